"""The hooks: how gates act inside a transformers model, and how it is known that they did.

One forward hook per guarded block corrects what the block returned, as `steerguard.rules.correct` says. A hook before and one
after the decoder know which tokens are present, so that a token is told by its absolute position, and count: every
forward must fire every hook exactly once with `[rows, tokens, d]`, or NotSteering is raised and no text comes out.

This module knows gates, blocks and columns; it knows no rule by name and no tokenizer. Nothing in it waits for the
device while text is generated: counters stay where the residual is and are read at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from steerguard.backends.base import Trace
from steerguard.backends.hf_kernel import Kernel, kernel
from steerguard.errors import NotSteering, Unsupported
from steerguard.guard import Guard
from steerguard.layers import Blocks, residual_out
from steerguard.rules import SHUT, correct

CACHES = ("past_key_values", "cache_params", "past_key_value")
"""The arguments under which transformers' decoders take the cache."""


@dataclass(frozen=True)
class Layout:
    """Where the tokens of each row of a left-padded batch stand. A column is an index into the padded sequence."""

    pads: tuple[int, ...]
    "padding tokens before each row's prompt"
    prompts: tuple[int, ...]
    "tokens of each row's prompt"

    def start(self, row: int, response: bool) -> int:
        """The first column at which a gate may act on that row."""
        return self.pads[row] + (self.prompts[row] if response else 0)


@dataclass(frozen=True, eq=False)
class Stage:
    """What acts k-th on one layer, for all rows of a batch at once."""

    layer: int
    v: Tensor
    "[d], or [rows, 1, d] where rows differ; float32"
    gate: Tensor
    "[6], or [rows, 1, 6]; float32"
    guards: tuple[int, ...]
    "index of the guard in each row's guards, -1 for none; one entry if all rows have the same guards"
    response: tuple[bool, ...]
    "whether it acts on generated tokens only; as long as `guards`"


def plan(rows: Sequence[Sequence[Guard]]) -> list[Stage]:
    """The stages of a batch whose rows have these guards. Rows with the same guards in the same order need no tables."""
    if all(_same(guards, rows[0]) for guards in rows[1:]):
        return [
            Stage(probe.layer, _tensor(probe.v), _tensor(gate.row()), (index,), (guard.positions == "response",))
            for index, guard in enumerate(rows[0])
            for probe, gate in guard.gates()
        ]
    compiled = {id(guard): list(guard.gates()) for guards in rows for guard in guards}
    on_layer: dict[int, list[list[tuple[int, Any, Any, bool]]]] = {}
    for row, guards in enumerate(rows):
        for index, guard in enumerate(guards):
            for probe, gate in compiled[id(guard)]:
                queues = on_layer.setdefault(probe.layer, [[] for _ in rows])
                queues[row].append((index, probe.v, gate.row(), guard.positions == "response"))
    return [
        _table(layer, [queue[k] if k < len(queue) else None for queue in queues])
        for layer, queues in sorted(on_layer.items())
        for k in range(max(map(len, queues)))
    ]


def _same(one: Sequence[Guard], other: Sequence[Guard]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _table(layer: int, entries: Sequence[tuple[int, Any, Any, bool] | None]) -> Stage:
    """One stage with a row of its own for each row of the batch; a row that it leaves alone has the shut gate."""
    width = next(len(entry[1]) for entry in entries if entry is not None)
    none = (-1, np.zeros(width, np.float32), SHUT.row(), False)
    rows = [none if entry is None else entry for entry in entries]
    return Stage(
        layer,
        v=torch.stack([_tensor(v) for _, v, _, _ in rows])[:, None],
        gate=torch.stack([_tensor(gate) for _, _, gate, _ in rows])[:, None],
        guards=tuple(index for index, *_ in rows),
        response=tuple(response for *_, response in rows),
    )


def _tensor(x: Any) -> Tensor:
    return torch.from_numpy(np.array(x, dtype=np.float32))  # a copy: a probe's own array is read-only


@dataclass(frozen=True)
class _Window:
    """The tokens of the forward in progress: `tokens` columns of `rows` rows, from column `first`."""

    first: int
    rows: int
    tokens: int
    real: Tensor | None
    "[rows, tokens] true where a token is no padding; None if all are, or if the layout tells"

    @property
    def end(self) -> int:
        return self.first + self.tokens


class _Acting:
    """One stage at work: its kernel on the block's device, where it acts, what it saw."""

    def __init__(self, stage: Stage, layout: Layout | None, trace: bool) -> None:
        self.stage, self._layout, self._trace = stage, layout, trace
        self.kernel: Kernel | None = None
        "made when the block's device is seen; None without a layout, where the call may be anybody's"
        self.seen: list[tuple[Tensor, Tensor]] = []
        rows = [] if layout is None else range(len(layout.pads))
        self._starts = [layout.start(row, self.of(stage.response, row)) for row in rows] if layout else [0]
        acting = [start for row, start in enumerate(self._starts) if self.of(stage.guards, row) >= 0]
        self._earliest, self._latest = min(acting), max(acting)

    @staticmethod
    def of(values: Sequence[Any], row: int) -> Any:
        return values[row] if len(values) > 1 else values[0]

    def act(self, h: Tensor, window: _Window, alive: Tensor | None) -> Tensor:
        """h `[rows, tokens, d]` corrected at the tokens where this stage acts."""
        where = None if window.first >= self._latest and window.real is None else self._where(h, window)
        if where is False and not self._trace:
            return h
        if self._layout is None:
            return self._direct(h, where)
        if self.kernel is None:
            self.kernel = kernel(self.stage.v, self.stage.gate, len(self._layout.pads), h.device)
        nowhere = torch.zeros(h.shape[:2], dtype=torch.bool, device=h.device) if where is False else where
        moved, rho, delta = self.kernel(h, nowhere, alive)
        if self._trace:
            self.seen.append((rho, delta))
        return moved

    def _direct(self, h: Tensor, where: Tensor | Literal[False] | None) -> Tensor:
        """A call whose batch is not known, with gradients perhaps: the reference, nothing counted."""
        if where is False:
            return h
        moved, _, _ = correct(h, self.stage.v.to(h.device), self.stage.gate.to(h.device))
        out: Tensor = moved if where is None else torch.where(where[..., None], moved, h)
        return out

    def _where(self, h: Tensor, window: _Window) -> Tensor | Literal[False] | None:
        """`[rows, tokens]` true where it acts; None for everywhere, False for nowhere."""
        if window.real is not None:
            return window.real.to(h.device)
        if window.first >= self._latest:
            return None
        if window.end <= self._earliest:
            return False
        return torch.arange(window.first, window.end, device=h.device) >= torch.tensor(self._starts, device=h.device)[:, None]


class Steering:
    """Stages installed on the blocks of one model, for the time of a `with` block; all of them or none.

    Args:
        layout: where the rows' tokens stand, for a call whose batch is known; None for whatever calls come. Without a
            layout, stages must be the same for all rows and act on all positions.
        trace: keep every token's rho and delta.
        columns: what went through the model before, where a call goes on with a cache.
    """

    def __init__(
        self, blocks: Blocks, stages: Sequence[Stage], layout: Layout | None, *, trace: bool = False, columns: int = 0
    ) -> None:
        self._blocks, self._layout = blocks, layout
        self._acting: dict[int, list[_Acting]] = {}
        for stage in stages:
            if not 0 <= stage.layer < blocks.depth:
                raise NotSteering(f"there is no layer {stage.layer}; {blocks.path} has layers 0 to {blocks.depth - 1}")
            if stage.v.shape[-1] != blocks.width:
                raise NotSteering(
                    f"layer {stage.layer}: the direction has width {stage.v.shape[-1]}, the residual stream {blocks.width}"
                )
            self._acting.setdefault(stage.layer, []).append(_Acting(stage, layout, trace))
        self.refuses = layout is None and any(any(stage.response) or len(stage.guards) > 1 for stage in stages)
        self._checks_positions = layout is not None and (any(layout.pads) or any(any(s.response) for s in stages))
        self._hooks = ExitStack()
        self._handles: list[Any] = []
        self._window: _Window | None = None
        self._fired: dict[int, int] = {}
        self._misplaced: Tensor | None = None
        self._pads: Tensor | None = None
        self.alive: Tensor | None = None
        "[rows] 1 for rows that are still answering; None while all are"
        self.columns = columns
        "columns that went through the model"
        self.forwards = 0

    # --------------------------------------------------------------------------------- installing

    def __enter__(self) -> Steering:
        if not self._acting:
            return self
        with ExitStack() as hooks:
            # Ours is the first to see a block's output, so that whoever else listens hears the corrected residual.
            decoder = self._blocks.decoder
            handles = [decoder.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True)]
            hooks.callback(handles[0].remove)
            for layer, stages in self._acting.items():
                block = self._blocks.modules[layer]
                handles.append(block.register_forward_hook(self._on_block(layer, stages), prepend=True))
                hooks.callback(handles[-1].remove)
            handles.append(decoder.register_forward_hook(self._end, prepend=True))
            hooks.callback(handles[-1].remove)
            self._hooks, self._handles = hooks.pop_all(), handles
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        present = all(handle.id in (handle.hooks_dict_ref() or {}) for handle in self._handles)
        self._hooks.close()
        self._handles = []
        if not present and error is None:
            raise NotSteering("hooks were taken off the model while it was guarded; what it answered since is not guarded")

    # --------------------------------------------------------------------------------- during a forward

    def _begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.refuses:
            raise Unsupported(
                "a guard on `response` positions needs to know where each prompt ends: call generate of the steerguard "
                "model, not of its module, or use a guard with positions `all`"
            )
        given = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args]
        rows, tokens = next(x.shape[:2] for x in given if isinstance(x, Tensor))
        cached = any(kwargs.get(name) is not None for name in CACHES)
        first = self.columns if cached else 0
        self._window = _Window(first, rows, tokens, self._real(kwargs.get("attention_mask"), rows, tokens))
        self._fired = dict.fromkeys(self._acting, 0)
        if self._layout is not None and rows != len(self._layout.pads):
            raise NotSteering(f"the model read {rows} rows where {len(self._layout.pads)} were asked for")
        if self._checks_positions:
            self._check_positions(kwargs.get("position_ids"), first + tokens - 1)

    def _on_block(self, layer: int, stages: Sequence[_Acting]) -> Any:
        width = self._blocks.width

        def hook(module: Any, args: Any, output: Any) -> Any:
            h, window = residual_out(output), self._window
            if window is None:
                raise NotSteering(f"layer {layer} ran outside a forward of {self._blocks.decoder_path}")
            if h is None or h.shape != (window.rows, window.tokens, width):
                got = "no tensor" if h is None else str(list(h.shape))
                raise NotSteering(f"layer {layer} returned {got} where [{window.rows}, {window.tokens}, {width}] was due")
            self._fired[layer] += 1
            for stage in stages:
                h = stage.act(h, window, self.alive)
            return h if isinstance(output, Tensor) else type(output)((h, *output[1:]))

        return hook

    def _end(self, module: Any, args: Any, output: Any) -> None:
        window, self._window = self._window, None
        wrong = {layer: n for layer, n in self._fired.items() if n != 1}
        if window is None or wrong:
            raise NotSteering(f"hooks must fire once in each forward; these fired another number of times: {wrong}")
        self.columns = window.end
        self.forwards += 1

    def _real(self, mask: Any, rows: int, tokens: int) -> Tensor | None:
        """Which tokens are no padding, where only the attention mask can tell."""
        if self._layout is not None or tokens == 1 or not isinstance(mask, Tensor):
            return None
        return mask[:, -tokens:].bool() if mask.ndim == 2 and mask.shape[0] == rows else None

    def _check_positions(self, ids: Any, last: int) -> None:
        """Compare where we think the last column stands with where the model puts it; read at the end."""
        if not isinstance(ids, Tensor) or ids.ndim != 2 or self._layout is None:
            return
        if self._pads is None:
            self._pads = torch.tensor(self._layout.pads, device=ids.device)
        wrong = ids[:, -1] + self._pads != last
        self._misplaced = wrong if self._misplaced is None else self._misplaced.logical_or_(wrong)

    # --------------------------------------------------------------------------------- afterwards

    def verify(self, columns: int) -> None:
        """Raise NotSteering unless exactly that many columns went through the model, each at its own position."""
        if self._acting and (self.forwards == 0 or self.columns != columns):
            raise NotSteering(
                f"{self.columns} columns went through the guarded blocks in {self.forwards} forwards, {columns} were due; "
                "nothing that was generated is returned"
            )
        if self._misplaced is not None and bool(self._misplaced.any()):
            raise NotSteering("the model counts positions otherwise than the guard does; nothing that was generated is returned")

    def tallies(self) -> list[tuple[int, float]]:
        """For each row, how many tokens its gates moved and the sum of |delta|, all stages together."""
        rows = len(self._layout.pads) if self._layout else 0
        found = [stage.kernel.tally() for stage in self._stages() if stage.kernel is not None]
        return [(sum(moved[i] for moved, _ in found), math.fsum(size[i] for _, size in found)) for i in range(rows)]

    def traces(self, row: int, tokens: int) -> tuple[Trace, ...]:
        """What the gates of one row saw and did at its first `tokens` tokens, by guard and layer."""
        if self._layout is None:
            return ()
        begin = self._layout.pads[row]
        found = []
        for acting in self._stages():
            guard = acting.of(acting.stage.guards, row)
            if guard >= 0 and acting.seen:
                rho, delta = (torch.cat([pair[k][row] for pair in acting.seen]).float().cpu().numpy() for k in (0, 1))
                end = begin + tokens
                found.append(Trace(guard, acting.stage.layer, rho[begin:end].copy(), delta[begin:end].copy()))
        return tuple(sorted(found, key=lambda trace: (trace.guard, trace.layer)))

    def _stages(self) -> list[_Acting]:
        return [stage for stages in self._acting.values() for stage in stages]


@contextmanager
def without_compiled_calls(module: Any) -> Iterator[None]:
    """Inside, transformers' `generate` may not compile the whole model: compiled code would not see the hooks."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise Unsupported(
            "generate wants to compile the whole model, and compiled code does not see hooks; pass disable_compile=True, "
            "or load the model with compile=True and call generate of the steerguard model"
        )

    module.get_compiled_call = refuse
    try:
        yield
    finally:
        del module.get_compiled_call
