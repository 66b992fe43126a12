"""The contract on residuals and logits: what a guard does to them, and what it leaves alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from bench import ANSWER, PROMPTS, Bench, close, contract, every_rule, same

from steerguard.errors import GuardMismatch, InputError, NotSteering, SteerguardError
from steerguard.guard import Guard
from steerguard.rules import Floor, StMP, StTP, SwFC, Target

POSITIONS = ("all", "response")


@contract
def unguarded_residuals_and_logits_are_the_oracles(bench: Bench) -> None:
    for answer in (None, ANSWER):
        close(bench.model.residuals(PROMPTS[0], answer), bench.oracle.residuals(PROMPTS[0], answer), "residuals")
        close(bench.model.logits(PROMPTS[0], answer), bench.oracle.logits(PROMPTS[0], answer), "logits")


@contract
def every_rule_moves_residuals_and_logits_as_the_oracle(bench: Bench) -> None:
    for rule in every_rule():
        for positions in POSITIONS:
            for layers in ((1,), (0, bench.depth - 1)):
                what, guard = f"{rule} {positions} {layers}", bench.guard(rule, layers, positions=positions)
                close(
                    bench.model.residuals(PROMPTS[0], ANSWER, guards=guard),
                    bench.oracle.residuals(PROMPTS[0], ANSWER, guards=guard),
                    f"residuals, {what}",
                )
                close(
                    bench.model.logits(PROMPTS[0], ANSWER, guards=guard),
                    bench.oracle.logits(PROMPTS[0], ANSWER, guards=guard),
                    f"logits, {what}",
                )


@contract
def only_the_projection_moves_and_only_where_the_gate_is_open(bench: Bench) -> None:
    before = bench.model.residuals(PROMPTS[0], ANSWER)
    for rule in (StTP(12), StMP(2), SwFC(2)):
        guard = bench.guard(rule, (2,))
        after = bench.model.residuals(PROMPTS[0], ANSWER, guards=guard)
        ((probe, gate),) = guard.gates()
        same(after[:2], before[:2], f"{rule}: layers before")
        difference = (after[2] - before[2]).astype(np.float64)
        across = difference - np.outer(difference @ probe.v, probe.v)
        assert np.abs(across).max() <= 1e-5 * np.abs(before[2]).max(), f"{rule}: moved across v"
        moved = (difference != 0).any(-1)
        due = (before[2] @ probe.v < gate.knee) if rule != SwFC(2) else np.ones(len(moved), bool)
        assert np.array_equal(moved, due), f"{rule}: other tokens were moved"
        assert due.any(), f"{rule}: no token is due, so nothing is tested"
        assert (after[3] != before[3]).any(), f"{rule}: the next layer does not read it"


@contract
def a_projection_is_set_in_float32(bench: Bench) -> None:
    for size in (1.0, 30.0):
        guard = bench.guard(Floor(size), (1,))
        after = bench.model.residuals(PROMPTS[0], ANSWER, guards=guard)[1]
        below = bench.base[1] @ guard.probes[0].v < size - 1e-3
        assert np.allclose(after[below].astype(np.float64) @ guard.probes[0].v, size, atol=2e-4), "the target is missed"


@contract
def shut_gates_and_zero_strengths_are_exactly_off(bench: Bench) -> None:
    plain = bench.greedy(PROMPTS, [None] * 3)
    residuals, logits = bench.model.residuals(PROMPTS[0], ANSWER), bench.model.logits(PROMPTS[0], ANSWER)
    for rule in (Floor(-1e9), SwFC(0.0), StMP(0.0)):
        for positions in POSITIONS:
            guard = bench.guard(rule, (0, 1, bench.depth - 1), positions=positions)
            same(bench.model.residuals(PROMPTS[0], ANSWER, guards=guard), residuals, f"{rule}: residuals")
            same(bench.model.logits(PROMPTS[0], ANSWER, guards=guard), logits, f"{rule}: logits")
            for a, b in zip(bench.greedy(PROMPTS, [guard] * 3), plain, strict=True):
                assert (a.ids, a.text, a.tokens_moved, a.shift) == (b.ids, b.text, 0, 0.0), f"{rule}: the text"


@contract
def response_guards_leave_the_prompt_alone(bench: Bench) -> None:
    before = bench.model.residuals(PROMPTS[0], ANSWER)
    for layers in ((0,), (1, 3)):
        guard = bench.guard(SwFC(3), layers, positions="response")
        after = bench.model.residuals(PROMPTS[0], ANSWER, guards=guard)
        same(after[:, : bench.start], before[:, : bench.start], "residuals of the prompt")
        rho = (after[layers[0], bench.start :] - before[layers[0], bench.start :]) @ guard.probes[0].v
        assert np.allclose(rho, 3 * guard.probes[0].delta_mu, rtol=1e-3), "every token of the answer is moved"
        everywhere = bench.model.residuals(PROMPTS[0], ANSWER, guards=replace(guard, positions="all"))
        assert (everywhere[layers[0], : bench.start] != before[layers[0], : bench.start]).any(-1).all()
        same(bench.model.residuals(PROMPTS[0], guards=guard), bench.model.residuals(PROMPTS[0]), "a prompt by itself")


@contract
def guards_act_in_the_order_given(bench: Bench) -> None:
    low, high = bench.guard(Target(0.0), (1,), name="low"), bench.guard(Target(30.0), (1,), name="high")
    for guards in ((low, high), (high, low)):
        after = bench.model.residuals(PROMPTS[0], ANSWER, guards=guards)
        ((probe, gate),) = guards[1].gates()
        assert np.allclose(after[1] @ probe.v, gate.above_a, rtol=1e-3), "the last guard has the last word"
        close(after, bench.oracle.residuals(PROMPTS[0], ANSWER, guards=guards), "two guards")
    several = (bench.guard(StTP(6), (1, 2)), bench.guard(SwFC(1), (0, 1, 3), seed=1, positions="response"))
    after = bench.model.residuals(PROMPTS[0], ANSWER, guards=several)
    close(after, bench.oracle.residuals(PROMPTS[0], ANSWER, guards=several), "guards that share a layer")


@contract
def one_guard_on_several_layers_is_one_guard_on_each(bench: Bench) -> None:
    together = bench.guard(StTP(6), (0, 1, 3))
    apart = [replace(together, probes=(probe,)) for probe in together.probes]
    expected = bench.model.residuals(PROMPTS[0], ANSWER, guards=apart)
    close(bench.model.residuals(PROMPTS[0], ANSWER, guards=together), expected, "one by one")
    close(expected, bench.oracle.residuals(PROMPTS[0], ANSWER, guards=apart), "one by one, against the oracle")


@contract
def capture_is_the_mean_of_the_residuals_of_the_answer(bench: Bench) -> None:
    pairs = [(PROMPTS[0], ANSWER), (PROMPTS[1], "the answer"), (PROMPTS[2], "a"), (PROMPTS[1], ANSWER)]
    for guards in (None, bench.guard(StTP(6), (1,)), bench.guard(SwFC(2), (0, 2), positions="response")):
        means = []
        for prompt, answer in pairs:
            start = bench.model.residuals(prompt).shape[1]
            means.append(bench.model.residuals(prompt, answer, guards=guards)[:, start:].mean(axis=1))
        captured = bench.model.capture(pairs, guards=guards)
        close(captured, np.stack(means), "capture")
        assert captured.dtype == np.float32
        close(captured, bench.oracle.capture(pairs, guards=guards), "capture, against the oracle")
        close(bench.model.capture(pairs, layers=[2, 0], guards=guards), captured[:, [2, 0]], "capture of some layers")
    assert bench.model.capture([]).shape == (0, bench.depth, bench.model.identity.width)


@contract
def residuals_and_logits_have_one_row_per_token(bench: Bench) -> None:
    answer = bench.greedy(PROMPTS[:1], [None])[0]
    tokens = len(answer.prompt_ids)
    residuals, logits = bench.model.residuals(PROMPTS[0]), bench.model.logits(PROMPTS[0])
    assert residuals.shape == (bench.depth, tokens, bench.model.identity.width)
    assert residuals.dtype == logits.dtype == np.float32
    assert logits.shape[0] == tokens
    assert int(logits[-1].argmax()) == answer.ids[0]
    by_message = bench.model.residuals([{"role": "user", "content": PROMPTS[0]}])
    same(by_message, residuals, "a text is a user's message")


@contract
def answers_may_be_given_by_their_tokens(bench: Bench) -> None:
    guard = bench.guard(StTP(12), (1,))
    answer = bench.greedy(PROMPTS[:1], [guard])[0]
    again = bench.model.logits(PROMPTS[0], answer.ids, guards=guard)
    assert len(again) == len(answer.prompt_ids) + len(answer.ids)
    assert tuple(again.argmax(-1)[len(answer.prompt_ids) - 1 : -1]) == answer.ids, "greedy tokens are the likeliest"
    residuals = bench.model.residuals(PROMPTS[0], answer.ids[:-1])
    close(residuals, bench.oracle.residuals(PROMPTS[0], answer.ids[:-1]), "residuals by ids")


# --------------------------------------------------------------------------------------------------- guarded


@contract
def entering_is_the_same_as_giving_guards_with_the_call_and_is_undone(bench: Bench) -> None:
    first, second = bench.guard(StTP(6), (1,)), bench.guard(SwFC(1), (1, 3), seed=1, name="second")
    before, text = bench.model.logits(PROMPTS[0], ANSWER), bench.greedy(PROMPTS, [None] * 3)
    with bench.model.guarded(first):
        same(bench.model.logits(PROMPTS[0], ANSWER), bench.model.logits(PROMPTS[0], ANSWER), "twice")
        inside = bench.model.residuals(PROMPTS[0], ANSWER, guards=second)
        answers = bench.greedy(PROMPTS, [second, None, second])
        with bench.model.guarded(second):
            nested = bench.model.residuals(PROMPTS[0], ANSWER)
    same(bench.model.logits(PROMPTS[0], ANSWER), before, "logits after leaving")
    for a, b in zip(bench.greedy(PROMPTS, [None] * 3), text, strict=True):
        assert (a.ids, a.traces) == (b.ids, ()), "text after leaving"
    close(inside, bench.oracle.residuals(PROMPTS[0], ANSWER, guards=(first, second)), "entered, then those of the call")
    close(nested, inside, "nested")
    assert [[t.guard for t in answer.traces] for answer in answers] == [[0, 1, 1], [0], [0, 1, 1]]


@contract
def an_error_inside_leaves_nothing_installed(bench: Bench) -> None:
    before = bench.model.logits(PROMPTS[0], ANSWER)
    with pytest.raises(ZeroDivisionError), bench.model.guarded(bench.guard(SwFC(3), (0, 2))):
        raise ZeroDivisionError
    same(bench.model.logits(PROMPTS[0], ANSWER), before, "logits after an error")


@contract
def what_cannot_be_guarded_is_refused_and_leaves_nothing(bench: Bench) -> None:
    good = bench.guard(SwFC(3), (0, 2))
    before = bench.model.logits(PROMPTS[0], ANSWER)
    for bad, error in _bad_guards(bench, good):
        calls = (
            lambda bad=bad: bench.model.guarded(good, bad).__enter__(),
            lambda bad=bad: bench.model.generate(PROMPTS[0], guards=(good, bad)),
            lambda bad=bad: bench.model.generate(list(PROMPTS), guards=[good, None, bad]),
            lambda bad=bad: bench.model.residuals(PROMPTS[0], guards=(good, bad)),
            lambda bad=bad: bench.model.logits(PROMPTS[0], guards=bad),
            lambda bad=bad: bench.model.capture([(PROMPTS[0], ANSWER)], guards=bad),
        )
        for call in calls:
            with pytest.raises(error):
                call()
            same(bench.model.logits(PROMPTS[0], ANSWER), before, "logits after a refusal")


def _bad_guards(bench: Bench, good: Guard) -> list[tuple[object, type[SteerguardError]]]:
    """Guards of other models, a layer that is not there and a wrong width behind a right identity, and no guard."""
    identity = bench.model.identity
    foreign = replace(good, model=replace(identity, weights=dict.fromkeys(identity.weights, "0" * 64)))
    deeper = replace(good, model=replace(identity, depth=bench.depth + 1))
    absent, narrow = replace(good), replace(good)
    probe = good.probes[0]
    v = np.ones(4, np.float32) / 2
    object.__setattr__(absent, "probes", (replace(probe, layer=bench.depth),))
    object.__setattr__(narrow, "probes", (replace(probe, v=v),))
    return [
        (foreign, GuardMismatch), (deeper, GuardMismatch), (absent, SteerguardError), (narrow, SteerguardError),
        ("honesty", InputError),
    ]  # fmt: skip


@contract
def a_list_of_guards_has_one_entry_per_prompt(bench: Bench) -> None:
    with pytest.raises(InputError):
        bench.model.generate(list(PROMPTS), guards=[None, None])
    with pytest.raises(InputError):
        bench.model.capture([(PROMPTS[0], ANSWER)], layers=[bench.depth])


@contract
def guarding_with_nothing_is_nothing(bench: Bench) -> None:
    before = bench.model.logits(PROMPTS[0], ANSWER)
    with bench.model.guarded() as inside:
        same(inside.logits(PROMPTS[0], ANSWER), before, "logits")


@contract
def the_proof_passes(bench: Bench) -> None:
    from steerguard.backends.proof import prove

    guards = [bench.guard(StMP(2), (1, 3)), bench.guard(StTP(6), (1,), positions="response", seed=1, name="second")]
    try:
        findings = prove(bench.model, guards)
    except NotSteering as error:
        raise AssertionError(str(error)) from error
    assert not [str(finding) for finding in findings if not finding.passed]
