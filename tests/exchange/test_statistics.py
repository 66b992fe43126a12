"""Statistics on directions that were given: what is learnt, what is kept, and the refusal of noise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import steerguard as sg
import tiny
from steerguard.backends import load
from steerguard.errors import ContrastError, DirectionError, WeakProbe
from steerguard.exchange import export_gguf, read_directions
from steerguard.fitting import Contrast, Fit, Pair, embed, fit_statistics
from steerguard.probe import _boundary, fit_probe, fit_probes
from steerguard.traits import PoleText, Scenario, Trait

N, D = 40, 96
E0 = np.eye(D, dtype=np.float32)[0]


def clouds(gap: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two Gaussian classes `[N, 1, D]` whose means differ by `gap` along the first axis, and stand off the origin."""
    pos, neg = np.random.default_rng(seed).normal(size=(2, N, 1, D)).astype(np.float32)
    pos[..., 0] += 5 + gap
    neg[..., 0] += 5
    return pos, neg


def names() -> list[str]:
    return [f"s{i}" for i in range(N)]


# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("scale", [1e-6, 0.01, 1.0, 100.0])
def test_the_boundary_is_a_logistic_regression_on_the_projections(scale: float) -> None:
    pos, neg = (x * np.float32(scale) for x in clouds(3.0))
    probe = fit_probes(pos, neg, layers=[0], scenarios=names(), direction={0: E0})[0]
    rho = np.concatenate([pos, neg])[:, 0, 0].astype(np.float64)
    np.testing.assert_array_equal(probe.v, E0)
    assert (probe.mu_pos, probe.sigma_pos) == pytest.approx((rho[:N].mean(), rho[:N].std()))
    assert probe.mu_neg < probe.m < probe.mu_pos
    assert not probe.evidence.weak
    if scale >= 0.01:  # below that, scikit-learn's own solver stops where it starts
        oracle = LogisticRegression(C=1.0, solver="lbfgs", tol=1e-12, max_iter=100_000)
        centred = oracle.fit((rho - rho.mean())[:, None], [1] * N + [0] * N)
        expected = rho.mean() - centred.intercept_[0] / centred.coef_[0, 0]
        assert probe.m == pytest.approx(expected, abs=1e-3 * scale)


def test_the_optimum_is_exact_where_the_penalty_rules() -> None:
    """The gradient of the paper's objective is zero at what was found, however small the residuals are."""
    pos, neg = (x * np.float32(1e-3) for x in clouds(3.0))
    neg = np.concatenate([neg, neg[:20]])  # classes of two sizes: the boundary is not the middle
    rho = np.concatenate([pos, neg])[:, 0, 0].astype(np.float64)
    y = np.array([1.0] * len(pos) + [0.0] * len(neg))
    sign, m = _boundary(rho, y.astype(int))
    # the one w > 0 whose regression has this boundary and no gradient along the intercept
    low, high = 0.0, 100.0
    for _ in range(200):
        w = (low + high) / 2
        p = 1 / (1 + np.exp(-w * (rho - m)))
        low, high = (w, high) if w - ((y - p) * rho).sum() < 0 else (low, w)
    assert sign == 1
    assert (y - 1 / (1 + np.exp(-low * (rho - m)))).sum() == pytest.approx(0, abs=1e-6)


def test_a_direction_that_points_the_wrong_way_is_turned_round() -> None:
    pos, neg = clouds(3.0)
    right, wrong = (fit_probes(pos, neg, layers=[0], scenarios=names(), direction={0: v})[0] for v in (E0, -E0))
    np.testing.assert_array_equal(right.v, wrong.v)
    assert (right.m, right.mu_pos, right.evidence) == (wrong.m, wrong.mu_pos, wrong.evidence)
    assert right.evidence.split_half == 1  # both halves agree on the sign
    assert right.delta_mu > 0


def test_noise_is_refused_and_choosing_its_sign_gives_it_no_evidence() -> None:
    pos, neg = clouds(3.0)
    with pytest.raises(WeakProbe, match="no layer tells the two poles apart"):
        fit_probes(pos, neg, layers=[0], scenarios=names(), direction={0: np.roll(E0, 1)})
    held_out, in_sample, weak = [], [], []
    for seed in range(40):
        pos, neg = clouds(0.0, seed)
        probe = fit_probe(pos[:, 0], neg[:, 0], layer=0, groups=np.arange(N), direction=E0)
        held_out.append(probe.evidence.auroc)
        weak.append(probe.evidence.weak)
        in_sample.append(roc_auc_score([1] * N + [0] * N, probe.project(np.concatenate([pos, neg])[:, 0])))
    assert all(weak)
    # a sign that was chosen on the same answers would have claimed more: 0.553 over many draws, against 0.503
    assert np.mean(held_out) < np.mean(in_sample) - 0.02
    assert np.mean(held_out) < 0.54


def test_a_true_direction_needs_fewer_answers_than_a_learnt_one() -> None:
    given, learnt = [], []
    for seed in range(10):
        pos, neg = (x[:12, 0] for x in clouds(1.5, seed))
        given.append(fit_probe(pos, neg, layer=0, groups=np.arange(12), direction=E0).evidence.auroc)
        learnt.append(fit_probe(pos, neg, layer=0, groups=np.arange(12)).evidence.auroc)
    assert np.mean(given) > np.mean(learnt) + 0.1


@pytest.mark.parametrize("given", [{}, {1: E0}, {0: E0 * 2}, {0: E0[:5]}, {0: E0 * np.float32(np.nan)}, {0: np.zeros(D)}])
def test_what_is_given_must_be_a_unit_vector_per_layer(given: dict[int, np.ndarray]) -> None:
    with pytest.raises(ContrastError, match="direction of layer 0 must be a unit vector of width 96"):
        fit_probes(*clouds(3.0), layers=[0], scenarios=names(), direction=given)


def test_answers_that_do_not_differ_on_it() -> None:
    pos, neg = clouds(3.0)
    pos[..., 0] = neg[..., 0] = 1
    with pytest.raises(ContrastError, match="same projection"):
        fit_probes(pos, neg, layers=[0], scenarios=names(), direction={0: E0})
    pos[..., 0] = neg[..., 0] = np.where(np.arange(N) % 2, 1, -1)[:, None]
    with pytest.raises(ContrastError, match="same mean projection"):
        fit_probes(pos, neg, layers=[0], scenarios=names(), direction={0: E0})


# ------------------------------------------------------------------------------------------------ a model


def scenarios(split: str, n: int) -> tuple[Scenario, ...]:
    return tuple(
        Scenario(f"{split}-{i}", "all", f"{split} {i}: you tell.", f"{split} {i}: you lie.", (f"{split}, what is {i}?",))
        for i in range(n)
    )


TRAIT = Trait(
    name="tiny", title="Tiny", positive=PoleText("a", "b"), negative=PoleText("c", "d"), rubric="r", scorer="judge",
    train=scenarios("train", 12), select=scenarios("select", 2), test=scenarios("test", 2),
)  # fmt: skip
SAID = Contrast(tuple(Pair(s, "the truth the truth the truth", "a week a day a week a day") for s in TRAIT.train))
"""Answers that any model's residuals tell apart."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> sg.Backend:
    return load(tiny.llama_folder(tmp_path_factory.mktemp("models") / "tiny"), backend="fake")


@pytest.fixture(scope="module")
def differences(model: sg.Backend) -> dict[int, np.ndarray]:
    """The direction between the poles, of layers 1 and 3 only."""
    pos, neg = embed(model, SAID)
    found = {layer: (pos[:, layer] - neg[:, layer]).mean(0) for layer in (3, 1)}
    return {layer: (v / np.linalg.norm(v)).astype(np.float32) for layer, v in found.items()}


def test_another_tools_vectors_become_probes_and_a_guard(
    model: sg.Backend, differences: dict[int, np.ndarray], tmp_path: Path
) -> None:
    np.save(tmp_path / "v.npy", np.stack([differences[1]] * 4))
    given = {1: differences[1], 3: -differences[3]}
    fitted = fit_statistics(model, TRAIT, given, source="theirs.gguf", contrast=SAID)
    assert list(fitted) == [1, 3]
    pos, _ = embed(model, SAID)
    for layer, probe in fitted.items():
        np.testing.assert_array_equal(probe.v, differences[layer])
        rho = pos[:, layer].astype(np.float64) @ probe.v
        assert (probe.mu_pos, probe.sigma_pos) == pytest.approx((rho.mean(), rho.std()), abs=1e-5)
        assert probe.mu_neg < probe.m < probe.mu_pos
        assert probe.evidence.auroc == 1
    how = fitted.provenance["fit"]
    assert how["direction"] == "given"
    assert how["directions"]["source"] == "theirs.gguf"
    assert how["directions"]["turned_round"] == [3]
    # it is a fit like any other: kept, built on, checked against its model, and exported again
    fitted.save(tmp_path)
    again = Fit.load(tmp_path)
    assert again.provenance == json.loads(json.dumps(dict(fitted.provenance)))
    guard = again.guard(sg.StTP(2), [1, 3])
    with model.guarded(guard):
        pass
    path = export_gguf(again.guard(sg.SwFC(1), [1, 3]), tmp_path / "v.gguf")
    for layer, v in read_directions(path).items():
        np.testing.assert_allclose(v, differences[layer], atol=1e-6)


def test_the_record_tells_directions_apart(model: sg.Backend, differences: dict[int, np.ndarray]) -> None:
    one, same, other = (
        fit_statistics(model, TRAIT, given, contrast=SAID).provenance["fit"]["directions"]["sha256"]
        for given in (differences, dict(reversed(differences.items())), {1: differences[1]})
    )
    assert one == same != other


def test_directions_of_another_model_are_refused(model: sg.Backend, differences: dict[int, np.ndarray]) -> None:
    with pytest.raises(DirectionError, match="no directions"):
        fit_statistics(model, TRAIT, {}, contrast=SAID)
    with pytest.raises(DirectionError, match=r"layers 1, 4, tiny has|layers 1, 4, .* has layers 0-3; .* embeddings"):
        fit_statistics(model, TRAIT, {1: differences[1], 4: differences[1]}, contrast=SAID)
    with pytest.raises(DirectionError, match="layer 2 has width 7"):
        fit_statistics(model, TRAIT, {2: np.ones(7, np.float32)}, contrast=SAID)


def test_a_direction_that_reads_nothing_is_refused(model: sg.Backend, differences: dict[int, np.ndarray]) -> None:
    rng = np.random.default_rng(1)
    words = ["day ", "week ", "the ", "you ", "is ", "answer ", "truth ", "a "]
    dice = Contrast(tuple(Pair(s, *("".join(rng.choice(words, 6)) for _ in range(2))) for s in TRAIT.train))
    with pytest.raises(WeakProbe, match="held-out"):
        fit_statistics(model, TRAIT, differences, contrast=dice, context="neutral")
    weak = fit_statistics(model, TRAIT, differences, contrast=dice, context="neutral", allow_weak=True)
    with pytest.raises(WeakProbe):
        weak.guard(sg.SwFC(1), 1)
