"""The result as tables: CSV as RFC 4180 has it, for a spreadsheet or a program.

An empty cell is what was not measured or could not be scored. Text that a spreadsheet would run as a formula gets an
apostrophe before it: answers and names are hostile text.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from io import StringIO

from steerguard.sweeping.result import Point, SweepResult

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
"""What a cell must not begin with."""
_SPACES = " \N{NO-BREAK SPACE}\ufeff"
"""What a spreadsheet may drop before it looks."""

POINTS = (
    "rule", "strength", "layers", "positions", "scenarios", "trait", "error", "coherence", "repetition", "moved", "shift", "n",
    "unscored", "benign_kl", "benign_fire_rate", "benign_lost", "benign_changed", "benign_n", "eligible", "why", "chosen", "wins",
)  # fmt: skip
ANSWERS = (
    "scenario", "category", "arm", "rule", "strength", "layers", "positions", "trait", "coherence", "note", "system", "turns",
    "answer",
)  # fmt: skip

Cell = str | float | None


def csv_points(result: SweepResult) -> str:
    """Every setting of the grid, one a row; `chosen` says best, rule (a rule's own choice) or second."""
    select = result.select
    roles: dict[int, str] = {}
    wins: dict[int, float | None] = {}
    for rule, choice in select.chosen.items():
        if choice.second is not None:
            roles.setdefault(choice.second, "second")
        roles[choice.point] = "best" if rule == select.best else "rule"
        wins[choice.point] = choice.wins
    rows: list[list[Cell]] = []
    for i, point in enumerate(select.points):
        f, b = point.figures, point.benign
        benign: list[Cell] = [None] * 5 if b is None else [b.kl, b.fire_rate, b.lost, b.changed, b.n]
        error = None if f.trait is None else f.error
        rows.append([
            *_setting(point), point.scenarios, f.trait, error, f.coherence, f.repetition, f.moved, f.shift, f.n, f.unscored,
            *benign, "yes" if point.eligible else "no", point.why, roles.get(i, ""), wins.get(i),
        ])  # fmt: skip
    return _csv(POINTS, rows)


def csv_answers(result: SweepResult) -> str:
    """Every answer to the test scenarios, one a row; the header alone if there was no test."""
    rows: list[list[Cell]] = []
    for arm in result.test.arms if result.test is not None else ():
        point = None if arm.point is None else result.select.points[arm.point]
        where: list[Cell] = [None] * 4 if point is None else _setting(point)
        for asked, row in zip(result.test.scenarios if result.test else (), arm.rows, strict=True):
            turns = "\n\n".join(f"{'user' if i % 2 == 0 else 'assistant'}: {turn}" for i, turn in enumerate(asked.turns))
            rows.append([
                asked.id, asked.category, arm.name, *where, row.trait, row.coherence, row.note, asked.system, turns, row.text,
            ])  # fmt: skip
    return _csv(ANSWERS, rows)


def _setting(point: Point) -> list[Cell]:
    return [point.rule, point.strength, " ".join(map(str, point.layers)), point.positions]


def _csv(header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    out = StringIO(newline="")
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(header)
    writer.writerows([_cell(cell) for cell in row] for row in rows)
    return out.getvalue()


def _cell(value: Cell) -> Cell:
    """A cell that no spreadsheet runs: a number as it is, text with an apostrophe where it would be a formula."""
    if not isinstance(value, str):
        return value
    text = value.replace("\0", "\N{SYMBOL FOR NULL}")
    return f"'{text}" if text.startswith(_FORMULA) or text.lstrip(_SPACES).startswith(_FORMULA) else text
