"""A sweep on a tiny model: many settings in one batch, resumed, coarse to fine, beside other guards, and reported."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

import steerguard as sg
import tiny
from steerguard.backends import load
from steerguard.errors import InputError, RuleError
from steerguard.fitting import Fit, fit
from steerguard.scorers import UNSCORED, Score
from steerguard.sweeping import Benign, Limits, Search, Setting, Sweep, compare, grid, sweep
from steerguard.sweeping.choice import finalists
from steerguard.traits import Scenario
from test_fitting import SHORT, TRAIT

PROMPTS = ("Hello.", "How are you today?")


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


def swept(model: sg.Backend, probes: Fit, settings: Sequence[Setting], **options: Any) -> Sweep:
    return sweep(model, TRAIT, probes, settings=settings, scorer=ByLength(), sampling=SHORT, **options)


class Counting:
    """A model that counts the answers that it gives, and is interrupted after so many calls."""

    def __init__(self, model: sg.Backend, calls: int = 1000) -> None:
        self._model, self._calls = model, calls
        self.rows = 0

    def generate(self, prompts: Any, **options: Any) -> Any:
        if options.get("sampling") == SHORT:
            self._calls -= 1
            if self._calls < 0:
                raise KeyboardInterrupt
            self.rows += len(prompts)
        return self._model.generate(prompts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


# ------------------------------------------------------------------------------------------------ the grid


def test_the_grid_is_the_papers_on_layers_that_read(probes: Fit) -> None:
    settings = grid(probes)
    assert {s.layers for s in settings} == {(layer,) for layer, p in probes.items() if not p.evidence.weak}
    assert len(settings) == (5 + 7 + 7) * len({s.layers for s in settings})
    assert {s.positions for s in grid(probes, positions=("all", "response"))} == {"all", "response"}
    with pytest.raises(RuleError, match="no grid of strengths"):
        grid(probes, rules=["Ablate"])
    with pytest.raises(RuleError, match="there is no rule"):
        grid(probes, rules=["CAA"])


def test_a_grid_of_ones_own(probes: Fit) -> None:
    settings = grid(probes, rules=["StTP"], layers=[1, (1, 3)], strengths={"StTP": [2, 4]})
    assert [str(s) for s in settings] == [
        "StTP(2) at layer 1", "StTP(4) at layer 1", "StTP(2) at layers 1, 3", "StTP(4) at layers 1, 3"
    ]  # fmt: skip
    assert str(Setting(sg.StTP(12), (3,), "response")) == "StTP(12) at layer 3, response tokens"
    with pytest.raises(InputError, match=r"no probe of layer 9; there are 0-3"):
        grid(probes, layers=[9])
    with pytest.raises(InputError, match="given for StMP, which is not among the rules StTP"):
        grid(probes, rules=["StTP"], strengths={"StMP": [1]})
    with pytest.raises(InputError, match="each once and in order"):
        Setting(sg.StTP(1), (3, 1))


# ------------------------------------------------------------------------------------------------ the sweep


def test_a_sweep_equals_each_setting_alone(model: sg.Backend, probes: Fit) -> None:
    settings = [Setting(sg.SwFC(a), (layer,)) for layer in (1, 2) for a in (1, 5)]
    seen: list[tuple[int, int]] = []

    def told(what: str, done: int, total: int, rate: float = 0.0) -> None:
        if what == "settings steered":
            seen.append((done, total))
            assert (rate > 0) == (done > 0)

    found = swept(model, probes, settings, batch=4, progress=told)
    assert seen == [(0, 8), (4, 8), (8, 8)]
    assert set(found.points) == set(settings)
    for setting in settings:
        alone = swept(model, probes, [setting])
        assert alone.points[setting] == found.points[setting]
        assert found.points[setting].unscored == 1
        assert found.points[setting].moved == 1.0
    guard = found.guard
    chosen = guard.provenance["chosen"]
    assert (chosen["by"], chosen["settings"], chosen["beside"], chosen["not_looked"]) == ("sweep", 4, [], "")
    assert chosen["wins"] == found.sure["SwFC"].wins
    assert found.winner == "SwFC"


def test_several_layers_and_a_guard_of_another_trait(model: sg.Backend, probes: Fit) -> None:
    other = replace(probes.guard(sg.Target(3), 1), name="other")
    setting = Setting(sg.StMP(2), (1, 2))
    found = swept(model, probes, [setting], beside=[other])
    guard = found.guard_at(setting)
    assert guard.layers == (1, 2)
    assert guard.provenance["chosen"]["beside"] == [other.digest]
    prompts = [[{"role": "system", "content": s.negative}, {"role": "user", "content": s.turns[0]}] for s in TRAIT.select]
    both = model.generate(prompts, guards=(other, guard), sampling=SHORT)
    assert found.points[setting].shift == pytest.approx(sum(a.shift for a in both) / sum(a.tokens_seen for a in both))
    # the malicious baseline is what the other guard leaves of it; the aligned one is unguarded
    assert found.malicious.moved > 0 == found.aligned.moved
    assert swept(model, probes, [setting]).points != found.points


def test_a_sweep_looks_at_benign_prompts(model: sg.Backend, probes: Fit) -> None:
    settings = [Setting(sg.SwFC(a), (2,)) for a in (0, 50)]  # one that moves nothing, one that moves everything far
    found = swept(model, probes, settings, benign=Benign(PROMPTS))
    assert found.best == {"SwFC": settings[0]}
    harmless = found.costs[settings[0]]
    assert (harmless.kl, harmless.lost, harmless.changed, harmless.n) == (0.0, None, None, 2)
    assert found.guard.provenance["chosen"]["benign"]["kl"] == 0.0
    assert "KL <= 0.1 on benign prompts" in found.guard.provenance["chosen"]["constraint"]
    assert found.guard.provenance["chosen"]["eligible"]
    refused = swept(model, probes, settings[1:], benign=Benign(PROMPTS))
    assert refused.best == {}
    assert refused.barred == {"SwFC": settings[1]}
    assert "KL on benign prompts" in refused.refused["SwFC"]
    assert (refused.costs[settings[1]].gated, refused.costs[settings[1]].fire_rate) == (False, 1.0)
    assert not refused.guard_at(settings[1]).provenance["chosen"]["eligible"]


def test_what_a_benign_answer_is_worth_is_the_callers_to_say(model: sg.Backend, probes: Fit) -> None:
    setting = Setting(sg.SwFC(50), (2,))
    unguarded = [answer.text for answer in model.generate(list(PROMPTS), sampling=SHORT)]
    exact = Benign(PROMPTS, lambda i, text: 100.0 * (text == unguarded[i]))
    strict = swept(model, probes, [setting], benign=exact, limits=Limits(kl=None))
    assert (strict.costs[setting].lost, strict.costs[setting].changed) == (100.0, 1.0)
    assert strict.best == {}
    anything = Benign(PROMPTS, lambda i, text: 50.0)
    loose = swept(model, probes, [setting], benign=anything, limits=Limits(kl=None))
    assert loose.costs[setting].lost == 0.0
    assert loose.best == {"SwFC": setting}


# ------------------------------------------------------------------------------------------------ from coarse to fine


def test_screening_tries_all_and_scores_the_best(model: sg.Backend, probes: Fit) -> None:
    settings = [Setting(sg.SwFC(a), (2,)) for a in (1, 2, 3, 4, 5)]
    whole = swept(model, probes, settings)
    assert whole.not_looked == ""
    found = swept(model, probes, settings, search=Search(screen=1, finalists=2))
    assert (found.tried, len(found.points), len(found.screened)) == (5, 2, 3)
    assert found.not_looked == "3 settings answered 1 of 2 scenarios and were left behind"
    for setting, figures in found.points.items():
        assert figures == whole.points[setting]
    assert swept(model, probes, settings, search=Search(screen=99)).points == whole.points


def test_screening_breaks_ties_by_what_would_move_benign_prompts(model: sg.Backend, probes: Fit) -> None:
    settings = [Setting(sg.SwFC(a), (2,)) for a in (3, 1)]
    equal = Scores(lambda asked, text: 50.0)
    found = sweep(
        model, TRAIT, probes, settings=settings, scorer=equal, sampling=SHORT, benign=Benign(PROMPTS),
        search=Search(screen=1, finalists=1), limits=Limits(kl=None),
    )  # fmt: skip
    assert list(found.points) == [settings[1]]


class Scores:
    """A scorer by a rule of the test's own."""

    def __init__(self, rule: Callable[[Scenario, str], float]) -> None:
        self._rule = rule
        self.identity = MappingProxyType({"scorer": str(id(rule))})

    def scores(self, asked: Sequence[Scenario], answers: Sequence[str]) -> list[Score]:
        return [Score(self._rule(one, text), 100.0) for one, text in zip(asked, answers, strict=True)]


def test_a_stride_looks_around_the_best_layers_and_says_what_it_left(tmp_path: Path) -> None:
    from steerguard.sweeping.points import Figures
    from steerguard.sweeping.run import _around, _coarse

    settings = [Setting(sg.StTP(alpha), (layer,)) for layer in range(12) for alpha in (6, 12)]
    coarse = _coarse(settings, 4)
    assert {s.layers for s in coarse} == {(2,), (6,), (10,)}
    assert _coarse(settings, 1) == settings
    figures = {s: Figures(10.0 * (s.layers == (6,)), 100.0, 0.0, 0.5, 1.0, 4, 0) for s in coarse}
    around = _around(figures, settings, next(iter(figures.values())), Limits(), 4)
    assert {s.layers[0] for s in around} >= {3, 4, 5, 7, 8, 9}  # all within reach of the best
    assert not set(around) & set(coarse)


def test_what_a_stride_left_out_is_said(model: sg.Backend, probes: Fit) -> None:
    settings = [Setting(sg.SwFC(a), (layer,)) for layer in (0, 1, 2, 3) for a in (1, 2)]
    weak = replace(probes[0], evidence=replace(probes[0].evidence, auroc_low=0.9))
    strong = Fit({**probes, 0: weak}, model=probes.model, provenance=probes.provenance)
    whole = swept(model, strong, settings)
    for stride in (2, 3, 4):
        found = swept(model, strong, settings, search=Search(stride=stride))
        assert found.points.items() <= whole.points.items()
        left = len(settings) - len(found.points)
        assert (found.not_looked == "") == (left == 0)
        assert found.best == whole.best or str(left) in found.not_looked
    with pytest.raises(InputError, match="at least 1"):
        Search(stride=0)


def test_finalists_come_from_several_layers_and_positions() -> None:
    from steerguard.sweeping.points import Figures

    base = Figures(trait=95.0, coherence=100.0, repetition=0.0, moved=0.0, shift=0.0, n=10, unscored=0)
    points = {
        Setting(sg.StTP(a), (layer,), p): replace(base, trait=50.0 + a + layer, shift=float(a))  # type: ignore[arg-type]
        for a in (6, 12) for layer in (1, 2) for p in ("all", "response")
    }  # fmt: skip
    found = finalists(points, base, 4)
    assert len({(s.layers, s.positions) for s in found}) == 4
    assert sorted(map(str, finalists(points, base, 99))) == sorted(map(str, points))


# ------------------------------------------------------------------------------------------------ the journal


def test_an_interrupted_sweep_goes_on_and_ends_the_same(model: sg.Backend, probes: Fit, tmp_path: Path) -> None:
    settings = [Setting(sg.SwFC(a), (layer,)) for layer in (1, 2) for a in (1, 2, 5)]
    options: dict[str, Any] = {"batch": 3, "benign": Benign(PROMPTS, lambda i, text: 50.0), "limits": Limits(kl=None)}
    whole = swept(model, probes, settings, **options)
    for calls in range(8):
        store = tmp_path / f"{calls}.jsonl"
        with pytest.raises(KeyboardInterrupt):
            swept(Counting(model, calls), probes, settings, store=store, **options)  # type: ignore[arg-type]
        again = Counting(model)
        found = swept(again, probes, settings, store=store, **options)  # type: ignore[arg-type]
        assert replace(found, reused=0) == whole
        third = Counting(model)
        assert replace(swept(third, probes, settings, store=store, **options), reused=0) == whole  # type: ignore[arg-type]
        assert third.rows == 0  # nothing is asked for twice
        assert again.rows == 4 + 12 + 2 + 2 * len(whole.costs) - found.reused


def test_what_was_made_otherwise_is_noticed_and_not_used(model: sg.Backend, probes: Fit, tmp_path: Path) -> None:
    store = tmp_path / "sweep.jsonl"
    settings = [Setting(sg.SwFC(1), (1,))]
    first = swept(model, probes, settings, store=store)
    assert first.changed == ""
    counting = Counting(model)
    hotter = sweep(
        counting, TRAIT, probes, settings=settings, scorer=ByLength(), sampling=replace(SHORT, seed=7), store=store  # type: ignore[arg-type]
    )  # fmt: skip
    assert "the sampling changed since the last sweep" in hotter.changed
    assert hotter.reused == 0
    back = swept(model, probes, settings, store=store)
    assert back.reused == 6  # what was there is found again
    assert replace(back, changed="", reused=0) == first
    larger = swept(model, probes, [*settings, Setting(sg.SwFC(2), (1,))], store=store)
    assert (larger.changed, larger.reused) == ("", 6)  # a larger grid is no other sweep


def test_a_journal_holds_no_half_batches(model: sg.Backend, probes: Fit, tmp_path: Path) -> None:
    store = tmp_path / "sweep.jsonl"
    swept(model, probes, [Setting(sg.SwFC(1), (1,))], store=store, batch=2)
    records = [json.loads(line)["record"] for line in store.read_text().splitlines()]
    assert [len(r["answers"]) for r in records if "answers" in r] == [2, 2, 2]


# ------------------------------------------------------------------------------------------------ the test split


def test_arms_on_the_test_split(model: sg.Backend, probes: Fit, tmp_path: Path) -> None:
    guard = swept(model, probes, [Setting(sg.StTP(6), (2,))]).guard_at(Setting(sg.StTP(6), (2,)))
    store = tmp_path / "test.jsonl"
    arms = compare(model, TRAIT, {"StTP": guard}, scorer=ByLength(), sampling=SHORT, store=store)
    assert [arm.name for arm in arms] == ["aligned", "malicious", "StTP"]
    assert arms[2].setting == Setting(guard.rule, guard.layers)
    aligned, malicious, steered = arms
    prompts = [[{"role": "system", "content": s.negative}, {"role": "user", "content": s.turns[0]}] for s in TRAIT.test]
    # a reading gate changes nothing, and reads what is there
    plain = model.generate(prompts, sampling=SHORT)
    assert [answer.text for answer in malicious.answers] == [answer.text for answer in plain]
    assert aligned.figures.moved == malicious.figures.moved == 0.0
    for prompt, answer, kept in zip(prompts, plain, malicious.answers, strict=True):
        rho = model.residuals(prompt, answer.ids)[2] @ guard.probes[0].v
        np.testing.assert_allclose(kept.rho, rho[: len(kept.rho)], rtol=1e-3, atol=1e-4)
        assert len(kept.rho) == len(rho) - 1
        assert "".join(kept.pieces) == kept.text
    traced = model.generate(prompts, guards=guard, sampling=SHORT, trace=True)
    for answer, kept in zip(traced, steered.answers, strict=True):
        np.testing.assert_allclose(kept.delta, answer.traces[0].delta, rtol=1e-4)
    again = Counting(model)
    repeated = compare(again, TRAIT, {"StTP": guard}, scorer=ByLength(), sampling=SHORT, store=store)  # type: ignore[arg-type]
    assert again.rows == 0
    assert [arm.figures for arm in repeated] == [arm.figures for arm in arms]


def test_a_sweep_of_nothing_is_refused(model: sg.Backend, probes: Fit) -> None:
    with pytest.raises(InputError, match="got 2 and 0"):
        swept(model, probes, [])
    nothing = swept(model, probes, [Setting(sg.SwFC(1), (1,))])
    none = replace(nothing, best={}, refused={"StTP": "why"})
    assert none.winner is None
    with pytest.raises(InputError, match="no setting is eligible: StTP: why"):
        none.guard  # noqa: B018
    with pytest.raises(InputError, match="judge"):
        sweep(model, TRAIT, probes)
    with pytest.raises(InputError, match="at least one row"):
        swept(model, probes, [Setting(sg.SwFC(1), (1,))], batch=-1)
