"""Read residuals: averaged over answers as the forward runs, or token by token for one conversation.

Answers are read right-padded and without a mask: in a causal model no token sees what comes after it, so the padding
cannot reach the answers and the fast attention paths stay open. What is not read is not computed: the language
modelling head is left out.

This module knows token ids and columns, and no prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steerguard.backends.base import Floats
from steerguard.backends.hf_generate import batches
from steerguard.backends.hf_hooks import Layout, Steering, plan
from steerguard.errors import NotSteering
from steerguard.guard import Guard
from steerguard.layers import Blocks, input_device, residual_out
from steerguard.prompts import Rendered


def mean_residuals(
    module: Any,
    blocks: Blocks,
    rendered: Sequence[Rendered],
    layers: Sequence[int],
    guards: tuple[Guard, ...],
    budget: int,
) -> Floats:
    """Residuals averaged over each answer's tokens, `[answers, layers, d]` float32, in one forward per batch."""
    out = np.empty((len(rendered), len(layers), blocks.width), np.float32)
    for batch in batches([len(read.ids) for read in rendered], budget):
        out[batch] = _mean_batch(module, blocks, [rendered[i] for i in batch], layers, guards)
    return out


def _mean_batch(
    module: Any, blocks: Blocks, rows: Sequence[Rendered], layers: Sequence[int], guards: tuple[Guard, ...]
) -> Floats:
    width = max(len(row.ids) for row in rows)
    first = min(row.answer_start for row in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    weights = torch.zeros((len(rows), 1, width - first))
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        weights[i, 0, row.answer_start - first : len(row.ids) - first] = 1 / (len(row.ids) - row.answer_start)
    means: dict[int, Tensor] = {}

    def take(layer: int, h: Tensor) -> None:
        nonlocal weights
        weights = weights.to(h.device)
        means[layer] = torch.bmm(weights, h[:, first:].float())[:, 0]

    with reading(blocks, layers, take):
        read_forward(module, blocks, ids, [row.answer_start for row in rows], [guards] * len(rows))
    _all_fired(blocks, layers, means)
    return torch.stack([means[layer].cpu() for layer in layers], dim=1).numpy()


def token_residuals(
    module: Any, blocks: Blocks, ids: Tensor, starts: Sequence[int], guards: Sequence[tuple[Guard, ...]]
) -> Tensor:
    """Every layer's residuals of unpadded rows `[rows, tokens]` after the guards acted: `[layers, rows, tokens, d]` float32."""
    kept: dict[int, Tensor] = {}
    with reading(blocks, range(blocks.depth), lambda layer, h: kept.__setitem__(layer, h.float().cpu())):
        read_forward(module, blocks, ids, starts, guards)
    _all_fired(blocks, range(blocks.depth), kept)
    return torch.stack([kept[layer] for layer in range(blocks.depth)])


def read_forward(
    module: Any,
    blocks: Blocks,
    ids: Tensor,
    starts: Sequence[int],
    guards: Sequence[tuple[Guard, ...]],
    *,
    head: bool = False,
) -> Any:
    """One forward of rows `[rows, tokens]` without a cache, guarded; `head` to compute logits too."""
    steering = Steering(blocks, plan(guards), Layout((0,) * len(ids), tuple(starts)))
    body = module if head else headless(module, blocks)
    with steering, torch.no_grad():
        output = body(input_ids=ids.to(input_device(module)), use_cache=False)
    steering.verify(ids.shape[1])
    return output


def headless(module: Any, blocks: Blocks) -> Any:
    """The part of the model that runs the blocks and stops before the logits; the whole model if it has no such part."""
    body = getattr(module, "base_model", module)
    return body if any(m is blocks.decoder for m in body.modules()) else module


@contextmanager
def reading(blocks: Blocks, layers: Sequence[int], take: Any) -> Iterator[None]:
    """Inside, `take(layer, h)` is called with what each of the layers returned, after the guards acted."""

    def hook(layer: int) -> Any:
        return lambda module, args, output: take(layer, residual_out(output))

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(blocks.modules[layer].register_forward_hook(hook(layer)).remove)
        yield


def _all_fired(blocks: Blocks, layers: Sequence[int], kept: dict[int, Tensor]) -> None:
    missing = [layer for layer in layers if layer not in kept]
    if missing:
        raise NotSteering(f"layers {missing} of {blocks.path} were not run in a forward, so they cannot be read")
