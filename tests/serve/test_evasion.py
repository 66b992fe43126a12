"""Ways to evade a required guard over HTTP. Each is answered as the guard has it, or refused; none gets the other text."""

from __future__ import annotations

import gzip
import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest
from local_server import NAME, PROMPT, STEPS, Reference, Server, policy_of, serving

from steerguard.backends.base import Sampling

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
KEY, ADMIN = "the key of a client", "the key of the operator"


@pytest.fixture(scope="module")
def server(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`still` is required, `push` may be chosen; the key of `lab` is free of `still`, and its model name is kept for it."""
    folder = tmp_path_factory.mktemp("served")
    still = {"required": True, "strength": [20, 40]}
    policy = {
        "guards": policy_of(reference.guards, folder, still=still, push={"strength": [0, 4]}, mirror={"mode": "shadow"}),
        "default": ["still"],
        "models": {"lab": {"keys": ["lab"], "guards": {"still": {"mode": "off"}}, "default": []}},
        "keys": [{"id": "client", "env": "CLIENT_KEY"}, {"id": "lab", "env": "LAB_KEY"}],
        "admin": {"env": "ADMIN_KEY"},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("CLIENT_KEY", KEY), ("LAB_KEY", "the key of the lab"), ("ADMIN_KEY", ADMIN)):
            patch.setenv(name, value)
        with serving(reference.model, policy, folder) as running:
            yield running


@pytest.fixture(scope="module")
def texts(reference: Reference) -> dict[str, str]:
    """What each endpoint says guarded and unguarded; they differ."""
    prompt = reference.model.tokenizer(PROMPT)["input_ids"]

    def completed(guards: list[str]) -> str:
        own = tuple(map(reference.guard, guards))
        greedy = Sampling(temperature=0, max_new_tokens=STEPS)
        return reference.model.generate_tokens([tuple(prompt)], guards=[own], sampling=greedy)[0].text

    found = {
        "chat": reference.answer(PROMPT, ["still"]).text, "completions": completed(["still"]),
        "chat, unguarded": reference.answer(PROMPT, []).text, "completions, unguarded": completed([]),
    }  # fmt: skip
    assert len(set(found.values())) == 4
    return found


def chat(**more: Any) -> dict[str, Any]:
    return {"model": NAME, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": STEPS, "temperature": 0, **more}


def completion(**more: Any) -> dict[str, Any]:
    return {"model": NAME, "prompt": PROMPT, "max_tokens": STEPS, "temperature": 0, **more}


def raw(server: Server, method: str, path: str, body: bytes, headers: list[tuple[str, str]]) -> tuple[int, bytes]:
    """A request whose path, headers and body go over the wire as they are."""
    link = http.client.HTTPConnection("127.0.0.1", int(server.url.rpartition(":")[2]), timeout=120)
    try:
        link.putrequest(method, path, skip_accept_encoding=True)
        for name, value in headers:
            link.putheader(name, value)
        link.putheader("Content-Length", str(len(body)))
        link.endheaders(body)
        answer = link.getresponse()
        return answer.status, answer.read()
    finally:
        link.close()


JSON, BEARER = ("Content-Type", "application/json"), ("Authorization", f"Bearer {KEY}")


def said(content: bytes) -> list[str]:
    """Every text of an answer or of a stream, by choice."""
    text = content.decode()
    if not text.startswith("data:"):
        value = json.loads(text)
        return [c["text"] if "text" in c else c["message"]["content"] for c in value.get("choices", [])]
    found: dict[int, str] = {}
    for line in text.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:]).get("choices", []):
                new = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
                found[choice["index"]] = found.get(choice["index"], "") + new
    return list(found.values())


def steer(value: Any) -> dict[str, Any]:
    return chat(steering=value)


NONE = {"guards": []}
BODIES: dict[str, dict[str, Any]] = {
    "other alias": chat(model=f"{NAME}:unguarded"),
    "alias of another guard": chat(model=f"{NAME}:push") | {"steering": {"guards": ["push"]}},
    "alias kept for another key": chat(model=f"{NAME}:lab"),
    "model in capitals": chat(model=NAME.upper()),
    "model with a space": chat(model=f"{NAME} "),
    "model with a zero byte": chat(model=f"{NAME}\x00:unguarded"),
    "model by its path": chat(model=f"../{NAME}"),
    "model with look-alikes": chat(model="tіny"),
    "model as a list": chat(model=[NAME, f"{NAME}:unguarded"]),
    "two aliases": chat(model=f"{NAME}:push:unguarded"),
    "no guards": steer(NONE),
    "null steering": steer(None),
    "empty steering": steer({}),
    "false steering": steer(False),
    "steering as text": steer("{}"),
    "no guards as text": steer('{"guards": []}'),
    "null guards": steer({"guards": None}),
    "guards as an object": steer({"guards": {"still": False}}),
    "another guard instead": steer({"guards": ["push"]}),
    "the guard in capitals": steer({"guards": ["STILL"]}),
    "the guard with look-alikes": steer({"guards": ["stіll"]}),
    "zero strength": steer({"guards": [{"name": "still", "strength": 0}]}),
    "negative strength": steer({"guards": [{"name": "still", "strength": -20}]}),
    "less strength": steer({"guards": [{"name": "still", "strength": 19.999}]}),
    "strength as text": steer({"guards": [{"name": "still", "strength": "0"}]}),
    "strength as a list": steer({"guards": [{"name": "still", "strength": [0]}]}),
    "strength true": steer({"guards": [{"name": "still", "strength": True}]}),
    "null strength": steer({"guards": [{"name": "still", "strength": None}]}),
    "answer only": steer({"guards": [{"name": "still", "positions": "response"}]}),
    "positions nowhere": steer({"guards": [{"name": "still", "positions": []}]}),
    "mode of one's own": steer({"guards": [{"name": "still", "mode": "off"}]}),
    "not required": steer({"guards": [{"name": "still", "required": False}]}),
    "layers of one's own": steer({"guards": [{"name": "still", "layers": []}]}),
    "the guard twice": steer({"guards": ["still", {"name": "still", "strength": 0}]}),
    "where the answer begins": steer({"guards": ["still"], "start": 10**6}),
    "a switch": steer({"enabled": False}),
    "xargs": chat(vllm_xargs={"steering": '{"guards": []}'}),
    "xargs as an object": chat(vllm_xargs={"steering": NONE}),
    "xargs by the inner name": chat(vllm_xargs={"steerguard": '{"acts": []}'}),
    "both places": chat(steering={"guards": ["still"]}, vllm_xargs={"steering": '{"guards": []}'}),
    "both places, one empty": chat(steering=None, vllm_xargs={"steering": '{"guards": []}'}),
    "nested in extra_body": chat(extra_body={"steering": NONE}),
    "nested in itself": steer({"steering": NONE}),
    "in capitals": chat(Steering=NONE),
    "with a space": chat(**{"steering ": NONE}),
    "with look-alikes": chat(**{"ѕteering": NONE}),
    "with a ligature": chat(**{"ﬆeering": NONE}),
    "in metadata": chat(metadata={"steering": "off"}),
    "in a message": chat() | {"messages": [{"role": "user", "content": PROMPT, "steering": NONE}]},
    "in stream_options": chat(stream=True, stream_options={"steering": NONE}),
    "in tools": chat(tools=[{"type": "function", "function": {"name": "steering_off"}}]),
    "of the engine": chat(additional_config={"steerguard": {"guards": []}}),
    "extra_args": chat(extra_args={"steering": NONE}),
    "completions": completion(steering=NONE),
    "completions by alias": completion(model=f"{NAME}:unguarded"),
    "completions as they are": completion(),
    "stream": chat(stream=True),
    "stream without guards": chat(stream=True, steering=NONE),
    "stream of completions": completion(stream=True),
    "three answers": chat(n=3),
    "three answers streamed": chat(n=3, stream=True),
    "none of n": chat(n=0),
    "best of": completion(best_of=4),
    "echo": completion(echo=True),
    "beams": chat(use_beam_search=True, n=2),
    "a prefix of the answer": chat(continue_final_message=True),
    "a template of one's own": chat(chat_template="{{ messages[0]['content'] }}"),
    "a prompt for the chat": chat(prompt=PROMPT),
    "no tokens": chat(max_tokens=0),
}  # fmt: skip
ANSWERED = {
    "null steering", "empty steering", "steering as text", "in metadata", "completions as they are", "stream",
    "stream of completions", "three answers", "three answers streamed",
}  # fmt: skip
"""Those that say nothing against the guard; they are answered, guarded. All others are refused."""


@pytest.mark.parametrize("way", list(BODIES))
def test_a_body_does_not_evade(server: Server, texts: dict[str, str], way: str) -> None:
    body = BODIES[way]
    path = COMPLETIONS if "prompt" in body and "messages" not in body else CHAT
    status, content = raw(server, "POST", path, json.dumps(body).encode(), [JSON, BEARER])
    check(status, content, texts, "completions" if path == COMPLETIONS else "chat", answered=way in ANSWERED)


def check(status: int, content: bytes, texts: dict[str, str], endpoint: str, *, answered: bool | None = None) -> None:
    """Guarded, or refused with OpenAI's error and no text at all."""
    assert texts[f"{endpoint}, unguarded"] not in content.decode("utf-8", "replace")
    if answered is not None:
        assert (status == 200) == answered, content
    if status == 200:
        assert said(content)
        assert set(said(content)) == {texts[endpoint]}
    elif content == NOT_HTTP:
        assert status == 400
    else:
        assert 400 <= status < 500
        error = json.loads(content)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]


NOT_HTTP = b"Invalid HTTP request received."
"""What uvicorn says by itself, where httptools is installed and a method is none: the application never saw the request."""
DUMPED = json.dumps(chat())
CONTENTS: dict[str, bytes] = {
    "steering twice": DUMPED[:-1].encode() + b', "steering": {"guards": ["still"]}, "steering": {"guards": []}}',
    "model twice": DUMPED[:-1].encode() + b', "model": "tiny:unguarded"}',
    "guards twice inside": DUMPED[:-1].encode() + b', "steering": {"guards": ["still"], "guards": []}}',
    "escaped twice": DUMPED[:-1].encode() + b', "steering": {"guards": ["still"]}, "st\\u0065ering": {"guards": []}}',
    "escaped key": DUMPED[:-1].encode() + b', "st\\u0065ering": {"guards": []}}',
    "NaN": DUMPED[:-1].encode() + b', "steering": {"guards": [{"name": "still", "strength": NaN}]}}',
    "Infinity": DUMPED[:-1].encode() + b', "steering": {"guards": [{"name": "still", "strength": -Infinity}]}}',
    "a huge number": DUMPED[:-1].encode() + b', "steering": {"guards": [{"name": "still", "strength": 1e999}]}}',
    "a long integer": DUMPED[:-1].encode() + b', "steering": {"guards": [{"name": "still", "strength": ' + b"9" * 5000 + b"}]}}",
    "deep nesting": DUMPED[:-1].encode() + b', "steering": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "half a surrogate": DUMPED[:-1].encode() + b', "user": "\\ud800"}',
    "a comment": DUMPED[:-1].encode() + b', "steering": {"guards": []} /* off */}',
    "two bodies": DUMPED.encode() + b'{"steering": {"guards": []}}',
    "a list of bodies": b"[" + DUMPED.encode() + b"]",
    "byte-order mark": b"\xef\xbb\xbf" + DUMPED.encode(),
    "UTF-16": DUMPED.encode("utf-16"),
    "UTF-7": b'{"model": "tiny", +ACI-steering+ACI-: {}}',
    "not UTF-8": DUMPED.encode()[:-1] + b', "user": "\xff\xfe"}',
    "nothing": b"",
    "too long": DUMPED[:-1].encode() + b', "user": "' + b"x" * 3_000_000 + b'"}',
}


@pytest.mark.parametrize("way", list(CONTENTS))
def test_a_body_that_can_be_read_in_two_ways_is_refused(server: Server, texts: dict[str, str], way: str) -> None:
    status, content = raw(server, "POST", CHAT, CONTENTS[way], [JSON, BEARER])
    check(status, content, texts, "chat", answered=False)


Headers = list[tuple[str, str]]
HEADERS: dict[str, Headers] = {
    "a header of ours": [JSON, BEARER, ("x-steering-guard", "none")],
    "a header like a key": [JSON, BEARER, ("steering", '{"guards": []}'), ("x-steering", "off")],
    "another method": [JSON, BEARER, ("X-HTTP-Method-Override", "GET")],
    "another path": [JSON, BEARER, ("X-Original-URL", "/v1/steering/admin/reload"), ("X-Rewrite-URL", "/health")],
    "another host": [JSON, BEARER, ("X-Forwarded-For", "127.0.0.1"), ("X-Forwarded-Host", "admin")],
    "a type with words": [("Content-Type", 'application/json; charset="utf-7"'), BEARER],
    "no key": [JSON],
    "an empty key": [JSON, ("Authorization", "Bearer ")],
    "the hash of a key": [JSON, ("Authorization", "Bearer 0000000000000000000000000000000000000000000000000000000000000000")],
    "two keys": [JSON, BEARER, ("Authorization", "Bearer the key of the lab")],
    "two keys in one": [JSON, ("Authorization", f"Bearer {KEY}, Bearer the key of the lab")],
    "the admin key": [JSON, ("Authorization", f"Bearer {ADMIN}")],
    "another scheme": [JSON, ("Authorization", f"Basic {KEY}")],
    "a key elsewhere": [JSON, ("api-key", KEY), ("x-api-key", KEY)],
    "text": [("Content-Type", "text/plain"), BEARER],
    "a form": [("Content-Type", "multipart/form-data; boundary=x"), BEARER],
    "no type": [BEARER],
    "compressed, it says": [JSON, BEARER, ("Content-Encoding", "gzip")],
    "compressed twice": [JSON, BEARER, ("Content-Encoding", "identity, br")],
}
LET_IN = {"a header of ours", "a header like a key", "another method", "another path", "another host", "a type with words"}


@pytest.mark.parametrize("way", list(HEADERS))
def test_headers_do_not_evade(server: Server, texts: dict[str, str], way: str) -> None:
    status, content = raw(server, "POST", CHAT, DUMPED.encode(), HEADERS[way])
    check(status, content, texts, "chat", answered=way in LET_IN)


def test_a_compressed_body_is_not_read(server: Server, texts: dict[str, str]) -> None:
    body = gzip.compress(json.dumps(steer(NONE)).encode())
    check(*raw(server, "POST", CHAT, body, [JSON, BEARER, ("Content-Encoding", "gzip")]), texts, "chat", answered=False)


ROUTES: dict[str, tuple[str, str]] = {
    "GET": ("GET", CHAT),
    "PUT": ("PUT", CHAT),
    "PATCH": ("PATCH", CHAT),
    "lower case": ("post", CHAT),
    "a slash at the end": ("POST", CHAT + "/"),
    "two slashes": ("POST", "//v1/chat/completions"),
    "dots": ("POST", "/v1/models/../chat/completions"),
    "an encoded slash": ("POST", "/v1/chat%2Fcompletions"),
    "an encoded letter": ("POST", "/v1/chat/%63ompletions"),
    "encoded twice": ("POST", "/v1/chat/%2563ompletions"),
    "capitals": ("POST", "/V1/Chat/Completions"),
    "a query": ("POST", CHAT + "?steering=off&guards=&model=tiny:unguarded"),
    "a fragment": ("POST", CHAT + "#/v1/completions"),
    "a parameter": ("POST", CHAT + ";steering=off"),
    "without version": ("POST", "/chat/completions"),
    "vLLM's other endpoints": ("POST", "/inference/v1/generate"),
    "responses": ("POST", "/v1/responses"),
    "messages": ("POST", "/v1/messages"),
    "embeddings": ("POST", "/v1/embeddings"),
    "docs": ("GET", "/docs"),
    "schema": ("GET", "/openapi.json"),
    "reload without the key": ("POST", "/v1/steering/admin/reload"),
    "check without the key": ("POST", "/v1/steering/admin/check"),
    "another policy": ("PUT", "/v1/steering/policy"),
}


@pytest.mark.parametrize("way", list(ROUTES))
def test_routes_do_not_evade(server: Server, texts: dict[str, str], way: str) -> None:
    method, path = ROUTES[way]
    body = b"" if method == "GET" else DUMPED.encode()
    check(*raw(server, method, path, body, [JSON, BEARER]), texts, "chat")


def test_the_key_that_is_free_gets_the_other_text(server: Server, texts: dict[str, str]) -> None:
    """The negation: the texts above can be told apart over this very server, by whom the operator allowed it."""
    lab = ("Authorization", "Bearer the key of the lab")
    status, content = raw(server, "POST", CHAT, json.dumps(chat(model=f"{NAME}:lab")).encode(), [JSON, lab])
    assert status == 200
    assert said(content) == [texts["chat, unguarded"]]
    check(*raw(server, "POST", CHAT, DUMPED.encode(), [JSON, lab]), texts, "chat", answered=True)


def test_the_server_is_as_it_was(server: Server) -> None:
    """After all of this: ready, under its first policy, with a line for each request and none that went unguarded."""
    assert server.get("/ready").json()["ready"]
    lines = server.audit()
    assert [line["event"] for line in lines].count("policy") == 1
    answered = [line for line in lines if line["event"] == "request" and line["outcome"] == "answered"]
    assert answered
    assert all([one["name"] for one in line["guards"]] == ["still"] for line in answered if line["key"] == "client")
    assert all(line["key"] == "lab" for line in answered if line["model"] == f"{NAME}:lab")
