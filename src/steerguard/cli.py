"""The command line: `steerguard demo | fit | sweep | report | build | ask | show | check | serve | recalibrate | export`.

What it knows: arguments, progress, and how to say what went wrong. Everything it does is one call into the library,
under the same name. Heavy modules are imported by the command that needs them, so `--help` answers at once.

Exit status: 0 done, 1 a guard does not steer, 2 the input cannot be used, 130 interrupted.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerguard.errors import InputError, OutputExists, SteerguardError

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


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for the guard files")] = Path("steerguard-demo"),
    json: Annotated[Path | None, typer.Option(help="also write every figure to this file")] = None,
    picture: Annotated[Path | None, typer.Option(help="also draw an example of each trait to this SVG file")] = None,
    traits: Annotated[list[str], typer.Option("--trait", help="honesty, compassion; both by default")] = [],  # noqa: B006
) -> None:
    """Fit, search and test guards on the bundled model: the whole line in a few minutes on a laptop."""
    from steerguard.organism import demo as organism_demo
    from steerguard.report import terminal

    with _progress() as progress:
        result = organism_demo.run(out, traits=traits or list(organism_demo.TRAITS), progress=progress)
    terminal.show_demo(result)
    if json is not None:
        from steerguard.files import write_json

        write_json(json, result.figures(), overwrite=True)
        terminal.note(f"figures: {json}")
    if picture is not None:
        terminal.draw_examples(result, picture)
        terminal.note(f"picture: {picture}")


@app.command()
def fit(
    model: ModelName,
    trait: Annotated[str, typer.Option("--trait", "-t", help="a bundled trait, or a folder with one of yours")],
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for the answers and the probes")],
    direction: Annotated[str | None, typer.Option(help="logistic (the paper's, the default) or mean-difference")] = None,
    directions: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="another tool's vectors (.gguf, .pt, .npy, .safetensors), kept as they are"),
    ] = None,
    directions_layer: Annotated[int | None, typer.Option(min=0, help="the layer of a --directions file of one vector")] = None,
    context: Annotated[str, typer.Option(help="own: read answers under their system prompt; neutral: under none")] = "own",
    allow_weak: Annotated[bool, typer.Option("--allow-weak", help="keep probes that read nothing held out")] = False,
    temperature: Temperature = 0.6, top_p: TopP = 0.9, seed: Seed = 42, max_new_tokens: MaxNewTokens = 1024,
    backend: BackendName = "hf", dtype: Dtype = "auto", device_map: DeviceMap = None, quantization: Quantization = None,
    engine: Engine = [],  # noqa: B006
    overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """Learn one direction per layer from the model's own answers under both poles of a trait.

    Interrupted, it goes on where it was: the answers are kept in the folder as they come.
    """
    from steerguard import exchange, fitting
    from steerguard.report import terminal
    from steerguard.traits import trait as find_trait

    if directions is not None and direction is not None:
        raise InputError("--directions gives the directions and --direction learns them: pass one of the two")
    if directions is None and directions_layer is not None:
        raise InputError("--directions-layer belongs to --directions: pass the file, or leave it out")
    if (out / fitting.PROBES).exists() and not overwrite:
        raise OutputExists(f"{out / fitting.PROBES} exists; choose another folder with -o, or pass --overwrite")
    chosen = find_trait(trait)
    given = None if directions is None else exchange.read_directions(directions, layer=directions_layer)
    loaded = _load(model, backend, dtype=dtype, device_map=device_map, quantization=quantization, **_engine(engine))
    options: dict[str, Any] = {
        "context": context, "sampling": _sampling(temperature, top_p, seed, max_new_tokens),
        "store": out / fitting.CONTRAST, "allow_weak": allow_weak,
    }  # fmt: skip
    with _progress() as progress:
        if given is not None and directions is not None:
            probes = fitting.fit_statistics(loaded, chosen, given, source=directions.name, progress=progress, **options)
        else:
            options |= {} if direction is None else {"direction": direction}
            probes = fitting.fit(loaded, chosen, progress=progress, **options)
    probes.save(out, overwrite=True)
    terminal.show_fit(probes, out)


@app.command()
def build(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="what `steerguard fit` wrote")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the guard file")],
    layer: Annotated[list[int], typer.Option("--layer", "-l", help="steered layer, 0 the first; repeat for several")],
    rule: Annotated[str, typer.Option("--rule", "-r", help="SwFC, StTP, StMP, Floor, Ceiling, Target, ...")] = "StTP",
    strength: Annotated[float | None, typer.Option("--strength", "-a", help="alpha (tau for Floor and Ceiling)")] = None,
    positions: Positions = "all",
    name: Annotated[str | None, typer.Option(help="what a server calls the guard; by default the trait's name")] = None,
    allow_weak: Annotated[bool, typer.Option("--allow-weak", help="accept a layer whose probe reads nothing held out")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Make a guard file by hand from fitted probes: this rule, this strength, these layers."""
    from steerguard import rules
    from steerguard.fitting import Fit
    from steerguard.report import terminal

    probes = Fit.load(folder)
    guard = probes.guard(rules.rule(rule, strength), layer, positions=positions, name=name, allow_weak=allow_weak)  # type: ignore[arg-type]
    guard.save(out, overwrite=overwrite)
    terminal.note(f"{guard}\n{out}: try `steerguard check {out}`, then `steerguard ask {out} \"...\"`")


@app.command()
def sweep(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="what `steerguard fit` wrote, or a new folder with --recipe")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="the guard file of the best setting")] = None,
    recipe: Annotated[str | None, typer.Option(help="a bundled recipe or a YAML file; fits where DIR has no probes")] = None,
    set_: Overrides = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print answers, tokens, hours, judge calls; do nothing")] = False,
    judge: Annotated[list[str], typer.Option(metavar="MODEL@URL", help="a judge's endpoint; repeat for several")] = [],  # noqa: B006
    judge_key_env: Annotated[str | None, typer.Option(help="NAME of the environment variable with the judge's key")] = None,
    screen: Annotated[int | None, typer.Option(min=1, help="try every setting on so many scenarios, the best on all")] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="try every n-th layer, then those around the best")] = None,
    trait: Annotated[str | None, typer.Option("--trait", "-t", help="the folder of a trait of yours")] = None,
    beside: Annotated[list[Path], typer.Option(help="a guard of another trait that is on throughout")] = [],  # noqa: B006
    test: Annotated[bool | None, typer.Option("--test/--no-test", help="read and report the test split")] = None,
    backend: Annotated[str | None, typer.Option(help="hf (transformers) or vllm")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16")] = None,
    device_map: DeviceMap = None, quantization: Quantization = None, engine: Engine = [],  # noqa: B006
    report: Annotated[Path | None, typer.Option(help="also write the page, as `steerguard report` does")] = None,
    overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """Try every layer, rule and strength, choose an operating point, and test it on scenarios that chose nothing.

    Interrupted, it goes on where it was. Without --recipe: the paper's grid on the probes in DIR.
    """
    from steerguard import recipes
    from steerguard.files import refuse_existing
    from steerguard.recipes.run import open_model, run
    from steerguard.report import terminal

    options = {
        "load.backend": backend, "load.dtype": dtype, "load.device_map": device_map, "load.quantization": quantization,
        "trait": trait, "search.screen": screen, "search.stride": stride, "test": test,
        "beside": [str(path) for path in beside] or None, "load.engine": _engine(engine) or None,
        "judge.judges": [{"model": one, "key_env": judge_key_env} for one in judge] or None,
    }  # fmt: skip
    given = {key: value for key, value in options.items() if value is not None}
    chosen = recipes.recipe(recipe, set_, given=given) if recipe else recipes.of_fit(folder, set_, given=given)
    if dry_run:
        from steerguard.recipes.plan import planned

        terminal.show_plan(chosen, planned(chosen, folder))
        return
    folder.mkdir(parents=True, exist_ok=True)
    for path in (out, report):
        if path is not None:
            refuse_existing(path, overwrite=overwrite)
    with terminal.loading(chosen.model):
        model = open_model(chosen)
    with _progress() as progress:
        outcome = run(chosen, folder, model=model, command=shlex.join(["steerguard", *sys.argv[1:]]), progress=progress)
    terminal.show_sweep(outcome)
    if outcome.sweep.winner is None:
        raise typer.Exit(1)
    if out is not None:
        outcome.sweep.guard.save(out, overwrite=overwrite)
        terminal.note(f"{out}: try `steerguard check {out}`, then `steerguard ask {out} \"...\"`")
    if report is not None:
        from steerguard.report.sweep_page import write_report

        terminal.note(f"page and tables: {', '.join(map(str, write_report(outcome.result, report, overwrite=overwrite)))}")
    else:
        terminal.note(f"to look at it: steerguard report {folder}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="what `steerguard sweep` wrote, or its result.json")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="the HTML file; by default report.html in DIR")] = None,
    overwrite: Overwrite = False,
) -> None:
    """One page of a sweep, to look at offline, and its figures as CSV."""
    from steerguard.recipes.run import RESULT
    from steerguard.report import terminal
    from steerguard.report.sweep_page import write_report
    from steerguard.sweeping import result_file

    path = folder / RESULT if folder.is_dir() else folder
    written = write_report(result_file.read(path), out or path.parent / "report.html", overwrite=overwrite)
    for one in written:
        terminal.note(str(one))


@app.command()
def show(guard: GuardPath) -> None:
    """What is in a guard file: from what data, for which model, how chosen."""
    from steerguard.guard import Guard
    from steerguard.report import terminal

    terminal.show_guard(Guard.load(guard))


@app.command()
def ask(
    guard: GuardPath,
    question: Annotated[str, typer.Argument(help="what to ask; `-` reads it from standard input")],
    system: Annotated[str | None, typer.Option(help="the system prompt, such as a malicious one")] = None,
    model: ModelOption = None, allow_mismatch: Allow = [],  # noqa: B006
    temperature: Temperature = 0.6, top_p: TopP = 0.9, seed: Seed = 42, max_new_tokens: MaxNewTokens = 1024,
    backend: BackendName = "hf", dtype: Dtype = "auto", device_map: DeviceMap = None, quantization: Quantization = None,
    engine: Engine = [],  # noqa: B006
) -> None:  # fmt: skip
    """Both answers to one question: unguarded and guarded, each token by its projection."""
    from steerguard.prompts import conversation
    from steerguard.report import terminal

    text = sys.stdin.read().strip() if question == "-" else question.strip()
    if not text:
        raise InputError('the question is empty; ask something, for example: steerguard ask honesty.guard "Who founded it?"')
    options = {"dtype": dtype, "device_map": device_map, "quantization": quantization, **_engine(engine)}
    loaded_guard, loaded = _open(guard, model, allow_mismatch, backend, **options)
    sampling = _sampling(temperature, top_p, seed, max_new_tokens)
    prompt = conversation(system, [text])
    unguarded = loaded.generate(prompt, sampling=sampling)[0]
    guarded = loaded.generate(prompt, guards=loaded_guard, sampling=sampling, trace=True)[0]
    terminal.show_answers(loaded, loaded_guard, unguarded, guarded)


@app.command()
def check(
    guard: GuardPath,
    model: ModelOption = None, allow_mismatch: Allow = [],  # noqa: B006
    backend: BackendName = "hf", dtype: Dtype = "auto", device_map: DeviceMap = None, quantization: Quantization = None,
    engine: Engine = [],  # noqa: B006
    json: Annotated[Path | None, typer.Option(help="also write the result to this file")] = None,
) -> None:  # fmt: skip
    """Is it really steering? Exit 1 if not."""
    from steerguard import checking
    from steerguard.report import terminal

    options = {"dtype": dtype, "device_map": device_map, "quantization": quantization, **_engine(engine)}
    loaded_guard, loaded = _open(guard, model, allow_mismatch, backend, **options)
    report = checking.check(loaded, loaded_guard)
    terminal.show_check(report)
    if json is not None:
        from steerguard.files import write_json

        write_json(json, report.as_dict(), overwrite=True)
    if not report.passed:
        raise typer.Exit(1)


@app.command()
def serve(
    guards: Annotated[
        list[str] | None, typer.Argument(metavar="GUARD... [-- FLAGS]", help="guard files, all required; flags for vLLM after --")
    ] = None,
    policy: Annotated[Path | None, typer.Option(help="a policy file instead of guard files; see docs/serving.md")] = None,
    model: ModelOption = None,
    name: Annotated[str | None, typer.Option(help="what requests call the model; by default the last part of its name")] = None,
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 is everybody")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    max_tokens: Annotated[int, typer.Option(min=1, help="longest answer, in tokens")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="answers that are written side by side")] = 8,
    queue: Annotated[int, typer.Option(min=1, help="requests that may wait; more get a 429")] = 64,
    audit: Annotated[Path | None, typer.Option(help="append a line about each request to this file")] = None,
    audit_text: Annotated[bool, typer.Option("--audit-text", help="prompts and answers go into it, too")] = False,
    backend: BackendName = "hf", dtype: Dtype = "auto", device_map: DeviceMap = None, quantization: Quantization = None,
    engine: Engine = [],  # noqa: B006
) -> None:  # fmt: skip
    """An OpenAI-compatible server under which required guards cannot be asked away.

    --backend hf serves one batch at a time: good for a laptop and for tests. For a crowd, --backend vllm starts vLLM's
    own server with the same policy.
    """
    from steerguard.serve import start

    found = list(guards or [])
    first = next((i for i, word in enumerate(found) if word.startswith("-")), len(found))
    limits = start.Limits(max_tokens=max_tokens, rows=batch, waiting=queue)
    place = start.Place(host, port, name, audit, audit_text)
    options = {"dtype": dtype, "device_map": device_map, "quantization": quantization, **_engine(engine)}
    start.start([Path(word) for word in found[:first]], policy, model, backend, place, limits, flags=found[first:], **options)


@app.command()
def export(
    guard: GuardPath,
    out: Annotated[Path, typer.Option("--out", "-o", help="the file to write")],
    to: Annotated[str, typer.Option(help="gguf: a llama.cpp control vector")] = "gguf",
    overwrite: Overwrite = False,
) -> None:
    """Write a guard for another tool; refused if the file could not do what the guard does."""
    from steerguard import exchange
    from steerguard.guard import Guard
    from steerguard.report import terminal

    if to != "gguf":
        raise InputError(f"a guard can be exported to gguf, not to {to!r}")
    loaded = Guard.load(guard)
    exchange.export_gguf(loaded, out, overwrite=overwrite)
    layers = ", ".join(map(str, loaded.layers))
    terminal.note(f"{out}: {loaded.rule} on layers {layers}, for {loaded.model.name}")
    terminal.note(f"  llama-server -m MODEL.gguf --control-vector {out}")
    terminal.note("llama.cpp checks nothing but the width: serve it with the model that the guard was made for")


@app.command()
def recalibrate(
    guard: GuardPath,
    out: Annotated[Path, typer.Option("--out", "-o", help="the new guard file")],
    model: ModelOption = None,
    trait: Annotated[str | None, typer.Option("--trait", "-t", help="by default the bundled trait that the guard names")] = None,
    benign: Annotated[Path | None, typer.Option(help="a JSON-lines file of benign prompts; by default the bundled ones")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="how many benign prompts are answered, at most")] = 500,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="longest answer; by default as the guard was fitted")] = None,
    store: Annotated[Path | None, typer.Option(help="folder that keeps answers, to go on from where it was")] = None,
    backend: BackendName = "hf", dtype: Dtype = "auto", device_map: DeviceMap = None, quantization: Quantization = None,
    engine: Engine = [],  # noqa: B006
    overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """Fit a guard to a new checkpoint of its model: the same direction and rule, new statistics, and what changed.

    On its own model it gives a guard the benign reference that drift is told by.
    """
    from dataclasses import replace

    from steerguard import files, recalibrating
    from steerguard.guard import Guard
    from steerguard.report import terminal
    from steerguard.traits import trait as find_trait

    files.refuse_existing(out, overwrite=overwrite)
    old = Guard.load(guard)
    chosen = find_trait(trait or recalibrating.trait_of(old))
    asked = recalibrating.benign_prompts(benign, prompts)
    sampling = recalibrating.sampling_of(old)
    if max_new_tokens is not None:
        sampling = replace(sampling, max_new_tokens=max_new_tokens)
    options = {"dtype": dtype, "device_map": device_map, "quantization": quantization, **_engine(engine)}
    loaded = _load(model or old.model.name, backend, **options)
    with _progress() as progress:
        found = recalibrating.recalibrate(old, loaded, chosen, asked, sampling=sampling, store=store, progress=progress)
    found.guard.save(out, overwrite=overwrite)
    terminal.show_recalibrated(found, out)


# ------------------------------------------------------------------------------------------------ shared


def _load(name: str, backend: str, **options: Any) -> Backend:
    from steerguard.backends import load
    from steerguard.report import terminal

    with terminal.loading(name):
        return load(name, backend=backend, **{k: v for k, v in options.items() if v not in (None, "auto")})


def _engine(given: list[str]) -> dict[str, Any]:
    """Options as KEY=VALUE, the value as YAML reads it."""
    import yaml

    found: dict[str, Any] = {}
    for one in given:
        key, equals, value = one.partition("=")
        if not equals or not key.isidentifier() or key in found:
            raise InputError(f"--engine takes KEY=VALUE, each key once, got {one!r}")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"--engine {one!r}: the value is no YAML: {' '.join(str(error).split())}") from error
    return found


def _open(path: Path, model: str | None, allow_mismatch: list[str], backend: str, **options: Any) -> tuple[Guard, Backend]:
    """A guard and the model it is asked to steer; refused if they do not belong together."""
    from steerguard.guard import Guard

    guard = Guard.load(path)
    loaded = _load(model or guard.model.name, backend, **options)
    return guard.for_model(loaded.identity, allow_mismatch=tuple(allow_mismatch)), loaded


def _sampling(temperature: float, top_p: float, seed: int, max_new_tokens: int) -> Sampling:
    from steerguard.backends.base import Sampling

    return Sampling(temperature=temperature, top_p=top_p, seed=seed, max_new_tokens=max_new_tokens)


@contextmanager
def _progress() -> Iterator[Stage]:
    from steerguard.report import terminal

    with terminal.progress() as report:
        yield report


def main() -> None:
    """The entry point: what went wrong becomes one sentence, never a traceback."""
    interrupted = "interrupted; what was finished is kept, the same command goes on from there"
    try:
        status = app(standalone_mode=False)
        if status == 130:  # how typer reports Ctrl-C
            _told(interrupted, 130)
    except SteerguardError as error:
        status = _told(str(error), 2 if isinstance(error, InputError) else 1)
    except typer.TyperException as error:  # a wrong option or argument
        status = _told(f"{error}; try --help", 2)
    except (KeyboardInterrupt, typer.Abort):
        status = _told(interrupted, 130)
    except BrokenPipeError:  # whoever read our output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    raise SystemExit(status or 0)


def _told(sentence: str, status: int) -> int:
    print(f"steerguard: {sentence}", file=sys.stderr)  # noqa: T201
    return status


if __name__ == "__main__":
    main()
