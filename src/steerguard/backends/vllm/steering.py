"""Steering in one worker: what each running request gets, and the slots of each forward.

vLLM's model runner tells, before every forward, which requests have how many tokens in it and how many they had before.
That is all that is needed: a token's absolute position decides whether it belongs to the prompt or to the answer, in
whatever chunks the prompt comes, and after a preemption too.

This module knows requests as vLLM names them, choices and rows. What it calls on the runner is in `runner`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from steerguard.backends.vllm.catalogue import RESOLVED, Catalogue, Choice
from steerguard.backends.vllm.tables import Stage, Tables
from steerguard.errors import NotSteering

MAX_RECORDS = 512
"""Finished requests whose records are kept until somebody takes them."""


@dataclass(eq=False)
class Record:
    """What was kept of one request that asked for it: chunks, each with the position of its first token.

    A request that was preempted runs some positions again; the last chunk that has a position is right.
    """

    rho: list[tuple[int, Any]] = field(default_factory=list)
    "chunks [layers, stages, tokens]"
    delta: list[tuple[int, Any]] = field(default_factory=list)
    residuals: list[tuple[int, Any]] = field(default_factory=list)
    "chunks [layers, tokens, d]"
    hidden: list[tuple[int, Any]] = field(default_factory=list)
    "chunks [tokens, d]: what the head reads"


@dataclass(frozen=True)
class _Span:
    """The tokens of one request in the forward in progress whose record is kept."""

    record: Record
    read: bool
    first: int
    "index of the first token in the forward"
    end: int
    position: int
    "absolute position of the first token"


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


class Steering:
    """The choices of the requests that run in one worker."""

    def __init__(self, catalogue: Catalogue, tables: Tables) -> None:
        self.catalogue, self.tables = catalogue, tables
        self._live: dict[str, Live] = {}
        self._records: dict[str, Record] = {}
        self._spans: list[_Span] = []
        self.filled = False
        "whether the slots of the forward in progress were set"

    # -------------------------------------------------------------------------------------- requests

    def begin(self, new: Iterable[Any], finished: Iterable[str]) -> None:
        """Take up the requests that are new (or come back), forget those that ended.

        Raises:
            NotSteering: a request that did not come through the frontend, so that nobody decided what guards it.
        """
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
        lives = [self._live[request_id] for request_id in request_ids]
        # 1. the rows of each request's prompt and answer, none evicted that another one needs
        rows = np.zeros((len(lives), 2), np.int64)
        in_use: list[int] = []
        for i, live in enumerate(lives):
            for part, stages in enumerate((live.prompt, live.answer)):
                rows[i, part] = self.tables.row(stages, in_use)
                in_use.append(int(rows[i, part]))
        # 2. each token by its absolute position
        ends = np.cumsum(scheduled)
        if rows.any():
            starts = np.array([live.start for live in lives])
            first = np.repeat(computed - (ends - scheduled), scheduled)
            positions = first + np.arange(int(ends[-1]))
            answered = positions >= np.repeat(starts, scheduled)
            self.tables.fill(np.where(answered, np.repeat(rows[:, 1], scheduled), np.repeat(rows[:, 0], scheduled)))
        else:
            self.tables.clear()
        # 3. whose tokens are to be kept afterwards
        self._spans = [
            _Span(live.record, live.choice.read, int(end - count), int(end), int(before))
            for live, count, end, before in zip(lives, scheduled, ends, computed, strict=True)
            if live.record is not None
        ]
        self.filled = True

    def after(self, hidden: Any) -> None:
        """Keep what the records want of the forward that has run; `hidden` [tokens, d] is what the head reads, if any."""
        if not self._spans:
            return
        tables = self.tables.layers
        rho, delta = (torch.stack([getattr(t, name) for t in tables.values()]).cpu() for name in ("rho", "delta"))
        for span in self._spans:
            at, record = slice(span.first, span.end), span.record
            record.rho.append((span.position, rho[..., at].clone()))
            record.delta.append((span.position, delta[..., at].clone()))
            if span.read:
                kept = torch.stack([table.kept[at].float().cpu() for table in tables.values() if table.kept is not None])
                record.residuals.append((span.position, kept))
                if hidden is not None:
                    record.hidden.append((span.position, hidden[at].cpu().clone()))
        self._spans = []

    # ---------------------------------------------------------------------------------------- records

    def take(self, request_id: str) -> Record | None:
        """The record of a request, once; None if there is none here."""
        live = self._live.get(request_id)
        if live is not None:
            return live.record
        return self._records.pop(request_id, None)

    def add(self, entry: Any) -> None:
        """Serve one more guard; all or nothing."""
        self.catalogue.add(entry)
        try:
            self.tables.add(entry.guard)
        except BaseException:
            self.catalogue.remove(entry.guard.name)
            raise

    def remove(self, name: str) -> bool:
        """Serve a guard no more; False while a running request has it."""
        if name in self.names_in_use:
            return False
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
