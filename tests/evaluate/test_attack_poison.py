"""Poisoned pairs: labels are exchanged as they should be, half of them kill the reading, figures are those of the guards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest

import steerguard as sg
import tiny
from steerguard.backends.base import Floats
from steerguard.errors import InputError
from steerguard.evaluate.attacks.poison import Poison, choose, poison, swapped, true_auroc
from steerguard.evaluate.results import as_json
from steerguard.fitting import Contrast, Pair, prompts_of
from steerguard.probe import Probe, fit_probe
from steerguard.scorers import Score
from steerguard.traits import Scenario

SHORT = sg.Sampling(max_new_tokens=4, temperature=1.0)
SCENARIOS = [Scenario(f"s{i}", "all", f"{i}: tell the truth.", f"{i}: lie.", (f"What is day {i}?",)) for i in range(40)]
CONTRAST = Contrast(tuple(Pair(scenario, "the truth", "a lie") for scenario in SCENARIOS))
GROUPS = np.arange(40, dtype=np.int64)


class ByText:
    """A scorer whose scores are a function of the text."""

    identity = MappingProxyType({"scorer": "by text"})

    def scores(self, asked: Sequence[Scenario], answers: Sequence[str]) -> list[Score]:
        return [Score(float(sum(answer.encode()) % 101), 100.0) for answer in answers]


@pytest.fixture(scope="module")
def embeddings() -> tuple[Floats, Floats]:
    """[40, 1, 48]: poles that lie apart along one axis, and noise."""
    rng, axis = np.random.default_rng(0), tiny.direction(48, 3)
    pos, neg = (rng.normal(size=(40, 1, 48)) + side * 3 * axis for side in (1, -1))
    return pos.astype(np.float32), neg.astype(np.float32)


@pytest.fixture(scope="module")
def own(model: sg.Backend, embeddings: tuple[Floats, Floats]) -> sg.Guard:
    probe = fit_probe(embeddings[0][:, 0], embeddings[1][:, 0], layer=2, groups=GROUPS)
    return tiny.guard(model.identity, sg.StTP(2), (probe,), name="own")


def test_labels_are_exchanged(embeddings: tuple[Floats, Floats]) -> None:
    pos, neg = embeddings
    chosen = np.zeros(40, bool)
    chosen[[3, 7]] = True
    one, other = swapped(pos, neg, chosen)
    assert np.array_equal(one[chosen], neg[chosen]) and np.array_equal(other[chosen], pos[chosen])
    assert np.array_equal(one[~chosen], pos[~chosen]) and np.array_equal(other[~chosen], neg[~chosen])


def test_which_pairs_are_chosen(embeddings: tuple[Floats, Floats]) -> None:
    pos, neg = (x[:, 0] for x in embeddings)
    v = tiny.direction(48, 3)
    for share, count in ((0.0, 0), (0.05, 2), (0.1, 4), (1.0, 40)):
        for which in ("random", "strongest"):
            assert choose(pos, neg, share, which, v, np.random.default_rng(0)).sum() == count  # type: ignore[arg-type]
    strongest = choose(pos, neg, 0.1, "strongest", v, np.random.default_rng(0))
    apart = (pos - neg) @ v
    assert apart[strongest].min() >= apart[~strongest].max()
    for share, way in ((1.5, "random"), (0.1, "weakest")):
        with pytest.raises(InputError, match="a share is from 0 to 1"):
            choose(pos, neg, share, way, v, np.random.default_rng(0))  # type: ignore[arg-type]


@pytest.mark.parametrize("direction", ["logistic", "mean-difference"])
def test_half_of_the_labels_kill_the_reading_and_none_do_not(embeddings: tuple[Floats, Floats], direction: str) -> None:
    pos, neg = (x[:, 0] for x in embeddings)
    rng = np.random.default_rng(1)

    def area(share: float) -> float:
        chosen = choose(pos, neg, share, "random", tiny.direction(48, 3), rng)
        return true_auroc(pos, neg, chosen, GROUPS, 2, direction=direction)  # type: ignore[arg-type]

    assert area(0.0) > 0.99
    assert 0.2 < float(np.mean([area(0.5) for _ in range(6)])) < 0.8
    assert area(1.0) < 0.01


def test_the_guards_are_those_of_the_poisoned_pairs(model: sg.Backend, own: sg.Guard, embeddings: tuple[Floats, Floats]) -> None:
    found: Poison = poison(
        model, SCENARIOS[:4], own, CONTRAST, embeddings, scorer=ByText(), shares=(0.0, 0.1, 0.5), sampling=SHORT
    )
    assert [(one.share, one.direction) for one in found.results] == [
        (share, how) for how in ("logistic", "mean-difference") for share in (0.0, 0.1, 0.5)
    ]
    clean = found.of(0.0)
    assert clean.cosine == pytest.approx(1) and clean.pairs == 0 and clean.spread == pytest.approx(1)
    assert clean.less_than_clean is not None and clean.less_than_clean.mean == 0
    answers = model.generate([prompts_of(one)[1] for one in SCENARIOS[:4]], guards=own, sampling=SHORT)
    by_hand = np.mean([score.trait for score in ByText().scores(SCENARIOS[:4], [answer.text for answer in answers])])
    assert clean.trait is not None and clean.trait.mean == pytest.approx(by_hand)  # nothing poisoned: the guard that was given
    assert clean.strength == pytest.approx(2, rel=0.05)
    few, half = found.of(0.1), found.of(0.5)
    assert few.pairs == 4 and half.pairs == 20
    assert half.cosine < few.cosine < 1 and half.auroc < few.auroc <= clean.auroc
    assert few.auroc_seen < few.auroc  # whoever fits it sees a worse figure than is true: wrong labels count as errors
    # a difference of means keeps its direction until about half of the labels are wrong
    assert found.of(0.1, direction="mean-difference").cosine > few.cosine
    assert found.of(0.1, direction="mean-difference").spread > 1.5
    assert as_json(found) and "4 of 40 pairs (random, logistic)" in str(found)
    with pytest.raises(InputError, match="nothing was poisoned at 0.3"):
        found.of(0.3)


def test_every_label_exchanged_turns_the_direction_round(
    model: sg.Backend, own: sg.Guard, embeddings: tuple[Floats, Floats]
) -> None:
    """And whoever fits it sees nothing amiss."""
    found = poison(
        model, SCENARIOS[:3], own, CONTRAST, embeddings, scorer=ByText(), shares=(1.0,), directions=("logistic",), sampling=SHORT
    )
    turned = found.of(1.0)
    assert turned.cosine == pytest.approx(-1, abs=1e-3) and turned.auroc < 0.01 and turned.auroc_seen > 0.99


def test_embeddings_must_be_those_of_the_pairs(model: sg.Backend, own: sg.Guard, embeddings: tuple[Floats, Floats]) -> None:
    pos, neg = embeddings
    for wrong in ((pos[:30], neg[:30]), (np.repeat(pos, 2, axis=1), np.repeat(neg, 2, axis=1))):
        with pytest.raises(InputError, match="poisoning needs scenarios"):
            poison(model, SCENARIOS[:2], own, CONTRAST, wrong, scorer=ByText(), sampling=SHORT)
    with pytest.raises(InputError, match="poisoning needs scenarios"):
        poison(model, [], own, CONTRAST, embeddings, scorer=ByText(), sampling=SHORT)


def test_a_guard_of_two_layers_has_the_least_of_both(model: sg.Backend, own: sg.Guard, embeddings: tuple[Floats, Floats]) -> None:
    rng = np.random.default_rng(5)
    noisy = [np.concatenate([x, x + rng.normal(size=x.shape).astype(np.float32) * 2], axis=1) for x in embeddings]
    second: Probe = fit_probe(noisy[0][:, 1], noisy[1][:, 1], layer=3, groups=GROUPS)
    both = replace(own, probes=(*own.probes, second))
    found = poison(
        model, SCENARIOS[:2], both, CONTRAST, (noisy[0], noisy[1]), scorer=ByText(), shares=(0.1,), directions=("logistic",),
        sampling=SHORT,
    ).of(0.1)  # fmt: skip
    alone = poison(
        model, SCENARIOS[:2], own, CONTRAST, embeddings, scorer=ByText(), shares=(0.1,), directions=("logistic",), sampling=SHORT
    ).of(0.1)
    assert found.cosine <= alone.cosine and found.auroc <= alone.auroc and found.retuned is None
