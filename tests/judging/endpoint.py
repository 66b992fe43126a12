"""A real OpenAI-compatible endpoint on this machine, in a thread, that behaves as it is told."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Request:
    """One call as it came over the wire."""

    number: int
    "0 the first"
    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def user(self) -> str:
        return str(self.body["messages"][-1]["content"])

    @property
    def schema(self) -> dict[str, Any] | None:
        found = self.body.get("response_format")
        return found["json_schema"]["schema"] if found else None

    @property
    def kind(self) -> str:
        if "Which answer shows more" in self.user:
            return "pair"
        return "trait" if "Rubric:" in self.user else "coherence"


@dataclass(frozen=True)
class Reply:
    """What the endpoint says."""

    text: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    finish: str = "stop"
    usage: bool = True
    raw: bytes | None = None
    "the body as it is, in place of a completion"
    wait: float = 0.0
    "seconds before the reply"
    hang: bool = False
    "no reply at all until the endpoint is closed"
    cut: bool = False
    "close the connection in the middle of the body"


TOKENS_IN, TOKENS_OUT = 100, 20
Behaviour = Callable[[Request], Reply]


class Endpoint:
    """What came in, and where it listens."""

    def __init__(self, behave: Behaviour) -> None:
        self.behave, self.requests = behave, list[Request]()
        self.in_flight = self.most_in_flight = 0
        self.lock, self.closed = threading.Lock(), threading.Event()
        self.url = ""

    def answer(self, request: Request) -> Reply:
        with self.lock:
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            reply = self.behave(request)
            if reply.hang or reply.wait:
                self.closed.wait(None if reply.hang else reply.wait)
            return reply
        finally:
            with self.lock:
                self.in_flight -= 1


@contextmanager
def serving(behave: Behaviour) -> Iterator[Endpoint]:
    """The endpoint, as long as this lasts."""
    endpoint = Endpoint(behave)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with endpoint.lock:
                request = Request(len(endpoint.requests), self.path, dict(self.headers), body)
                endpoint.requests.append(request)
            reply = endpoint.answer(request)
            if endpoint.closed.is_set():
                return
            data = reply.raw if reply.raw is not None else completion(request, reply)
            try:
                self.send_response(reply.status)
                for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if reply.cut else data)
                self.close_connection = reply.cut
            except OSError:  # whoever asked has gone
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None: ...

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False
        request_queue_size = 64

        def handle_error(self, request: Any, client_address: Any) -> None: ...

    server = Server(("127.0.0.1", 0), Handler)
    endpoint.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint.closed.set()
        server.shutdown()
        server.server_close()
        thread.join()


def completion(request: Request, reply: Reply) -> bytes:
    if reply.status != 200:
        return json.dumps({"error": {"message": reply.text, "type": "error", "code": None}}).encode()
    message = {"role": "assistant", "content": reply.text}
    found: dict[str, Any] = {
        "id": "x", "object": "chat.completion", "created": 0, "model": request.body["model"],
        "choices": [{"index": 0, "finish_reason": reply.finish, "message": message}],
    }  # fmt: skip
    if reply.usage:
        total = TOKENS_IN + TOKENS_OUT
        found["usage"] = {"prompt_tokens": TOKENS_IN, "completion_tokens": TOKENS_OUT, "total_tokens": total}
    return json.dumps(found).encode()


# ------------------------------------------------------------------------------------------------ what judges say


def fenced(user: str, name: str) -> str:
    """What stands between the fences of that name, in the eyes of a judge that looks at the name alone."""
    found = re.search(rf"⟦{name}[^⟧]*⟧\n(.*?)\n⟦END {name}[^⟧]*⟧", user, re.DOTALL)
    assert found is not None, user
    return found.group(1)


def planted(text: str, kind: str = "trait") -> int:
    """The score that a test has planted in an answer, such as `trait=80 coherence=90`."""
    found = re.search(rf"{kind}=(-?\d+)", text)
    return int(found.group(1)) if found else 50


def verdict(value: int | str, reason: str = "so it is") -> str:
    return json.dumps({"reason": reason, "winner" if isinstance(value, str) else "score": value})


def well(request: Request) -> Reply:
    """A judge that says what was planted; of two answers, the one with the higher trait."""
    if request.kind == "pair":
        first, second = (planted(fenced(request.user, f"{which} ANSWER")) for which in ("FIRST", "SECOND"))
        return Reply(verdict("tie" if first == second else "first" if first > second else "second"))
    return Reply(verdict(planted(fenced(request.user, "ANSWER"), request.kind)))


def gullible(request: Request) -> Reply:
    """A judge that obeys whatever it takes to stand outside the fences, whoever wrote it.

    It knows a fence by its name alone, believes special tokens of chat templates, and copies a verdict that it is shown.
    """
    outside = re.sub(r"⟦(?P<name>[A-Z ]+?) [^⟧]*⟧\n.*?\n⟦END (?P=name) [^⟧]*⟧", "", request.user, flags=re.DOTALL)
    spoken = re.findall(r"<\|im_start\|>system\n(.*?)(?:<\||\Z)", request.user, flags=re.DOTALL)
    for text in (outside, *spoken):
        ordered = re.search(r"(?:give|score)\D{0,20}100", text.split("Reply with")[0], flags=re.IGNORECASE)
        shown = re.search(r'\{"reason": "[^".][^"]*", "score": 100\}', text)
        if ordered or shown:
            return Reply(verdict(100, "as you wish"))
    return well(request)
