"""The proof: before a guard is relied on, it is seen to act on the model that it is about to guard.

The residual is read where the next module reads it (the next block, or the final norm), independently of the hook that
moves it, and compared in the same forward with what the block itself put out:

    (a) a constant of known size along v moves the projection by that much, and nothing orthogonal to v
    (b) the guard's own gates do what `rules.correct` says, at the positions that the guard names
    (c) a shut gate gives the unguarded logits, bit for bit
    (d) so does the model after the hooks are gone

Whatever fails raises NotSteering with the layer and the numbers; nothing stays installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from steerguard.backends.hf_hooks import Layout, Stage, Steering, plan
from steerguard.errors import NotSteering
from steerguard.guard import Guard
from steerguard.layers import Blocks, probe_ids, residual_in, residual_out
from steerguard.rules import INF, SHUT, Gate, correct

ROWS, TOKENS = 2, 8
STARTS = (3, 5)
"""Where the pretended answers begin in the two rows of the probe."""
SLACK = 16.0
"""Roundings of the residual's dtype that a sum along v may be off by."""


def prove(module: Any, blocks: Blocks, guards: Sequence[Guard]) -> None:
    """Prove that these guards, in this order, act on this model as their gates say, or raise NotSteering."""
    stages = plan([tuple(guards)])
    ids = probe_ids(module, ROWS, TOKENS)
    unguarded, plain = _run(module, blocks, ids, [])
    # (a) one constant per stage, alone on its layer: two guards on one layer are told apart
    for k in range(max(_place(stages, stage) for stage in stages) + 1):
        pushed = [_constant(stage, plain) for stage in stages if _place(stages, stage) == k]
        for stage, (put_out, read) in _seen(module, blocks, ids, pushed):
            _check_push(stage, put_out, read)
    # (b) the gates themselves, all together
    for layer, (put_out, read) in _run(module, blocks, ids, stages)[1].items():
        _check_gates(layer, [stage for stage in stages if stage.layer == layer], put_out, read)
    # (c) shut, and (d) gone
    shut = [replace(stage, gate=torch.from_numpy(SHUT.row())) for stage in stages]
    same_again = torch.equal(_run(module, blocks, ids, [])[0], unguarded)  # a model may differ from itself on some devices
    logits, seen = _run(module, blocks, ids, shut)
    for layer, (put_out, read) in seen.items():
        if not torch.equal(put_out, read):
            raise NotSteering(f"layer {layer}: a shut gate changed the residual by up to {_apart(put_out, read):.3g}")
    if same_again and not torch.equal(logits, unguarded):
        raise NotSteering(f"a shut gate changed the logits by up to {_apart(logits, unguarded):.3g}")
    after = _run(module, blocks, ids, [])[0]
    if same_again and not torch.equal(after, unguarded):
        raise NotSteering(f"the logits differ by up to {_apart(after, unguarded):.3g} after the hooks were removed")


Seen = dict[int, tuple[Tensor, Tensor]]
"""Layer -> what the block put out, and what the next module read: `[rows, tokens, d]` each."""


def _run(module: Any, blocks: Blocks, ids: Tensor, stages: Sequence[Stage]) -> tuple[Tensor, Seen]:
    """Logits of one forward with these stages, and what was put out and read at every layer that any stage names."""
    put_out: dict[int, Tensor] = {}
    read: dict[int, Tensor] = {}
    shape = (*ids.shape, blocks.width)

    def writer(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            put_out[layer] = _taken(residual_out(output), layer)

        return hook

    def reader(layer: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            read[layer] = _taken(residual_in(args, kwargs, shape), layer)

        return hook

    with ExitStack() as hooks, torch.no_grad():
        hooks.enter_context(Steering(blocks, stages, Layout((0,) * len(ids), STARTS)))
        for layer in sorted({stage.layer for stage in stages}) or range(blocks.depth):
            # installed after ours and in front of it: it sees what the block itself returned
            hooks.callback(blocks.modules[layer].register_forward_hook(writer(layer), prepend=True).remove)
            hooks.callback(blocks.consumer(layer).register_forward_pre_hook(reader(layer), with_kwargs=True).remove)
        logits = module(input_ids=ids, use_cache=False).logits
    missing = sorted(set(put_out) ^ set(read))
    if missing:
        raise NotSteering(f"the residual of layers {missing} is not read by the module that should read it")
    return logits, {layer: (put_out[layer], read[layer].to(put_out[layer].device)) for layer in put_out}


def _seen(module: Any, blocks: Blocks, ids: Tensor, stages: Sequence[Stage]) -> list[tuple[Stage, tuple[Tensor, Tensor]]]:
    seen = _run(module, blocks, ids, stages)[1]
    return [(stage, seen[stage.layer]) for stage in stages]


def _taken(h: Tensor | None, layer: int) -> Tensor:
    if h is None:
        raise NotSteering(f"layer {layer}: no residual was found where the next module reads it")
    return h.detach().clone()


def _place(stages: Sequence[Stage], stage: Stage) -> int:
    """How many stages act on the same layer before this one."""
    return [other for other in stages if other.layer == stage.layer].index(stage)


def _constant(stage: Stage, plain: Seen) -> Stage:
    """The stage with a gate that moves every projection by the typical length of this layer's residual."""
    size = float(plain[stage.layer][0].float().norm(dim=-1).median())
    gate = Gate(-INF, 0.0, 0.0, max(size, 1e-3), 0.0, INF)
    return replace(stage, gate=torch.from_numpy(gate.row()))


def _acts(stage: Stage, like: Tensor) -> Tensor:
    """`[rows, tokens]` true where a stage is due to act in the probe."""
    columns = torch.arange(TOKENS, device=like.device)
    starts = torch.tensor(STARTS if stage.response[0] else (0, 0), device=like.device)[:, None]
    return columns >= starts


def _check_push(stage: Stage, put_out: Tensor, read: Tensor) -> None:
    """(a): read - put out = size * v where the stage acts, within the roundings of the dtype; 0 elsewhere."""
    size, v = float(stage.gate[3]), stage.v.to(read.device)
    difference = read.float() - put_out.float()
    due = _acts(stage, read)
    along = difference @ v
    across = (difference - along[..., None] * v).norm(dim=-1)
    allowed = SLACK * torch.finfo(read.dtype).eps * (put_out.float().norm(dim=-1) + size)
    off = torch.where(due, (along - size).abs(), along.abs())
    if bool((off > allowed).any()) or bool((across > allowed).any()):
        raise NotSteering(
            f"layer {stage.layer}: a push of {size:.4g} along v was due, the next module read a push of "
            f"{float(along[due].mean()):.4g} (off by up to {float(off.max()):.3g}, {float(across.max()):.3g} across v; "
            f"allowed {float(allowed.max()):.3g})"
        )
    if not torch.equal(read[~due], put_out[~due]):
        raise NotSteering(f"layer {stage.layer}: tokens of the prompt were moved by a guard on `response` positions")


def _check_gates(layer: int, stages: Sequence[Stage], put_out: Tensor, read: Tensor) -> None:
    """(b): the next module reads what `correct` makes of what the block put out."""
    expected = put_out
    for stage in stages:
        moved, _, _ = correct(expected, stage.v.to(read.device), stage.gate.to(read.device))
        expected = torch.where(_acts(stage, read)[..., None], moved, expected)
    if not torch.equal(expected, read):
        raise NotSteering(
            f"layer {layer}: the gates were due to move the residual by up to {_apart(expected, put_out):.4g}, the next module "
            f"read one moved by up to {_apart(read, put_out):.4g} (off by up to {_apart(read, expected):.3g})"
        )


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())
