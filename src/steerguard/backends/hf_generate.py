"""One batch of answers through transformers' own `generate`, with our drawing, our ends and our hooks.

This module knows a batch: rows of token ids and the guards of each row. It knows no prompts and no templates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from steerguard.backends.base import Answer, Sampling
from steerguard.backends.drawing import Draw, Ends, cut, decode
from steerguard.backends.hf_hooks import Layout, Steering, plan
from steerguard.guard import Guard
from steerguard.layers import Blocks, input_device, text_config


@dataclass(frozen=True, eq=False)
class Row:
    """What is asked of one row of a batch."""

    ids: tuple[int, ...]
    "the prompt's tokens"
    guards: tuple[Guard, ...]
    key: int
    "seeds its draws"
    limit: int
    "at most so many new tokens"
    emit: Callable[[str], None] | None = None
    unwanted: Callable[[], bool] | None = None
    "asked after every step: whether nobody waits for the answer any more; only with `emit`"


@dataclass(frozen=True, eq=False)
class Engine:
    """What generating needs of a loaded model."""

    module: Any
    tokenizer: Any
    blocks: Blocks
    ends: tuple[int, ...]
    pad: int
    static_cache: bool
    bounded: bool
    "see `bounded_positions`"


def batches(sizes: Sequence[int], budget: int, apart: Sequence[int] = ()) -> Iterator[list[int]]:
    """Indices of sequences in batches of like length, longest first, of at most `budget` tokens with padding.

    Sequences for which `apart` differs never share a batch.
    """
    apart = apart or [0] * len(sizes)
    batch: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-apart[i], -sizes[i])):
        if batch and (apart[i] != apart[batch[0]] or (len(batch) + 1) * sizes[batch[0]] > budget):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def bounded_positions(model: Any) -> bool:
    """Whether no token of a batch may stand beyond the model's context, not even padding after a row that has ended.

    So it is with learned position embeddings, which end there, and with rotary embeddings that change for all rows when
    one grows long. Rows that may reach the end of the context are then batched with rows of their own length only.
    """
    config = text_config(model)
    context = getattr(config, "max_position_embeddings", None) or 0
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type")} | {one.get("rope_type") for one in rope.values() if isinstance(one, dict)}
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding) and m is not model.get_input_embeddings()]
    return bool(kinds & {"dynamic", "longrope"}) or any(0 <= n - context <= 8 for n in tables)


def generate_batch(engine: Engine, rows: Sequence[Row], sampling: Sampling, *, trace: bool) -> list[Answer]:
    """Answer the rows of one batch. Raises NotSteering if any gate missed a forward; then nothing is returned."""
    # 1. left padding: every row ends in the same column
    width = max(len(row.ids) for row in rows)
    layout = Layout(tuple(width - len(row.ids) for row in rows), tuple(len(row.ids) for row in rows))
    device = input_device(engine.module)
    ids = torch.full((len(rows), width), engine.pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, layout.pads[i] :] = torch.tensor(row.ids)
        mask[i, layout.pads[i] :] = 1
    # 2. who draws, who ends, who steers
    streams = any(row.emit for row in rows)
    ends = Ends(
        engine.tokenizer, sampling, engine.ends, [row.limit for row in rows], width,
        (lambda row, text: rows[row].emit(text)) if streams else None,  # type: ignore[misc]
    )  # fmt: skip
    steps = max(row.limit for row in rows)
    draws = [Draw(sampling, [row.key for row in rows], width, steps)] if sampling.temperature > 0 else []
    steering = Steering(engine.blocks, plan([row.guards for row in rows]), layout, trace=trace)
    ends.unwanted = [row.unwanted for row in rows]
    if len(rows) > 1:
        ends.on_step = lambda alive: setattr(steering, "alive", alive)
    # 3. generate, and make sure that the gates saw it all
    with ExitStack() as stack:
        stack.enter_context(_clean_config(engine.module))
        stack.enter_context(torch.no_grad())
        stack.enter_context(steering)
        whole = engine.module.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=_config(engine, steps),
            logits_processor=draws, stopping_criteria=[ends],
        )  # fmt: skip
    steering.verify(whole.shape[1] - 1)
    # 4. cut each row where it ended
    return _answers(engine, rows, whole[:, width:].tolist(), ends, steering, sampling, trace)


def _answers(
    engine: Engine, rows: Sequence[Row], generated: Sequence[Sequence[int]], ends: Ends, steering: Steering,
    sampling: Sampling, trace: bool,
) -> list[Answer]:  # fmt: skip
    found = []
    for i, (row, (moved, shift)) in enumerate(zip(rows, steering.tallies(), strict=True)):
        ids, ended = ends.answer(i, generated[i])
        full = decode(engine.tokenizer, ids)
        text = cut(full, sampling.stop)
        ends.finish(i, text)
        read = len(row.ids) + len(ids) - 1  # the last token is never fed back
        seen = sum(len(g.probes) * (len(ids) - 1 if g.positions == "response" else read) for g in row.guards)
        answer = Answer(
            text=text, prompt_ids=row.ids, ids=tuple(ids),
            finished="stop" if ended or len(text) < len(full) else "length",
            tokens_seen=seen, tokens_moved=moved, shift=shift, traces=steering.traces(i, read) if trace else (),
        )  # fmt: skip
        found.append(answer)
    return found


def _config(engine: Engine, steps: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False, num_beams=1, use_cache=True, max_new_tokens=steps, eos_token_id=list(engine.ends) or None,
        pad_token_id=engine.pad, cache_implementation="static" if engine.static_cache else None, disable_compile=True,
    )  # fmt: skip


@contextmanager
def _clean_config(module: Any) -> Iterator[None]:
    """Inside, the model's own generation settings are not there: `generate` would fill our gaps with its penalties."""
    from transformers import GenerationConfig

    own = module.generation_config
    module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        module.generation_config = own
