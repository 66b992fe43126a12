"""Guards over HTTP: a real `vllm serve`, asked as clients ask it.

What a request chooses is what transformers answers under the same guards; what it may not choose is a 400 that says
what is allowed; and what it says in a place that nobody reads is a 400, too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

pytest.importorskip("vllm.engine.arg_utils", reason="needs vLLM")
openai = pytest.importorskip("openai")

from processes import PROMPT, PROMPTS, STEPS, Reference, Server, serving, three_guards  # noqa: E402
from stress import Crowd, configurations  # noqa: E402

import steerguard as sg  # noqa: E402

pytestmark = pytest.mark.slow

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
GENERATE = "/inference/v1/generate"
DEFAULT = ["still"]
STRONG: dict[str, Any] = {"name": "pushing", "strength": 6, "positions": "all"}
CHOICES: tuple[list[Any], ...] = (
    [], ["still"], ["pushing"], ["mirroring"], ["still", "mirroring"], ["mirroring", "still"], [STRONG],
    [{"name": "pushing", "strength": -4.5}, "still"], [{"name": "pushing", "positions": "all"}],
)  # fmt: skip


@pytest.fixture(scope="module")
def reference() -> Reference:
    model = sg.load("organism")
    return Reference(model, three_guards(model))


@pytest.fixture(scope="module")
def server(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    for guard in reference.guards.values():
        guard.save(folder / f"{guard.name}.guard")
    ranged = {"file": str(folder / "pushing.guard"), "strength": [-6, 8], "positions": ["all", "response"]}
    guards = [str(folder / "still.guard"), ranged, str(folder / "mirroring.guard")]
    with serving(folder, {"guards": guards, "default": DEFAULT}, "--enable-scale-out") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300, max_retries=0) as made:
        yield made


def asked(guards: Any) -> dict[str, Any]:
    return {"steering": {"guards": guards}}


def in_xargs(guards: Any) -> dict[str, Any]:
    return {"vllm_xargs": {"steering": json.dumps({"guards": guards})}}


def chat(prompt: str = PROMPT, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {"model": "organism", "messages": messages, "max_tokens": STEPS, "temperature": 0, **more}


def text_of(response: httpx.Response) -> str:
    """The answer in any of the protocols."""
    assert response.status_code == 200, response.text
    said = response.json()
    if "choices" in said:
        (choice,) = said["choices"]
        return choice["text"] if "text" in choice else choice["message"]["content"]
    (message,) = said.get("output", [said])
    return "".join(part["text"] for part in message["content"])


# ------------------------------------------------------------------------------------------------ what is asked for


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_request_gets_what_it_asks_for(server: Server, client: Any, reference: Reference, prompt: str) -> None:
    """In the body and in `vllm_xargs`, in chat and in completions; and the guards do something."""
    texts = set()
    for guards in CHOICES:
        due = reference.answer(prompt, guards)
        texts.add(due.text)
        body = client.chat.completions.create(**chat(prompt), extra_body=asked(guards))
        xargs = client.chat.completions.create(**chat(prompt), extra_body=in_xargs(guards))
        tokens = client.completions.create(
            model="organism", prompt=list(due.prompt_ids), max_tokens=STEPS, temperature=0, extra_body=asked(guards)
        )
        assert body.usage.prompt_tokens == len(due.prompt_ids)
        for got in (body.choices[0].message.content, xargs.choices[0].message.content, tokens.choices[0].text):
            assert got == due.text, guards
    assert len(texts) > 2


@pytest.mark.parametrize("more", [{}, {"steering": None}, {"steering": {}}, {"vllm_xargs": {"steering": "null"}}], ids=str)
def test_who_says_nothing_gets_the_default(server: Server, reference: Reference, more: dict[str, Any]) -> None:
    due = reference.answer(PROMPT, DEFAULT)
    assert due.text != reference.answer(PROMPT, []).text
    assert text_of(server.post(CHAT, chat(**more))) == due.text


@pytest.mark.parametrize("guards", [[], ["still"], [STRONG]], ids=str)
def test_a_stream_says_the_same(client: Any, reference: Reference, guards: list[Any]) -> None:
    due = reference.answer(PROMPT, guards)
    chunks = client.chat.completions.create(**chat(stream=True), extra_body=asked(guards))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == due.text
    chunks = client.completions.create(
        model="organism", prompt=list(due.prompt_ids), max_tokens=STEPS, temperature=0, stream=True, extra_body=asked(guards)
    )
    assert "".join(c.choices[0].text for c in chunks) == due.text


def test_every_one_of_n_is_guarded(client: Any, reference: Reference) -> None:
    """Three draws of a temperature at which only one token can be drawn are three times the greedy answer."""
    due = reference.answer(PROMPT, [STRONG]).text
    body = chat(n=3) | {"temperature": 0.01, "seed": 1}
    got = client.chat.completions.create(**body, extra_body=asked([STRONG]) | {"top_k": 1})
    assert [choice.message.content for choice in got.choices] == [due] * 3


def test_logprobs_are_the_guarded_models(client: Any, reference: Reference) -> None:
    """The first token's, against those that transformers computes under the guard."""
    import numpy as np

    logits = reference.model.logits(PROMPT, guards=(reference.guard({**STRONG, "positions": "all"}),))[-1].astype(np.float64)
    due = np.sort(logits - logits.max() - np.log(np.exp(logits - logits.max()).sum()))[::-1][:3]
    got = client.chat.completions.create(**chat(logprobs=True, top_logprobs=3), extra_body=asked([STRONG]))
    first = got.choices[0].logprobs.content[0]
    assert [one.logprob for one in first.top_logprobs] == pytest.approx(list(due), abs=2e-3)
    assert first.logprob == pytest.approx(due[0], abs=2e-3)


def test_a_stop_text_ends_a_guarded_answer(client: Any, reference: Reference) -> None:
    due = reference.answer(PROMPT, ["still"]).text
    stop = due.split()[3]
    got = client.chat.completions.create(**chat(stop=[stop]), extra_body=asked(["still"])).choices[0]
    assert (got.message.content, got.finish_reason) == (due[: due.index(stop)], "stop")


def test_a_seed_repeats_a_guarded_answer(client: Any) -> None:
    hot = chat("Tell me about books.") | {"temperature": 1.5}

    def draw(seed: int) -> str:
        return client.chat.completions.create(**hot, seed=seed, extra_body=asked([STRONG])).choices[0].message.content

    answers = {seed: {draw(seed), draw(seed)} for seed in range(4)}
    assert all(len(texts) == 1 for texts in answers.values())
    assert len(set.union(*answers.values())) > 1


# --------------------------------------------------------------------------------------------- every other endpoint


def other(reference: Reference) -> dict[str, dict[str, Any]]:
    """Bodies of the other endpoints that generate, and of those that only score."""
    ids = list(reference.answer(PROMPT, []).prompt_ids)
    params = {"max_tokens": STEPS, "temperature": 0}
    return {
        RESPONSES: {"model": "organism", "input": PROMPT, "max_output_tokens": STEPS, "temperature": 0},
        MESSAGES: chat(),
        GENERATE: {"model": "organism", "token_ids": ids, "sampling_params": params, "output_mode": "text"},
        "/invocations": chat(),
        "/v1/chat/completions/batch": chat() | {"messages": [chat()["messages"]]},
        "/generative_scoring": {"model": "organism", "query": PROMPT, "items": ["a", "b"], "label_token_ids": [5, 6]},
    }


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES, "/invocations", "/v1/chat/completions/batch", GENERATE])
def test_every_endpoint_guards(server: Server, reference: Reference, path: str) -> None:
    """The default where nothing is said; what is asked for where the endpoint reads it."""
    body = other(reference)[path]
    default, strong = (reference.answer(PROMPT, guards).text for guards in (DEFAULT, [STRONG]))
    assert len({default, strong, reference.answer(PROMPT, []).text}) == 3
    if path == GENERATE:
        params = body["sampling_params"]
        chosen = [{**body, "sampling_params": {**params, "extra_args": asked([STRONG])}}]
    else:
        chosen = [{**body, **in_xargs([STRONG])}]
    if path not in (MESSAGES, GENERATE):
        chosen.append({**body, **asked([STRONG])})
    assert text_of(server.post(path, body)) == default
    for one in chosen:
        assert text_of(server.post(path, one)) == strong


def test_beams_have_the_default_and_cannot_choose(server: Server) -> None:
    body = chat(use_beam_search=True, n=2)
    assert server.post(CHAT, body).status_code == 200
    refused(server.post(CHAT, {**body, **asked(["still"])}), "beam search cannot choose guards")
    refused(server.post(CHAT, {**body, "vllm_xargs": {"steering": "{}"}}), "beam search cannot choose guards")


# ------------------------------------------------------------------------------------------------- what is refused


def refused(response: httpx.Response, *said: str) -> None:
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    message = error["message"] if isinstance(error, dict) else error
    for one in said:
        assert one in message


BAD: tuple[tuple[Any, str], ...] = (
    ({"guards": ["nothing"]}, "there is no guard 'nothing'; there are still, pushing, mirroring"),
    ({"guards": [{"name": "pushing", "strength": 8.001}]}, "strength 8.001 is not allowed here; allowed is -6 to 8"),
    ({"guards": [{"name": "pushing", "strength": 1e300}]}, "allowed is -6 to 8"),
    ({"guards": [{"name": "pushing", "strength": "6"}]}, "strength '6' is not allowed here; allowed is -6 to 8"),
    ({"guards": [{"name": "pushing", "strength": True}]}, "strength True is not allowed here"),
    ({"guards": [{"name": "pushing", "strength": None}]}, "strength None is not allowed here"),
    ({"guards": [{"name": "pushing", "strength": [[6]]}]}, "strength [[6]] is not allowed here"),
    ({"guards": [{"name": "still", "strength": 11}]}, "strength 11 is not allowed here; allowed is 36"),
    ({"guards": [{"name": "still", "positions": "response"}]}, "are not allowed here; allowed is all"),
    ({"guards": [{"name": "pushing", "positions": "prompt"}]}, "are not allowed here; allowed is response, all"),
    ({"guards": [{"name": "pushing", "positions": ["all"]}]}, "are not allowed here; allowed is response, all"),
    ({"guards": [{"name": "still", "power": 3}]}, "a guard has no key 'power'; it has name, strength, positions"),
    ({"guards": [{"strength": 3}]}, "a guard is a name"),
    ({"guards": [["still"]]}, "a guard is a name"),
    ({"guards": [None]}, "a guard is a name"),
    ({"guards": ["still", "still"]}, "names each guard once"),
    ({"guards": ["still"] * 17}, "a list of at most 16 guards"),
    ({"guards": "still"}, "must be a list"),
    ({"guards": {"still": 1}}, "must be a list"),
    ({"guards": None}, "must be a list"),
    ({"guard": ["still"]}, "steering has no key 'guard'; it has guards"),
    ({"guards": ["still"], "trace": True}, "steering has no key 'trace'"),
    ({"guards": ["still"], "start": 0}, "steering has no key 'start'"),
    (["still"], "steering must be an object"),
    (7, "steering must be an object"),
    (False, "steering must be an object"),
)  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("steering", "said"), BAD, ids=str)
def test_what_is_not_allowed_is_a_400(server: Server, steering: Any, said: str, stream: bool) -> None:
    """Also where the answer would be streamed: it is said before the stream begins."""
    refused(server.post(CHAT, chat(stream=stream, steering=steering)), said)
    refused(server.post(CHAT, chat(stream=stream, vllm_xargs={"steering": json.dumps(steering)})), said)


@pytest.mark.parametrize(
    ("steering", "said"),
    [
        ('{"guards": [{"name": "pushing", "strength": NaN}]}', "numbers must be finite"),
        ('{"guards": [{"name": "pushing", "strength": -Infinity}]}', "numbers must be finite"),
        ('{"guards": [{"name": "pushing", "strength": 1e999}]}', "numbers must be finite"),
        ('{"guards": [{"name": "pushing", "strength": 1%s}]}' % ("0" * 400), "digits"),
        ('{"guards": ["still"], "guards": []}', "has the key 'guards' twice"),
        ('{"guards": [{"name": "still", "name": "pushing"}]}', "has the key 'name' twice"),
    ],
)  # fmt: skip
def test_what_is_not_strict_json_is_a_400(server: Server, steering: str, said: str) -> None:
    body = json.dumps(chat(steering=0)).replace('"steering": 0', f'"steering": {steering}')
    refused(server.post(CHAT, content=body), said)
    refused(server.post(CHAT, chat(vllm_xargs={"steering": steering})), said)


@pytest.mark.parametrize("steering", ["", "still", "{", '{"guards": ["still"]', "[1,]"])
def test_a_string_that_is_not_json_is_a_400(server: Server, steering: str) -> None:
    refused(server.post(CHAT, chat(vllm_xargs={"steering": steering})), "steering: is not JSON")


def test_an_object_where_vllm_takes_text_is_a_400(server: Server) -> None:
    refused(server.post(CHAT, chat(vllm_xargs=asked(["still"]))), "as a JSON string")


def test_what_is_said_twice_is_a_400(server: Server) -> None:
    both = asked(["still"]) | {"vllm_xargs": {"steering": '{"guards": []}'}}
    refused(server.post(CHAT, chat(**both)), "say it once")
    twice = json.dumps(chat(**asked(["still"])))[:-1] + ', "steering": {"guards": []}}'
    refused(server.post(CHAT, content=twice), "has the key 'steering' twice")


DECISION = {"acts": [], "keys": ["", ""], "start": None, "trace": False, "read": None}
MISPLACED: tuple[dict[str, Any], ...] = (
    {"vllm_xargs": {"steerguard": json.dumps(DECISION)}}, {"steerguard": DECISION},
    *({key: {"guards": []}} for key in ("Steering", "steerng", "steer", "STEERING", "steering_guards", "x-steering")),
    *({"vllm_xargs": {key: '{"guards": []}'}} for key in ("Steering", "steerng", "steer", "steering_guards")),
    {"extra_body": asked([])}, {"extra_args": asked([])}, {"sampling_params": {"extra_args": asked([])}},
    {"chat_template_kwargs": asked([])}, {"stream_options": {"include_usage": True, **asked([])}},
    {"vllm_xargs": {"extra": 1}, "additional_config": {"steerguard": {}}}, {"kv_transfer_params": asked([])},
    {"mm_processor_kwargs": asked([])}, {"messages": [{"role": "user", "content": PROMPT, **asked([])}]},
)  # fmt: skip


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, MESSAGES])
@pytest.mark.parametrize("more", MISPLACED, ids=str)
def test_what_is_misplaced_is_a_400(server: Server, reference: Reference, path: str, more: dict[str, Any]) -> None:
    """Also the decision that only the frontend makes."""
    body = {**other(reference), CHAT: chat(), COMPLETIONS: {"model": "organism", "prompt": PROMPT}}[path]
    refused(server.post(path, {**body, **more}), "it is read from", "steer")


@pytest.mark.parametrize("path", [MESSAGES, GENERATE, "/generative_scoring", "/tokenize"])
def test_what_an_endpoint_does_not_read_is_a_400(server: Server, reference: Reference, path: str) -> None:
    body = {**other(reference), "/tokenize": {"model": "organism", "prompt": PROMPT}}[path]
    assert server.post(path, body).status_code == 200
    refused(server.post(path, {**body, **asked([])}), "does not read 'steering'")


def test_the_decision_cannot_be_forged_in_sampling_parameters(server: Server, reference: Reference) -> None:
    body = other(reference)[GENERATE]
    forged = {**body, "sampling_params": {**body["sampling_params"], "extra_args": {"steerguard": DECISION}}}
    refused(server.post(GENERATE, forged), "steerguard")


def test_what_is_the_users_own_may_speak_of_steering(server: Server, reference: Reference) -> None:
    """Text, tools and schemas are not looked at."""
    wheel = {"type": "object", "properties": {"steering": {"type": "number"}}}
    tool = {"type": "function", "function": {"name": "turn", "parameters": wheel}}
    body = chat("What is steering?", tools=[tool], tool_choice="none", metadata={"steering": "wheel"}, user='{"steering": 1}')
    assert server.post(CHAT, body).status_code == 200
    twice = json.dumps(chat("Is steering fine?")).replace('"temperature": 0', '"temperature": 1, "temperature": 0')
    assert server.post(CHAT, content=twice).status_code == 200


def test_an_escaped_key_is_a_key(server: Server, reference: Reference) -> None:
    strong = json.dumps(chat(**asked([STRONG]))).replace('"steering"', '"\\u0073teering"')
    assert text_of(server.post(CHAT, content=strong)) == reference.answer(PROMPT, [STRONG]).text
    misplaced = json.dumps(chat(extra_body=asked([]))).replace('"steering"', '"\\u0073teering"')
    refused(server.post(CHAT, content=misplaced), "it is read from")


def test_the_server_goes_on_after_all_that(server: Server, reference: Reference) -> None:
    for guards in CHOICES:
        assert text_of(server.post(CHAT, chat(**asked(guards)))) == reference.answer(PROMPT, guards).text


def test_an_engine_without_guards_lets_nobody_choose() -> None:
    """What it would not honour it does not ignore; who says nothing is served as by vLLM alone."""
    from types import SimpleNamespace

    from vllm.exceptions import VLLMValidationError

    from steerguard.backends.vllm.plugin import _decided
    from vllm import SamplingParams

    def decided(**args: Any) -> Any:
        unguarded = SimpleNamespace(steerguard=None)
        return _decided(lambda *_: "vLLM's own", unguarded, "1", {}, SamplingParams(**args))

    with pytest.raises(VLLMValidationError, match="serves no guards"):
        decided(extra_args=asked(["still"]))
    assert decided() == decided(extra_args={"other": 1}) == "vLLM's own"


# ------------------------------------------------------------------------------------------------------- in a crowd


def test_two_thousand_requests_of_which_some_are_given_up(server: Server, reference: Reference) -> None:
    """No answer is a neighbour's; what was given up leaves nothing; memory does not grow with the requests."""
    crowd = Crowd(server, configurations(), PROMPTS, seed=0)
    assert len(crowd.configurations) >= 70
    crowd.learn()
    assert len({known.ids for known in crowd.known.values()}) > 20, "too many configurations say the same to show anything"
    for guards in crowd.configurations[:5]:
        assert crowd.text(PROMPT, guards) == reference.answer(PROMPT, guards).text
    memory = []
    for _ in range(2):
        crowd.run(1000, at_once=64)
        assert not crowd.wrong, crowd.wrong[:3]
        memory.append(server.memory())
        quiet(server)
    assert not crowd.broken, crowd.broken[:3]
    assert crowd.finished > 1600 and crowd.cancelled > 100 and crowd.disconnected > 50
    assert memory[1] < memory[0] * 1.03 + 2**24, [size >> 20 for size in memory]
    counters = server.call("steerguard_counters")
    assert {one["guard"] for one in counters} == set(reference.guards)
    assert all(one["seen"] == one["expected"] > 0 for one in counters)
    test_the_server_goes_on_after_all_that(server, reference)


def quiet(server: Server) -> None:
    """Wait until the worker knows of no request."""
    deadline = time.monotonic() + 60
    while (held := server.call("steerguard_held"))["requests"]:
        assert time.monotonic() < deadline, f"requests that ended are still held: {held}"
        time.sleep(0.5)
