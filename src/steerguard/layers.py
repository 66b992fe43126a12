"""Find the decoder blocks of a causal language model, and the residual that they return.

No list of architectures is kept here. Candidates come from the structure (a ModuleList as long as the text
configuration says the model is deep), and one short forward decides: the blocks that we want fire once each, in
order, and what a block returns is what the next one reads. That is the residual stream, and whoever reads the last
block's output is the final norm. A vision tower stays silent on text, experts and rotary tables do not chain.

The residual of layer i is the output of block i, before the final norm. A model for which that does not hold (blocks
used twice, several streams, something added between the blocks) is refused with what was seen, because a guard on it
would not do what it says.

This module knows modules and tensors, and nothing of guards, prompts or tokenizers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steerguard.errors import ModelError

PROBE_TOKENS = 8


@dataclass(frozen=True, eq=False, repr=False)
class Blocks:
    """The decoder blocks of one model, as found and as seen at work."""

    path: str
    "where the list of blocks stands, such as `model.layers`"
    depth: int
    "number of blocks"
    width: int
    "d, the size of the residual stream"
    kind: str
    "class of the blocks; several in a hybrid"
    returns: str
    "`tensor`, or `tuple` if the residual is the first of several"
    decoder_path: str
    "the module whose forward runs the blocks"
    reader_path: str
    "the module that reads the last block's output: the final norm"
    modules: tuple[nn.Module, ...]
    decoder: nn.Module
    reader: nn.Module

    def consumer(self, layer: int) -> nn.Module:
        """The module that reads the residual of a layer: the next block, or the final norm."""
        return self.modules[layer + 1] if layer + 1 < self.depth else self.reader

    def __len__(self) -> int:
        return self.depth

    def __repr__(self) -> str:
        return (
            f"Blocks({self.depth} x {self.kind} at {self.path}, width {self.width}, each returns a {self.returns}; "
            f"run by {self.decoder_path or 'the model itself'}, read at the end by {self.reader_path})"
        )


def find_blocks(model: nn.Module) -> Blocks:
    """The decoder blocks of a causal language model, verified by one forward of a few tokens.

    Args:
        model: a transformers model with a language modelling head, text only or multimodal, in eval mode.

    Raises:
        ModelError: no list of blocks, or more than one, is a residual stream; the message names what was seen.
    """
    config = text_config(model)
    depth = getattr(config, "num_hidden_layers", None)
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{type(model).__name__} is an encoder-decoder; steerguard guards decoder-only language models")
    if not isinstance(depth, int):
        raise ModelError(f"{type(config).__name__} does not say num_hidden_layers, so the decoder blocks cannot be told")
    candidates = _candidates(model, depth)
    seen = [_Seen(path, tuple(blocks)) for path, blocks in candidates]
    readers = _watch(model, seen)
    streams = [one for one in seen if not one.faults() and id(one) in readers]
    if len(streams) != 1:
        raise ModelError(_refusal(model, depth, seen, readers, streams))
    found = streams[0]
    reader_path, reader = readers[id(found)]
    decoder_path = found.path.rpartition(".")[0]
    return Blocks(
        path=found.path, depth=depth, width=found.width,
        kind=", ".join(dict.fromkeys(type(block).__name__ for block in found.blocks)),
        returns=" or ".join(sorted(found.returns)), decoder_path=decoder_path, reader_path=reader_path,
        modules=found.blocks, decoder=model.get_submodule(decoder_path), reader=reader,
    )  # fmt: skip


def text_config(model: nn.Module) -> Any:
    """The configuration of the text decoder: the model's own, or the one inside a multimodal configuration."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise ModelError(f"{type(model).__name__} is not a transformers model: it has no configuration")
    return config.get_text_config(decoder=True)


def probe_ids(model: nn.Module, rows: int, tokens: int = PROBE_TOKENS) -> Tensor:
    """Token ids `[rows, tokens]` for a short forward: ordinary tokens, spread over the vocabulary, no two rows alike.

    Ids that a configuration names (image and audio placeholders, padding, beginning and end) are left out: a
    multimodal model expects pictures where it sees its placeholder.
    """
    config: Any = model.config
    vocabulary = int(text_config(model).vocab_size)
    named = set(_named_ids(config.to_dict()))
    ordinary = [i for i in range(vocabulary) if i not in named] if vocabulary < 4096 else None
    size = len(ordinary) if ordinary else vocabulary
    ids = [(i * 7919 + 11) % size for i in range(rows * tokens)]
    ids = [ordinary[i] for i in ids] if ordinary else [_step_past(i, named, vocabulary) for i in ids]
    return torch.tensor(ids, device=input_device(model)).view(rows, tokens)


def input_device(model: nn.Module) -> torch.device:
    """Where token ids must be: the device of the input embeddings, or where offloaded embeddings are executed."""
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    hook = getattr(embeddings, "_hf_hook", None)
    execution = getattr(hook, "execution_device", None)
    device = torch.device(execution) if execution is not None else next(embeddings.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def residual_out(output: Any) -> Tensor | None:
    """The residual in what a block returned: the tensor itself, or the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    first = output[0] if isinstance(output, tuple | list) and output else None
    return first if isinstance(first, Tensor) else None


def residual_in(args: Sequence[Any], kwargs: Mapping[str, Any], shape: Sequence[int]) -> Tensor | None:
    """The residual in what a module was called with: the first floating tensor of that shape."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point() and tuple(value.shape) == tuple(shape):
            return value
    return None


# ------------------------------------------------------------------------------------------------ the search


@dataclass(eq=False)
class _Seen:
    """What one list of modules did during the probe forward."""

    path: str
    blocks: tuple[nn.Module, ...]
    order: list[int] = field(default_factory=list)
    "indices of the modules, as they fired"
    shapes: set[tuple[int, ...]] = field(default_factory=set)
    returns: set[str] = field(default_factory=set)
    broken: set[int] = field(default_factory=set)
    "modules that read something else than what the one before returned"
    last: Tensor | None = None

    @property
    def width(self) -> int:
        return next(iter(self.shapes))[-1]

    def faults(self) -> list[str]:
        depth = len(self.blocks)
        if len({id(block) for block in self.blocks}) < depth:
            return ["the same module stands in several places"]
        if not self.order:
            return ["did not run on text"]
        out = []
        if self.order != list(range(depth)):
            out.append(f"ran in the order {self.order}, not once each from 0 to {depth - 1}")
        if len(self.shapes) != 1 or len(next(iter(self.shapes))) != 3:
            shapes = ", ".join(str(list(shape)) for shape in sorted(self.shapes)) or "no tensor"
            out.append(f"returned {shapes}, not one residual [rows, tokens, width]")
        if not out and self.last is not None and not _causal(self.last):
            out.append("lets a token see those after it")
        if self.broken:
            out.append(f"modules {sorted(self.broken)} read something else than the module before them returned")
        return out


def _candidates(model: nn.Module, depth: int) -> list[tuple[str, nn.ModuleList]]:
    """Lists of that length, without those that stand inside a member of another one (experts, say)."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return [(name, m) for name, m in lists if not any(name.startswith(f"{other}.") for other, _ in lists if other != name)]


def _watch(model: nn.Module, seen: Sequence[_Seen]) -> dict[int, tuple[str, nn.Module]]:
    """Run a few tokens through the model; fill `seen`, and return who read each list's last output."""
    readers: dict[int, tuple[str, nn.Module]] = {}
    inside = {id(m) for one in seen for block in one.blocks for m in block.modules()}
    holders = {id(m) for one in seen for m in _ancestors(model, one.path)}

    def before(one: _Seen, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if one.last is not None and not _same(one.last, residual_in(args, kwargs, one.last.shape)):
                one.broken.add(index)

        return hook

    def after(one: _Seen, index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            one.order.append(index)
            one.last = residual_out(output)
            one.returns.add("tensor" if isinstance(output, Tensor) else type(output).__name__)
            if one.last is not None:
                one.shapes.add(tuple(one.last.shape))

        return hook

    def reading(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for one in seen:
                done = one.last is not None and one.order[-1] == len(one.blocks) - 1
                if done and id(one) not in readers and _same(one.last, residual_in(args, kwargs, one.last.shape)):  # type: ignore[union-attr]
                    readers[id(one)] = (name, module)

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for one in seen:
            for index, block in enumerate(one.blocks):
                hooks.callback(block.register_forward_pre_hook(before(one, index), with_kwargs=True).remove)
                hooks.callback(block.register_forward_hook(after(one, index)).remove)
        for name, module in model.named_modules():
            if id(module) not in inside and id(module) not in holders:
                hooks.callback(module.register_forward_pre_hook(reading(name), with_kwargs=True).remove)
        ids = probe_ids(model, rows=2)
        ids[1, :-1] = ids[0, :-1]  # two rows that differ in their last token only
        model(input_ids=ids, use_cache=False)
    return readers


def _causal(h: Tensor) -> bool:
    """Whether residuals `[2, tokens, d]` of two rows are alike up to the last token, in which the rows differ."""
    rounding = 64 * torch.finfo(h.dtype).eps * float(h.float().abs().mean())
    return bool((h[0, :-1].float() - h[1, :-1].float()).abs().max() <= rounding)


def _same(residual: Tensor | None, read: Tensor | None) -> bool:
    """The same tensor, or (moved between devices on the way) the same values."""
    if residual is None or read is None:
        return False
    return read is residual or torch.equal(read.to(residual.device), residual)


def _refusal(model: nn.Module, depth: int, seen: list[_Seen], readers: Mapping[int, Any], streams: list[_Seen]) -> str:
    name = type(model).__name__
    if len(streams) > 1:
        return f"{name} has several residual streams of {depth} blocks: {', '.join(one.path for one in streams)}"
    if not seen:
        lists = [f"{path} ({len(m)})" for path, m in model.named_modules() if isinstance(m, nn.ModuleList)]
        return f"{name} has no list of {depth} decoder blocks; there are {', '.join(lists[:12]) or 'no lists of modules'}"
    told = []
    for one in seen:
        faults = one.faults() or ([] if id(one) in readers else ["nothing reads the last module's output"])
        told.append(f"{one.path} ({type(one.blocks[0]).__name__}): {'; '.join(faults)}")
    return f"the residual stream of {name} cannot be told, so it cannot be guarded: {' | '.join(told)}"


def _ancestors(model: nn.Module, path: str) -> Iterator[nn.Module]:
    yield model
    parts = path.split(".")
    for i in range(1, len(parts) + 1):
        yield model.get_submodule(".".join(parts[:i]))


def _named_ids(config: Any, key: str = "") -> Iterable[int]:
    """Every token id that a configuration, or one inside it, names."""
    if isinstance(config, Mapping):
        for name, value in config.items():
            yield from _named_ids(value, str(name))
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _named_ids(value, key)
    elif isinstance(config, int) and not isinstance(config, bool) and ("token_id" in key or "token_index" in key):
        yield config


def _step_past(i: int, named: set[int], vocabulary: int) -> int:
    while i in named:
        i = (i + 1) % vocabulary
    return i
