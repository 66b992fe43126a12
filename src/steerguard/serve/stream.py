"""From the engine's thread to a client: the texts of a job as they come, and the end of waiting for one who has left.

This module knows jobs, asyncio and server-sent events. It knows no policy.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

from steerguard.serve.engine import Job

DONE = b"data: [DONE]\n\n"


def event(value: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"


class Texts:
    """The texts of a job, in the order in which they come. Made before the job is submitted."""

    def __init__(self, job: Job) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, str] | None] = asyncio.Queue()
        job.on_text = lambda choice, text: self._put((choice, text))
        job.answers.add_done_callback(lambda _: self._put(None))

    def _put(self, item: tuple[int, str] | None) -> None:
        with suppress(RuntimeError):  # the loop is closed: there is nobody left to tell
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def __aiter__(self) -> AsyncIterator[tuple[int, str]]:
        while (item := await self._queue.get()) is not None:
            yield item


async def finished(job: Job, gone: Callable[[], Awaitable[bool]]) -> bool:
    """Wait until a job is done: true. False as soon as nobody waits for it any more; then it is given up."""
    done = asyncio.Event()
    loop = asyncio.get_running_loop()

    def tell(_: object) -> None:
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(done.set)

    job.answers.add_done_callback(tell)
    try:
        while not done.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(done.wait(), 0.1)
            if not done.is_set() and await gone():
                return False
        return True
    finally:
        if not done.is_set():
            job.gone.set()
