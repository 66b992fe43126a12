"""Endpoints: one call to one judge through inspect-ai's model layer, and what came of it.

A call ends with a reply or with a `Failure` that says whether another may help; nothing an endpoint can do raises. No
key leaves this module but to the client: it is cut out of all that an endpoint says before anybody reads it.

inspect-ai's own retries and its cache are off: retries are counted by us, and its cache does not know all that decides.
"""

from __future__ import annotations

import logging
import os
import random
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from typing import Any

import anyio

from steerguard.errors import JudgeError
from steerguard.judging.budget import Hold
from steerguard.judging.cache import key_of
from steerguard.judging.config import JudgeConfig
from steerguard.judging.prompts import Question

Sleep = Callable[[float], Awaitable[None]]
INSTALL = 'pip install "steerguard[judge]"'
_OLDEST = (0, 3, 285)
"""The oldest inspect-ai that works with the openai client of today; `pyproject.toml` says the same."""
_SECRET = re.compile(r"(?:^|_)(?:API_?KEY|KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)
_ENOUGH_FOR_A_SECRET = 8
"""Characters; what is shorter is a placeholder such as `none`, and would be cut out of ordinary words."""
_REFUSED = (400, 413, 422)
_LOGGING = ("inspect_ai", "openai", "httpx", "httpx2", "httpcore", "httpcore2", "anthropic")
_FRAMING = 64
"""Tokens that a chat template may put around two messages."""


@dataclass(frozen=True)
class Call:
    """One question to one judge, for the draw of that number."""

    judge: JudgeConfig
    question: Question
    draw: int = 0

    @cached_property
    def key(self) -> str:
        return key_of(self.judge, self.question, self.draw)

    @cached_property
    def hold(self) -> Hold:
        """The most that it can take: no token is shorter than a byte."""
        size = len(self.question.system.encode()) + len(self.question.user.encode())
        return Hold(self.judge, size + _FRAMING, self.judge.max_tokens)


@dataclass(frozen=True)
class Failure:
    """One call that brought nothing."""

    why: str
    again: bool = True
    "whether another call may help"
    after: float | None = None
    "seconds that the endpoint asks to wait"
    limited: bool = False
    "the endpoint is well, and has too much to do"
    status: int | None = None
    usage: tuple[int, int] | None = (0, 0)


@dataclass(frozen=True)
class Reply:
    text: str
    usage: tuple[int, int] | None
    ended: str
    "how it ended, if not as it should"


class Endpoint:
    """One judge's endpoint, and how it has behaved."""

    def __init__(self, judge: JudgeConfig, model: Any, hidden: Sequence[str], sleep: Sleep) -> None:
        self.judge, self._model, self._hidden, self._sleep = judge, model, hidden, sleep
        self._structured, self._in_a_row, self._not_before, self._works = judge.structured, 0, 0.0, False
        self.down = ""
        "why it is taken to be down"

    async def call(self, call: Call, attempt: int) -> Reply | Failure:
        """One call within its time limit."""
        wait = self._not_before - anyio.current_time()
        if wait > 0:
            await self._sleep(wait)
        structured, output, failure = self._structured, None, None
        with anyio.move_on_after(self.judge.timeout):
            try:
                output = await self._model.generate(_messages(call.question), config=_options(call, attempt, structured))
            except Exception as error:
                failure = self._failure(_cause(error))
                if failure is None:
                    raise  # no endpoint's doing
        if output is not None:
            self._in_a_row, self._works = 0, True
            return self._reply(output)
        failure = failure or Failure(f"the judge did not answer within {self.judge.timeout:g} s", usage=None)
        if self.judge.structured and failure.status in _REFUSED:
            self._structured = not structured  # it may not know schemas; if that was not why, they are used again
            if structured:
                return Failure(failure.why, after=0.0)
        if failure.limited:
            wait = self.judge.wait if failure.after is None else failure.after
            self._not_before = max(self._not_before, anyio.current_time() + min(wait, self.judge.longest_wait))
        elif failure.status not in _REFUSED or not self._works:  # one that works refuses what it is sent, such as its length
            self._count(failure)
        return failure

    def clean(self, text: str) -> str:
        """A text without keys."""
        return _scrub(text, self._hidden)

    async def pause(self, attempt: int, last: Failure | None) -> None:
        """Wait before a further call: as long as the endpoint said, else twice as long as the last time."""
        wait = self.judge.wait * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
        if last is not None and last.after is not None:
            wait = last.after
        await self._sleep(min(wait, self.judge.longest_wait))

    def lost(self, last: Failure | None) -> None:
        """A verdict was given up after all calls that it may have."""
        if last is not None and last.limited:
            self._count(last)

    def _count(self, failure: Failure) -> None:
        self._in_a_row += 1
        if self._in_a_row >= self.judge.give_up:
            told = f"the judge {self.judge.model} ({self.judge.where}) is taken to be down"
            self.down = f"{told}, after {self._in_a_row} failures in a row: {failure.why}"

    def _reply(self, output: Any) -> Reply:
        usage = output.usage
        counted = None
        if usage is not None and (usage.input_tokens or usage.output_tokens):
            cached = (usage.input_tokens_cache_read or 0) + (usage.input_tokens_cache_write or 0)
            counted = (int(usage.input_tokens + cached), int(usage.output_tokens))
        reason = output.stop_reason if output.choices else "unknown"
        ended = {
            "max_tokens": f"; it was cut off at {self.judge.max_tokens} tokens (max_tokens)",
            "model_length": "; it was cut off at the end of the model's context",
            "content_filter": "; the endpoint refused or filtered it",
        }.get(reason, "")
        text = output.completion if output.choices else ""
        return Reply(self.clean(text), counted, ended)

    def _failure(self, error: BaseException) -> Failure | None:
        """What went wrong with a call; None if that is not of the endpoint's making."""
        decision = self._model.api.should_retry(error)
        status = getattr(error, "status_code", None)
        if not decision and not isinstance(status, int) and not isinstance(error, _openai_error()):
            # a reply that is no JSON is the endpoint's; all else is a mistake of ours or of a library
            if not isinstance(error, ValueError) or type(error).__name__ != "JSONDecodeError":
                return None
            decision = True
        said = " ".join(self.clean(str(getattr(error, "provider_message", None) or error)).split())[:300]
        return Failure(
            f"the judge's endpoint failed{f' with status {status}' if status else ''}: {said or type(error).__name__}",
            again=bool(decision),
            after=getattr(decision, "retry_after", None),
            limited=status == 429,
            status=status if isinstance(status, int) else None,
        )


# --------------------------------------------------------------------------------------------------- inspect-ai


def _inspect() -> Any:
    try:
        import inspect_ai.model as model
        import openai  # noqa: F401
    except ImportError as error:
        raise JudgeError(f"judges need inspect-ai and openai, and {error.name} is not there; {INSTALL}") from error
    return model


def _check_version() -> None:
    """Refuse an inspect-ai that pip went back to, without a word, to please another package."""
    found = metadata.version("inspect-ai")
    if tuple(int(digits) for digits in re.findall(r"\d+", found)[:3]) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise JudgeError(f'judges need inspect-ai {oldest} or newer, got {found}; pip install "inspect-ai>={oldest}"')


def _openai_error() -> type[Exception]:
    import openai

    found: type[Exception] = openai.OpenAIError
    return found


def open_model(judge: JudgeConfig, key: str | None) -> Any:
    """inspect-ai's model of a judge, to be used as an async context. Raises JudgeError."""
    inspect = _inspect()
    _check_version()
    name, more = judge.model, dict[str, Any]()
    if judge.base_url is not None:
        name = f"openai-api/steerguard/{judge.model}"
        key = key or "none"  # the client wants one
    if name.split("/")[0] in ("openai", "openai-api"):
        more["max_retries"] = 0  # the client's own: retries are counted here
    why = ""
    try:
        return inspect.get_model(name, base_url=judge.base_url, api_key=key, memoize=False, **more)
    except (ValueError, RuntimeError, ImportError, TypeError) as error:
        why = _scrub(str(error), secrets([key]))
    except Exception as error:
        if type(error).__name__ != "PrerequisiteError":  # what inspect-ai raises for a key or a package that is missing
            raise
        why = _scrub(str(getattr(error, "message", error)), secrets([key]))
    raise JudgeError(f"the judge {judge.model} cannot be set up: {' '.join(why.split())}")


def _messages(question: Question) -> list[Any]:
    inspect = _inspect()
    return [inspect.ChatMessageSystem(content=question.system), inspect.ChatMessageUser(content=question.user)]


def _options(call: Call, attempt: int, structured: bool) -> Any:
    inspect = _inspect()
    judge, schema = call.judge, None
    if structured:
        from inspect_ai.util import JSONSchema

        schema = inspect.ResponseSchema(name="verdict", json_schema=JSONSchema(**call.question.schema), strict=True)
    return inspect.GenerateConfig(
        temperature=judge.temperature,
        top_p=judge.top_p,
        max_tokens=judge.max_tokens,
        reasoning_effort=judge.reasoning_effort,
        seed=None if judge.seed is None else judge.seed + call.draw + 1000 * attempt,
        response_schema=schema,
        max_retries=0,
        max_connections=1000,  # ours is the limit; inspect's is shared by all that have one key and model
        cache=False,
    )


def _cause(error: BaseException) -> BaseException:
    """What inspect-ai's retries, which are off, wrap."""
    attempt = getattr(error, "last_attempt", None)
    return (attempt.exception() if attempt is not None else None) or error


# --------------------------------------------------------------------------------------------------------- keys


def key_for(judge: JudgeConfig) -> str | None:
    """The judge's key, to be handed to the client and to nobody else. Raises JudgeError if it is not there."""
    if judge.key_env is None:
        return None
    key = os.environ.get(judge.key_env, "").strip()
    if not key:
        raise JudgeError(f"the judge {judge.model} needs a key: the environment variable {judge.key_env} is not set")
    return key


def secrets(keys: Iterable[str | None]) -> list[str]:
    """Everything that must not be shown, longest first: the keys in use, and whatever the environment calls one."""
    named = [value for name, value in os.environ.items() if _SECRET.search(name)]
    return sorted({s for s in [*keys, *named] if s and len(s) >= _ENOUGH_FOR_A_SECRET}, key=len, reverse=True)


@contextmanager
def keys_unlogged(hidden: Sequence[str]) -> Iterator[None]:
    """Drop what the libraries below would log with a key in it, such as an endpoint's error that repeats it."""

    def clean(record: logging.LogRecord) -> bool:
        told = str(vars(record))
        return not any(secret in told for secret in hidden)

    names = [name for name in logging.root.manager.loggerDict if name.split(".")[0] in _LOGGING]
    for name in names:
        logging.getLogger(name).addFilter(clean)
    try:
        yield
    finally:
        for name in names:
            logging.getLogger(name).removeFilter(clean)


def _scrub(text: str, hidden: Sequence[str]) -> str:
    for secret in hidden:
        text = text.replace(secret, "[key]")
    return text
