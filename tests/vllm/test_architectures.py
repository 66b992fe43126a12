"""Parity with transformers on tiny random models of real configuration classes: the same projections, the same text.

Blocks that return a (hidden, residual) pair and blocks that return one tensor, dense and mixtures of experts; compiled
and eager.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from architectures import ARCHITECTURES, build
from architectures import tokenizer as tiny_tokenizer
from steerguard.backends import load
from steerguard.backends.base import Answer, Floats, Sampling
from steerguard.guard import Guard, ModelIdentity
from steerguard.rules import StMP, StTP, SwFC

pytest.importorskip("vllm", reason="vLLM is not installed; `make test` installs its CPU build")
pytestmark = pytest.mark.slow

WIDE: Mapping[str, Any] = {"hidden_size": 128, "intermediate_size": 96}
HEADS: Mapping[str, Any] = {"head_dim": 32}
SERVED: Mapping[str, Mapping[str, Any]] = {
    "llama": HEADS,
    "qwen2": WIDE,
    "qwen3": HEADS,
    "gemma2": HEADS,
    "gemma3-text": HEADS,
    "qwen3-moe": HEADS,
    "mistral": HEADS,
    "phi3": WIDE,
    "olmo2": WIDE,
    "gpt2": {"n_embd": 128},
    "gpt-neox": WIDE,
}
"""Architectures by name -> settings that make their heads of a size that vLLM's CPU attention has. The last of them, and
OLMo 2, are run by vLLM through transformers: their blocks return one tensor [1, tokens, width]."""
PROMPTS = ["tell me what is the truth and what is the answer", "Hi", "Is a week longer than a day?"]
ANSWER = "the day is a week and you tell me"
GREEDY = Sampling(temperature=0.0, max_new_tokens=12)


@pytest.fixture(scope="module", params=SERVED)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random model."""
    made = next(one for one in ARCHITECTURES if one.name == request.param)
    at = tmp_path_factory.mktemp("served") / request.param
    build(replace(made, settings={**made.settings, **SERVED[request.param]})).save_pretrained(at)
    tiny_tokenizer().save_pretrained(at)
    return at


@dataclass(frozen=True)
class Reference:
    """What transformers says of a folder, under no guard and under several."""

    identity: ModelIdentity
    guards: list[Guard | None]
    residuals: list[Floats]
    "[layers, tokens, d] of one conversation, per guard"
    answers: list[list[Answer]]
    "of the prompts, per guard"


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    """Asked before vLLM is: it runs some architectures through transformers, and changes its classes for that."""
    model = load(folder)
    every = [None, *guards(model)]
    return Reference(
        model.identity,
        every,
        [model.residuals(PROMPTS[0], ANSWER, guards=guard) for guard in every],
        [model.generate(PROMPTS, guards=guard, sampling=GREEDY) for guard in every],
    )


@pytest.fixture(scope="module", params=["eager", "compiled"])
def served(request: pytest.FixtureRequest, folder: Path, reference: Reference) -> Iterator[Any]:
    """The same folder in vLLM."""
    if request.param == "compiled" and folder.name not in ("llama", "gemma2", "qwen3-moe", "gpt2"):
        pytest.skip("compiled on one architecture of each kind of block")
    eager = request.param == "eager"
    model: Any = load(folder, backend="vllm", kv_cache_memory_bytes=2**26, max_model_len=256, enforce_eager=eager)
    yield model
    model.close()


def guards(model: Any) -> list[Guard]:
    base = model.residuals(PROMPTS[0], ANSWER)
    base = base[:, : base.shape[1] // 2 * 2]  # of an even number of tokens, none stands at the median itself
    width, identity = model.identity.width, model.identity
    return [
        tiny.guard(identity, rule, (tiny.probe(layer, width, rho=base[layer]),), positions=positions, name="tiny")
        for rule, layer in ((SwFC(6), 1), (StTP(60), 2), (StMP(6), 0))
        for positions in ("all", "response")
    ]


def test_the_identity_is_the_same(served: Any, reference: Reference) -> None:
    assert reference.identity.differences(served.identity) == {}


def test_residuals_are_the_same_guarded_and_not(served: Any, reference: Reference) -> None:
    for guard, theirs in zip(reference.guards, reference.residuals, strict=True):
        ours = served.residuals(PROMPTS[0], ANSWER, guards=guard)
        scale = np.abs(theirs).mean(axis=(1, 2), keepdims=True)
        assert (np.abs(ours - theirs) / scale).max() < 2e-3, guard


def test_greedy_text_and_moved_tokens_are_the_same(served: Any, reference: Reference) -> None:
    plain = [a.ids for a in reference.answers[0]]
    changed = 0
    for guard, theirs in zip(reference.guards, reference.answers, strict=True):
        ours = served.generate(PROMPTS, guards=guard, sampling=GREEDY)
        assert [a.ids for a in ours] == [a.ids for a in theirs], guard
        assert [a.tokens_moved for a in ours] == [a.tokens_moved for a in theirs], guard
        changed += [a.ids for a in ours] != plain
    assert changed >= 2, "guards that change no text test nothing"
