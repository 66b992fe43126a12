"""The rules and the reference kernel, against an independent float64 transcription of the paper's equations."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch

from steerguard.errors import RuleError
from steerguard.rules import (
    RULES,
    SHUT,
    Ablate,
    Ceiling,
    Floor,
    Gate,
    MeanAblate,
    Rule,
    StMP,
    StTP,
    SwFC,
    Target,
    Watch,
    correct,
    rule,
)  # fmt: skip


@dataclass(frozen=True)
class Stats:
    m: float = 0.3
    mu_pos: float = 1.7
    sigma_pos: float = 0.4
    mu_neg: float = -1.1
    sigma_neg: float = 0.6

    @property
    def delta_mu(self) -> float:
        return self.mu_pos - self.mu_neg


STATS = Stats()
D = 48


def paper(rule: Rule, rho: float, p: Stats) -> float:
    """The new projection, transcribed from the equations rule by rule: shares nothing with the six numbers."""
    s = rule.strength
    match rule.name:
        case "SwFC":
            return rho + s * (p.mu_pos - p.mu_neg)
        case "StTP":
            return p.mu_pos + s * p.sigma_pos if rho < p.m else rho
        case "StMP":
            return min(rho + 2 * s * (p.m - rho), max(rho, p.mu_pos + 40 * p.sigma_pos)) if rho < p.m else rho
        case "Floor":
            return max(rho, p.m if s is None else s)
        case "Ceiling":
            return min(rho, p.m if s is None else s)
        case "Target":
            return p.mu_pos + s * p.sigma_pos
        case "MeanAblate":
            return (p.mu_pos + p.mu_neg) / 2
        case "Ablate":
            return 0.0
        case "Watch":
            return rho
    raise AssertionError(f"{rule.name} has no transcription: write its equation here")


def instances() -> list[Rule]:
    """Every registered rule, over its grid and some strengths beside it."""
    out: list[Rule] = []
    for name, cls in RULES.items():
        strengths = sorted({*cls.grid, *((0.0, 0.7) if cls.grid else ())})
        if "tau" in cls.__dataclass_fields__:
            out += [cls(), rule(name, 0.9), rule(name, -2.0)]
        elif strengths:
            out += [rule(name, s) for s in strengths]
        else:
            out.append(cls())
    return out


def unit(rng: np.random.Generator, d: int = D) -> np.ndarray:
    v = rng.normal(size=d)
    return (v / np.linalg.norm(v)).astype(np.float32)


def residuals(rng: np.random.Generator, v: np.ndarray, n: int = 300) -> np.ndarray:
    """`[n, D]` whose projections cover both sides of every knee, the class means and far tails."""
    h = rng.normal(size=(n, len(v))) * 2
    rho = np.concatenate([rng.uniform(-4, 4, n - 20), np.linspace(-40, 40, 20)])
    return (h + np.outer(rho - h @ v, v)).astype(np.float32)


@pytest.mark.parametrize("rule", instances(), ids=str)
def test_every_rule_is_its_equation(rule: Rule) -> None:
    rng = np.random.default_rng(0)
    v = unit(rng)
    h = residuals(rng, v)
    new, rho, delta = correct(h, v, rule.compile(STATS).row())
    exact = h.astype(np.float64) @ v.astype(np.float64)
    far_from_knee = np.abs(exact - STATS.m) > 1e-4
    want = np.array([paper(rule, r, STATS) for r in exact])
    scale = 1 + np.abs(want) + np.abs(exact) * (1 + 2 * abs(rule.strength or 0))
    assert np.all(np.abs(rho - exact) < 1e-4)
    assert np.all((np.abs(rho + delta - want) < 1e-5 * scale)[far_from_knee])
    got = new.astype(np.float64) @ v.astype(np.float64)
    assert np.all((np.abs(got - want) < 1e-5 * scale)[far_from_knee])
    # the orthogonal component never changes
    before, after = (x.astype(np.float64) - np.outer(x.astype(np.float64) @ v, v) for x in (h, new))
    assert np.abs(before - after).max() < 1e-4
    # ... and the transcription can fail: another strength is another equation
    moved = np.abs(want - exact) > 0.1
    if moved.any():
        assert not np.allclose(want[moved], (exact + 0.5 * (want - exact))[moved])


@pytest.mark.parametrize("rule", instances(), ids=str)
@pytest.mark.parametrize("shape", [(7, D), (3, 5, D)], ids=["tokens", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_numpy_and_torch_agree(rule: Rule, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rng = np.random.default_rng(1)
    v = unit(rng)
    h = torch.tensor(rng.normal(size=shape).astype(np.float32)).to(dtype)
    gate = rule.compile(STATS).row()
    new, rho, delta = correct(h, torch.tensor(v), torch.tensor(gate))
    new_np, rho_np, delta_np = correct(h.float().numpy(), v, gate)
    assert new.dtype == dtype
    assert rho.dtype == delta.dtype == torch.float32
    assert rho.shape == delta.shape == shape[:-1]
    np.testing.assert_allclose(rho.numpy(), rho_np, atol=1e-5)
    sure = np.abs(rho_np - gate[0]) > 1e-4
    np.testing.assert_allclose(delta.numpy()[sure], delta_np[sure], atol=1e-3, rtol=1e-5)
    want = torch.tensor(new_np).to(dtype).float().numpy()
    np.testing.assert_allclose(new.float().numpy()[sure], want[sure], rtol=1e-2, atol=1e-2)


def test_one_guard_per_row_equals_each_alone() -> None:
    rng = np.random.default_rng(2)
    rules: list[Rule] = [SwFC(2), StTP(6), StMP(1), Ablate()]
    v = np.stack([unit(rng) for _ in rules])
    h = rng.normal(size=(len(rules), 9, D)).astype(np.float32)
    gates = np.stack([r.compile(STATS).row() for r in rules])
    together = correct(h, v[:, None], gates[:, None])
    for row in range(len(rules)):
        alone = correct(h[row], v[row], gates[row])
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_array_equal(a[row], b)


def apply(rule: Rule, h: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    out: tuple[np.ndarray, np.ndarray, np.ndarray] = correct(h, v, rule.compile(STATS).row())
    return out


def test_identities_between_rules() -> None:
    rng = np.random.default_rng(3)
    v = unit(rng)
    h = residuals(rng, v)
    below = (h.astype(np.float64) @ v) < STATS.m - 1e-4
    # StMP(1) mirrors about m ...
    new, rho, delta = apply(StMP(1), h, v)
    near = np.abs(rho) < 10
    np.testing.assert_allclose((rho + delta)[below & near], (2 * STATS.m - rho)[below & near], atol=1e-5)
    # ... and StMP(2) does not
    _, rho2, delta2 = apply(StMP(2), h, v)
    assert not np.allclose((rho2 + delta2)[below & near], (2 * STATS.m - rho2)[below & near], atol=1e-2)
    # StMP(0.5) is Floor(m)
    for a, b in zip(apply(StMP(0.5), h, v), apply(Floor(STATS.m), h, v), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_array_equal(apply(Floor(), h, v)[0], apply(Floor(STATS.m), h, v)[0])
    # StTP(alpha) is Target(alpha) below m, and leaves the rest bit for bit
    st, target = apply(StTP(6), h, v)[0], apply(Target(6), h, v)[0]
    np.testing.assert_array_equal(st[below], target[below])
    np.testing.assert_array_equal(st[~below], h[~below])
    assert not np.array_equal(target[~below], h[~below])
    # SwFC moves every projection by exactly alpha * delta_mu
    np.testing.assert_allclose(apply(SwFC(3), h, v)[2], 3 * STATS.delta_mu, rtol=1e-6)
    # Floor and Ceiling together clamp
    np.testing.assert_allclose(apply(Ceiling(0.5), apply(Floor(0.5), h, v)[0], v)[0] @ v, 0.5, atol=1e-4)
    # MeanAblate leaves the two class means indistinguishable
    np.testing.assert_allclose(apply(MeanAblate(), h, v)[0] @ v, 0.3, atol=1e-4)
    assert new.shape == h.shape


def test_the_cap_acts_where_it_must_and_only_there() -> None:
    v = np.zeros(D, np.float32)
    v[0] = 1
    cap = STATS.mu_pos + 40 * STATS.sigma_pos  # 17.7
    rho = np.array([-100.0, -20.0, -17.0, -1.0, 0.3, 50.0], np.float32)
    h = np.outer(rho, v)
    new = apply(StMP(1), h, v)[0][:, 0]
    np.testing.assert_allclose(new, [cap, cap, 17.6, 1.6, 0.3, 50.0], rtol=1e-6)
    uncapped = correct(h, v, Gate(0.3, 0.6, -2.0, 0.0, 0.0, math.inf).row())[0][:, 0]
    np.testing.assert_allclose(uncapped, [100.6, 20.6, 17.6, 1.6, 0.3, 50.0], rtol=1e-6)


def test_what_a_gate_leaves_alone_stays_bit_for_bit() -> None:
    v = np.zeros(4, np.float32)
    v[0] = 1
    h = torch.tensor([[5.0, -0.0, 1e-8, 3e4], [0.3, -0.0, 0.1, 0.2]]).to(torch.bfloat16)
    for gate in (SHUT, SwFC(0).compile(STATS), StMP(0).compile(STATS), Floor(-10).compile(STATS)):
        new, _, delta = correct(h, torch.tensor(v), torch.tensor(gate.row()))
        assert torch.equal(new.view(torch.int16), h.view(torch.int16))
        assert not delta.any()
    assert SHUT.shut
    assert Watch().compile(STATS) == SHUT
    assert SwFC(0).compile(STATS).shut
    assert not StTP(0).compile(STATS).shut


def test_projection_is_taken_in_float32() -> None:
    """In bfloat16 arithmetic this dot product is 256, since 256 + 1 rounds back to 256."""
    h = torch.ones(1, 513, dtype=torch.bfloat16)
    _, rho, _ = correct(h, torch.ones(513), torch.tensor(SHUT.row()))
    assert rho.item() == 513.0


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_residual_that_is_not_finite_is_left_alone() -> None:
    v = np.zeros(4, np.float32)
    v[0] = 1
    h = np.array([[np.inf, 1, 2, 3], [-np.inf, 1, 2, 3], [0, 1, 2, 3]], np.float32)
    new, _, delta = apply(StMP(1), h, v)
    np.testing.assert_array_equal(new[:2], h[:2])
    assert delta[2] != 0


@pytest.mark.parametrize("cls", [c for c in RULES.values() if fields(c)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "2", True])
def test_strengths_that_no_rule_can_have(cls: type[Rule], bad: object) -> None:
    with pytest.raises(RuleError, match="finite number"):
        cls(bad)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["StTP", "StMP", "Target"])
def test_negative_strengths_where_they_mean_nothing(name: str) -> None:
    with pytest.raises(RuleError, match="at least 0"):
        rule(name, -1)
    assert SwFC(-1).compile(STATS).above_a == pytest.approx(-STATS.delta_mu)


def test_rules_by_name() -> None:
    assert rule("sttp", 12) == StTP(12)
    assert str(StTP(12)) == "StTP(12)"
    assert str(Floor()) == "Floor"
    assert rule("Ablate") == Ablate()
    with pytest.raises(RuleError, match="there are SwFC, StTP"):
        rule("CAA", 1)
    with pytest.raises(RuleError, match="needs a strength"):
        rule("StTP")
    with pytest.raises(RuleError, match="has no strength"):
        rule("Ablate", 1.0)


def test_a_probe_that_does_not_separate_is_refused_by_gated_rules() -> None:
    mixed = Stats(m=2.0)
    for gated in (StTP(1), StMP(1)):
        with pytest.raises(RuleError, match="boundary between the classes"):
            gated.compile(mixed)
    assert SwFC(1).compile(mixed).above_a == pytest.approx(2.8)
    with pytest.raises(RuleError, match="NaN"):
        Gate(math.nan, 0, 0, 0, 0, math.inf)
    with pytest.raises(NotImplementedError):
        Rule().compile(STATS)


def test_every_rule_documents_itself() -> None:
    for name, cls in RULES.items():
        assert cls.__name__ == name
        assert cls.summary
        assert cls.__doc__
