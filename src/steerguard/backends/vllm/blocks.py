"""Find the decoder blocks of a model that vLLM has built, and put the op behind those that are open.

A pipeline stage holds some of the blocks and placeholders for the others; each block is known by its number in the
whole model. What is found is refused rather than guessed: the proof after warm-up shows the rest.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from steerguard.backends.vllm.op import PREFIX, OpenLayer, steer_output
from steerguard.backends.vllm.tables import Tables
from steerguard.errors import NotSteering, Unsupported


def find_blocks(model: nn.Module, depth: int) -> dict[int, nn.Module]:
    """The decoder blocks that this rank holds, by their number. Raises Unsupported if they cannot be told."""
    inner: Any = getattr(model, "get_language_model", None)
    language: nn.Module = model if inner is None else inner()
    lists = [(name, m) for name, m in language.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    outer = [(name, m) for name, m in lists if not any(name.startswith(f"{other}.") for other, _ in lists if other != name)]
    if len(outer) != 1:
        named = ", ".join(name for name, _ in outer) or "none"
        raise Unsupported(
            f"{type(model).__name__} has {len(outer)} lists of {depth} decoder blocks ({named}), one was expected; this "
            "architecture is not supported on vLLM yet"
        )
    return {i: block for i, block in enumerate(outer[0][1]) if type(block).__name__ != "PPMissingLayer"}


def open_layers(
    blocks: dict[int, nn.Module], layers: Sequence[int], tables: Tables, context: dict[str, Any]
) -> dict[int, Any]:
    """Put the op behind each open layer that this rank holds, and its tables into the forward context; all or nothing.

    Returns the hooks' handles by layer.
    """
    handles: dict[int, Any] = {}
    try:
        for layer in layers:
            name = f"{PREFIX}{layer}"
            if name in context:
                raise NotSteering(f"layer {layer} is open already: two installations in one engine")
            context[name] = OpenLayer(tables.layers[layer], tables)
            handles[layer] = blocks[layer].register_forward_hook(_hook(blocks[layer], name))
    except BaseException:
        close_layers(handles, context)
        raise
    return handles


def close_layers(handles: dict[int, Any], context: dict[str, Any]) -> None:
    """Undo `open_layers`."""
    for layer, handle in handles.items():
        handle.remove()
        context.pop(f"{PREFIX}{layer}", None)


def _hook(block: nn.Module, name: str) -> Any:
    pair = "residual" in inspect.signature(block.forward).parameters

    def hook(module: Any, args: Any, output: Any) -> Any:
        return steer_output(output, name, pair=pair)

    return hook
