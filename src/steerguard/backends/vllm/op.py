"""The custom op that stands in the compiled graph after each open layer.

The graph holds the op and the layer's name, and nothing else: the op finds its tables through vLLM's forward context,
as vLLM's own attention does, so that compiled code and CUDA graphs do not depend on which guards there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerguard.backends.vllm import kernel
from steerguard.backends.vllm.tables import LayerTables, Tables
from steerguard.errors import NotSteering, Unsupported

ABI = 1
"""Changes whenever what is traced into the graph changes; part of the engine's compile key."""
PREFIX = "steerguard.layers."


@dataclass(frozen=True, eq=False)
class OpenLayer:
    """What stands in the forward context under a layer's name."""

    table: LayerTables
    tables: Tables

    def __call__(self, hidden: Tensor, residual: Tensor | None) -> None:
        if hidden.is_cuda:
            from steerguard.backends.vllm.kernel_triton import steer

            steer(hidden, residual, self.tables.slots, self.table)  # keeps in the same pass what is to be kept
            return
        if not self.tables.idle:
            from steerguard.backends.vllm import kernel_loop

            on_host = kernel_loop.steer if kernel_loop.fits(hidden, residual) else kernel.steer
            on_host(hidden, residual, self.tables.slots, self.table)
        kernel.keep(hidden, residual, self.table)


def _of(name: str) -> OpenLayer:
    from vllm.forward_context import get_forward_context

    found: OpenLayer = get_forward_context().no_compile_layers[name]
    return found


def _pair(hidden: Tensor, residual: Tensor, name: str) -> None:
    _of(name)(_tokens(hidden), _tokens(residual))


def _single(hidden: Tensor, name: str) -> None:
    _of(name)(_tokens(hidden), None)


def _tokens(h: Tensor) -> Tensor:
    """[T, d] of what a block holds; a model that vLLM runs through transformers has [1, T, d]."""
    if h.ndim == 2:
        return h
    if h.ndim == 3 and h.shape[0] == 1:
        return h[0]
    raise NotSteering(f"a decoder block returned a residual of shape {list(h.shape)}, [tokens, width] was expected")


_library = torch.library.Library("steerguard", "DEF")
_library.define("steer_pair(Tensor(a!) hidden, Tensor(b!) residual, str name) -> ()")
_library.define("steer_single(Tensor(a!) hidden, str name) -> ()")
for _device in ("CPU", "CUDA"):
    _library.impl("steer_pair", _pair, _device)
    _library.impl("steer_single", _single, _device)
torch.library.register_fake("steerguard::steer_pair", lambda hidden, residual, name: None, lib=_library)
torch.library.register_fake("steerguard::steer_single", lambda hidden, name: None, lib=_library)


def steer_output(output: Any, name: str, *, pair: bool) -> Any:
    """What a block returned, corrected: a (hidden, residual) pair, or one tensor. Traced into the graph.

    Args:
        pair: whether the block takes a residual beside what is hidden, and so has to return both.

    Raises:
        Unsupported: it returned something else, of which nobody knows what the next block makes.
    """
    if isinstance(output, Tensor) and not pair:
        torch.ops.steerguard.steer_single(output, name)
    elif isinstance(output, tuple) and len(output) == 2 and all(isinstance(one, Tensor) for one in output):
        torch.ops.steerguard.steer_pair(output[0], output[1], name)
    else:
        got = f"{len(output)} values" if isinstance(output, tuple | list) else type(output).__name__
        due = "a pair (hidden, residual)" if pair else "one tensor or a pair (hidden, residual)"
        raise Unsupported(f"a decoder block returned {got}, {due} was expected; this architecture is not supported on vLLM yet")
    return output
