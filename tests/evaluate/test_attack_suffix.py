"""The suffix attack: the guarded forward and its gradient are right; what is planted is found, with gradients sooner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

import steerguard as sg
import tiny
from steerguard.backends import load
from steerguard.backends.hf import TransformersModel
from steerguard.errors import InputError
from steerguard.evaluate.attacks.objective import Attacked, Objective
from steerguard.evaluate.attacks.search import GRADIENT, Plan, Slot, allowed, search, start
from steerguard.evaluate.attacks.suffix import suffix_attack, surprise
from steerguard.fitting import prompts_of
from steerguard.guard import Guard
from steerguard.journal import Journal
from steerguard.metrics.likelihood import log_softmax, surprisal
from steerguard.probe import Probe
from steerguard.prompts import render
from steerguard.rules import correct
from steerguard.scorers import Score
from steerguard.traits import Scenario

SHORT = sg.Sampling(max_new_tokens=6, temperature=0.0)
SCENARIOS = [Scenario(f"s{i}", "all", f"{i}: tell the truth.", f"{i}: lie.", (f"What is day {i}?",)) for i in range(4)]


@pytest.fixture(scope="module")
def loaded(folder: Path) -> TransformersModel:
    found = load(folder)
    assert isinstance(found, TransformersModel)
    return found


@pytest.fixture(scope="module")
def probe(loaded: TransformersModel) -> Probe:
    rho = np.concatenate([loaded.residuals(prompts_of(one)[1])[2] for one in SCENARIOS])
    return tiny.probe(2, 48, rho=rho)


def asked(loaded: TransformersModel, target: Sequence[int] = (70, 80, 90)) -> Attacked:
    ids = render(loaded.tokenizer, prompts_of(SCENARIOS[0])[1]).ids
    return Attacked(ids[:6], ids[6:], tuple(target))


# ------------------------------------------------------------------------------------------------ the objective


@pytest.mark.parametrize("positions", ["all", "response"])
@pytest.mark.parametrize("rule", ["StTP", "StMP", "SwFC", "none"])
def test_the_loss_is_that_of_the_backends_own_guarded_forward(
    loaded: TransformersModel, probe: Probe, rule: str, positions: Any
) -> None:
    guard = None if rule == "none" else tiny.guard(loaded.identity, sg.rule(rule, 2), (probe,), positions=positions)
    ids = render(loaded.tokenizer, prompts_of(SCENARIOS[0])[1]).ids
    target = (70, 80, 90, 100)
    found = Objective(loaded, guard, Attacked(ids[:6], ids[8:], target), weight=0.7, margin=0.5).losses([ids[6:8]])[0]
    logits = loaded.logits(prompts_of(SCENARIOS[0])[1], target[:-1], guards=guard)[-4:]
    expected = -np.mean([log_softmax(logits)[i, token] for i, token in enumerate(target)])
    if guard is not None:
        before = loaded.residuals(prompts_of(SCENARIOS[0])[1], target[:-1])[2]
        place = (before[-3:] @ probe.v - probe.m) / probe.delta_mu
        expected += 0.7 * np.maximum(0.5 - place, 0).mean()
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_guard_of_two_layers_sees_what_the_first_left(loaded: TransformersModel, probe: Probe) -> None:
    first = tiny.probe(1, 48, rho=loaded.residuals(prompts_of(SCENARIOS[0])[1])[1])
    guard = tiny.guard(loaded.identity, sg.StTP(4), (first, probe))
    ids = render(loaded.tokenizer, prompts_of(SCENARIOS[0])[1]).ids
    target = (70, 80, 90)
    objective = Objective(loaded, guard, Attacked(ids[:6], ids[8:], target))
    answers = loaded.residuals(prompts_of(SCENARIOS[0])[1], target[:-1], guards=replace(guard, probes=(first,)))
    plain = loaded.residuals(prompts_of(SCENARIOS[0])[1], target[:-1])
    short = [
        np.maximum(-(h[-2:] @ one.v - one.m) / one.delta_mu, 0).mean()
        for h, one in ((plain[1], first), (answers[2], probe))
    ]  # fmt: skip
    logits = loaded.logits(prompts_of(SCENARIOS[0])[1], target[:-1], guards=guard)[-3:]
    expected = surprisal(logits, target).mean() + np.mean(short)
    assert objective.losses([ids[6:8]])[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("rule", ["StTP", "StMP", "SwFC"])
def test_the_gradient_through_the_guard_equals_finite_differences(
    loaded: TransformersModel, probe: Probe, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = tiny.guard(loaded.identity, sg.rule(rule, 1.5), (probe,))
    objective = Objective(loaded, guard, asked(loaded), weight=1.0, margin=0.3)
    suffix = (60, 75, 66)
    slope = objective.gradient(suffix)
    unguarded = Objective(loaded, None, asked(loaded)).gradient(suffix)
    assert not torch.allclose(slope, unguarded, rtol=0.01)  # the guard is in it
    for seed in range(4):
        way = torch.randn(slope.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            ends = [float(objective.nudged(suffix, sign * 2e-3 * way)) for sign in (1, -1)]
        assert (ends[0] - ends[1]) / 4e-3 == pytest.approx(float((slope * way).sum()), rel=0.03, abs=2e-3)


def test_scores_are_the_slope_towards_each_token(loaded: TransformersModel, probe: Probe) -> None:
    objective = Objective(loaded, tiny.guard(loaded.identity, sg.StMP(2), (probe,)), asked(loaded))
    suffix = (60, 75)
    scores = objective.scores(suffix)
    weights = loaded.module.get_input_embeddings().weight.detach()
    assert scores.shape == (2, loaded.vocabulary)
    way = weights[99] - weights[75]
    expected = float(objective.gradient(suffix)[1] @ way)
    assert scores[1, 99] - scores[1, 75] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_batches_do_not_matter_and_nothing_stays(
    loaded: TransformersModel, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = loaded.logits("Hello.")
    objective = Objective(loaded, tiny.guard(loaded.identity, sg.StTP(9), (probe,)), asked(loaded))
    rows = [(60 + i, 70) for i in range(5)]
    whole = objective.losses(rows)
    objective.gradient(rows[0])
    monkeypatch.setattr(loaded, "batch_tokens", 50)
    assert objective.losses(rows) == pytest.approx(whole, rel=1e-4)
    assert np.array_equal(loaded.logits("Hello."), before)
    with pytest.raises(InputError, match="no token"):
        Objective(loaded, None, asked(loaded, ()))


# ------------------------------------------------------------------------------------------------ the search


class Planted:
    """Losses that a hidden suffix makes 0, with the slopes of a distance: a stand-in for a model whose weak spot is known."""

    def __init__(self, wanted: Sequence[int], table: np.ndarray) -> None:
        self.wanted, self.table = table[list(wanted)], table

    def losses(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        return np.array([((self.table[list(row)] - self.wanted) ** 2).sum() for row in rows])

    def scores(self, row: Sequence[int]) -> np.ndarray:
        return 2 * (self.table[list(row)] - self.wanted) @ self.table.T


def run(loaded: TransformersModel, objectives: Sequence[Any], plan: Plan, journal: Journal) -> Any:
    slots = [Slot(loaded.tokenizer, SCENARIOS[0], plan.place)]
    tokens = allowed(loaded.tokenizer, loaded.vocabulary)
    return search(
        slots, objectives, tokens, plan, lambda rng: start(slots, tokens, plan.length, rng), journal=journal, key="0" * 64
    )  # fmt: skip


def test_what_is_planted_is_found_and_blindly_later(loaded: TransformersModel) -> None:
    tokens = allowed(loaded.tokenizer, loaded.vocabulary)
    table = np.random.default_rng(0).normal(size=(loaded.vocabulary, 24))
    reached = {}
    for gradient in (True, False):
        plan = Plan(length=4, steps=12, candidates=16, top=8)
        plan = plan if gradient else plan.blind(1)
        found = [
            run(loaded, [Planted(start_of(loaded, 100 + seed), table)], replace(plan, seed=seed), Journal(None))
            for seed in range(4)
        ]
        reached[gradient] = float(np.mean([one.loss / one.losses[0] for one in found]))
        assert all(one.losses == tuple(sorted(one.losses, reverse=True)) and one.evaluations <= plan.evaluations for one in found)
        assert all(set(one.ids) <= set(tokens.tolist()) for one in found)
    assert reached[True] < 0.2 < reached[False]


def start_of(loaded: TransformersModel, seed: int) -> tuple[int, ...]:
    tokens = allowed(loaded.tokenizer, loaded.vocabulary)
    return start([Slot(loaded.tokenizer, SCENARIOS[1], "system")], tokens, 4, np.random.default_rng(seed))


def test_a_real_guarded_forward_is_forced(loaded: TransformersModel, probe: Probe) -> None:
    """On a random model the probability of any chosen next token rises many times over, and that is so through the backend."""
    guard = tiny.guard(loaded.identity, sg.StTP(4), (probe,))
    slot = Slot(loaded.tokenizer, SCENARIOS[0], "system")
    plan = Plan(length=6, steps=15, candidates=24, top=24, tokens=1)
    start([slot], allowed(loaded.tokenizer, loaded.vocabulary), plan.length, np.random.default_rng(0))
    for target in (70, 90, 110):
        objective = Objective(loaded, guard, Attacked(*slot.around(), (target,)))
        found = run(loaded, [objective], plan, Journal(None))
        assert found.loss < found.losses[0] - 1
        logits = loaded.logits(slot.prompt(found.text), guards=guard)[-1:]  # the text, through the template
        assert surprisal(logits, [target])[0] == pytest.approx(found.loss, rel=1e-3, abs=1e-3)


def test_an_interrupted_search_ends_as_it_would_have(loaded: TransformersModel, tmp_path: Path) -> None:
    table = np.random.default_rng(0).normal(size=(loaded.vocabulary, 24))
    plan = Plan(length=4, steps=6, candidates=8, restarts=2)
    planted = Planted(start_of(loaded, 0), table)
    whole = run(loaded, [planted], plan, Journal(None))

    class Stops(Planted):
        left = 5

        def losses(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().losses(rows)

    with Journal(tmp_path / "a.jsonl") as journal, pytest.raises(KeyboardInterrupt):
        run(loaded, [Stops(start_of(loaded, 0), table)], plan, journal)
    with Journal(tmp_path / "a.jsonl") as journal:
        assert len(journal.records) == 5
        assert run(loaded, [planted], plan, journal) == whole
    with Journal(tmp_path / "a.jsonl") as journal:  # all of it is there: no loss is computed any more
        stopped = Stops(start_of(loaded, 0), table)
        stopped.left = 0
        assert run(loaded, [stopped], plan, journal) == whole


def test_a_suffix_is_read_back_from_its_text(loaded: TransformersModel) -> None:
    for place in ("system", "user"):
        slot = Slot(loaded.tokenizer, SCENARIOS[0], place)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="no suffix has been read back"):
            slot.around()
        ids = start([slot], allowed(loaded.tokenizer, loaded.vocabulary), 5, np.random.default_rng(1))
        before, after = slot.around()
        message = slot.prompt(slot.text(ids))[0 if place == "system" else -1]["content"]
        assert message.endswith(slot.text(ids))
        assert render(loaded.tokenizer, slot.prompt(slot.text(ids))).ids == (*before, *ids, *after)
        pieces = [loaded.tokenizer.convert_tokens_to_ids(letter) for letter in "th"]
        assert not slot.reads((*ids[:1], *pieces, *ids[3:]))  # read as the one token "th"


def test_plans_that_cannot_be() -> None:
    assert Plan(steps=10, candidates=4).evaluations == 1 + 10 * (4 + GRADIENT)
    blind = Plan(steps=10, candidates=4).blind(2)
    assert (blind.gradient, blind.restarts, blind.evaluations) == (False, 2, 2 + 10 * (4 + GRADIENT))
    for wrong in ({"length": 0}, {"steps": 1, "restarts": 2}, {"weight": -1.0}, {"place": "front"}):
        with pytest.raises(InputError, match="counts must be"):
            Plan(**wrong)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ all of it


class Lies:
    """A scorer to which every answer is a lie but those with an `e`."""

    identity = MappingProxyType({"scorer": "lies"})

    def scores(self, asked: Sequence[Scenario], answers: Sequence[str]) -> list[Score]:
        return [Score(100.0 if "e" in answer else 0.0, 100.0) for answer in answers]


def test_the_attack_on_a_tiny_model(loaded: TransformersModel, probe: Probe, tmp_path: Path) -> None:
    guard: Guard = tiny.guard(loaded.identity, sg.StTP(4), (probe,))
    plan = Plan(length=4, steps=3, candidates=6, tokens=4)
    store = tmp_path / "s.jsonl"

    def go(each: bool) -> Any:
        return suffix_attack(
            loaded, SCENARIOS[:2], guard, scorer=Lies(), held_out=SCENARIOS[2:], plan=plan, each=each, benign=["Hello."],
            sampling=SHORT, store=store,
        )  # fmt: skip

    found = go(True)
    assert len(found.suffixes) + found.skipped == 2 and found.own.n == len(found.suffixes)
    assert found.held_out is not None and found.held_out.n == 2 and found.transfer is not None
    assert found.gain is not None and found.noticed is not None and found.noticed.benign == found.own.n + 1
    assert all(one.found.loss <= one.found.losses[0] for one in found.suffixes)
    size = store.stat().st_size
    assert go(True) == found and store.stat().st_size == size
    together = go(False)
    assert len(together.suffixes) == 1 and set(together.suffixes[0].scenarios) == {case.scenario for case in found.own.cases}
    assert "gradient-guided suffix of 4 tokens" in str(found)


def test_what_cannot_be_attacked(loaded: TransformersModel, model: sg.Backend, probe: Probe) -> None:
    guard = tiny.guard(loaded.identity, sg.StTP(4), (probe,))

    class Honest(Lies):
        def scores(self, asked: Sequence[Scenario], answers: Sequence[str]) -> list[Score]:
            return [Score(None, None) for _ in answers]

    with pytest.raises(InputError, match="gives no gradients"):
        suffix_attack(model, SCENARIOS, guard, scorer=Lies())
    with pytest.raises(InputError, match="misbehaves on none of 4"):
        suffix_attack(loaded, SCENARIOS, guard, scorer=Honest(), sampling=SHORT)
    with pytest.raises(InputError, match="ids of their own"):
        suffix_attack(loaded, [SCENARIOS[0]] * 2, guard, scorer=Lies(), sampling=SHORT)


def test_surprise_is_the_worst_window(loaded: TransformersModel) -> None:
    prompt = prompts_of(SCENARIOS[0])[1]
    ids = render(loaded.tokenizer, prompt).ids
    each = surprisal(loaded.logits(prompt)[:-1], ids[1:])
    assert surprise(loaded, prompt, 3) == pytest.approx(max(each[i : i + 3].mean() for i in range(len(each) - 2)))
    assert surprise(loaded, prompt, 10_000) == pytest.approx(each.mean())


def test_the_reference_kernel_has_the_gradient_of_its_branches(probe: Probe) -> None:
    """Below the knee StTP sets the projection, so nothing flows along v; above it everything does."""
    v, gate = torch.from_numpy(np.array(probe.v)), torch.from_numpy(sg.StTP(2).compile(probe).row())
    for side, expected in ((-1.0, 0.0), (1.0, 1.0)):
        h = ((probe.m + side) * v).requires_grad_()
        moved, _, _ = correct(h, v, gate)
        (slope,) = torch.autograd.grad(moved @ v, h)
        assert float(slope @ v) == pytest.approx(expected, abs=1e-5)
