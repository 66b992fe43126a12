"""One batch of answers through transformers' own `generate`, with our drawing, our ends and our hooks.

This module knows a batch: rows of token ids and the guards of each row. It knows no prompts and no templates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from steerguard.backends.base import Answer, Sampling
from steerguard.backends.drawing import Draw, Ends, cut, decode
from steerguard.backends.hf_hooks import Layout, Steering, plan
from steerguard.guard import Guard
from steerguard.layers import Blocks, input_device, text_config

WORTH_A_PAUSE = 8
"""Rows that a batch must have for those that have ended to be taken out of it."""


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
    shrinks: bool
    "whether rows that have ended may leave a batch; see `can_shrink`"


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
    """Answer the rows of one batch. Raises NotSteering if any gate missed a forward; then nothing is returned.

    Answers differ in length. Once half of the rows have ended they leave the batch, keys and values too, and the others
    go on in a smaller one: a batch does not cost what its longest answer would cost in all rows.
    """
    # 1. left padding: every row ends in the same column
    width = max(len(row.ids) for row in rows)
    pads = [width - len(row.ids) for row in rows]
    device = input_device(engine.module)
    ids = torch.full((len(rows), width), engine.pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, pads[i] :] = torch.tensor(row.ids)
        mask[i, pads[i] :] = 1
    ids, mask = ids.to(device), mask.to(device)
    # 2. who draws, and who ends
    streams = any(row.emit for row in rows)
    shrinks = engine.shrinks and not trace  # a trace is of one piece
    ends = Ends(
        engine.tokenizer, sampling, engine.ends, [row.limit for row in rows], width,
        (lambda row, text: rows[row].emit(text)) if streams else None,  # type: ignore[misc]
        pause=WORTH_A_PAUSE if shrinks else None,
    )  # fmt: skip
    steps = max(row.limit for row in rows)
    ends.unwanted = [row.unwanted for row in rows]
    cache = DynamicCache(config=text_config(engine.module)) if shrinks else None
    # 3. generate, in parts of fewer and fewer rows, and make sure that the gates saw it all
    alive = list(range(len(rows)))
    found: dict[int, _Generated] = {}
    tallies = [(0, 0.0)] * len(rows)
    columns = 0
    with ExitStack() as stack:
        stack.enter_context(_clean_config(engine.module))
        stack.enter_context(torch.no_grad())
        while alive:
            own = [rows[i] for i in alive]
            draws = [Draw(sampling, [row.key for row in own], width, steps)] if sampling.temperature > 0 else []
            layout = Layout(tuple(pads[i] for i in alive), tuple(len(row.ids) for row in own))
            steering = Steering(engine.blocks, plan([row.guards for row in own]), layout, trace=trace, columns=columns)
            if len(rows) > 1:
                ends.on_step = partial(setattr, steering, "alive")
            with steering:
                whole = engine.module.generate(
                    input_ids=ids, attention_mask=mask, generation_config=_config(engine, steps - (ids.shape[1] - width)),
                    logits_processor=draws, stopping_criteria=[ends], **({} if cache is None else {"past_key_values": cache}),
                )  # fmt: skip
            columns = whole.shape[1] - 1
            steering.verify(columns)
            for i, (moved, shift) in zip(alive, steering.tallies(), strict=True):
                tallies[i] = (tallies[i][0] + moved, tallies[i][1] + shift)
            left = ends.keep() if ends.paused else []
            for at in set(range(len(alive))).difference(left):
                found[alive[at]] = _Generated(whole[at, width:].tolist(), steering, at)
            if left:
                assert cache is not None
                cache.batch_select_indices(torch.tensor(left, device=device))
                ids = whole[left]
                mask = torch.cat([mask[left], mask.new_ones(len(left), whole.shape[1] - mask.shape[1])], dim=1)
            alive = [alive[at] for at in left]
    # 4. cut each row where it ended
    return [_answer(engine, row, i, found[i], tallies[i], ends, sampling, trace) for i, row in enumerate(rows)]


@dataclass(frozen=True, eq=False)
class _Generated:
    """What came of one row before it was cut, and where in which part of the batch it ended."""

    ids: list[int]
    steering: Steering
    at: int


def _answer(
    engine: Engine, row: Row, i: int, generated: _Generated, tally: tuple[int, float], ends: Ends, sampling: Sampling, trace: bool
) -> Answer:
    ids, ended = ends.answer(i, generated.ids)
    full = decode(engine.tokenizer, ids)
    text = cut(full, sampling.stop)
    ends.finish(i, text)
    read = len(row.ids) + len(ids) - 1  # the last token is never fed back
    seen = sum(len(g.probes) * (len(ids) - 1 if g.positions == "response" else read) for g in row.guards)
    return Answer(
        text=text, prompt_ids=row.ids, ids=tuple(ids),
        finished="stop" if ended or len(text) < len(full) else "length",
        tokens_seen=seen, tokens_moved=tally[0], shift=tally[1],
        traces=generated.steering.traces(generated.at, read) if trace else (),
    )  # fmt: skip


def can_shrink(model: Any) -> bool:
    """Whether rows can be taken out of the model's cache: plain keys and values, whole or of a sliding window."""
    if not model._supports_default_dynamic_cache() or "past_key_values" not in signature(model.forward).parameters:
        return False
    layers = DynamicCache(config=text_config(model)).layers
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


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
