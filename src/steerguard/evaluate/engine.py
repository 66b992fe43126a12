"""Engines: one loaded model, one thread, and many who ask it at once.

Whoever waits is answered together, in one call of the model, if nothing but the prompts differs: the same guards (none is
a kind of its own) and the same sampling. So guarded and unguarded conversations never share a batch. Two equal requests
never share a call either: the draws of equal rows of one call differ, and what an answer is must not hang on who waited
beside it.

It knows backends and guards, and nothing of who asks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

from steerguard.backends.base import Answer, Backend, Sampling
from steerguard.errors import InputError, NotSteering
from steerguard.evaluate import BATCH
from steerguard.files import canonical_json
from steerguard.guard import Guard
from steerguard.metrics.reading import check_unguarded
from steerguard.prompts import Message

LINGER = 0.02
"""Seconds that the engine waits for company before it answers."""


@dataclass(frozen=True, eq=False)
class Request:
    """One conversation to be answered, so many times."""

    prompt: tuple[Message, ...]
    guards: tuple[Guard, ...]
    sampling: Sampling
    count: int = 1
    "answers, each drawn by itself"

    @cached_property
    def kind(self) -> tuple[tuple[str, ...], Sampling]:
        "what it must share with others to be answered beside them"
        return tuple(guard.digest for guard in self.guards), self.sampling

    @cached_property
    def said(self) -> str:
        return canonical_json(list(self.prompt))


class _Ticket:
    """A request that waits."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.answers: list[Answer] | None = None


class Engine:
    """A model in a thread of its own.

    Args:
        load: makes the model; called in that thread.
        batch: rows that are answered at a time.

    Raises:
        InputError: a model inside `guarded`: what is asked of it unguarded would be guarded.
    """

    def __init__(self, load: Callable[[], Backend], *, batch: int = BATCH, linger: float = LINGER) -> None:
        if batch < 1:
            raise InputError(f"a batch has at least one row, got {batch}")
        self.batch, self._linger = batch, linger
        self._waiting: list[_Ticket] = []
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "steerguard-engine")
        self.calls: list[tuple[tuple[str, ...], int]] = []
        "guard digests and rows of every call of the model so far"
        try:
            self.model: Backend = self._thread.submit(load).result()
            self._thread.submit(check_unguarded, self.model).result()
        except BaseException:
            self.close()
            raise

    def prove(self, guards: tuple[Guard, ...]) -> None:
        """Show on the model that the guards act and are undone. Raises NotSteering or GuardMismatch."""
        self._thread.submit(self._prove, guards).result()

    def ask(self, request: Request) -> Future[list[Answer]]:
        """The request's answers, as soon as they are there. Cancelled before its turn, it is never answered."""
        ticket = _Ticket(request)
        with self._lock:
            self._waiting.append(ticket)
        future = self._thread.submit(self._serve, ticket)
        future.add_done_callback(lambda done: self._forget(ticket) if done.cancelled() else None)
        return future

    def close(self) -> None:
        """Drop what waits and end the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------------------------------------ in the thread

    def _prove(self, guards: tuple[Guard, ...]) -> None:
        with self.model.guarded(*guards):
            pass

    def _serve(self, ticket: _Ticket) -> list[Answer]:
        """The ticket's answers; whoever waits and may is answered beside it."""
        try:
            if ticket.answers is None:
                time.sleep(self._linger)
                try:
                    self._answer(self._company(ticket))
                except InputError:  # a conversation that the model's template refuses must not fail its neighbours
                    self._answer([ticket])
        finally:
            self._forget(ticket)  # answered or failed, it is nobody's company any more
        assert ticket.answers is not None
        return ticket.answers

    def _company(self, first: _Ticket) -> list[_Ticket]:
        """The ticket, and those behind it that may be answered in one call with it."""
        together, said, rows = [first], {first.request.said}, first.request.count
        with self._lock:
            for other in self._waiting:
                one = other.request
                if other.answers is not None or one.kind != first.request.kind or one.said in said:
                    continue
                if rows + one.count > self.batch:
                    break
                together.append(other)
                said.add(one.said)
                rows += one.count
        return together

    def _answer(self, tickets: list[_Ticket]) -> None:
        guards, sampling = tickets[0].request.guards, tickets[0].request.sampling
        prompts = [list(t.request.prompt) for t in tickets for _ in range(t.request.count)]
        answers = self.model.generate(prompts, guards=[guards] * len(prompts), sampling=sampling)
        self.calls.append((tickets[0].request.kind[0], len(prompts)))
        if not guards and any(answer.tokens_seen for answer in answers):
            raise NotSteering(
                f"{self.model.identity.name} was asked without a guard and answered under one: somebody has entered "
                "`guarded` on it; leave that block while it is evaluated"
            )
        for ticket in tickets:
            ticket.answers, answers = answers[: ticket.request.count], answers[ticket.request.count :]

    def _forget(self, ticket: _Ticket) -> None:
        with self._lock:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
