"""Answers over HTTP, asked with the official client: what the library says under the same guards, streamed or not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from serving import PROMPT, PROMPTS, STEPS, Reference, Server, policy_of, serving

STRONG: dict[str, Any] = {"name": "push", "strength": 6, "positions": "all"}
CHOICES: tuple[list[Any], ...] = (
    [], ["still"], ["mirror"], ["push"], ["still", "mirror"], ["mirror", "still"], [STRONG],
    [{"name": "mirror", "strength": 1}, "push"],
)  # fmt: skip


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
