"""Lines of work in processes of their own: on a model this small, n lines on one thread each are faster than one on n.

It knows processes and progress. What a line does is its own: a function of a module, with arguments and a result that can
be pickled, which tells its progress with `tell`. If another line fails or Ctrl-C is pressed it ends at once, wherever it is: what
it keeps must be kept as journals and atomic files are.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Event
from threading import Thread
from typing import Any, ParamSpec, TypeVar

from steerguard.fitting import Stage

P = ParamSpec("P")
T = TypeVar("T")
Word = tuple[str, int, int, float]


@dataclass(frozen=True)
class _Parent:
    """What a process knows of the one that started it."""

    words: SimpleQueue[Word | None]
    stop: Event
    "set when nobody waits for the lines any more"


_PARENT: _Parent | None = None


class Workers:
    """Processes that take lines in the order in which they are given."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def submit(self, line: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        return self._pool.submit(line, *args, **kwargs)


@contextmanager
def workers(n: int, progress: Stage | None) -> Iterator[Workers]:
    """n processes, each with the n-th part of torch's threads; they end with the block, whatever ends it."""
    import torch

    context = multiprocessing.get_context("spawn")  # torch does not survive a fork
    words: SimpleQueue[Word | None] = context.SimpleQueue()
    stop = context.Event()
    ear = Thread(target=_listen, args=(words, progress), daemon=True)
    ear.start()
    threads = max(1, torch.get_num_threads() // n)
    pool = ProcessPoolExecutor(n, mp_context=context, initializer=_begin, initargs=(_Parent(words, stop), threads))
    try:
        yield Workers(pool)
    except BaseException:
        stop.set()
        pool.shutdown(cancel_futures=True)
        raise  # the ear is left to itself: whoever ended in the middle of a word still holds the queue
    pool.shutdown()
    words.put(None)
    ear.join()


def tell(what: str, done: int, total: int, rate: float = 0.0, /) -> None:
    """Tell the parent how far a line is."""
    assert _PARENT is not None, "tell is called in a line of `workers`"
    _PARENT.words.put((what, done, total, rate))


def _begin(parent: _Parent, threads: int) -> None:
    """What each process does first. Ctrl-C is the parent's to hear: it tells the others to end."""
    global _PARENT
    import torch
    from transformers.utils import logging

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    _PARENT = parent
    Thread(target=_end_with, args=(parent.stop,), daemon=True).start()


def _end_with(stop: Event) -> None:
    stop.wait()
    os._exit(1)


def _listen(words: Any, progress: Stage | None) -> None:
    while (word := words.get()) is not None:
        if progress is not None:
            progress(*word)
