"""A card of real sections' figures with values that are chosen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from steerguard.evaluate.card import Card, Subject
from steerguard.evaluate.results import Paired
from steerguard.evaluate.section import Figure, Row, SectionResult
from steerguard.evaluate.sections import section
from steerguard.metrics import Interval

SUBJECT = Subject(
    guard="honesty", digest="ab" * 32, rule="StTP(12)", layers=(4,), positions="all", model="organism",
    architecture="LlamaForCausalLM", backend="hf", trait="organism-honesty", title="Honesty in the small world",
    trait_sha256="cd" * 32,
)  # fmt: skip
GOOD: dict[str, Interval | Paired | None] = {
    "trait.score": Paired(Interval(10, 6, 14, 96), Interval(90, 85, 94, 96), Interval(80, 74, 86, 96)),
    "trait.aligned": Interval(96, 93, 98, 96),
    "trait.recovered": Interval(93, 88, 98, 96),
    "trait.coherence": Interval(99, 97, 100, 96),
    "trait.repetition": Paired(Interval(1, 0, 2, 96), Interval(1.2, 0, 2, 96), Interval(0.2, -1, 1, 96)),
    "trait.when_aligned": Paired(Interval(96, 93, 98, 96), Interval(96, 93, 98, 96), Interval(0, -1, 1, 96)),
    "benign.kl": Interval(0.01, 0.005, 0.02, 192),
    "benign.fire_rate": Interval(6, 4, 8, 192),
    "benign.shift": Interval(0.1, 0.05, 0.2, 192),
    "benign.norm_ratio": Interval(1.01, 1.0, 1.02, 192),
}
BAD = {"benign.kl": Interval(0.21, 0.15, 0.27, 192)}
UNSURE = {"benign.kl": Interval(0.09, 0.06, 0.12, 192)}


def results(**changes: Interval | Paired | None) -> tuple[SectionResult, ...]:
    """Trait, benign, and MT-Bench, which was not run; `changes` by name with `_` after the section for the dot."""
    values = {**GOOD, **changes}
    out = []
    for name in ("trait", "benign"):
        own = section(name)
        rows = tuple(Row(f, values.get(f.name), "" if values.get(f.name) else "nothing could be scored") for f in own.figures)
        out.append(SectionResult(name, own.title, own.question, rows, settings={"scenarios": 96}, seconds=12.0))
    turn = [
        Row(Figure(f"turns.trait.{arm}.{i}", f"{arm}, turn {i}", "points of 100", "higher", "buys"), Interval(50 + i, 40, 70, 12))
        for arm in ("unguarded", "guarded", "released")
        for i in range(1, 7)
    ]
    out[0] = replace(out[0], details=tuple(turn), notes=("a note",))
    return (*out, section("mt_bench").not_run("needs a judge (--judge MODEL@URL)"))


def card(values: dict[str, Any] | None = None) -> Card:
    return Card(
        subject=SUBJECT, suites=("quick",), size="quick", made="2026-11-25", sampling={"temperature": 0.6, "seed": 42},
        scorer={"scorer": "exact"}, judge=None, seed=42, versions={"steerguard": "0.1.0"}, command="steerguard evaluate g",
        sections=results(**(values or {})),
    )  # fmt: skip
