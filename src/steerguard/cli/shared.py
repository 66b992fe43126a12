"""What every command shares: the application, the options that several have, opening a model and a guard.

It knows no command.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerguard.errors import InputError

if TYPE_CHECKING:
    from steerguard.backends.base import Backend, Sampling
    from steerguard.fitting import Stage
    from steerguard.guard import Guard

app = typer.Typer(
    name="steerguard",
    help="Activation steering of language models as a runtime defence (arXiv 2604.08169).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="hub name or local folder; `organism` is the bundled model")]
GuardPath = Annotated[Path, typer.Argument(metavar="GUARD", help="a .guard file")]
ModelOption = Annotated[str | None, typer.Option("--model", help="hub name or folder; by default the guard's own model")]
Allow = Annotated[
    list[str],
    typer.Option("--allow-mismatch", help="a difference to waive: architecture, weights, tokenizer or chat_template"),
]
BackendName = Annotated[str, typer.Option(help="hf (transformers), vllm, or fake (numpy, Llama only)")]
Engine = Annotated[
    list[str], typer.Option("--engine", metavar="KEY=VALUE", help="an option of the backend, such as tensor_parallel_size=2")
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")]
DeviceMap = Annotated[str | None, typer.Option(help="where the weights go: auto, cpu, cuda, cuda:1, ...")]
Quantization = Annotated[str | None, typer.Option(help="8bit or 4bit")]
Positions = Annotated[str, typer.Option(help="all (prompt and answer) or response (answer only)")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="longest answer, in tokens")]
Temperature = Annotated[float, typer.Option(min=0, help="0 is greedy")]
TopP = Annotated[float, typer.Option(min=0, max=1)]
Seed = Annotated[int, typer.Option(min=0)]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="change a setting of the recipe, such as grid.layers=[20-30]")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace the output if it exists")]


def load_model(name: str, backend: str, **options: Any) -> Backend:
    from steerguard.backends import load
    from steerguard.report import terminal

    with terminal.loading(name):
        return load(name, backend=backend, **{k: v for k, v in options.items() if v not in (None, "auto")})


def engine_options(given: list[str]) -> dict[str, Any]:
    """Options as KEY=VALUE, the value as YAML reads it."""
    from steerguard import strict_yaml

    try:
        found = strict_yaml.assignments(given)
    except strict_yaml.NotYaml as error:
        raise InputError(f"--engine: {error}") from error
    if dotted := [key for key in found if "." in key]:
        raise InputError(f"--engine takes options of the backend, such as tensor_parallel_size=2, got {dotted[0]!r}")
    return found


def open_both(path: Path, model: str | None, allow_mismatch: list[str], backend: str, **options: Any) -> tuple[Guard, Backend]:
    """A guard and the model it is asked to steer; refused if they do not belong together."""
    from steerguard.guard import Guard

    guard = Guard.load(path)
    loaded = load_model(model or guard.model.name, backend, **options)
    return guard.for_model(loaded.identity, allow_mismatch=tuple(allow_mismatch)), loaded


def sampling_of(temperature: float, top_p: float, seed: int, max_new_tokens: int) -> Sampling:
    from steerguard.backends.base import Sampling

    return Sampling(temperature=temperature, top_p=top_p, seed=seed, max_new_tokens=max_new_tokens)


@contextmanager
def progressing() -> Iterator[Stage]:
    from steerguard.report import terminal

    with terminal.progress() as report:
        yield report
