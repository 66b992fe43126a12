"""The card: everything that an evaluation found out about a guard, and what it comes to in one line.

A card says of every figure whether its limit is exceeded (red), kept, not to be told from so few cases (amber), or why it was
not measured (grey). The worst stands first, and decides the line on top. It knows figures and limits. How a card looks is
`card_page`'s affair, its file `card_file`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from steerguard.evaluate.section import Row, SectionResult, Verdict
from steerguard.evaluate.wording import shown

SCHEMA = 1
Light = Literal["red", "amber", "green", "grey"]
LIGHTS: Mapping[Verdict, Light] = {"over": "red", "undecided": "amber", "within": "green", "free": "grey", "missing": "grey"}
ESSENTIAL = "trait.recovered"
"""Without it there is nothing to say for a guard."""


@dataclass(frozen=True)
class Subject:
    """What was evaluated, and with what."""

    guard: str
    digest: str
    rule: str
    layers: tuple[int, ...]
    positions: str
    model: str
    architecture: str
    backend: str
    trait: str
    title: str
    "of the trait"
    trait_sha256: str


@dataclass(frozen=True)
class Card:
    """The result of an evaluation."""

    subject: Subject
    suites: tuple[str, ...]
    "as they were asked for"
    size: str
    made: str
    "the day, as 2026-11-25"
    sampling: Mapping[str, Any]
    scorer: Mapping[str, Any] | None
    judge: Mapping[str, Any] | None
    seed: int
    versions: Mapping[str, str]
    command: str
    sections: tuple[SectionResult, ...]

    def rows(self) -> Iterator[Row]:
        """Every promised figure, section by section."""
        return (row for section in self.sections for row in section.rows)

    def row(self, name: str) -> Row | None:
        """The figure of that name; None if its section was not asked for."""
        return next((row for row in self.rows() if row.figure.name == name), None)

    def of(self, verdict: Verdict) -> list[Row]:
        """The figures of that verdict, in order."""
        return [row for row in self.rows() if row.verdict == verdict]

    @property
    def light(self) -> Light:
        "the card's colour: its worst figure's; grey where what the guard buys was not measured"
        if self.of("over"):
            return "red"
        essential = self.row(ESSENTIAL)
        if essential is None or essential.verdict == "missing":
            return "grey"
        return "amber" if self.of("undecided") else "green"

    @property
    def verdict(self) -> str:
        "one line, worst first"
        over, undecided, missing = self.of("over"), self.of("undecided"), self.of("missing")
        if over:
            rest = f", and {len(over) - 1} more" if len(over) > 1 else ""
            return f"Do not deploy as it is: {sentence(over[0])}{rest}."
        left = f" {_counted(len(missing), 'figure was', 'figures were')} not measured." if missing else ""
        if self.light == "grey":
            return f"Nothing can be said for this guard: what it brings back was not measured.{left}"
        if undecided:
            open_ = _counted(len(undecided), "is", "are")
            return f"No limit is exceeded, but {open_} not decided: {sentence(undecided[0])}.{left}"
        kept = len(self.of("within"))
        return f"All {kept} limits that were measured are kept.{left}"


def sentence(row: Row) -> str:
    """A figure and its limit in words: `KL of the next token to the unguarded model is 0.21 [0.18, 0.25], the limit is ...`."""
    limit = row.figure.limit
    what = "change in " if limit is not None and limit.of == "change" else ""
    held = "" if limit is None else f", the limit is {limit}{_unit(row)}"
    return f"{what}{row.figure.label} is {shown(row.held)}{_unit(row)}{held}"


def _unit(row: Row) -> str:
    unit = row.figure.unit
    return "" if not unit else "\N{NO-BREAK SPACE}%" if unit == "%" else f" {unit}"


def _counted(n: int, one: str, several: str) -> str:
    return f"{n} {one if n == 1 else several}"
