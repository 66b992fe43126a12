"""Choosing an operating point: planted figures, and what is chosen of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

import steerguard as sg
from steerguard.sweeping import Cost, Figures, Limits, Scored, Setting, choose, gap_recovered
from steerguard.sweeping.choice import Choice, finalists, sureness

ALIGNED = Figures(trait=95.0, coherence=100.0, repetition=0.0, moved=0.0, shift=0.0, n=10, unscored=0)


def figures(trait: float | None, coherence: float | None, shift: float = 1.0) -> Figures:
    return replace(ALIGNED, trait=trait, coherence=coherence, shift=shift)


def test_the_highest_trait_with_enough_coherence_is_chosen() -> None:
    points = {
        Setting(sg.StTP(6), (1,)): figures(70, 99),
        Setting(sg.StTP(12), (1,)): figures(85, 90),  # the planted best: coherence exactly at the bar
        Setting(sg.StTP(18), (1,)): figures(99, 89.9),  # a better trait that broke the language
        Setting(sg.StMP(1), (2,)): figures(60, 100, shift=3.0),
        Setting(sg.StMP(2), (2,)): figures(60, 100, shift=2.0),  # a tie goes to the smaller shift
    }
    found = choose(points, ALIGNED)
    assert found.best == {"StTP": Setting(sg.StTP(12), (1,)), "StMP": Setting(sg.StMP(2), (2,))}
    assert found.refused == found.barred == found.costs == {}
    # with a lower bar the broken one would have been chosen: the constraint is what decided
    assert choose(points, replace(ALIGNED, coherence=99.0)).best["StTP"] == Setting(sg.StTP(18), (1,))


def test_a_rule_without_an_eligible_point_says_which_constraint_bit() -> None:
    points = {Setting(sg.SwFC(5), (1,)): figures(99, 40), Setting(sg.StTP(0), (1,)): figures(None, None)}
    found = choose(points, ALIGNED)
    assert found.best == found.barred == {}
    assert found.refused["SwFC"] == "the highest coherence of its 1 settings is 40.0, the bar is 90.0"
    assert found.refused["StTP"] == "none of its 1 settings could be scored"
    # an aligned baseline that could not be scored is no licence
    assert choose({Setting(sg.SwFC(1), (1,)): figures(99, 99)}, figures(None, None)).best == {}


def test_strong_and_gentle_settings_go_on() -> None:
    strong, second, gentle, weak, broken = (Setting(sg.StTP(alpha), (1,)) for alpha in (36, 30, 12, 6, 24))
    deep = Setting(sg.StTP(36), (2,))
    points = {
        strong: replace(figures(99, 99, shift=4.0), error=5.0),
        second: replace(figures(98, 99, shift=3.0), error=5.0),
        gentle: figures(95, 99, shift=1.0),
        weak: figures(50, 99, shift=0.5),
        broken: figures(100, 20, shift=9.0),
        deep: figures(60, 99, shift=20.0),
    }
    assert finalists(points, ALIGNED, 2) == [strong, gentle]
    assert finalists(points, ALIGNED, 4) == [strong, deep, gentle, second]
    assert finalists(points, ALIGNED, 9) == [strong, deep, gentle, second, weak, broken]


def test_settings_that_cannot_be_told_apart_go_to_the_smaller_shift() -> None:
    strong, gentle, weak = (Setting(sg.StTP(alpha), (1,)) for alpha in (36, 12, 6))
    points = {
        strong: replace(figures(92, 99, shift=3.0), error=4.0),
        gentle: figures(88, 99, shift=2.0),  # just within one standard error
        weak: figures(87.9, 99, shift=1.0),  # just outside
    }
    assert choose(points, ALIGNED).best == {"StTP": gentle}
    exact = {**points, strong: figures(92, 99, shift=3.0)}
    assert choose(exact, ALIGNED).best == {"StTP": strong}  # known exactly: the highest trait
    # benign answers tell more than the shift does, and so does KL
    for key in ("changed", "kl"):
        told = {strong: 0.01, gentle: 0.02}
        found = choose(points, ALIGNED, costs=lambda settings: {s: replace(MILD, **{key: told[s]}) for s in settings})
        assert found.best == {"StTP": strong}


MILD = Cost(gated=True, kl=0.0, fire_rate=0.0, lost=0.0, changed=0.0, n=96)


@pytest.mark.parametrize(("bar", "key"), [("kl", "kl"), ("fire_rate", "fire_rate"), ("benign_lost", "lost")])
def test_a_setting_that_harms_benign_prompts_is_passed_over(bar: str, key: str) -> None:
    first, second, third = (Setting(sg.StTP(alpha), (1,)) for alpha in (36, 30, 24))
    points = {first: figures(95, 99), second: figures(90, 99), third: figures(80, 99)}
    limit = getattr(Limits(), bar)
    planted = {first: replace(MILD, **{key: limit * 1.01}), second: replace(MILD, **{key: limit}), third: MILD}
    asked: list[Setting] = []

    def costs(settings: Sequence[Setting]) -> dict[Setting, Cost]:
        asked.extend(settings)
        return {s: planted[s] for s in settings}

    found = choose(points, ALIGNED, costs=costs)
    assert found.best == {"StTP": second}  # exactly at the bar
    assert asked == [first, second]  # only what would else be chosen is tried
    assert found.costs == {s: planted[s] for s in asked}
    assert found.barred == found.refused == {}
    # the constraint is what decided
    assert choose(points, ALIGNED).best == {"StTP": first}
    assert choose(points, ALIGNED, costs=costs, limits=replace(Limits(), **{bar: None})).best == {"StTP": first}


def test_a_rule_without_a_gate_is_held_to_kl_and_not_to_how_often_it_fires() -> None:
    setting = Setting(sg.SwFC(1), (1,))
    always = replace(MILD, gated=False, fire_rate=1.0)
    assert choose({setting: figures(95, 99)}, ALIGNED, costs=lambda _: {setting: always}).best == {"SwFC": setting}
    far = replace(always, kl=0.2)
    found = choose({setting: figures(95, 99)}, ALIGNED, costs=lambda _: {setting: far})
    assert found.refused["SwFC"] == (
        "none of its 1 settings with enough coherence is mild enough; the mildest: "
        "KL on benign prompts 0.200, the bar is 0.1"
    )


def test_a_rule_that_benign_prompts_alone_refuse_says_so() -> None:
    points = {Setting(sg.SwFC(a), (1,)): figures(80 + a, 99 if a < 3 else 0) for a in (1, 2, 3)}
    found = choose(points, ALIGNED, costs=lambda settings: {s: replace(MILD, lost=30.0 * s.rule.strength) for s in settings})  # type: ignore[operator]
    assert found.best == {}
    assert found.barred == {"SwFC": Setting(sg.SwFC(2), (1,))}
    assert found.refused["SwFC"] == (
        "none of its 2 settings with enough coherence is mild enough; the mildest: "
        "points lost on benign prompts 30.0, the bar is 1"
    )


def test_the_limits_in_words() -> None:
    assert str(Limits()) == (
        "coherence >= 0.9 of the aligned baseline's; KL <= 0.1 on benign prompts; fire rate <= 0.25 there (rules with a gate); "
        "at most 1 points lost there"
    )
    assert str(Limits(kl=None, fire_rate=None, benign_lost=None)) == "coherence >= 0.9 of the aligned baseline's"


def test_share_of_the_gap() -> None:
    malicious = figures(15, 100)
    assert gap_recovered(figures(95, 1), aligned=ALIGNED, malicious=malicious) == pytest.approx(100)
    assert gap_recovered(figures(55, 1), aligned=ALIGNED, malicious=malicious) == pytest.approx(50)
    assert gap_recovered(figures(None, 1), aligned=ALIGNED, malicious=malicious) is None


# ---------------------------------------------------------------------------------------------- how sure it is


def scored(trait: Sequence[float], coherence: Sequence[float] | None = None, shift: float = 1.0) -> Scored:
    values = np.array(trait, float)
    language = np.array(coherence if coherence is not None else [100.0] * len(values), float)
    known = values[~np.isnan(values)]
    error = float(known.std(ddof=1) / np.sqrt(len(known)))
    means = figures(float(known.mean()), float(np.nanmean(language)), shift)
    return Scored(replace(means, error=error, n=len(values)), values, language)


def chosen(points: dict[Setting, Scored], aligned: Scored, **options: object) -> Choice:
    return choose({s: one.figures for s, one in points.items()}, aligned.figures, **options)  # type: ignore[arg-type]


def test_a_clear_choice_wins_always_and_a_toss_wins_half() -> None:
    rng = np.random.default_rng(0)
    aligned = scored([95.0] * 40)
    low, high = (Setting(sg.StTP(alpha), (1,)) for alpha in (6, 12))
    clear = {low: scored(rng.uniform(0, 20, 40)), high: scored(rng.uniform(80, 100, 40))}
    found = sureness(clear, aligned, chosen(clear, aligned))["StTP"]
    assert (found.wins, found.second) == (1.0, low)
    # two settings that are right on opposite halves of the scenarios, the gentler one chosen when neither is ahead
    half = np.repeat([0.0, 100.0], 20)
    toss = {low: scored(half, shift=2.0), high: scored(100 - half, shift=1.0)}
    choice = chosen(toss, aligned)
    assert choice.best == {"StTP": high}
    found = sureness(toss, aligned, choice)["StTP"]
    assert 0.6 < found.wins < 0.9  # within one standard error either way the gentler one stays
    assert found.second == low


def test_resamples_equal_choosing_by_hand() -> None:
    rng = np.random.default_rng(3)
    aligned = scored(rng.uniform(80, 100, 12), rng.uniform(90, 100, 12))
    points = {
        Setting(sg.StMP(alpha), (layer,)): scored(
            np.where(rng.random(12) < 0.1, np.nan, rng.uniform(0, 100, 12)), rng.uniform(75, 100, 12), float(rng.uniform(1, 9))
        )
        for alpha in (1, 2, 3) for layer in (1, 2)
    }  # fmt: skip
    choice = chosen(points, aligned)
    found = sureness(points, aligned, choice, seed=5)["StMP"]
    drawn = np.random.default_rng(5).multinomial(12, np.full(12, 1 / 12), size=1000)
    wins: dict[Setting | None, int] = {}
    for weights in drawn:
        at = np.repeat(np.arange(12), weights)
        again = {
            s: replace(scored(one.trait[at], one.coherence[at]), figures=replace(
                scored(one.trait[at], one.coherence[at]).figures, shift=one.figures.shift))
            for s, one in points.items() if (~np.isnan(one.trait[at])).sum() > 1
        }  # fmt: skip
        best = chosen(again, scored(aligned.trait[at], aligned.coherence[at])).best.get("StMP")
        wins[best] = wins.get(best, 0) + 1
    assert found.wins == pytest.approx(wins[choice.best["StMP"]] / 1000, abs=0.01)


def test_what_benign_prompts_refused_stays_refused() -> None:
    rng = np.random.default_rng(1)
    aligned = scored([95.0] * 20)
    strong, mild = (Setting(sg.StTP(alpha), (1,)) for alpha in (36, 6))
    points = {strong: scored(rng.uniform(90, 100, 20)), mild: scored(rng.uniform(60, 80, 20))}
    harm = {strong: replace(MILD, kl=5.0), mild: MILD}
    choice = chosen(points, aligned, costs=lambda settings: {s: harm[s] for s in settings})
    assert choice.best == {"StTP": mild}
    assert sureness(points, aligned, choice)["StTP"].wins == 1.0
    assert sureness(points, aligned, chosen(points, aligned))["StTP"].second == mild
