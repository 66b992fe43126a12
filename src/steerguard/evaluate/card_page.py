"""The card as a page: one HTML file that works offline, prints, and asks for nothing from anywhere. And the three files of it.

What this module knows: what stands on the page and in which order. Names, notes and labels are hostile text: templates
escape by themselves, and the page's policy lets neither scripts run nor anything be fetched.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from steerguard import files
from steerguard.evaluate import card_file, card_markdown, card_pictures, wording
from steerguard.evaluate.card import LIGHTS, Card, sentence
from steerguard.evaluate.section import FEW, Row, Verdict
from steerguard.report import answers
from steerguard.report.wording import counted

HTML, JSON, MARKDOWN = "card.html", "card.json", "card.md"
ORDER: tuple[Verdict, ...] = ("over", "undecided", "within", "free")


def page(card: Card) -> str:
    """The whole page as HTML."""
    parts = [
        (part, title, in_order([row for row in card.rows() if row.figure.part == part])) for part, title in wording.PARTS.items()
    ]
    return _environment().get_template("card.html.j2").render(
        card=card, parts=[one for one in parts if one[2]], over=card.of("over"), undecided=card.of("undecided"),
        missing=_missing(card), words=wording.VERDICTS, few=FEW, lights=LIGHTS, record=_record(card), sentence=sentence,
        gap=card_pictures.gap(card), forest=card_pictures.forest, pictures=card_pictures.pictures(card),
    )  # fmt: skip


def in_order(rows: Sequence[Row]) -> list[Row]:
    """What was measured, the worst first."""
    return sorted((row for row in rows if row.verdict in ORDER), key=lambda row: ORDER.index(row.verdict))


def write(card: Card, folder: Path, *, overwrite: bool = False) -> tuple[Path, ...]:
    """Write the card to a folder as HTML, JSON and Markdown; returns the three paths.

    Raises:
        OutputExists: one of the three exists and `overwrite` is not set; nothing was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    refuse_existing(folder, overwrite=overwrite)
    html, text = page(card), card_markdown.markdown(card)
    return (
        files.write_atomically(folder / HTML, html.encode(), overwrite=overwrite),
        card_file.write(card, folder / JSON, overwrite=overwrite),
        files.write_atomically(folder / MARKDOWN, text.encode(), overwrite=overwrite),
    )


def refuse_existing(folder: Path, *, overwrite: bool) -> None:
    """Before any long work, refuse a folder that holds a card. Raises OutputExists."""
    if folder.is_dir():
        for name in (HTML, JSON, MARKDOWN):
            files.refuse_existing(folder / name, overwrite=overwrite)
    else:
        files.refuse_existing(folder, overwrite=False)


@cache
def _environment() -> Environment:
    loader = ChoiceLoader(
        [PackageLoader("steerguard.evaluate", "templates"), PackageLoader("steerguard.report", "templates")]
    )
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "visible": answers.visible, "arms": wording.arms, "counted": counted, "shown": wording.shown,
        "first": wording.first, "others": wording.others, "limit": wording.limit,
        "thin": lambda text: Markup("&nbsp;").join(str(text).split(" ")),
    }  # fmt: skip
    return environment


def _missing(card: Card) -> list[tuple[str, list[Row]]]:
    """What was not measured, by reason: a reason stands once for all figures that it is the reason of."""
    by_reason: dict[str, list[Row]] = {}
    for row in card.of("missing"):
        by_reason.setdefault(row.note, []).append(row)
    return list(by_reason.items())


def _record(card: Card) -> list[tuple[str, str]]:
    """What is needed to do it again."""
    own = card.subject
    where = f"layer{'s' if len(own.layers) > 1 else ''} {', '.join(map(str, own.layers))}, {own.positions} positions"
    return [
        ("guard", f"{own.guard}: {own.rule}, {where}"),
        ("guard, SHA-256", own.digest),
        ("model", f"{own.model}: {own.architecture}, by {own.backend}"),
        ("trait", f"{own.trait}: {own.title}"),
        ("trait, SHA-256", own.trait_sha256),
        ("scorer", "none" if card.scorer is None else _json(card.scorer)),
        ("judge of free text", "none" if card.judge is None else _json(card.judge)),
        ("sampling", ", ".join(f"{key} {_json(value)}" for key, value in card.sampling.items()) or "none"),
        ("seed", str(card.seed)),
        ("suites and size", f"{', '.join(card.suites) or 'none'}; {card.size}"),
        ("sections", "; ".join(f"{s.section} {_json(s.settings)}, {s.seconds:.0f} s" for s in card.sections if s.ran) or "none"),
        ("versions", ", ".join(f"{key} {value}" for key, value in card.versions.items()) or "none"),
        ("command", card.command or "not recorded"),
    ]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=dict)
