"""The card as Markdown, for a model card: the line on top, then three tables and what was not measured."""

from __future__ import annotations

import re

from steerguard.evaluate.card import Card
from steerguard.evaluate.section import Row
from steerguard.evaluate.wording import PARTS, VERDICTS, arms
from steerguard.files import printable


def markdown(card: Card) -> str:
    """The whole card; headings begin at the second level."""
    own = card.subject
    lines = [
        "## Evaluation", "", f"**{_escaped(card.verdict)}**", "",
        f"{_escaped(own.guard)} ({_escaped(own.rule)}, layers {', '.join(map(str, own.layers))}) on {_escaped(own.model)}, "
        f"{_escaped(own.title)}; suite {_escaped(', '.join(card.suites) or card.size)}, size {_escaped(card.size)}"
        f"{f', {_escaped(card.made)}' if card.made else ''}. Means with 95 % intervals.",
    ]  # fmt: skip
    for part, title in PARTS.items():
        rows = [row for row in card.rows() if row.figure.part == part and row.held is not None]
        if rows:
            lines += ["", f"### {title}", "", "| | unguarded | guarded | change | n | limit | |", "|---|---|---|---|---|---|---|"]
            lines += [_line(row) for row in rows]
    missing = card.of("missing")
    if missing:
        lines += ["", "### Not measured", ""]
        lines += [f"- {_escaped(row.figure.label)}: {_escaped(row.note)}" for row in missing]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    limit = row.figure.limit
    unit = f", {row.figure.unit}" if row.figure.unit else ""
    of = " (change)" if limit is not None and limit.of == "change" else ""
    cells = [_escaped(row.figure.label + unit), *map(_escaped, arms(row.value)), str(row.n)]
    word = VERDICTS[row.verdict]
    cells += ["" if limit is None else _escaped(f"{limit}{of}"), f"**{word}**" if row.verdict == "over" else word]
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", printable(text))
