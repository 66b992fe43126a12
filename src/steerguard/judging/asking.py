"""Asking: many questions to judges at once, with patience that ends.

Every call has a time limit and every question a number of calls; a limit on spending is kept beforehand; what was judged
is in the cache before anything else happens. A judge that is down is left out and its verdicts are missing, with the
reason; a judge that was set up wrongly (key, model), or the last one to go down, ends the work with an error.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from typing import Any

import anyio
from anyio.from_thread import start_blocking_portal

from steerguard.errors import JudgeError
from steerguard.judging.budget import Budget
from steerguard.judging.cache import Cache, Entry
from steerguard.judging.config import JudgeConfig
from steerguard.judging.endpoint import Call, Endpoint, Failure, key_for, keys_unlogged, open_model, secrets
from steerguard.judging.verdict import NoVerdict, Verdict, read_verdict

Stage = Callable[[str, int, int], None]
"""Progress of long work: called with (what is being done, done, total)."""
_WRONGLY_SET_UP = {401: "refuses the key", 402: "asks for payment", 404: "does not know the model or the address"}


def run(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run an async function to its end, in a thread of its own if a loop is running here already (a notebook's)."""
    if not _loop_is_running():
        return anyio.run(function, *arguments)
    with start_blocking_portal() as portal:
        future = portal.start_task_soon(function, *arguments)
        try:
            return future.result()
        finally:
            future.cancel()  # of no effect on what is done; on Ctrl-C it ends the calls in flight


def _loop_is_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class Asker:
    """Asks what the cache does not know, and keeps every verdict as it comes.

    Args:
        what: what is being done, for the progress.
    """

    def __init__(self, cache: Cache, budget: Budget, *, what: str, progress: Stage | None = None) -> None:
        self._cache, self._budget, self._what, self._progress = cache, budget, what, progress
        self.missing: dict[str, str] = {}
        "why there is no verdict, by key"
        self._stopped: JudgeError | None = None
        self._done = self._total = self._kept = 0

    def ask(self, calls: Iterable[Call]) -> None:
        """Ask all of it, each key once.

        Raises:
            JudgeError: a judge that is set up wrongly, or no judge that answers.
            SpendLimitReached: what was judged is in the cache.
        """
        wanted = {call.key: call for call in calls}
        todo = {key: call for key, call in wanted.items() if key not in self._cache}
        self._budget.found(len(wanted) - len(todo))
        self._total, self._judges = len(todo), {call.judge for call in wanted.values()}
        if not todo:
            return
        by_judge: dict[JudgeConfig, deque[Call]] = {}
        for call in todo.values():
            by_judge.setdefault(call.judge, deque()).append(call)
        keys = {judge: key_for(judge) for judge in by_judge}  # before anything is sent
        run(self._ask, by_judge, keys)
        if self._stopped is not None:
            raise self._stopped

    async def _ask(self, by_judge: Mapping[JudgeConfig, deque[Call]], keys: Mapping[JudgeConfig, str | None]) -> None:
        self._settled, self._ended = anyio.Event(), anyio.Event()
        hidden = secrets(keys.values())
        async with AsyncExitStack() as stack:
            endpoints = []
            for judge in by_judge:
                model = await stack.enter_async_context(open_model(judge, keys[judge]))
                endpoints.append(Endpoint(judge, model, hidden, self._sleep))
            stack.enter_context(keys_unlogged(hidden))
            try:
                async with anyio.create_task_group() as group:
                    for endpoint in endpoints:
                        calls = by_judge[endpoint.judge]
                        for _ in range(min(endpoint.judge.concurrency, len(calls))):
                            group.start_soon(self._work, endpoint, calls)
            except BaseExceptionGroup as together:
                raise _first(together) from None
        down = [endpoint.down for endpoint in endpoints if endpoint.down]
        if len(down) == len(self._judges):  # one whose verdicts are all in the cache is none of them
            self._stop(JudgeError(f"{down[0]}; {self._kept} verdicts of this run are kept; mend the endpoint and run it again"))

    async def _work(self, endpoint: Endpoint, calls: deque[Call]) -> None:
        while calls and self._stopped is None:
            call = calls.popleft()
            why = endpoint.down or await self._verdict(endpoint, call)
            if why is None:
                return
            if why:
                self.missing[call.key] = why
            self._done += 1
            if self._progress is not None:
                self._progress(self._what, self._done, self._total)

    async def _verdict(self, endpoint: Endpoint, call: Call) -> str | None:
        """Ask until there is a verdict, which is then kept (""), or no call is left (why); None if the work has ended."""
        judge, outcome = call.judge, None
        for attempt in range(judge.attempts):
            if attempt:
                await endpoint.pause(attempt, outcome)
            if endpoint.down:
                return endpoint.down
            if self._stopped is not None or not await self._room(call):
                return None
            outcome = await self._once(endpoint, call, attempt)
            if outcome is None:
                return ""
            if outcome.status in _WRONGLY_SET_UP:
                self._stop(self._wrongly_set_up(judge, outcome))
                return None
            if not outcome.again:
                return outcome.why
        endpoint.lost(outcome)
        return f"{outcome.why if outcome else ''} ({judge.attempts} calls)"

    def _wrongly_set_up(self, judge: JudgeConfig, failure: Failure) -> JudgeError:
        told = f"the endpoint of the judge {judge.model} ({judge.where}) {_WRONGLY_SET_UP[failure.status or 0]}"
        key = f"the key is read from ${judge.key_env}" if judge.key_env else "no key_env was given"
        return JudgeError(f"{told}; {key}; {self._kept} verdicts of this run are kept. {failure.why}")

    async def _once(self, endpoint: Endpoint, call: Call, attempt: int) -> Failure | None:
        """One call, accounted for whatever becomes of it; None if its verdict is in the cache."""
        usage: tuple[int, int] | None = None
        verdict: Verdict | None = None
        try:
            reply = await endpoint.call(call, attempt)
            usage = reply.usage
            if isinstance(reply, Failure):
                return reply
            try:
                verdict = read_verdict(call.question.kind, reply.text)
            except NoVerdict as error:
                return Failure(f"{error}{reply.ended}", after=0.0, usage=usage)
        finally:
            self._budget.settle(call.hold, usage=usage, verdict=verdict is not None)
            self._settled.set()
            self._settled = anyio.Event()
        tokens_in, tokens_out = usage or (0, 0)
        model, kind, reason = call.judge.model, call.question.kind, endpoint.clean(verdict.reason)
        self._cache.add(Entry(call.key, model, kind, verdict.value, reason, tokens_in, tokens_out))
        self._kept += 1
        return None

    async def _room(self, call: Call) -> bool:
        """Wait until the call fits into the budget; False, and the end of the work, if it never will."""
        while (short := self._budget.short(call.hold)) is not None:
            if self._budget.idle:
                where = f"in {self._cache.path}" if self._cache.path else "in memory (give a cache to keep them on disk)"
                missing = self._total - self._kept
                self._stop(self._budget.reached(short, self._kept, missing, where))
                return False
            await self._settled.wait()
            if self._stopped is not None:
                return False
        self._budget.hold(call.hold)
        return True

    async def _sleep(self, seconds: float) -> None:
        """Wait, but not past the end of the work."""
        with anyio.move_on_after(seconds):
            await self._ended.wait()

    def _stop(self, error: JudgeError) -> None:
        self._stopped = self._stopped or error
        self._ended.set()


def _first(error: BaseException) -> BaseException:
    """The first error of a group, which a caller can catch by its kind."""
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error
