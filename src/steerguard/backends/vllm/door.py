"""The door of vLLM's HTTP server: what a body says of steering is either honoured or refused, on every endpoint.

vLLM's endpoints drop keys that they do not know, and some drop even `vllm_xargs`; and whatever is wrong with a request
that streams, they say after a 200. So a body that speaks of steering is looked at before any endpoint sees it: it must
say it where that endpoint reads it, once, and the engine must allow it. What does not speak of steering passes untouched,
as do the headers and all that is text, tools or a schema of the user's. An answer says in a header what acted on it.

This module knows JSON bodies and paths. What guards there are, the engine's frontend knows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from steerguard import files
from steerguard.backends.vllm.catalogue import ASKED, HEADER, Catalogue, Choice, header
from steerguard.errors import InputError
from steerguard.files import Malformed, shown

BODY, XARGS, PARAMS = (ASKED,), ("vllm_xargs", ASKED), ("sampling_params", "extra_args", ASKED)
READ: dict[str, tuple[tuple[str, ...], ...]] = {
    "/v1/chat/completions": (BODY, XARGS),
    "/v1/chat/completions/render": (BODY, XARGS),
    "/v1/chat/completions/batch": (BODY, XARGS),
    "/v1/completions": (BODY, XARGS),
    "/v1/completions/render": (BODY, XARGS),
    "/v1/responses": (BODY, XARGS),
    "/invocations": (BODY, XARGS),
    "/v1/messages": (XARGS,),
    "/inference/v1/generate": (PARAMS,),
}
"""Where each endpoint reads what a request asks for; the others always give the server's default guards."""
USERS_OWN = {"documents", "logit_bias", "metadata", "output_config", "prompt", "response_format", "structured_outputs",
             "text", "tools"}  # fmt: skip
"""Keys of a body whose values have keys of the user's own."""
MESSAGES = {"messages", "input"}
"""Keys whose values are messages: they have keys of the protocol, and below those of the user's own."""
_SPEAKS = re.compile(rb"steer|\\u", re.IGNORECASE)


class Door:
    """An ASGI application before vLLM's own."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and (catalogue := _catalogue(scope)) is not None:
            body, receive = await _body(receive)
            path = scope["path"].removeprefix(scope.get("root_path") or "").rstrip("/")
            choice = None
            if _SPEAKS.search(body) and not dict(scope["headers"]).get(b"content-type", b"").startswith(b"multipart/"):
                try:
                    choice = check(catalogue, path, body)
                except InputError as error:
                    await _refuse(send, str(error))
                    return
            if path in READ and not path.endswith("/render"):
                send = _telling(send, choice or catalogue.choose(None))
        await self.app(scope, receive, send)


def check(catalogue: Catalogue, path: str, body: bytes) -> Choice | None:
    """What a body chooses; None if it says nothing of steering.

    Raises:
        InputError: it says what this endpoint would not honour, or the engine not allow.
    """
    try:
        said = files.strict_json(body)
    except Malformed as error:
        if not any(_places(_read_loosely(body))):
            return None  # it is vLLM's to say what it thinks of it
        raise InputError(f"the body {error}") from error
    places = dict(_places(said))
    read = READ.get(path, ())
    for place in places:
        if place not in read:
            where = " or ".join(".".join(one) for one in read)
            means = f"it is read from {where}" if read else "its answers have the server's default guards"
            raise InputError(f"{path} does not read {shown('.'.join(place))}; {means}")
    if len(places) > 1:
        raise InputError(f"{ASKED!r} stands in {' and in '.join('.'.join(place) for place in places)}; say it once")
    for place, value in places.items():
        if place == XARGS and isinstance(value, dict):
            raise InputError(f"vLLM takes text in vllm_xargs: write {ASKED!r} as a JSON string there, or beside it as it is")
        return catalogue.choose(value)
    return None


def _read_loosely(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _places(value: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every key that speaks of steering, with what it says; not what is below one, nor what is the user's own."""
    if isinstance(value, dict):
        for key, below in value.items():
            if "steer" in key.casefold():
                yield (*at, key), below
            elif not (at == () and key in USERS_OWN) and at[:1] not in {(one,) for one in MESSAGES}:
                yield from _places(below, (*at, key))
    elif isinstance(value, list):
        for below in value:
            yield from _places(below, at)


def _catalogue(scope: Any) -> Catalogue | None:
    engine = getattr(scope["app"].state, "engine_client", None)
    found: Catalogue | None = getattr(getattr(engine, "input_processor", None), "steerguard", None)
    return found


async def _body(receive: Any) -> tuple[bytes, Any]:
    """The body, and a `receive` that says it again and goes on."""
    messages = []
    while True:
        messages.append(await receive())
        if messages[-1]["type"] != "http.request" or not messages[-1].get("more_body", False):
            break
    kept = iter(messages)

    async def again() -> Any:
        message = next(kept, None)
        return await receive() if message is None else message

    return b"".join(message.get("body", b"") for message in messages), again


def _telling(send: Any, choice: Choice) -> Any:
    """A `send` that puts into the header of an answer what acts on it."""
    told = (HEADER.encode(), header((act.name, act.digest) for act in choice.acts).encode())

    async def sent(message: Any) -> None:
        if message["type"] == "http.response.start" and message["status"] == 200:
            message = {**message, "headers": [*message.get("headers", ()), told]}
        await send(message)

    return sent


async def _refuse(send: Any, message: str) -> None:
    error = {"message": message, "type": "BadRequestError", "param": ASKED, "code": 400}
    said = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(said)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": said})
