"""Arms: every metric of every arm, in one context, on the cases it says; on the numpy backend and a tiny random model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import steerguard as sg
import tiny
from steerguard.backends import load
from steerguard.errors import InputError
from steerguard.fitting import Contrast, Fit, collect, fit, prompts_of
from steerguard.metrics import bootstrap_interval, compression, distinct, repetition
from steerguard.metrics.arms import measure
from steerguard.metrics.likelihood import cross_entropy
from steerguard.metrics.projection import target_distance
from steerguard.metrics.reading import exchanges
from steerguard.prompts import conversation
from steerguard.traits import PoleText, Scenario, Trait

SHORT = sg.Sampling(max_new_tokens=8, temperature=1.0)
WITHOUT_EXTRA = ("repetition", "distinct_1", "distinct_2", "compression", "cross_entropy", "target_distance")


def scenarios(split: str, n: int) -> tuple[Scenario, ...]:
    return tuple(
        Scenario(f"{split}-{i}", "all", f"{split} {i}: the truth.", f"{split} {i}: a lie.", (f"{split}, what is {i}?",))
        for i in range(n)
    )


TRAIT = Trait(
    name="tiny", title="Tiny", positive=PoleText("a", "b"), negative=PoleText("c", "d"), rubric="r", scorer="judge",
    train=scenarios("train", 10), select=scenarios("select", 2), test=scenarios("test", 3),
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> sg.Backend:
    return load(str(tiny.llama_folder(tmp_path_factory.mktemp("models") / "tiny")), backend="fake")


@pytest.fixture(scope="module")
def contrast(model: sg.Backend) -> Contrast:
    return collect(model, TRAIT, sampling=SHORT)


@pytest.fixture(scope="module")
def probes(model: sg.Backend, contrast: Contrast) -> Fit:
    return fit(model, TRAIT, contrast=contrast, sampling=SHORT, allow_weak=True)


@pytest.fixture(scope="module")
def arms(model: sg.Backend) -> dict[str, list[sg.Answer]]:
    return {
        name: model.generate([prompts_of(s)[pole] for s in TRAIT.test], sampling=SHORT)
        for pole, name in enumerate(("aligned", "malicious"))
    }


# ------------------------------------------------------------------------------------------------ target distance


def test_the_aligned_answers_of_the_fit_stand_at_its_mean(model: sg.Backend, contrast: Contrast, probes: Fit) -> None:
    """Read as fitting read them, they have mean 0 and spread 1, and the others stand where mu_neg does; without the
    system prompt they do not."""
    prompts = [prompts_of(pair.scenario) for pair in contrast.usable()]
    for probe in probes.values():
        pos = target_distance(model, [(p[0], pair.positive) for p, pair in zip(prompts, contrast.usable(), strict=True)], probe)
        neg = target_distance(model, [(p[1], pair.negative) for p, pair in zip(prompts, contrast.usable(), strict=True)], probe)
        assert np.mean(pos) == pytest.approx(0, abs=1e-3)
        assert np.std(pos) == pytest.approx(1, abs=1e-3)
        assert np.mean(neg) == pytest.approx((probe.mu_neg - probe.mu_pos) / probe.sigma_pos, abs=1e-3)
    neutral = [(conversation(None, pair.scenario.turns), pair.positive) for pair in contrast.usable()]
    assert abs(np.mean(target_distance(model, neutral, probes[1]))) > 0.01


def test_target_distance_token_by_token(model: sg.Backend, probes: Fit) -> None:
    prompt, answer, probe = "Hi", "the day, é ответ 🙂", probes[2]
    start = model.residuals(prompt).shape[1]
    rho = model.residuals(prompt, answer)[2][start:].astype(np.float64) @ probe.v
    found = target_distance(model, [(prompt, ""), (prompt, answer), (prompt, " \n"), (prompt, "x")], probe)
    assert found[0] is None and found[2] is None and found[3] is not None
    assert found[1] == pytest.approx((rho.mean() - probe.mu_pos) / probe.sigma_pos, rel=1e-3)
    assert target_distance(model, [(prompt, "")], probe) == [None]


def test_a_push_along_the_direction_is_its_length_in_sigmas(model: sg.Backend, probes: Fit) -> None:
    """Moving the target moves the distance, in sigmas: mu_pos two sigmas lower is two sigmas more."""
    probe = probes[1]
    lower = replace(probe, mu_pos=probe.mu_pos - 2 * probe.sigma_pos)
    (one,), (two,) = (target_distance(model, [("Hi", "the day")], p) for p in (probe, lower))
    assert one is not None
    assert two == pytest.approx(one + 2, abs=1e-4)
    with pytest.raises(InputError, match="layer 1 has no spread"):
        target_distance(model, [], replace(probe, sigma_pos=0.0))
    guard = probes.guard(sg.SwFC(1), 1, allow_weak=True)
    with model.guarded(guard), pytest.raises(InputError, match="is guarded now"):
        target_distance(model, [("Hi", "the day")], probe)


# ------------------------------------------------------------------------------------------------- all at once


def test_every_metric_of_every_arm(model: sg.Backend, probes: Fit, arms: dict[str, list[sg.Answer]]) -> None:
    told: list[tuple[int, int]] = []
    found = measure(
        model, TRAIT.test, arms, probe=probes[2], metrics=WITHOUT_EXTRA, progress=lambda _, *n: told.append(n)
    )  # fmt: skip
    assert told == [(0, 2), (1, 2), (2, 2)]
    assert found.groups == ("test-0", "test-1", "test-2")
    aligned = [prompts_of(s)[0] for s in TRAIT.test]
    for name, answers in arms.items():
        texts = [a.text for a in answers]
        due: dict[str, Sequence[float | None]] = {
            "repetition": [repetition(t) for t in texts],
            "distinct_1": [distinct(t, 1) for t in texts],
            "distinct_2": [distinct(t, 2) for t in texts],
            "compression": [compression(t) for t in texts],
            "cross_entropy": cross_entropy(model, exchanges(aligned, answers)),
            "target_distance": target_distance(model, list(zip(aligned, texts, strict=True)), probes[2]),
        }
        assert {metric: list(values) for metric, values in found.values[name].items()} == due
    difference = found.difference("malicious", "cross_entropy")
    assert difference is not None
    assert difference.mean == pytest.approx(
        np.mean(found.of("malicious", "cross_entropy")) - np.mean(found.of("aligned", "cross_entropy"))  # type: ignore[arg-type]
    )


def test_all_arms_are_read_under_the_aligned_prompt(model: sg.Backend, probes: Fit, arms: dict[str, list[sg.Answer]]) -> None:
    """The same answers in another arm measure the same, whatever they were asked under; `neutral` reads them otherwise."""
    same = {"aligned": arms["malicious"], "malicious": arms["malicious"]}
    found = measure(model, TRAIT.test, same, probe=probes[2], metrics=WITHOUT_EXTRA)
    assert found.values["aligned"] == found.values["malicious"]
    neutral = measure(model, TRAIT.test, same, probe=probes[2], metrics=WITHOUT_EXTRA, context="neutral")
    assert neutral.of("aligned", "target_distance") != found.of("aligned", "target_distance")
    assert neutral.of("aligned", "cross_entropy") == found.of("aligned", "cross_entropy")
    turns = [conversation(None, s.turns) for s in TRAIT.test]
    read = [(turn, answer.text) for turn, answer in zip(turns, arms["malicious"], strict=True)]
    assert list(neutral.of("aligned", "target_distance")) == target_distance(model, read, probes[2])


def test_answers_to_one_scenario_are_resampled_together(model: sg.Backend, arms: dict[str, list[sg.Answer]]) -> None:
    twice = [s for s in TRAIT.test for _ in range(2)]
    answers = {name: [a for a in own for _ in range(2)] for name, own in arms.items()}
    found = measure(model, twice, answers, metrics=["compression", "cross_entropy"])
    once = measure(model, TRAIT.test, arms, metrics=["compression", "cross_entropy"])
    several, one = found.interval("aligned", "cross_entropy"), once.interval("aligned", "cross_entropy")
    assert several is not None and one is not None
    assert (several.low, several.high) == (pytest.approx(one.low), pytest.approx(one.high))
    assert several != bootstrap_interval(found.of("aligned", "cross_entropy"))


def test_an_answer_of_nothing_is_unscored_where_nothing_can_be_said(model: sg.Backend, probes: Fit) -> None:
    nothing = sg.Answer("", (1, 2), (), "length")
    ended = sg.Answer("", (1, 2), (2,), "stop")  # the model ended its turn at once: a token, and no text
    arms: dict[str, list[sg.Answer]] = {"aligned": [nothing, ended, ended], "other": [ended, nothing, ended]}
    found = measure(model, TRAIT.test, arms, probe=probes[1])  # with similarity: nothing to embed, no extra needed
    for metric in ("distinct_1", "distinct_2", "target_distance", "similarity"):
        assert found.of("aligned", metric) == (None, None, None)
    assert found.of("aligned", "repetition") == (0.0, 0.0, 0.0)
    assert found.of("aligned", "compression") == (1.0, 1.0, 1.0)
    scored = [value is not None for value in found.of("aligned", "cross_entropy")]
    assert scored == [False, True, True]
    difference = found.difference("other", "cross_entropy")
    assert difference is not None and (difference.n, difference.unscored) == (1, 2)


def test_what_cannot_be_measured_is_refused(model: sg.Backend, probes: Fit, arms: dict[str, list[sg.Answer]]) -> None:
    def refused(match: str, **options: Any) -> None:
        given: dict[str, Any] = {"arms": arms, "metrics": ["compression"]} | options
        with pytest.raises(InputError, match=match):
            measure(model, TRAIT.test, given.pop("arms"), **given)

    refused("there is no arm 'aligned' among steered", arms={"steered": arms["aligned"]})
    refused("there is no arm 'best' among aligned, malicious", baseline="best")
    refused("arm 'malicious' needs one answer to each scenario, got 1 for 3", arms={**arms, "malicious": arms["malicious"][:1]})
    refused("no metric 'bleu'; there are repetition,", metrics=["bleu"])
    refused("pass probe=, or leave it out of metrics", metrics=["target_distance"])
    refused("context must be aligned or neutral, got 'own'", context="own")
    with model.guarded(probes.guard(sg.SwFC(1), 1, allow_weak=True)):
        refused("is guarded now")
    renamed = measure(model, TRAIT.test, {"a": arms["aligned"], "b": arms["malicious"]}, metrics=["compression"], baseline="b")
    assert renamed.baseline == "b"
