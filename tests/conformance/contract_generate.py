"""The contract on generation: rows, the cache, traces, drawing, ends, and streaming."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from bench import LONG, PROMPTS, STEPS, Bench, agree, close, contract, every_rule

from steerguard.backends.base import Answer, Sampling
from steerguard.rules import Floor, Gate, StMP, StTP, SwFC

DRAWN = Sampling(temperature=1.0, top_p=0.9, seed=7, max_new_tokens=STEPS)


@contract
def the_identity_is_the_oracles(bench: Bench) -> None:
    assert bench.model.identity.differences(bench.oracle.identity) == {}
    assert bench.model.identity.name == bench.oracle.identity.name


@contract
def every_rule_gives_the_oracles_text_and_moves_its_tokens(bench: Bench) -> None:
    """Cached against uncached, too: the oracle has no cache."""
    plain = bench.greedy(PROMPTS, [None] * 3)
    changed = 0
    for rule in every_rule():
        for positions in ("all", "response"):
            guard = bench.guard(rule, (1, 2), positions=positions)
            mine = bench.greedy(PROMPTS, [guard] * 3)
            for a, b in zip(mine, bench.greedy(PROMPTS, [guard] * 3, model=bench.oracle), strict=True):
                agree(a, b, f"{rule} {positions}")
            changed += [a.ids for a in mine] != [a.ids for a in plain]
    # half of all on random weights; a trained model is moved only by the rules that push it as far as its probes say
    enough = len(every_rule()) if bench.apart == 1.0 else len(every_rule()) // 2
    assert changed > enough, "guards that change no text test nothing"


@contract
def a_long_answer_is_steered_to_its_end(bench: Bench) -> None:
    guards = [bench.guard(StTP(12), (1,)), bench.guard(SwFC(2), (2,), positions="response"), None]
    mine = bench.greedy(PROMPTS, guards, steps=LONG)
    for a, b in zip(mine, bench.greedy(PROMPTS, guards, steps=LONG, model=bench.oracle), strict=True):
        agree(a, b, "a long answer")
    assert max(len(answer.ids) for answer in mine[:2]) == LONG


@contract
def rows_of_a_batch_are_independent(bench: Bench) -> None:
    both = (bench.guard(StMP(2), (1,)), bench.guard(SwFC(2), (1, 3), positions="response", seed=1, name="second"))
    prompts = [*PROMPTS, PROMPTS[1], PROMPTS[0]]
    guards = [both[0], None, both, (both[1], both[0]), bench.guard(Floor(), (0, 2), seed=2)]
    for order in ([0, 1, 2, 3, 4], [4, 2, 3, 1, 0]):
        together = bench.greedy([prompts[i] for i in order], [guards[i] for i in order])
        for i, answer in zip(order, together, strict=True):
            agree(answer, bench.greedy([prompts[i]], [guards[i]])[0], f"row {i}")
    # a prompt that is asked twice, guarded and not, and each again after the other
    first, second = bench.greedy([PROMPTS[0]] * 2, [None, both])
    agree(second, bench.greedy([PROMPTS[0]], [both])[0], "guarded beside its unguarded twin")
    agree(first, bench.greedy([PROMPTS[0]], [None])[0], "unguarded beside its guarded twin")


@contract
def one_guard_serves_every_prompt_and_one_prompt_takes_several(bench: Bench) -> None:
    one, two = bench.guard(StTP(6), (1,)), bench.guard(SwFC(2), (2,), seed=1)
    sampling = Sampling(temperature=0.0, max_new_tokens=STEPS)
    for given in (one, (one, two)):
        answers = bench.model.generate(list(PROMPTS), guards=given, sampling=sampling, trace=True)
        for a, b in zip(answers, bench.greedy(PROMPTS, [given] * 3), strict=True):
            agree(a, b, "for every prompt")
        alone = bench.model.generate(PROMPTS[0], guards=given, sampling=sampling, trace=True)
        agree(alone[0], answers[0], "a prompt that is no list")


@contract
def traces_say_what_the_gates_did(bench: Bench) -> None:
    guards = (bench.guard(StTP(6), (0, 2)), bench.guard(StMP(3), (2,), positions="response", seed=1))
    for answer in bench.greedy(PROMPTS, [guards] * 3):
        start, read = len(answer.prompt_ids), len(answer.prompt_ids) + len(answer.ids) - 1
        assert [(t.guard, t.layer) for t in answer.traces] == [(0, 0), (0, 2), (1, 2)]
        for trace in answer.traces:
            guard = guards[trace.guard]
            assert trace.rho.shape == trace.delta.shape == (read,), "one entry per token read, and none for padding"
            assert trace.rho.dtype == trace.delta.dtype == np.float32
            gate = next(gate for probe, gate in guard.gates() if probe.layer == trace.layer)
            first = 0 if guard.positions == "all" else start
            due = np.array([_delta(rho, gate) if i >= first else 0.0 for i, rho in enumerate(trace.rho)], np.float32)
            close(trace.delta, due, "delta", tolerance=1e-5)
        assert answer.tokens_seen == 2 * read + len(answer.ids) - 1
        assert answer.tokens_moved == sum(int((t.delta != 0).sum()) for t in answer.traces)
        assert answer.shift == pytest.approx(sum(float(np.abs(t.delta).sum()) for t in answer.traces), rel=1e-4)
        assert answer.tokens_moved > 0
    sampling = Sampling(temperature=0.0, max_new_tokens=STEPS)
    silent = bench.model.generate(PROMPTS[0], guards=guards, sampling=sampling)[0]
    assert silent.traces == ()
    assert silent.tokens_seen > silent.tokens_moved > 0


def _delta(rho: float, gate: Gate) -> float:
    if rho >= gate.knee:
        return gate.above_a + gate.above_b * rho
    return min(gate.below_a + gate.below_b * rho, gate.cap - rho)


@contract
def generation_is_what_one_forward_over_its_tokens_is(bench: Bench) -> None:
    """A guard on layer 1 and witnesses that move nothing: what they saw is what one forward holds there."""
    for positions in ("all", "response"):
        guard = bench.guard(StTP(24), (1,), positions=positions)
        witness = bench.guard(Floor(-1e9), range(bench.depth), seed=5, name="witness")
        for prompt, answer in zip(PROMPTS, bench.greedy(PROMPTS, [(guard, witness)] * 3), strict=True):
            again = bench.oracle.residuals(prompt, answer.ids[:-1], guards=guard)
            for trace in answer.traces[1:]:
                close(
                    trace.rho,
                    again[trace.layer] @ witness.probes[trace.layer].v,
                    f"layer {trace.layer}",
                    tolerance=1e-3,
                )


# ---------------------------------------------------------------------------------------------------- drawing


@contract
def draws_repeat_and_do_not_depend_on_neighbours(bench: Bench) -> None:
    guards = [bench.guard(StTP(6), (1,)), None, bench.guard(SwFC(1), (2,))]
    together = _texts(bench.model.generate(list(PROMPTS), guards=guards, sampling=DRAWN))
    assert together == _texts(bench.model.generate(list(PROMPTS), guards=guards, sampling=DRAWN))
    alone = [bench.model.generate([p], guards=[g], sampling=DRAWN)[0] for p, g in zip(PROMPTS, guards, strict=True)]
    assert together == _texts(alone)
    assert together[::-1] == _texts(bench.model.generate(list(PROMPTS[::-1]), guards=guards[::-1], sampling=DRAWN))
    assert together != _texts(bench.model.generate(list(PROMPTS), guards=guards, sampling=replace(DRAWN, seed=8)))


@contract
def equal_prompts_of_one_call_draw_differently(bench: Bench) -> None:
    answers = _texts(bench.model.generate([PROMPTS[0], PROMPTS[1], PROMPTS[0]], sampling=DRAWN))
    assert answers[0] != answers[2]
    assert answers[0] == _texts(bench.model.generate(PROMPTS[0], sampling=DRAWN))[0]


@contract
def draws_are_the_oracles(bench: Bench) -> None:
    guard = bench.guard(StTP(6), (1,))
    for sampling in (DRAWN, Sampling(max_new_tokens=STEPS), replace(DRAWN, temperature=3.0, top_p=1.0)):
        mine = bench.model.generate(list(PROMPTS), guards=guard, sampling=sampling)
        assert _texts(mine) == _texts(bench.oracle.generate(list(PROMPTS), guards=guard, sampling=sampling))


@contract
def a_tiny_nucleus_is_greedy(bench: Bench) -> None:
    drawn = bench.model.generate(list(PROMPTS), sampling=replace(DRAWN, top_p=1e-6))
    assert _texts(drawn) == _texts(bench.greedy(PROMPTS, [None] * 3))


def _texts(answers: list[Answer]) -> list[tuple[tuple[int, ...], str]]:
    return [(answer.ids, answer.text) for answer in answers]


# ------------------------------------------------------------------------------------------------------- ends


@contract
def answers_end_at_their_limit_or_at_the_end_of_the_turn(bench: Bench) -> None:
    for limit in (1, 3):
        for answer in bench.greedy(PROMPTS, [None] * 3, steps=limit):
            assert len(answer.ids) <= limit
            assert (answer.finished == "length") == (len(answer.ids) == limit)
    # a guard along what the head reads as the end of the turn: the second token is the end
    guards = [None, bench.ender(), None, bench.ender()]
    answers = bench.greedy([*PROMPTS, PROMPTS[0]], guards, steps=LONG)
    for answer, guard in zip(answers, guards, strict=True):
        assert len(answer.ids) == (2 if guard else LONG)
        assert answer.finished == ("stop" if guard else "length")
        assert all(len(trace.rho) == len(answer.prompt_ids) + 1 for trace in answer.traces), "nothing follows the end"
    first = bench.greedy(PROMPTS[1:2], [None], steps=1)[0]
    assert (answers[1].text, answers[1].ids[:1]) == (first.text, first.ids), "the end of the turn is no text"


@contract
def a_stop_text_ends_the_row_and_is_left_out(bench: Bench) -> None:
    whole = bench.greedy(PROMPTS, [None] * 3, steps=LONG)
    stop = whole[0].text[4:6]
    sampling = Sampling(temperature=0.0, max_new_tokens=LONG, stop=(stop, "never said"))
    answers = bench.model.generate(list(PROMPTS), sampling=sampling)
    for answer, full in zip(answers, whole, strict=True):
        assert answer.text == full.text.split(stop)[0]
        assert (answer.finished == "stop") == (stop in full.text or full.finished == "stop")
        assert answer.ids == full.ids[: len(answer.ids)]
    assert len(answers[0].ids) < len(whole[0].ids), "generation went on after the stop text"


@contract
def what_is_streamed_is_the_text(bench: Bench) -> None:
    stop = bench.greedy(PROMPTS, [None] * 3, steps=LONG)[2].text[5:7]
    guards = [bench.guard(SwFC(1), (1,)), None, None]
    for sampling in (Sampling(temperature=0.0, max_new_tokens=LONG, stop=(stop,)), replace(DRAWN, max_new_tokens=LONG)):
        told: dict[int, list[str]] = {}
        answers = bench.model.generate(
            list(PROMPTS),
            guards=guards,
            sampling=sampling,
            on_token=lambda row, text, told=told: told.setdefault(row, []).append(text),
        )
        assert ["".join(told.get(row, [])) for row in range(3)] == [answer.text for answer in answers]
        assert _texts(answers) == _texts(bench.model.generate(list(PROMPTS), guards=guards, sampling=sampling))
        assert max(map(len, told.values())) > 3, "it came in pieces"


@contract
def no_prompts_no_answers(bench: Bench) -> None:
    assert bench.model.generate([]) == []
    assert bench.model.generate([], guards=bench.guard(SwFC(1), (1,))) == []


@contract
def conversations_are_prompts(bench: Bench) -> None:
    talk = [
        {"role": "system", "content": "tell me the truth"},
        {"role": "user", "content": "what is a day"},
        {"role": "assistant", "content": "a day is a day"},
        {"role": "user", "content": "and a week"},
    ]
    sampling = Sampling(temperature=0.0, max_new_tokens=STEPS)
    for prompts in (talk, [talk], [talk, PROMPTS[1]]):
        for a, b in zip(
            bench.model.generate(prompts, sampling=sampling),
            bench.oracle.generate(prompts, sampling=sampling),
            strict=True,
        ):
            agree(a, b, "a conversation")


@contract
def pieces_join_to_the_text(bench: Bench) -> None:
    for answer in bench.greedy(PROMPTS, [None] * 3, steps=LONG):
        pieces = bench.model.pieces(answer.ids)
        assert len(pieces) == len(answer.ids)
        assert "".join(pieces) == answer.text
