"""Engines that are tampered with, started one after the other in a process of their own; run by `test_sabotage`.

`start` says why an engine did not start, or nothing. Each tampering is undone before the next, and an engine that is
left alone is started first and last: so what stops the others is what was done to them.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from steerguard.backends.vllm import kernel, plugin, tables, worker

OP = "steerguard.backends.vllm.op"
TINY: dict[str, Any] = {
    "dtype": "float32", "max_model_len": 128, "kv_cache_memory_bytes": 2**26, "max_num_seqs": 4, "disable_log_stats": True,
}  # fmt: skip


def engine(model: str, settings: Any, **more: Any) -> Any:
    """An engine of this process."""
    from vllm import LLM

    additional = {} if settings is None else {"additional_config": {"steerguard": settings}}
    return LLM(model, **{**TINY, **additional, **more})


def answers(llm: Any, prompts: list[list[int]], guards: list[str] | None, steps: int) -> list[list[int]]:
    """Greedy tokens of each prompt."""
    from vllm import SamplingParams

    chosen = None if guards is None else {"steering": {"guards": guards}}
    params = SamplingParams(temperature=0.0, max_tokens=steps, extra_args=chosen)
    out = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in out]


# ------------------------------------------------------------------------------------------------------ tamperings


def hook_removed() -> Any:
    """The hooks are taken away after installing."""
    inner = worker.install

    def install(one: Any, settings: Any) -> None:
        inner(one, settings)
        for handle in one.steering_handles.values():
            handle.remove()

    return patch.object(worker, "install", install)


@contextlib.contextmanager
def returning(what: Callable[..., Any]) -> Iterator[None]:
    """Blocks that return something else, which the model around them knows how to read."""
    from vllm.model_executor.models.llama import LlamaDecoderLayer

    inner = LlamaDecoderLayer.forward

    def forward(self: Any, positions: Any, hidden_states: Any, residual: Any) -> Any:
        self.kept = inner(self, positions, hidden_states, residual)
        return what(*self.kept)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        torch.nn.Module.__call__(self, *args, **kwargs)
        return self.kept

    with patch.object(LlamaDecoderLayer, "forward", forward), patch.object(LlamaDecoderLayer, "__call__", call):
        yield


def three_returned() -> Any:
    return returning(lambda hidden, residual: (hidden, residual, residual))


def hidden_returned() -> Any:
    return returning(lambda hidden, residual: hidden)


@contextlib.contextmanager
def kernel_with(tampered: Callable[..., None]) -> Iterator[None]:
    """Whichever kernel runs is tampered with; what it gets first is the kernel as it is."""
    from steerguard.backends.vllm import kernel_loop  # late: a vLLM without our plugin does not bear Numba before it

    with contextlib.ExitStack() as stack:
        for module in (kernel, kernel_loop):
            stack.enter_context(patch.object(module, "steer", partial(tampered, module.steer)))
        yield


@contextlib.contextmanager
def shift_with(tampered: Callable[..., Any]) -> Iterator[None]:
    """The reference runs, and moves tokens otherwise; what it gets first is the shift as it is."""
    from steerguard.backends.vllm import kernel_loop

    inner = partial(tampered, kernel.shift)
    with patch.object(kernel_loop, "fits", lambda *_: False), patch.object(kernel, "shift", inner):
        yield


def gates_zeroed() -> Any:
    return kernel_with(
        lambda inner, h, r, slots, table: inner(h, r, slots, replace(table, gates=torch.zeros_like(table.gates)))
    )


def directions_zeroed() -> Any:
    return kernel_with(lambda inner, h, r, slots, table: inner(h, r, slots, replace(table, v=torch.zeros_like(table.v))))


def slots_zeroed() -> Any:
    """What is written to the slots is lost."""
    inner = tables.Tables.fill

    def fill(self: Any, rows: Any) -> None:
        inner(self, rows)
        self.slots.zero_()

    return patch.object(tables.Tables, "fill", fill)


def kept_half(which: int) -> Any:
    """One half of the pair stays as it was."""

    def tampered(inner: Any, *args: Any) -> None:
        before = args[which].clone()
        inner(*args)
        args[which].copy_(before)

    return kernel_with(tampered)


def hidden_not_written() -> Any:
    return kept_half(0)


def residual_not_written() -> Any:
    return kept_half(1)


def half_moved() -> Any:
    """Every shift is half of what the gate says."""
    return shift_with(lambda inner, *args: inner(*args) / 2)


def all_moved() -> Any:
    """A gate that is shut moves all the same."""
    return shift_with(lambda inner, *args: inner(*args) + 0.5)


def one_token_missed() -> Any:
    """The last token of a forward is left out."""

    def tampered(inner: Any, hidden: Any, residual: Any, slots: Any, table: Any) -> None:
        slots = slots[: len(hidden)].clone()
        if len(slots) > 1:
            slots[-1] = 0
        inner(hidden, residual, slots, table)

    return kernel_with(tampered)


TAMPERINGS = (
    hook_removed, three_returned, hidden_returned, gates_zeroed, directions_zeroed, slots_zeroed, hidden_not_written,
    residual_not_written, half_moved, all_moved, one_token_missed,
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------- reports


def start(what: Any, model: str, settings: Any, **more: Any) -> str | None:
    """Why an engine under these settings does not start while this is done to it; None if it starts."""
    try:
        with what:
            stop(engine(model, settings, enforce_eager=True, **more))
    except Exception as error:  # noqa: BLE001 -- whatever it was is reported, and judged by the test
        return f"{type(error).__name__}: {error}"
    finally:
        cleared()
    return None


def stop(llm: Any) -> None:
    llm.llm_engine.engine_core.shutdown()


def cleared() -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def undecided(model: str, settings: Any) -> str | None:
    """What an engine says that gets a request of which the frontend decided nothing; None if it answers."""
    llm = engine(model, settings, enforce_eager=True)
    try:
        with patch.object(plugin, "decide", lambda catalogue, args: dict(args or {})):
            answers(llm, [[1, 4, 5]], None, 4)
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    finally:
        stop(llm)
        cleared()
    return None


def report(folder: Path, model: str, settings: Any, refused: dict[str, dict[str, Any]]) -> dict[str, str | None]:
    """What became of every start, by name."""
    nothing = contextlib.nullcontext
    found = {"left alone": start(nothing(), model, settings)}
    for tampering in TAMPERINGS:
        found[tampering.__name__] = start(tampering(), model, settings)
    for name, case in refused.items():
        found[name] = start(nothing(), model, case["settings"], **case.get("more", {}))
    found["left alone again"] = start(nothing(), model, settings)
    found["undecided"] = undecided(model, settings)
    return found


def texts(out: str, model: str, settings: Any, prompts: list[list[int]], choices: list[list[str] | None], steps: int) -> None:
    """Start a compiled engine and write what it answers under each choice."""
    llm = engine(model, settings)
    found = [answers(llm, prompts, choice, steps) for choice in choices]
    Path(out).write_text(json.dumps(found))
    stop(llm)


def main() -> None:
    """`sabotages.py report|texts FOLDER`, with the arguments in FOLDER/arguments.json."""
    what, folder = sys.argv[1], Path(sys.argv[2])
    arguments = json.loads((folder / "arguments.json").read_text())
    if what == "texts":
        texts(str(folder / "out.json"), **arguments)
    else:
        (folder / "out.json").write_text(json.dumps(report(folder, **arguments)))


if __name__ == "__main__":
    main()
