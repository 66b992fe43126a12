"""Answers over HTTP, asked with the official client: what the library says under the same guards, streamed or not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from local_server import PROMPT, PROMPTS, STEPS, Reference, Server, policy_of, serving

from steerguard.backends.base import Sampling

STRONG: dict[str, Any] = {"name": "push", "strength": 6, "positions": "all"}
CHOICES: tuple[list[Any], ...] = (
    [],
    ["still"],
    ["mirror"],
    ["push"],
    ["still", "mirror"],
    ["mirror", "still"],
    [STRONG],
    [{"name": "mirror", "strength": 1}, "push"],
)


@pytest.fixture(scope="module")
def server(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    ranges = {"strength": [0, 8], "positions": ["all", "response"]}
    guards = policy_of(reference.guards, folder, push=ranges, mirror=ranges)
    with serving(reference.model, {"guards": guards, "default": ["still"], "trace": True}, folder) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0) as made:
        yield made


def chat(prompt: str = PROMPT, **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": prompt}], "max_tokens": STEPS, "temperature": 0, **more}


def asked(guards: Any) -> dict[str, Any]:
    return {"steering": {"guards": guards}}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_request_gets_what_it_asks_for(client: Any, reference: Reference, prompt: str) -> None:
    texts = set()
    for guards in CHOICES:
        due = reference.answer(prompt, guards)
        texts.add(due.text)
        got = client.chat.completions.create(**chat(prompt), extra_body=asked(guards))
        assert got.choices[0].message.content == due.text, guards
        assert got.choices[0].finish_reason == due.finished
        assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (len(due.prompt_ids), len(due.ids))
        assert got.steering["tokens_moved"] == due.tokens_moved
        assert got.steering["tokens_seen"] == due.tokens_seen
    assert len(texts) > 4


def test_xargs_and_names_choose_as_the_body_does(client: Any, reference: Reference) -> None:
    due = reference.answer(PROMPT, ["mirror"]).text
    xargs = client.chat.completions.create(**chat(), extra_body={"vllm_xargs": {"steering": '{"guards": ["mirror"]}'}})
    named = client.chat.completions.create(**chat(model="tiny:mirror"))
    assert xargs.choices[0].message.content == named.choices[0].message.content == due
    assert named.model == "tiny:mirror"
    bare = client.chat.completions.create(**chat(model="tiny:unguarded"))
    assert bare.choices[0].message.content == reference.answer(PROMPT, []).text
    assert {model.id for model in client.models.list()} == {"tiny", "tiny:still", "tiny:mirror", "tiny:push", "tiny:unguarded"}
    assert client.models.retrieve("tiny:push").id == "tiny:push"


@pytest.mark.parametrize("more", [{}, {"steering": None}, {"steering": {}}, {"vllm_xargs": {"steering": "null"}}], ids=str)
def test_who_says_nothing_gets_the_default(server: Server, reference: Reference, more: dict[str, Any]) -> None:
    due = reference.answer(PROMPT, ["still"])
    assert due.text != reference.answer(PROMPT, []).text
    got = server.post("/v1/chat/completions", chat(**more))
    assert got.json()["choices"][0]["message"]["content"] == due.text
    assert got.headers["x-steering-guard"] == f"still@{reference.guards['still'].digest[:12]}"


def test_system_prompts_turns_and_parts(client: Any, reference: Reference) -> None:
    said = [
        {"role": "developer", "content": "you lie"},
        {"role": "user", "content": [{"type": "text", "text": "tell "}, {"type": "text", "text": "me"}]},
        {"role": "assistant", "content": "the truth", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "é 你好 🙂"},
    ]
    plain = [
        {"role": "system", "content": "you lie"},
        {"role": "user", "content": "tell me"},
        {"role": "assistant", "content": "the truth"},
        {"role": "user", "content": "é 你好 🙂"},
    ]
    got = client.chat.completions.create(**chat() | {"messages": said}, extra_body=asked(["still"]))
    assert got.choices[0].message.content == reference.answer(plain, ["still"]).text


def test_completions_go_on_after_text_and_after_tokens(client: Any, reference: Reference) -> None:
    ids = tuple(reference.model.tokenizer(PROMPT)["input_ids"])
    own = reference.guard("still")
    due = reference.model.generate_tokens([ids], guards=[own], sampling=Sampling(temperature=0, max_new_tokens=STEPS))[0]
    rendered = reference.answer(PROMPT, ["still"])
    for prompt, text in (
        (PROMPT, due.text),
        (list(ids), due.text),
        ([PROMPT], due.text),
        (list(rendered.prompt_ids), rendered.text),
    ):
        got = client.completions.create(model="tiny", prompt=prompt, max_tokens=STEPS, temperature=0)
        assert got.choices[0].text == text


# ------------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("guards", [[], ["still"], ["mirror", "push"]], ids=str)
@pytest.mark.parametrize("usage", [True, False])
def test_a_stream_says_the_same(client: Any, guards: list[Any], usage: bool) -> None:
    whole = client.chat.completions.create(**chat(n=2), extra_body=asked(guards))
    options = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = list(client.chat.completions.create(**chat(n=2, stream=True, **options), extra_body=asked(guards)))
    for choice in whole.choices:
        own = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == choice.index]
        assert own[0].delta.role == "assistant"
        assert "".join(one.delta.content or "" for one in own) == choice.message.content
        assert [one.finish_reason for one in own if one.finish_reason] == [choice.finish_reason]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].steering == whole.steering
    assert not any(hasattr(chunk, "steering") for chunk in chunks[:-1])
    assert (chunks[-1].usage == whole.usage) if usage else (chunks[-1].usage is None)
    assert bool(chunks[-1].choices) != usage
    assert len(chunks) > 6


def test_a_stream_of_a_completion_says_the_same(client: Any) -> None:
    body = {"model": "tiny", "prompt": PROMPTS[1], "max_tokens": STEPS, "temperature": 0}
    whole = client.completions.create(**body)
    chunks = list(client.completions.create(**body, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_stream_ends_as_the_protocol_has_it(server: Server) -> None:
    got = server.post("/v1/chat/completions", chat(stream=True))
    assert got.headers["content-type"].startswith("text/event-stream")
    events = got.text.strip().split("\n\n")
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    assert events[-1] == "data: [DONE]"


# ------------------------------------------------------------------------------------------------------- drawing


def test_stop_texts_and_lengths(client: Any, reference: Reference) -> None:
    due = reference.answer(PROMPT, ["still"]).text
    stop = due[len(due) // 2 : len(due) // 2 + 2]
    got = client.chat.completions.create(**chat(stop=[stop, "never"])).choices[0]
    assert (got.message.content, got.finish_reason) == (due[: due.index(stop)], "stop")
    streamed = client.chat.completions.create(**chat(stop=stop, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == due[: due.index(stop)]
    body = chat()
    del body["max_tokens"]
    short = client.chat.completions.create(**body, max_completion_tokens=3)
    assert (short.usage.completion_tokens, short.choices[0].finish_reason) == (3, "length")


def test_draws_are_the_librarys_and_a_seed_repeats_them(client: Any, reference: Reference) -> None:
    hot = chat() | {"temperature": 1.5, "top_p": 0.95}
    due = [reference.answer(PROMPT, ["still"], temperature=1.5, top_p=0.95, seed=seed).text for seed in range(4)]
    assert len(set(due)) > 1
    with ThreadPoolExecutor(8) as pool:  # the same request twice at once, so that they could share a call
        got = list(
            pool.map(
                lambda seed: client.chat.completions.create(**hot, seed=seed).choices[0].message.content, [*range(4), *range(4)]
            )
        )
    assert got == due + due
    several = [choice.message.content for choice in client.chat.completions.create(**hot, seed=0, n=3).choices]
    assert several[0] == due[0]
    assert len(set(several)) == 3


def test_without_a_seed_draws_differ(client: Any) -> None:
    hot = chat() | {"temperature": 1.5}
    assert len({client.chat.completions.create(**hot).choices[0].message.content for _ in range(4)}) > 1


def test_greedy_choices_are_equal(client: Any, reference: Reference) -> None:
    got = client.chat.completions.create(**chat(n=3))
    assert {choice.message.content for choice in got.choices} == {reference.answer(PROMPT, ["still"]).text}
    one = client.chat.completions.create(**chat())
    assert got.usage.completion_tokens == 3 * one.usage.completion_tokens
    assert got.usage.prompt_tokens == one.usage.prompt_tokens
    assert got.steering["tokens_seen"] == 3 * one.steering["tokens_seen"]


def test_requests_at_once_get_what_they_get_alone(client: Any, reference: Reference) -> None:
    """Different guards, prompts and forms, all at once."""
    wanted = [(prompt, guards, stream) for prompt in PROMPTS for guards in CHOICES for stream in (False, True)]
    gate = threading.Barrier(8)

    def ask(one: tuple[str, list[Any], bool]) -> str:
        prompt, guards, stream = one
        gate.wait(60)
        got = client.chat.completions.create(**chat(prompt, stream=stream), extra_body=asked(guards))
        return "".join(c.choices[0].delta.content or "" for c in got) if stream else got.choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, wanted))
    assert texts == [reference.answer(prompt, guards).text for prompt, guards, _ in wanted]


# ------------------------------------------------------------------------------------------------- what is told


def test_the_answer_says_what_acted(client: Any, reference: Reference) -> None:
    due = reference.answer(PROMPT, ["still", "push"])
    answer = reference.model.generate(
        PROMPT,
        guards=(reference.guard("still"), reference.guard("push")),
        sampling=Sampling(temperature=0, max_new_tokens=STEPS),
        trace=True,
    )[0]
    got = client.chat.completions.create(**chat(), extra_body={"steering": {"guards": ["still", "push"], "trace": True}}).steering
    assert (got["tokens_seen"], got["tokens_moved"]) == (due.tokens_seen, due.tokens_moved)
    assert got["largest_shift"] == pytest.approx(max(abs(trace.delta).max() for trace in answer.traces))
    still, push = got["guards"]
    assert (still["name"], still["digest"], still["mode"]) == ("still", reference.guards["still"].digest, "enforce")
    assert (push["strength"], push["positions"]) == (3.0, "response")
    assert push["tokens_seen"] == push["tokens_moved"] == len(due.ids) - 1
    assert [(one["guard"], one["layer"]) for one in got["trace"]] == [("still", 1), ("push", 2)]
    for one, trace in zip(got["trace"], answer.traces, strict=True):
        assert one["rho"] == pytest.approx(trace.rho, abs=1e-3)
        assert one["delta"] == pytest.approx(trace.delta, abs=1e-3)
        assert one["prompt_tokens"] == len(due.prompt_ids)


def test_requests_have_names(server: Server) -> None:
    mine = server.post("/v1/chat/completions", chat(), headers={"x-request-id": "mine-1"})
    assert mine.headers["x-request-id"] == "mine-1"
    assert mine.json()["id"] == "chatcmpl-mine-1"
    ids = {
        server.post("/v1/chat/completions", chat(), headers={"x-request-id": bad}).headers["x-request-id"]
        for bad in ("", "a b", "x" * 65)
    }
    assert all(len(one) == 32 for one in ids)


UNSUPPORTED: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "response_format": {"type": "json_object"},
    "logprobs": True,
    "top_logprobs": 3,
    "logit_bias": {"5": 100},
    "presence_penalty": 0.5,
    "frequency_penalty": -1,
    "functions": [{}],
    "modalities": ["audio"],
    "audio": {},
    "prediction": {},
    "reasoning_effort": "low",
    "verbosity": "low",
    "web_search_options": {},
    "top_k": 1,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "guided_json": {},
    "structured_outputs": {},
    "ignore_eos": True,
    "whatever": None,
}


@pytest.mark.parametrize("field", list(UNSUPPORTED))
def test_what_is_not_supported_is_refused_by_name(client: Any, field: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(**chat(), extra_body={field: UNSUPPORTED[field]})
    assert raised.value.code == "unsupported"
    assert raised.value.param == field
    assert raised.value.type == "invalid_request_error"


def test_what_changes_nothing_is_accepted(client: Any, reference: Reference) -> None:
    more = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logprobs": False,
        "logit_bias": {},
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "n": 1,
        "parallel_tool_calls": True,
        "stream_options": None,
        "stop": None,
        "seed": None,
        "top_p": None,
    }
    got = client.chat.completions.create(**chat(), extra_body=more)
    assert got.choices[0].message.content == reference.answer(PROMPT, ["still"]).text


WRONG: tuple[tuple[dict[str, Any], str], ...] = (
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "0"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"n": 17}, "n"),
    ({"n": True}, "n"),
    ({"n": 1.5}, "n"),
    ({"max_tokens": 65}, "max_tokens"),
    ({"max_completion_tokens": 5}, "max_completion_tokens"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "name": "n"}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0]"),
    ({"model": None}, "model"),
    ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
)


@pytest.mark.parametrize(("more", "param"), WRONG, ids=lambda value: str(value)[:60])
def test_what_is_wrong_is_refused_by_name(server: Server, more: dict[str, Any], param: str) -> None:
    got = server.post("/v1/chat/completions", chat(**more))
    assert got.status_code == 400, got.text
    assert got.json()["error"]["param"] == param


@pytest.mark.parametrize("prompt", ["", [], [10**6], [-1], ["a", "b"], [[1], [2]], [1.5], [True], None, {}], ids=str)
def test_a_prompt_that_is_none_is_refused(server: Server, prompt: Any) -> None:
    got = server.post("/v1/completions", {"model": "tiny", "prompt": prompt})
    assert got.status_code == 400, got.text
    assert got.json()["error"]["param"] == "prompt"


def test_errors_are_openais(client: Any, server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(**chat(model="gpt-5"))
    assert raised.value.code == "model_not_found"
    assert "tiny:unguarded" in raised.value.message
    assert server.get("/v1/nothing").json()["error"]["code"] == "no_such_route"
    assert server.get("/v1/chat/completions").status_code == 405
