"""Probes: the paper's formulas, their evidence, and the refusal of noise."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from steerguard.errors import ContrastError, WeakProbe
from steerguard.probe import Evidence, Probe, Probes, _auroc, fit_probe, fit_probes, ranges, refit_statistics

N, D = 40, 96


def clouds(gap: float, seed: int = 0, n: int = N, layers: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Two Gaussian classes `[n, layers, D]` whose means differ by `gap` along the first axis."""
    rng = np.random.default_rng(seed)
    pos, neg = rng.normal(size=(2, n, layers, D)).astype(np.float32)
    pos[..., 0] += gap
    return pos, neg


def names(n: int = N, per_scenario: int = 1) -> list[str]:
    return [f"s{i // per_scenario}" for i in range(n)]


def test_direction_boundary_and_statistics_are_the_papers() -> None:
    pos, neg = clouds(3.0)
    probe = fit_probe(pos[:, 0], neg[:, 0], layer=5, groups=np.arange(N))
    x = np.concatenate([pos, neg])[:, 0].astype(np.float64)
    oracle = LogisticRegression(C=1.0, tol=1e-10, max_iter=100_000).fit(x, [1] * N + [0] * N)
    w, b = oracle.coef_[0], oracle.intercept_[0]
    np.testing.assert_allclose(probe.v, w / np.linalg.norm(w), atol=2e-3)
    assert probe.m == pytest.approx(-b / np.linalg.norm(w), abs=5e-3)
    rho = x @ probe.v
    assert (probe.mu_pos, probe.sigma_pos) == pytest.approx((rho[:N].mean(), rho[:N].std()))
    assert (probe.mu_neg, probe.sigma_neg) == pytest.approx((rho[N:].mean(), rho[N:].std()))
    assert probe.delta_mu == pytest.approx(probe.mu_pos - probe.mu_neg)
    np.testing.assert_allclose(probe.project(x), rho, atol=1e-4)


def test_mean_difference_has_the_same_statistics() -> None:
    pos, neg = clouds(3.0)
    probe = fit_probe(pos[:, 0], neg[:, 0], layer=0, groups=np.arange(N), direction="mean-difference")
    w = pos[:, 0].mean(0) - neg[:, 0].mean(0)
    np.testing.assert_allclose(probe.v, w / np.linalg.norm(w), atol=1e-5)
    assert probe.m == pytest.approx((probe.mu_pos + probe.mu_neg) / 2, abs=1e-4)
    assert probe.evidence.cosine_mean_difference == pytest.approx(1.0, abs=1e-5)


def test_evidence_grows_with_the_gap_and_is_held_out() -> None:
    strong = fit_probe(*(x[:, 0] for x in clouds(6.0)), layer=0, groups=np.arange(N)).evidence
    faint = fit_probe(*(x[:, 0] for x in clouds(1.0)), layer=0, groups=np.arange(N)).evidence
    assert strong.auroc > 0.95 > faint.auroc
    assert strong.cohens_d > faint.cohens_d
    assert strong.split_half > faint.split_half
    assert strong.auroc_low <= strong.auroc <= strong.auroc_high
    assert (strong.n_pos, strong.n_neg) == (N, N)
    assert not strong.weak


def test_perfect_separation_still_has_an_interval() -> None:
    few = fit_probe(*(x[:, 0] for x in clouds(60.0, n=10)), layer=0, groups=np.arange(10)).evidence
    assert few.auroc == 1.0
    assert few.auroc_low == pytest.approx(1 - 3 / 20)


def test_noise_is_refused_and_its_training_score_would_not_have_told() -> None:
    pos, neg = clouds(0.0, layers=3)
    with pytest.raises(WeakProbe, match="no layer tells the two poles apart"):
        fit_probes(pos, neg, layers=[0, 1, 2], scenarios=names())
    allowed = fit_probes(pos, neg, layers=[0, 1, 2], scenarios=names(), allow_weak=True)
    # d exceeds n: on the answers it was fitted on, the direction separates the noise nearly perfectly
    x = np.concatenate([pos, neg])[:, 0]
    assert roc_auc_score([1] * N + [0] * N, allowed[0].project(x)) > 0.95
    assert all(p.evidence.weak for p in allowed.values())
    assert "WEAK" in repr(allowed[0])


def test_shuffled_labels_of_a_real_trait_are_refused() -> None:
    pos, neg = clouds(4.0)
    assert not fit_probes(pos, neg, layers=[0], scenarios=names())[0].evidence.weak
    swap = np.random.default_rng(1).permutation(N) < N // 2
    pos[swap], neg[swap] = neg[swap].copy(), pos[swap].copy()
    with pytest.raises(WeakProbe):
        fit_probes(pos, neg, layers=[0], scenarios=names())


def test_noise_is_weak_in_nearly_every_draw() -> None:
    weak = [fit_probe(*(x[:, 0] for x in clouds(0.0, s)), layer=0, groups=np.arange(N)).evidence.weak for s in range(25)]
    assert sum(weak) == 25


def test_few_scenarios_cannot_make_noise_look_like_a_trait() -> None:
    """Eight scenarios, the fewest that are admitted: a bootstrap alone would let one draw in five through."""
    draws = [fit_probe(*(x[:, 0] for x in clouds(0.0, s, n=8)), layer=0, groups=np.arange(8)).evidence for s in range(60)]
    assert sum(e.weak for e in draws) >= 58
    assert sum(e.auroc > 0.7 for e in draws) > 2  # which is no great evidence with so few


def test_scenarios_never_stand_on_two_sides_of_a_fold() -> None:
    """A scenario's answers repeat exactly: leaking them between folds would make noise look perfect."""
    pos, neg = clouds(0.0, n=12)
    pos, neg = np.repeat(pos, 5, axis=0), np.repeat(neg, 5, axis=0)
    with pytest.raises(WeakProbe):
        fit_probes(pos, neg, layers=[0], scenarios=names(60, per_scenario=5))
    leaky = fit_probes(pos, neg, layers=[0], scenarios=names(60), allow_weak=True)
    assert leaky[0].evidence.auroc > 0.9


def test_the_same_seed_gives_the_same_probe() -> None:
    pos, neg = clouds(2.0)
    a, b = (fit_probes(pos, neg, layers=[0], scenarios=names(), seed=7)[0] for _ in range(2))
    np.testing.assert_array_equal(a.v, b.v)
    assert a.evidence == b.evidence


def test_bad_input() -> None:
    pos, neg = clouds(3.0, layers=2)
    with pytest.raises(ContrastError, match="at least 8"):
        fit_probes(pos[:5], neg[:5], layers=[0, 1], scenarios=names(5))
    with pytest.raises(ContrastError, match="at least 8"):
        fit_probes(pos, neg, layers=[0, 1], scenarios=["one"] * N)
    with pytest.raises(ContrastError, match="must be"):
        fit_probes(pos, neg[:-1], layers=[0, 1], scenarios=names())
    with pytest.raises(ContrastError, match="no direction 'pca'"):
        fit_probes(pos, neg, layers=[0, 1], scenarios=names(), direction="pca")  # type: ignore[arg-type]
    for direction in ("logistic", "mean-difference"):
        with pytest.raises(ContrastError, match="do not differ"):
            fit_probes(pos, pos, layers=[0, 1], scenarios=names(), direction=direction)
    neg[3, 1, 2] = np.nan
    with pytest.raises(ContrastError, match="negative answers are not finite at layers 9"):
        fit_probes(pos, neg, layers=[8, 9], scenarios=names())


EVIDENCE = Evidence(0.9, 0.8, 0.95, 2.0, 0.7, 0.9, 10, 10)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"v": np.ones(4)}, "must be 1"),
        ({"v": np.full(4, np.nan)}, "finite"),
        ({"v": np.eye(2)}, "finite vector"),
        ({"m": float("nan")}, "finite"),
        ({"sigma_pos": -1.0}, "negative"),
        ({"layer": -1}, "negative"),
    ],
)
def test_a_probe_is_sound_or_does_not_exist(change: dict[str, object], match: str) -> None:
    sound = Probe(0, np.array([1, 0, 0, 0], np.float32), 0.0, 1.0, 0.1, -1.0, 0.1, EVIDENCE)
    with pytest.raises(ContrastError, match=match):
        dataclasses.replace(sound, **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="read-only"):
        sound.v[0] = 2


def test_probes_is_a_mapping_by_layer() -> None:
    pos, neg = clouds(3.0, layers=2)
    seen: list[tuple[int, int]] = []
    probes = fit_probes(pos, neg, layers=[4, 7], scenarios=names(), progress=lambda i, n: seen.append((i, n)))
    assert seen == [(1, 2), (2, 2)]
    assert list(probes) == [4, 7]
    assert len(probes) == 2
    assert isinstance(probes, Probes)
    assert probes.best_read.layer in (4, 7)
    assert "layers 4, 7" in repr(probes)
    with pytest.raises(ContrastError, match="no probe of layer 5; there are 4, 7"):
        probes[5]


def test_refit_statistics_keeps_the_direction() -> None:
    pos, neg = clouds(3.0)
    probe = fit_probe(pos[:, 0], neg[:, 0], layer=0, groups=np.arange(N))
    moved = refit_statistics(probe, pos[:, 0] + 1, neg[:, 0] + 1)
    np.testing.assert_array_equal(moved.v, probe.v)
    assert moved.mu_pos == pytest.approx(probe.mu_pos + probe.v.sum(), abs=1e-3)
    assert moved.m == probe.m


def test_helpers() -> None:
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 30)
    score = rng.integers(0, 5, 60) + y
    assert _auroc(score.astype(float), y) == pytest.approx(roc_auc_score(y, score))
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert ranges([]) == "none"
