"""The engine: one model, many requests. Those that wait and want the same drawing go into one call of the model.

One thread chooses a batch, another runs it; so whatever a call raises is looked at and told, and the next batch runs all the
same. A batch ends when its last answer has: what comes meanwhile waits for the next one. That is right for a laptop and
for tests, and not for a crowd: use vLLM for that.

This module knows tokens, guards and drawings. It knows no HTTP and no policy.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from steerguard.backends.base import Answer, Guards, Sampling
from steerguard.errors import SteerguardError
from steerguard.guard import Guard
from steerguard.serve.protocol import Drawing

LINGER = 0.005
"""Seconds that a first request waits for others to share its batch."""
T = TypeVar("T")


class GoesOn(Protocol):
    """What is asked of a model: to go on after tokens; see `TransformersModel.generate_tokens`."""

    def generate_tokens(
        self,
        prompts: Sequence[tuple[int, ...]],
        *,
        guards: Sequence[Guards],
        sampling: Sampling = ...,
        trace: bool = ...,
        on_token: Callable[[int, str], None] | None = ...,
        unwanted: Callable[[int], bool] | None = ...,
    ) -> list[Answer]: ...


class Busy(SteerguardError):
    """Too many requests wait already."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"too many requests wait already; try again in {seconds} s")
        self.seconds = seconds


class Closed(SteerguardError):
    """The engine answers no more."""


@dataclass(eq=False)
class Job:
    """One request as the engine gets it."""

    ids: tuple[int, ...]
    "the prompt's tokens"
    n: int
    drawing: Drawing
    guards: tuple[Guard, ...]
    on_text: Callable[[int, str], None] | None = None
    "called with (choice, new text) on the engine's thread"
    answers: Future[list[Answer]] = field(default_factory=Future)
    gone: threading.Event = field(default_factory=threading.Event)
    "set when nobody waits for the answers any more"

    @property
    def shares(self) -> Hashable:
        """What jobs of one call have in common."""
        return self.drawing

    @property
    def luck(self) -> Hashable:
        """Jobs that would be drawn alike, and so may not share a call: there they would be told apart by their number."""
        settled = self.drawing.seed is not None and self.drawing.temperature > 0
        return (self.ids, tuple(guard.digest for guard in self.guards)) if settled else id(self)


class Engine:
    """Runs jobs. `submit` may be called from any thread.

    Args:
        rows: answers of one call at most.
        waiting: requests that may wait.
    """

    def __init__(self, model: GoesOn, *, rows: int, waiting: int) -> None:
        self._model, self._rows, self._waiting = model, rows, waiting
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._seconds = 1.0
        "how long the last batch took"
        self._device = ThreadPoolExecutor(1, thread_name_prefix="steerguard-device")
        self._thread = threading.Thread(target=self._run, name="steerguard-engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job. Raises Busy, or Closed."""
        with self._changed:
            if self._closed:
                raise Closed("the server is shutting down; try again when it is back")
            if len(self._queue) >= self._waiting:
                raise Busy(max(1, math.ceil(self._seconds * math.ceil(len(self._queue) / self._rows))))
            self._queue.append(job)
            self._changed.notify()

    def between(self, work: Callable[[], T]) -> Future[T]:
        """Run something on the device's thread between two batches."""
        return self._device.submit(work)

    @property
    def depth(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    def close(self) -> None:
        """End after the batch in progress; what waits is told so."""
        with self._changed:
            self._closed = True
            left = list(self._queue)
            self._queue.clear()
            self._changed.notify()
        for job in left:
            if job.answers.set_running_or_notify_cancel():
                job.answers.set_exception(Closed("the server is shutting down; try again when it is back"))
        self._thread.join()
        self._device.shutdown()

    # ------------------------------------------------------------------------------------------------------ inside

    def _run(self) -> None:
        while jobs := self._next():
            begun = time.monotonic()
            call = self._device.submit(self._answer, jobs)
            error = call.exception()
            self._seconds = time.monotonic() - begun
            for job in jobs:
                if error is not None:
                    job.answers.set_exception(error)
                else:
                    job.answers.set_result(call.result()[job])

    def _next(self) -> list[Job]:
        """The next batch: the job that waits longest, and others that may share its call; empty at the end."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
            time.sleep(LINGER)
            with self._changed:
                chosen = self._choose()
                if chosen or self._closed:
                    return chosen

    def _choose(self) -> list[Job]:
        chosen: list[Job] = []
        left: deque[Job] = deque()
        for job in self._queue:
            if chosen and not self._fits(job, chosen):
                left.append(job)
            elif job.gone.is_set():
                job.answers.cancel()
            elif job.answers.set_running_or_notify_cancel():
                chosen.append(job)
        self._queue = left
        return chosen

    def _fits(self, job: Job, chosen: Sequence[Job]) -> bool:
        room = sum(one.n for one in chosen) + job.n <= self._rows
        return room and job.shares == chosen[0].shares and all(job.luck != one.luck for one in chosen)

    def _answer(self, jobs: Sequence[Job]) -> dict[Job, list[Answer]]:
        """All answers of one call."""
        rows = [(job, choice) for job in jobs for choice in range(job.n)]
        drawing = jobs[0].drawing
        seed = secrets.randbits(63) if drawing.seed is None else drawing.seed
        sampling = Sampling(
            temperature=drawing.temperature, top_p=drawing.top_p, seed=seed, max_new_tokens=drawing.max_tokens, stop=drawing.stop
        )

        def tell(row: int, text: str) -> None:
            job, choice = rows[row]
            if job.on_text is not None:
                job.on_text(choice, text)

        answers = self._model.generate_tokens(
            [job.ids for job, _ in rows], guards=[job.guards for job, _ in rows], sampling=sampling, trace=True,
            on_token=tell, unwanted=lambda row: rows[row][0].gone.is_set(),
        )  # fmt: skip
        found: dict[Job, list[Answer]] = {job: [] for job in jobs}
        for (job, _), answer in zip(rows, answers, strict=True):
            found[job].append(answer)
        return found
