"""Steering in one worker: what each running request gets, and the slots of each forward.

vLLM's model runner tells, before every forward, which requests have how many tokens in it and how many they had before.
That is all that is needed: a token's absolute position decides whether it belongs to the prompt or to the answer, in
whatever chunks the prompt comes, and after a preemption too.

This module knows requests as vLLM names them, choices and rows. What it calls on the runner is in `runner`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from steerguard.backends.vllm.catalogue import RESOLVED, Catalogue, Choice
from steerguard.backends.vllm.tables import Stage, Tables
from steerguard.errors import NotSteering

Chunk = tuple[int, npt.NDArray[Any]]
MAX_RECORDS = 4096
"""Finished requests whose records are kept until somebody takes them."""


@dataclass(eq=False)
class Record:
    """What was kept of one request that asked for it, as chunks with the position of their first token.

    A request that was preempted runs some positions again; the last chunk that has a position is right.
    """

    rho: dict[int, list[Chunk]] = field(default_factory=dict)
    "per layer chunks [stages, tokens]"
    delta: dict[int, list[Chunk]] = field(default_factory=dict)
    residuals: list[Chunk] = field(default_factory=list)
    "chunks [tokens, layers, d]"
    hidden: list[Chunk] = field(default_factory=list)
    "chunks [tokens, d]: what the head reads"
    total: Any = None
    "[layers, d] sum of the answer's residuals"
    until: int = 0
    "position after the last token in `total`"

    def plain(self) -> dict[str, Any]:
        """The chunks put together by position, as numpy arrays; what no chunk has is NaN."""
        return {
            "rho": {layer: joined(chunks, axis=1) for layer, chunks in self.rho.items()},
            "delta": {layer: joined(chunks, axis=1) for layer, chunks in self.delta.items()},
            "residuals": joined(self.residuals, axis=0), "hidden": joined(self.hidden, axis=0), "total": self.total,
        }  # fmt: skip


def joined(chunks: Sequence[Chunk], *, axis: int) -> npt.NDArray[Any] | None:
    """Chunks side by side on their token axis, each at its position; None if there are none."""
    if not chunks:
        return None
    shape = list(chunks[0][1].shape)
    shape[axis] = max(position + chunk.shape[axis] for position, chunk in chunks)
    out = np.full(shape, np.nan, np.float32)
    for position, chunk in chunks:
        where = [slice(None)] * len(shape)
        where[axis] = slice(position, position + chunk.shape[axis])
        out[tuple(where)] = chunk
    return out


@dataclass(eq=False)
class Live:
    """One request that is known to the runner."""

    choice: Choice
    start: int
    "position of the answer's first token"
    prompt: tuple[Stage, ...]
    "what looks at the prompt, in order"
    answer: tuple[Stage, ...]
    "what looks at the answer, in order"
    record: Record | None

    @cached_property
    def stages(self) -> Counter[int]:
        """Layer -> how many guards look at it."""
        return Counter(layer for guard, _ in self.answer for layer in guard.layers)


@dataclass(frozen=True)
class _Batch:
    """The requests of a forward, in the order of their tokens, and their rows; the same for step after step of decoding."""

    ids: list[str]
    lives: list[Live]
    starts: npt.NDArray[Any]
    "[requests] position of the answer's first token"
    prompt: npt.NDArray[Any]
    "[requests] the row of the prompt's tokens"
    answer: npt.NDArray[Any]
    "[requests] the row of the answer's"
    acts: bool
    "whether any row is not 0"
    records: bool
    "whether anything is kept of any request"


@dataclass(frozen=True)
class _Span:
    """The tokens of one request in the forward in progress, of which something is kept."""

    live: Live
    record: Record
    first: int
    "index of the first token in the forward"
    end: int
    position: int
    "absolute position of the first token"


def _spread(batch: _Batch, scheduled: npt.NDArray[Any], computed: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The row of each token of a forward that has several of a request."""
    owner = np.repeat(np.arange(len(scheduled)), scheduled)
    first = computed - (np.cumsum(scheduled) - scheduled)
    positions = first[owner] + np.arange(len(owner))
    return np.where(positions >= batch.starts[owner], batch.answer[owner], batch.prompt[owner])


class Steering:
    """The choices of the requests that run in one worker."""

    def __init__(self, catalogue: Catalogue, tables: Tables) -> None:
        self.catalogue, self.tables = catalogue, tables
        self._live: dict[str, Live] = {}
        self._records: dict[str, Record] = {}
        self._spans: list[_Span] = []
        self._batch: _Batch | None = None
        "of the last forward; None once a request or a guard has come or gone"
        self.filled = False
        "whether the slots of the forward in progress were set"
        self.proving = False
        "whether dummy forwards are the canary's"

    def __len__(self) -> int:
        return len(self._live)

    # -------------------------------------------------------------------------------------- requests

    def begin(self, new: Collection[Any], finished: Collection[str]) -> None:
        """Take up the requests that are new (or come back), forget those that ended.

        Raises:
            NotSteering: a request that did not come through the frontend, so that nobody decided what guards it.
        """
        if new or finished:
            self._batch = None
        for request_id in finished:
            live = self._live.pop(request_id, None)
            if live is not None and live.record is not None:
                self._keep(request_id, live.record)
        for request in new:
            self._live[request.req_id] = self._taken_up(request)
        self.filled = False

    def _taken_up(self, request: Any) -> Live:
        args = getattr(request.sampling_params, "extra_args", None) or {}
        if RESOLVED not in args:
            raise NotSteering(f"request {request.req_id} reached the engine without a decision on its guards; it is not answered")
        before = self._live.get(request.req_id)
        choice = Choice.of_args(args[RESOLVED])
        guards = [self.catalogue.guard_of(act) for act in choice.acts]
        record = (before.record if before else Record()) if choice.trace or choice.read else None
        return Live(
            choice,
            start=request.prompt_len if choice.start is None else choice.start,
            prompt=tuple((g, g.positions == "all") for g in guards if record is not None or g.positions == "all"),
            answer=tuple((g, True) for g in guards),
            record=record,
        )

    def _keep(self, request_id: str, record: Record) -> None:
        self._records[request_id] = record
        while len(self._records) > MAX_RECORDS:
            del self._records[next(iter(self._records))]

    @property
    def names_in_use(self) -> set[str]:
        """Names of the guards that some running request has."""
        return {act.name for live in self._live.values() for act in live.choice.acts}

    # --------------------------------------------------------------------------------------- forwards

    def fill(self, request_ids: Sequence[str], scheduled: npt.NDArray[Any], computed: npt.NDArray[Any]) -> None:
        """Set the slots of the forward to come.

        Args:
            request_ids: in the order in which their tokens stand in the forward.
            scheduled: [requests] tokens of each in this forward.
            computed: [requests] tokens of each before it.
        """
        batch = self._batch
        if batch is None or batch.ids != request_ids:
            batch = self._batch = self._rows_of(request_ids)
        # 1. each token by its absolute position
        if not batch.acts:
            self.tables.clear()
        elif int(scheduled.sum()) == len(batch.ids):  # one token each: nothing to spread
            self.tables.fill(np.where(computed >= batch.starts, batch.answer, batch.prompt))
        else:
            self.tables.fill(_spread(batch, scheduled, computed))
        # 2. whose tokens are to be kept afterwards
        self._spans = []
        if batch.records:
            self._spans = [
                _Span(live, live.record, int(end - count), int(end), int(before))
                for live, count, end, before in zip(batch.lives, scheduled, np.cumsum(scheduled), computed, strict=True)
                if live.record is not None
            ]
        self.filled = True

    def _rows_of(self, request_ids: Sequence[str]) -> _Batch:
        """The rows of each request's prompt and answer, none evicted that another one needs."""
        lives = [self._live[request_id] for request_id in request_ids]
        rows = np.zeros((2, len(lives)), np.int64)
        in_use: list[int] = []
        for i, live in enumerate(lives):
            for part, stages in enumerate((live.prompt, live.answer)):
                rows[part, i] = self.tables.row(stages, in_use)
                in_use.append(int(rows[part, i]))
        starts = np.array([live.start for live in lives], np.int64)
        records = any(live.record is not None for live in lives)
        return _Batch(list(request_ids), lives, starts, rows[0], rows[1], bool(rows.any()), records)

    def after(self, hidden: Any) -> None:
        """Keep what the records want of the forward that has run; `hidden` [tokens, d] is what the head reads, if any.

        Waits for the device, and only if a request asked for a record.
        """
        spans, self._spans = self._spans, []
        for layer in {layer for span in spans for layer in span.live.stages}:
            table = self.tables.layers.get(layer)
            if table is not None:
                self._keep_traces(spans, layer, table.rho.cpu().numpy(), table.delta.cpu().numpy())
        for span in spans:
            if span.live.choice.read:
                self._keep_residuals(span, hidden)

    def _keep_traces(self, spans: Sequence[_Span], layer: int, rho: npt.NDArray[Any], delta: npt.NDArray[Any]) -> None:
        for span in spans:
            if stages := span.live.stages[layer]:
                part = np.s_[:stages, span.first : span.end]
                span.record.rho.setdefault(layer, []).append((span.position, rho[part].copy()))
                span.record.delta.setdefault(layer, []).append((span.position, delta[part].copy()))

    def _keep_residuals(self, span: _Span, hidden: Any) -> None:
        """Every token's, or the sum over the answer's that were not summed before."""
        record, begin = span.record, span.position
        kept = [table.kept for table in self.tables.layers.values() if table.kept is not None]
        if span.live.choice.read == "mean":
            skip = max(span.live.start, record.until) - begin
            if span.first + skip < span.end:
                total = torch.stack([k[span.first + max(skip, 0) : span.end].double().sum(0) for k in kept]).cpu().numpy()
                record.total = total if record.total is None else record.total + total
                record.until = begin + span.end - span.first
            return
        residuals = torch.stack([k[span.first : span.end] for k in kept], 1).float().cpu().numpy()
        record.residuals.append((begin, residuals))
        if isinstance(hidden, torch.Tensor):
            record.hidden.append((begin, hidden[span.first : span.end].float().cpu().numpy()))

    # ---------------------------------------------------------------------------------------- records

    def take(self, request_id: str) -> Record | None:
        """The record of a request, once; None if there is none here."""
        live = self._live.get(request_id)
        if live is None:
            return self._records.pop(request_id, None)
        record, live.record = live.record, None
        return record

    def add(self, entry: Any) -> None:
        """Serve one more guard; all or nothing."""
        self._batch = None
        self.catalogue.add(entry)
        try:
            self.tables.add(entry.guard)
        except BaseException:
            self.catalogue.remove(entry.guard.name)
            raise

    def remove(self, name: str) -> bool:
        """Serve a guard no more; False while a running request has it, True if it is gone."""
        if name not in self.catalogue:
            return True
        if name in self.names_in_use:
            return False
        self._batch = None
        self.catalogue.remove(name)
        self.tables.remove(name)
        return True

    def counters(self) -> list[Mapping[str, Any]]:
        """See `Tables.counters`. Raises NotSteering where a gate did not look at every token that it was due."""
        found = self.tables.counters()
        for one in found:
            if one["seen"] != one["expected"]:
                raise NotSteering(
                    f"guard {one['guard']!r} looked at {one['seen']} tokens at layer {one['layer']}, {one['expected']} were due"
                )
        return found
