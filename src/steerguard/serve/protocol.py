"""What a request may say: the part of OpenAI's protocol that is done rightly here, and a refusal by name of all else.

A field that is not known is an error, since whoever sends it expects something of it. So is one that would change the answer
and is not supported, unless it has the value that changes nothing. This module knows JSON values; it knows no HTTP, no
model and no guard.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from steerguard import files
from steerguard.backends.vllm.catalogue import ASKED
from steerguard.files import Malformed, shown
from steerguard.prompts import Message
from steerguard.serve.policy import XARGS

MAX_N = 16
"""Answers that one request may ask for."""
COLD = 1e-4
"""Temperatures below this are greedy: dividing by them leaves no number."""
MAX_STOPS = 4
"""Stop texts of one request, as OpenAI has it."""
ROLES: Mapping[str, str] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

Endpoint = Literal["chat", "completions"]


class Refused(Exception):
    """A request that gets an error in place of an answer."""

    def __init__(
        self, status: int, reason: str, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.reason, self.message, self.param = status, reason, message, param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.reason}}


def _invalid(message: str, param: str) -> Refused:
    return Refused(400, "invalid_value", message, param=param)


def _unsupported(message: str, param: str) -> Refused:
    return Refused(400, "unsupported", message, param=param)


@dataclass(frozen=True)
class Drawing:
    """How a request wants its answers drawn. Requests that want the same may share a batch."""

    temperature: float
    top_p: float
    seed: int | None
    "None: whatever comes"
    max_tokens: int
    stop: tuple[str, ...]


@dataclass(frozen=True)
class Request:
    """A request of either endpoint, read and found in order; what it says of guards is the policy's to read."""

    endpoint: Endpoint
    model: str
    messages: tuple[Message, ...]
    "of a chat"
    prompt: str | tuple[int, ...]
    "of a completion: text or tokens"
    n: int
    drawing: Drawing
    stream: bool
    usage: bool
    "a stream ends with a chunk that has the usage"
    body: Mapping[str, Any]


# ------------------------------------------------------------------------------------------------- what may be said


def _neutral(*allowed: Any) -> Callable[[Any], bool]:
    """A check for a value that changes nothing. `1` is not `True` here."""
    return lambda value: any(type(value) is type(one) and value == one for one in (None, *allowed))


NEUTRAL: Mapping[str, Callable[[Any], bool]] = {
    "audio": _neutral(),
    "best_of": _neutral(1),
    "echo": _neutral(False),
    "frequency_penalty": _neutral(0, 0.0),
    "function_call": _neutral("none"),
    "functions": _neutral([]),
    "logit_bias": _neutral({}),
    "logprobs": _neutral(False),
    "modalities": _neutral(["text"]),
    "moderation": _neutral(),
    "parallel_tool_calls": lambda value: value is None or isinstance(value, bool),
    "prediction": _neutral(),
    "presence_penalty": _neutral(0, 0.0),
    "reasoning_effort": _neutral(),
    "response_format": _neutral({"type": "text"}),
    "suffix": _neutral(""),
    "tool_choice": _neutral("none", "auto"),
    "tools": _neutral([]),
    "top_logprobs": _neutral(0),
    "verbosity": _neutral(),
    "web_search_options": _neutral(),
}
"""Fields of the protocol that are not supported here, with the values of them that change nothing."""
HARMLESS = {"metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user"}
"""Fields that say nothing of the answer."""
COMMON = {
    "model", "n", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options", ASKED, XARGS,
}  # fmt: skip
OWN: Mapping[Endpoint, set[str]] = {"chat": {"messages", "max_completion_tokens"}, "completions": {"prompt"}}


def parse(endpoint: Endpoint, content: bytes, *, longest: int) -> Request:
    """Read a body.

    Args:
        longest: tokens of an answer that a request may ask for, and the number for one that asks for none.

    Raises:
        Refused: 400, naming the field, what was got and what is allowed.
    """
    try:
        body = files.strict_json(content)
    except Malformed as error:
        raise Refused(400, "invalid_body", f"the body {error}") from error
    if not isinstance(body, dict):
        raise Refused(400, "invalid_body", f"the body must be an object, got {shown(body)}")
    _check_fields(endpoint, body)
    read = _Reader(body)
    model = read.take("model", str)
    if model is None:
        raise _invalid("model is missing; GET /v1/models lists what there is", "model")
    options = read.take("stream_options", dict) or {}
    stream = bool(read.take("stream", bool))
    if options and not stream:
        raise _invalid("stream_options belong to a stream; set stream, or leave them out", "stream_options")
    n = read.number("n", int, 1, low=1, high=MAX_N)
    return Request(
        endpoint, model,
        messages=_messages(body.get("messages")) if endpoint == "chat" else (),
        prompt=_prompt(body.get("prompt")) if endpoint == "completions" else "",
        n=int(n), drawing=_drawing(read, longest), stream=stream, usage=_usage(options), body=body,
    )  # fmt: skip


def _check_fields(endpoint: Endpoint, body: Mapping[str, Any]) -> None:
    for name, value in body.items():
        if name in NEUTRAL:
            if not NEUTRAL[name](value):
                raise _unsupported(f"{name} is not supported here, got {shown(value)}; leave it out", name)
        elif "steer" not in name.casefold() and name not in COMMON | OWN[endpoint] | HARMLESS:
            raise _unsupported(f"there is no field {shown(name)} here; leave it out", files.printable(name)[:64])


@dataclass(frozen=True)
class _Reader:
    body: Mapping[str, Any]

    def take(self, name: str, kind: files.Kind) -> Any:
        """The field, None if it is left out or null; of that kind, or refused."""
        value = self.body.get(name)
        if value is None:
            return None
        try:
            return files.of_kind(value, name, kind)
        except Malformed as error:
            raise _invalid(str(error), name) from error

    def number(self, name: str, kind: type, default: float, *, low: float, high: float) -> float:
        value = self.take(name, kind)
        if value is None:
            return default
        if not low <= value <= high:
            raise _invalid(f"{name} must be from {low:g} to {high:g}, got {shown(value)}", name)
        found: float = value
        return found


def _drawing(read: _Reader, longest: int) -> Drawing:
    given = [name for name in ("max_tokens", "max_completion_tokens") if read.body.get(name) is not None]
    if len(given) > 1:
        raise _invalid("max_tokens and max_completion_tokens say the same; give one", given[1])
    most = read.number(given[0], int, longest, low=1, high=longest) if given else longest
    stop = read.body.get("stop")
    stops = (stop,) if isinstance(stop, str) else () if stop is None else stop
    sound = isinstance(stops, list | tuple) and len(stops) <= MAX_STOPS and all(isinstance(s, str) and s for s in stops)
    if not sound:
        raise _invalid(f"stop must be a text or up to {MAX_STOPS} texts, got {shown(stop)}", "stop")
    top_p = read.number("top_p", float, 1.0, low=0, high=1)
    if top_p == 0:
        raise _invalid("top_p must be above 0 and at most 1, got 0", "top_p")
    seed = read.take("seed", int)
    if seed is not None and not abs(seed) < 2**63:
        raise _invalid(f"seed must be an integer of 64 bits, got {shown(seed)}", "seed")
    temperature = float(read.number("temperature", float, 1.0, low=0, high=2))
    return Drawing(
        temperature if temperature >= COLD else 0.0, float(top_p),
        None if seed is None else seed % 2**64, int(most), tuple(stops),
    )  # fmt: skip


def _usage(options: Mapping[str, Any]) -> bool:
    unknown = sorted(set(options) - {"include_usage", "include_obfuscation"})
    bad = [name for name, value in options.items() if not isinstance(value, bool | None)]
    if unknown or bad:
        name = (unknown or bad)[0]
        message = f"stream_options has include_usage, true or false; got {shown(dict(options))}"
        raise _unsupported(message, f"stream_options.{files.printable(name)[:64]}")
    return bool(options.get("include_usage"))


# ----------------------------------------------------------------------------------------------------- the prompt


def _messages(value: object) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise _invalid(f"messages must be a list of at least one message, got {shown(value)}", "messages")
    return tuple(_message(one, f"messages[{i}]") for i, one in enumerate(value))


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        raise _invalid(f"{where} must be an object with role and content, got {shown(value)}", where)
    more = [key for key in value if key not in ("role", "content") and value[key] not in (None, [])]
    if more:
        raise _unsupported(f"{where} has {', '.join(map(shown, more))}; only role and content are supported here", where)
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise _unsupported(f"{where}.role must be {', '.join(ROLES)}, got {shown(role)}", f"{where}.role")
    return {"role": ROLES[role], "content": _content(value.get("content"), f"{where}.content")}


def _content(value: object, where: str) -> str:
    """The text of a message, given as text or as parts of text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _invalid(f"{where} must be text, got {shown(value)}", where)
    texts = []
    for i, part in enumerate(value):
        sound = isinstance(part, dict) and set(part) == {"type", "text"} and part["type"] == "text"
        if not sound or not isinstance(part["text"], str):
            example = '{"type": "text", "text": ...}'
            raise _unsupported(f"{where}[{i}] must be {example}, got {shown(part)}; only text is read here", f"{where}[{i}]")
        texts.append(part["text"])
    return "".join(texts)


def _prompt(value: object) -> str | tuple[int, ...]:
    """One prompt: text, or tokens; in a list of one, too, as some clients write it."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(type(token) is int and token >= 0 for token in value):
        return tuple(value)
    raise _invalid(f"prompt must be one text or one list of tokens, not empty, got {shown(value)}", "prompt")


# ----------------------------------------------------------------------------------------------------- the answer

ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""What a client may call its own request."""


@dataclass(frozen=True)
class Writer:
    """Writes the answers to one request as OpenAI's objects, whole or in chunks."""

    request: Request
    request_id: str
    created: int

    @classmethod
    def of(cls, request: Request, request_id: str) -> Writer:
        return cls(request, request_id, int(time.time()))

    def _head(self, chunk: bool) -> dict[str, Any]:
        chat = self.request.endpoint == "chat"
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if chat else "text_completion"
        prefix = "chatcmpl" if chat else "cmpl"
        return {"id": f"{prefix}-{self.request_id}", "object": kind, "created": self.created, "model": self.request.model}

    def whole(self, texts: Sequence[tuple[str, str]], usage: Mapping[str, int], steering: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request that does not stream: (text, why it ended) of each choice."""
        chat = self.request.endpoint == "chat"
        choices = []
        for i, (text, finished) in enumerate(texts):
            said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            choices.append({"index": i, **said, "logprobs": None, "finish_reason": finished})
        return {**self._head(False), "choices": choices, "usage": dict(usage), "steering": dict(steering)}

    def piece(self, index: int, text: str | None, *, first: bool = False, finished: str | None = None) -> dict[str, Any]:
        """One chunk of a stream; without text, the last of its choice or the one that names the role."""
        if self.request.endpoint == "chat":
            delta: dict[str, Any] = {"role": "assistant", "content": ""} if first else {}
            if text is not None:
                delta["content"] = text
            said: dict[str, Any] = {"delta": delta}
        else:
            said = {"text": text or ""}
        return {**self._head(True), "choices": [{"index": index, **said, "logprobs": None, "finish_reason": finished}]}

    def ends(self, finished: Sequence[str], usage: Mapping[str, int], steering: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The last chunks: why each choice ended; what the guards did, beside the usage if that was asked for."""
        for i, why in enumerate(finished):
            chunk = self.piece(i, None, finished=why)
            if i == len(finished) - 1 and not self.request.usage:
                chunk["steering"] = dict(steering)
            yield chunk
        if self.request.usage:
            yield {**self._head(True), "choices": [], "usage": dict(usage), "steering": dict(steering)}
