"""Every architecture of the table, guarded: what is read, what is moved, and that it is the same however it is run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hf_cases import PROMPTS, STEPS, guard_of, hooks_of, ids_of, tiny_model, uncached

from architectures import ARCHITECTURES, Architecture
from steerguard.backends.hf import TransformersModel
from steerguard.backends.hf_read import headless, token_residuals
from steerguard.prompts import as_conversation, render
from steerguard.rules import StTP, SwFC, correct


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=str)
def case(request: pytest.FixtureRequest) -> tuple[Architecture, TransformersModel]:
    architecture: Architecture = request.param
    return architecture, tiny_model(architecture.name)


@pytest.fixture
def model(case: tuple[Architecture, TransformersModel]) -> TransformersModel:
    return case[1]


def test_the_blocks_are_found(case: tuple[Architecture, TransformersModel]) -> None:
    architecture, model = case
    assert (model.blocks.depth, model.blocks.width) == (4, 32)
    assert "vision" not in model.blocks.path
    assert model.blocks.kind in repr(model), architecture


def test_the_residual_is_the_one_that_transformers_calls_hidden_state(model: TransformersModel) -> None:
    ids = torch.tensor([render(model.tokenizer, as_conversation(PROMPTS[0])).ids])
    ours = token_residuals(model.module, model.blocks, ids, [3], [()])
    with torch.no_grad():
        theirs = headless(model.module, model.blocks)(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    assert len(theirs) == model.blocks.depth + 1
    for layer in range(model.blocks.depth - 1):
        torch.testing.assert_close(ours[layer], theirs[layer + 1], rtol=0, atol=0)
    with torch.no_grad():  # the last one is given after the final norm
        torch.testing.assert_close(model.blocks.reader(ours[-1]), theirs[-1], rtol=1e-6, atol=1e-6)


def test_a_guard_moves_the_residual_as_its_rule_says_on_every_layer(model: TransformersModel) -> None:
    before, logits = model.residuals(PROMPTS[1]), model.logits(PROMPTS[1])
    for layer in range(model.blocks.depth):
        guard = guard_of(model, [layer])
        ((one, gate),) = guard.gates()
        expected, _, delta = correct(before[layer], one.v, gate.row())
        assert 0 < np.count_nonzero(delta) < len(delta)
        after = model.residuals(PROMPTS[1], guards=guard)
        np.testing.assert_allclose(after[layer], expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(after[:layer], before[:layer])
        assert np.abs(model.logits(PROMPTS[1], guards=guard) - logits).max() > 1e-3


def test_shut_is_exactly_off_and_undone_is_exactly_restored(model: TransformersModel) -> None:
    logits, answers = model.logits(PROMPTS[1]), ids_of(model.generate(PROMPTS, sampling=STEPS))
    hooks = hooks_of(model)
    shut = guard_of(model, range(4), SwFC(0.0))
    with model.guarded(shut):
        np.testing.assert_array_equal(model.logits(PROMPTS[1]), logits)
        assert ids_of(model.generate(PROMPTS, sampling=STEPS)) == answers
    with model.guarded(guard_of(model, [1, 2])):
        assert np.abs(model.logits(PROMPTS[1]) - logits).max() > 1e-3
    np.testing.assert_array_equal(model.logits(PROMPTS[1]), logits)
    assert hooks == hooks_of(model)


@pytest.mark.parametrize("guarded", [False, True], ids=["unguarded", "guarded"])
def test_cached_is_uncached(case: tuple[Architecture, TransformersModel], guarded: bool) -> None:
    architecture, model = case
    if reason := architecture.broken.get("cached"):
        pytest.skip(reason)
    guards = (guard_of(model, [1, 3]), guard_of(model, [2], positions="response", seed=1)) if guarded else ()
    for prompt in PROMPTS:
        answer = model.generate(prompt, guards=guards, sampling=STEPS)[0]
        assert list(answer.ids) == uncached(model, prompt, STEPS.max_new_tokens, guards)


@pytest.mark.parametrize("guarded", [False, True], ids=["unguarded", "guarded"])
def test_batched_is_one_by_one(case: tuple[Architecture, TransformersModel], guarded: bool) -> None:
    architecture, model = case
    if reason := architecture.broken.get("batched"):
        pytest.skip(reason)
    guards = (guard_of(model, [0, 2], StTP(4)),) if guarded else ()
    together = model.generate(PROMPTS, guards=guards, sampling=STEPS, trace=True)
    for prompt, answer in zip(PROMPTS, together, strict=True):
        alone = model.generate(prompt, guards=guards, sampling=STEPS, trace=True)[0]
        assert (answer.ids, answer.text, answer.finished) == (alone.ids, alone.text, alone.finished)
        assert (answer.tokens_seen, answer.tokens_moved) == (alone.tokens_seen, alone.tokens_moved)
        for one, other in zip(answer.traces, alone.traces, strict=True):
            assert one.rho.shape == (len(answer.prompt_ids) + len(answer.ids) - 1,)
            np.testing.assert_allclose(one.rho, other.rho, rtol=1e-3, atol=1e-4)
            np.testing.assert_array_equal(one.delta != 0, other.delta != 0)


def test_response_positions_are_the_same_cached_and_read_again(case: tuple[Architecture, TransformersModel]) -> None:
    architecture, model = case
    guard = guard_of(model, [1, 2], SwFC(1.0), "response")
    prompts = PROMPTS[:1] if "batched" in architecture.broken else PROMPTS
    for answer in model.generate(prompts, guards=guard, sampling=STEPS, trace=True):
        start, read = len(answer.prompt_ids), torch.tensor([answer.prompt_ids + answer.ids[:-1]])
        again = token_residuals(model.module, model.blocks, read, [start], [(guard,)])
        for trace in answer.traces:
            v = torch.tensor(guard.probes[trace.guard + [1, 2].index(trace.layer)].v)
            assert not trace.delta[:start].any()
            assert trace.delta[start:].all()
            if "cached" not in architecture.broken:
                np.testing.assert_allclose((again[trace.layer, 0] @ v).numpy(), trace.rho + trace.delta, rtol=1e-3, atol=1e-3)
        assert answer.tokens_seen == answer.tokens_moved == 2 * (len(answer.ids) - 1)


def test_a_different_guard_for_each_row_is_one_by_one(case: tuple[Architecture, TransformersModel]) -> None:
    architecture, model = case
    if reason := architecture.broken.get("batched"):
        pytest.skip(reason)
    first, second = guard_of(model, [1]), guard_of(model, [1, 3], StTP(6), "response", seed=2)
    guards: list[Any] = [first, None, (second, first)]
    together = model.generate(PROMPTS, guards=guards, sampling=STEPS)
    alone = [model.generate(prompt, guards=own, sampling=STEPS)[0] for prompt, own in zip(PROMPTS, guards, strict=True)]
    assert ids_of(together) == ids_of(alone)
    assert [a.tokens_moved for a in together] == [a.tokens_moved for a in alone]
    assert together[1].ids == model.generate(PROMPTS[1], sampling=STEPS)[0].ids


def test_capture_is_the_mean_over_the_answer(model: TransformersModel) -> None:
    pairs = [
        ("tell me the truth", "the day is a week"),
        ("a", "you"),
        (PROMPTS[1], "what is the answer? a week and a day"),
    ]
    guard = guard_of(model, [1])
    for guards in (None, guard):
        together = model.capture(pairs, guards=guards)
        for row, (prompt, answer) in enumerate(pairs):
            start = render(model.tokenizer, as_conversation(prompt), answer).answer_start
            expected = model.residuals(prompt, answer, guards=guards)[:, start:].mean(axis=1)
            np.testing.assert_allclose(together[row], expected, rtol=1e-3, atol=1e-4)
