"""What a sweep found: the grid, the choice, the report on `test`, and every setting that is needed to do it again.

What this module knows: the nouns of a result. It refuses to know how the figures came about, how they are read from a
file (`result_file`), and how they are shown (`report`).

None stands for what was not measured or could not be scored; nothing here turns it into a number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from steerguard.identity import ModelIdentity
from steerguard.metrics import Interval
from steerguard.sweeping.choice import Cost, Limits
from steerguard.sweeping.points import Figures

BASELINES = ("aligned", "malicious")
"""The arms that no guard acts on; every other arm has the name of its rule."""


@dataclass(frozen=True)
class Pole:
    """One end of the behaviour."""

    name: str
    description: str


@dataclass(frozen=True)
class SweptTrait:
    """What was steered, and what scored it."""

    name: str
    title: str
    positive: Pole
    negative: Pole
    sha256: str
    scorer: Mapping[str, Any]
    "the scorer's identity, as JSON values"


@dataclass(frozen=True)
class Settings:
    """Everything that is needed to do it again."""

    command: str
    sampling: Mapping[str, Any]
    rules: tuple[str, ...]
    layers: tuple[int, ...]
    positions: tuple[str, ...]
    seed: int
    versions: Mapping[str, Any]
    recipe: Mapping[str, Any] | None
    beside: tuple[str, ...]
    "digests of guards that were on throughout"
    constraints: Limits


@dataclass(frozen=True)
class LayerEvidence:
    """One layer's probe: where the classes stand on it, and how well it reads answers that it was not fitted on."""

    layer: int
    m: float
    mu_pos: float
    sigma_pos: float
    mu_neg: float
    sigma_neg: float
    delta_mu: float
    auroc: float
    auroc_low: float
    auroc_high: float
    cohens_d: float
    split_half: float
    cosine_mean_difference: float
    weak: bool


@dataclass(frozen=True)
class Point:
    """One setting of the grid and what it measured."""

    rule: str
    strength: float | None
    layers: tuple[int, ...]
    positions: str
    scenarios: int
    "how many scenarios it answered"
    figures: Figures
    benign: Cost | None
    eligible: bool
    why: str
    "the constraint that it failed; empty if it is eligible"


@dataclass(frozen=True)
class Chosen:
    """One rule's operating point."""

    point: int
    "index into the points"
    wins: float | None
    "share of the bootstrap resamples in which this point is the one that is chosen"
    second: int | None
    "index of the next best"


@dataclass(frozen=True)
class Selection:
    """The grid on the `select` split, and the choice."""

    n: int
    "scenarios"
    aligned: Figures
    malicious: Figures
    points: tuple[Point, ...]
    chosen: Mapping[str, Chosen]
    best: str | None
    refused: Mapping[str, str]
    not_looked: str
    "what a search from coarse to fine left out; empty if every setting was tried"


@dataclass(frozen=True)
class Asked:
    """One scenario of the `test` split."""

    id: str
    category: str
    system: str
    "the negative pole's system prompt"
    turns: tuple[str, ...]


@dataclass(frozen=True)
class Projections:
    """How many tokens stood where on a direction, before correction."""

    layer: int
    m: float
    mu_pos: float
    mu_neg: float
    edges: tuple[float, ...]
    "[bins + 1] ascending"
    seen: tuple[int, ...]
    "[bins] tokens"
    moved: tuple[int, ...]
    "[bins] tokens of them that the gate moved"


@dataclass(frozen=True)
class Category:
    """The trait of one category's answers."""

    category: str
    trait: Interval | None


@dataclass(frozen=True)
class Metric:
    """One figure that needs no judge, and its paired difference to the aligned arm."""

    value: Interval | None
    against_aligned: Interval | None


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer."""

    piece: str
    rho: float
    "projection before correction"
    delta: float
    "0 where the gate left it alone"


@dataclass(frozen=True)
class Row:
    """One answer of the test."""

    trait: float | None
    coherence: float | None
    note: str
    "what a judge said for its reason"
    text: str
    tokens: tuple[Token, ...] | None


@dataclass(frozen=True)
class TestedArm:
    """One way to answer the test scenarios: a baseline, or a rule at its operating point."""

    name: str
    point: int | None
    trait: Interval | None
    coherence: Interval | None
    recovered: Interval | None
    "share of the gap, percent"
    repetition: float
    moved: float
    shift: float
    categories: tuple[Category, ...]
    metrics: Mapping[str, Metric]
    projections: Projections | None
    rows: tuple[Row, ...]
    "one per scenario"


@dataclass(frozen=True)
class HeldOut:
    """The report on the `test` split."""

    scenarios: tuple[Asked, ...]
    arms: tuple[TestedArm, ...]

    def arm(self, name: str | None) -> TestedArm | None:
        return next((arm for arm in self.arms if arm.name == name), None)


@dataclass(frozen=True)
class GuardRecord:
    """A guard that came out."""

    digest: str
    describe: str
    "several lines, as `steerguard show` prints them"


@dataclass(frozen=True)
class SweepResult:
    """The whole document."""

    trait: SweptTrait
    model: ModelIdentity
    settings: Settings
    probes: tuple[LayerEvidence, ...]
    select: Selection
    test: HeldOut | None
    guards: Mapping[str, GuardRecord]

    @property
    def coherence_bar(self) -> float | None:
        """The lowest coherence on `select` that is eligible; None if the aligned baseline could not be scored."""
        aligned = self.select.aligned.coherence
        return None if aligned is None else self.settings.constraints.coherence_kept * aligned


__all__ = [
    "Asked", "BASELINES", "Category", "Chosen", "Cost", "Figures", "GuardRecord", "HeldOut", "LayerEvidence", "Limits",
    "Metric", "Point", "Pole", "Projections", "Row", "Selection", "Settings", "SweepResult", "SweptTrait", "TestedArm", "Token",
]  # fmt: skip
