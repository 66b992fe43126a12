"""What is read again: a prompt and the tokens of an answer to it, by a model that nothing guards."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from steerguard.backends.base import GREEDY, Answer, Backend
from steerguard.errors import InputError
from steerguard.fitting import Stage
from steerguard.prompts import Prompt

T = TypeVar("T")
Exchange = tuple[Prompt, Sequence[int]]
"""A prompt and the token ids of an answer to it, as `Answer.ids` has them; () where there is no answer.

The last token is predicted, and never read: that is how generation leaves it.
"""


def exchanges(prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[Exchange]:
    """Each prompt with the tokens of its answer. Raises InputError for another number of answers."""
    if len(prompts) != len(answers):
        raise InputError(f"every prompt needs an answer, got {len(prompts)} prompts and {len(answers)} answers")
    return [(prompt, answer.ids) for prompt, answer in zip(prompts, answers, strict=True)]


def check_unguarded(model: Backend) -> None:
    """Refuse a model inside `guarded`: there, what is meant to be unguarded would be guarded too.

    Raises:
        InputError: a guard is entered.
    """
    answer = model.generate("Hello", sampling=_SHORT, trace=True)[0]
    if answer.traces:
        raise InputError(
            f"{model.identity.name} is guarded now, and this is measured against the unguarded model; call it outside "
            "`with model.guarded(...)`, and pass guards as an argument where they are asked for"
        )


_SHORT = replace(GREEDY, max_new_tokens=1)


def each(items: Collection[T], progress: Stage | None, what: str) -> Iterator[T]:
    """The items one by one; tells before each, and at the end, how many are done."""
    for done, item in enumerate(items):
        if progress is not None:
            progress(what, done, len(items))
        yield item
    if progress is not None:
        progress(what, len(items), len(items))
