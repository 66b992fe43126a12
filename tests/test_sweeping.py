"""Choosing an operating point: planted figures, and a sweep on a tiny model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

import steerguard as sg
import tiny
from steerguard.backends import load
from steerguard.errors import InputError, RuleError
from steerguard.fitting import Contrast, Fit, fit
from steerguard.scorers import UNSCORED, Score
from steerguard.sweeping import (
    BENIGN_LOST,
    Benign,
    Cost,
    Figures,
    Setting,
    Sweep,
    _finalists,
    choose,
    compare,
    disturbance,
    gap_recovered,
    grid,
    sweep,
)
from steerguard.traits import Scenario
from test_fitting import SHORT, TRAIT

ALIGNED = Figures(trait=95.0, coherence=100.0, repetition=0.0, moved=0.0, shift=0.0, n=10, unscored=0)


def figures(trait: float | None, coherence: float | None, shift: float = 1.0) -> Figures:
    return replace(ALIGNED, trait=trait, coherence=coherence, shift=shift)


def test_the_highest_trait_with_enough_coherence_is_chosen() -> None:
    points = {
        Setting(sg.StTP(6), 1): figures(70, 99),
        Setting(sg.StTP(12), 1): figures(85, 90),  # the planted best: coherence exactly at the bar
        Setting(sg.StTP(18), 1): figures(99, 89.9),  # a better trait that broke the language
        Setting(sg.StMP(1), 2): figures(60, 100, shift=3.0),
        Setting(sg.StMP(2), 2): figures(60, 100, shift=2.0),  # a tie goes to the smaller shift
    }
    found = choose(points, ALIGNED)
    assert found.best == {"StTP": Setting(sg.StTP(12), 1), "StMP": Setting(sg.StMP(2), 2)}
    assert found.refused == found.barred == found.costs == {}
    # with a lower bar the broken one would have been chosen: the constraint is what decided
    assert choose(points, replace(ALIGNED, coherence=99.0)).best["StTP"] == Setting(sg.StTP(18), 1)


def test_a_rule_without_an_eligible_point_says_which_constraint_bit() -> None:
    points = {Setting(sg.SwFC(5), 1): figures(99, 40), Setting(sg.StTP(0), 1): figures(None, None)}
    found = choose(points, ALIGNED)
    assert found.best == found.barred == {}
    assert found.refused["SwFC"] == "the highest coherence of its 1 settings is 40.0, the bar is 90.0"
    assert found.refused["StTP"] == "none of its 1 settings could be scored"
    # an aligned baseline that could not be scored is no licence
    assert choose({Setting(sg.SwFC(1), 1): figures(99, 99)}, figures(None, None)).best == {}


def test_strong_and_gentle_settings_go_on() -> None:
    strong, second, gentle, weak, broken = (Setting(sg.StTP(alpha), 1) for alpha in (36, 30, 12, 6, 24))
    deep = Setting(sg.StTP(36), 2)
    points = {
        strong: replace(figures(99, 99, shift=4.0), error=5.0),
        second: replace(figures(98, 99, shift=3.0), error=5.0),
        gentle: figures(95, 99, shift=1.0),
        weak: figures(50, 99, shift=0.5),
        broken: figures(100, 20, shift=9.0),
        deep: figures(60, 99, shift=20.0),
    }
    assert _finalists(points, ALIGNED, 2) == [strong, gentle]
    assert _finalists(points, ALIGNED, 4) == [strong, deep, gentle, second]
    assert _finalists(points, ALIGNED, 9) == [strong, deep, gentle, second, weak, broken]


def test_settings_that_cannot_be_told_apart_go_to_the_smaller_shift() -> None:
    strong, gentle, weak = (Setting(sg.StTP(alpha), 1) for alpha in (36, 12, 6))
    points = {
        strong: replace(figures(92, 99, shift=3.0), error=4.0),
        gentle: figures(88, 99, shift=2.0),  # just within one standard error
        weak: figures(87.9, 99, shift=1.0),  # just outside
    }
    assert choose(points, ALIGNED).best == {"StTP": gentle}
    exact = {**points, strong: figures(92, 99, shift=3.0)}
    assert choose(exact, ALIGNED).best == {"StTP": strong}  # known exactly: the highest trait
    # benign answers tell more than the shift does
    changed = {strong: 0.1, gentle: 0.2}
    found = choose(points, ALIGNED, costs=lambda settings: {s: cost(0, changed[s]) for s in settings})
    assert found.best == {"StTP": strong}


def cost(lost: float, changed: float = 0.0) -> Cost:
    return Cost(unguarded=98.0, guarded=98.0 - lost, moved=0.1, changed=changed, n=96)


def test_a_setting_that_harms_benign_prompts_is_passed_over() -> None:
    first, second, third = (Setting(sg.StTP(alpha), 1) for alpha in (36, 30, 24))
    points = {first: figures(95, 99), second: figures(90, 99), third: figures(80, 99)}
    planted = {first: cost(BENIGN_LOST + 0.01), second: cost(BENIGN_LOST), third: cost(0)}
    asked: list[Setting] = []

    def costs(settings: Sequence[Setting]) -> dict[Setting, Cost]:
        asked.extend(settings)
        return {s: planted[s] for s in settings}

    found = choose(points, ALIGNED, costs=costs)
    assert found.best == {"StTP": second}  # exactly at the bar
    assert asked == [first, second]  # only what would else be chosen is tried
    assert found.costs == {s: planted[s] for s in asked}
    assert found.barred == found.refused == {}
    assert choose(points, ALIGNED).best == {"StTP": first}  # the constraint is what decided


def test_a_rule_that_benign_prompts_alone_refuse_says_so() -> None:
    points = {Setting(sg.SwFC(a), 1): figures(80 + a, 99 if a < 3 else 0) for a in (1, 2, 3)}
    found = choose(points, ALIGNED, costs=lambda settings: {s: cost(30.0 * s.rule.strength) for s in settings})  # type: ignore[operator]
    assert found.best == {}
    assert found.barred == {"SwFC": Setting(sg.SwFC(2), 1)}
    assert found.refused["SwFC"] == (
        "its 2 settings with enough coherence lose 30.0 points or more on benign prompts, the bar is 1"
    )


def test_share_of_the_gap() -> None:
    malicious = figures(15, 100)
    assert gap_recovered(figures(95, 1), aligned=ALIGNED, malicious=malicious) == pytest.approx(100)
    assert gap_recovered(figures(55, 1), aligned=ALIGNED, malicious=malicious) == pytest.approx(50)
    assert gap_recovered(figures(None, 1), aligned=ALIGNED, malicious=malicious) is None


class ByLength:
    """A scorer that likes long answers, so that there is something to sweep; every tenth scenario is beyond it."""

    identity = MappingProxyType({"scorer": "by length"})

    def scores(self, asked: Sequence[Scenario], answers: Sequence[str]) -> list[Score]:
        return [
            UNSCORED if one.id == "select-1" else Score(min(100.0, 5.0 * len(answer)), 100.0)
            for one, answer in zip(asked, answers, strict=True)
        ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> sg.Backend:
    return load(tiny.llama_folder(tmp_path_factory.mktemp("models") / "tiny"), backend="fake")


@pytest.fixture(scope="module")
def probes(model: sg.Backend) -> Fit:
    found = fit(model, TRAIT, sampling=SHORT, allow_weak=True)
    strong = {layer: replace(p, evidence=replace(p.evidence, auroc_low=0.9)) for layer, p in found.items() if layer > 0}
    return Fit({0: found[0], **strong}, model=found.model, provenance=found.provenance)


def test_the_grid_is_the_papers_on_layers_that_read(probes: Fit) -> None:
    settings = grid(probes)
    assert {s.layer for s in settings} == {layer for layer, p in probes.items() if not p.evidence.weak}
    assert len(settings) == (5 + 7 + 7) * len({s.layer for s in settings})
    assert {s.positions for s in grid(probes, positions=("all", "response"))} == {"all", "response"}
    with pytest.raises(RuleError, match="no grid of strengths"):
        grid(probes, rules=["Ablate"])
    with pytest.raises(RuleError, match="there is no rule"):
        grid(probes, rules=["CAA"])


def test_a_sweep_equals_each_setting_alone(model: sg.Backend, probes: Fit) -> None:
    settings = [Setting(sg.SwFC(a), layer) for layer in (1, 2) for a in (1, 5)]
    seen: list[tuple[int, int]] = []
    found = sweep(
        model, TRAIT, probes, settings=settings, scorer=ByLength(), sampling=SHORT, rows=4,
        progress=lambda _, done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(0, 4), (2, 4), (4, 4)]
    assert set(found.points) == set(settings)
    for setting in settings:
        alone = sweep(model, TRAIT, probes, settings=[setting], scorer=ByLength(), sampling=SHORT)
        assert alone.points[setting] == found.points[setting]
        assert found.points[setting].unscored == 1
        assert found.points[setting].moved == 1.0
    guard = found.guard
    assert guard.provenance["chosen"]["by"] == "sweep"
    assert guard.provenance["chosen"]["settings"] == 4
    arms = compare(model, TRAIT, {"SwFC": guard}, scorer=ByLength(), sampling=SHORT)
    assert [arm.name for arm in arms] == ["aligned", "malicious", "SwFC"]
    assert arms[2].setting == Setting(guard.rule, guard.layers[0])
    assert arms[0].figures.moved == 0.0


def test_a_sweep_looks_at_benign_prompts(model: sg.Backend, probes: Fit) -> None:
    settings = [Setting(sg.SwFC(a), 2) for a in (0, 50)]  # one that moves nothing, one that moves everything far
    prompts = ("Hello.", "How are you?")
    found = sweep(
        model, TRAIT, probes, settings=settings, scorer=ByLength(), sampling=SHORT, benign=Benign(prompts)
    )  # fmt: skip
    assert found.best == {"SwFC": settings[0]}
    harmless = found.costs[settings[0]]
    assert (harmless.unguarded, harmless.lost, harmless.n) == (100.0, 0.0, 2)
    chosen = found.guard.provenance["chosen"]
    assert chosen["benign"] == {"unguarded": 100.0, "guarded": 100.0, "moved": harmless.moved, "changed": 0.0, "n": 2}
    assert "at most 1 points lost on benign prompts" in chosen["constraint"]
    assert chosen["eligible"]
    refused = sweep(
        model, TRAIT, probes, settings=settings[1:], scorer=ByLength(), sampling=SHORT, benign=Benign(prompts)
    )  # fmt: skip
    assert refused.best == {}
    assert refused.barred == {"SwFC": settings[1]}
    assert not refused.guard_at(settings[1]).provenance["chosen"]["eligible"]
    # what an answer is worth is the caller's to say
    anything = Benign(prompts, lambda i, text: 50.0)
    loose = sweep(model, TRAIT, probes, settings=settings[1:], scorer=ByLength(), sampling=SHORT, benign=anything)
    assert loose.costs[settings[1]].unguarded == loose.costs[settings[1]].guarded == 50.0
    assert loose.best == {"SwFC": settings[1]}


def test_disturbance_is_what_the_gates_would_do_to_the_prompts(model: sg.Backend, probes: Fit) -> None:
    fixed, never, gated = (Setting(rule, 2) for rule in (sg.SwFC(3), sg.Floor(-1e6), sg.StMP(2)))
    prompts = ("Hello.", "How are you today?")
    found = disturbance(model, probes, Benign(prompts), [fixed, never, gated])
    assert found[fixed] == pytest.approx(3.0)  # three class separations at every token
    assert found[never] == 0.0
    rho = np.concatenate([model.residuals(prompt)[2] for prompt in prompts]) @ probes[2].v
    probe = probes[2]
    mirrored = np.minimum(rho + 4 * (probe.m - rho), probe.mu_pos + 40 * probe.sigma_pos)  # the paper's cap
    due = np.where(rho < probe.m, mirrored - rho, 0).mean() / abs(probe.delta_mu)
    assert found[gated] == pytest.approx(due, rel=1e-4)
    assert due > 0


def test_screening_tries_all_and_scores_the_best(model: sg.Backend, probes: Fit) -> None:
    settings = [Setting(sg.SwFC(a), 2) for a in (1, 2, 3, 4, 5)]
    whole = sweep(model, TRAIT, probes, settings=settings, scorer=ByLength(), sampling=SHORT)
    found = sweep(model, TRAIT, probes, settings=settings, scorer=ByLength(), sampling=SHORT, screen=1, finalists=2)
    assert (found.tried, len(found.points)) == (5, 2)
    for setting, figures_ in found.points.items():
        assert figures_ == whole.points[setting]
    everything = sweep(model, TRAIT, probes, settings=settings, scorer=ByLength(), sampling=SHORT, screen=99)
    assert everything.points == whole.points


def test_a_sweep_of_nothing_is_refused(model: sg.Backend, probes: Fit) -> None:
    with pytest.raises(InputError, match="got 2 and 0"):
        sweep(model, TRAIT, probes, settings=[], scorer=ByLength())
    none = Sweep(probes, ALIGNED, ALIGNED, {}, 0, {}, {"StTP": "why"})
    with pytest.raises(InputError, match="no setting is eligible: StTP: why"):
        none.guard  # noqa: B018
    with pytest.raises(InputError, match="judge"):
        sweep(model, TRAIT, probes)
    assert isinstance(Contrast(()).digest, str)


def test_the_grid_ids(tmp_path: Path) -> None:
    assert str(Setting(sg.StTP(12), 3)) == "StTP(12) at layer 3"
    assert str(Setting(sg.StTP(12), 3, "response")) == "StTP(12) at layer 3, response tokens"
