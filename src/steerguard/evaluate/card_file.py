"""Cards as files: JSON with a schema, read without trust. The same for the result of one section.

What this module knows: every key and what each may hold. A broken, foreign or newer file is refused in one sentence.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from steerguard import files
from steerguard.errors import ResultError
from steerguard.evaluate.card import SCHEMA, Card, Subject
from steerguard.evaluate.results import Paired, as_json
from steerguard.evaluate.section import Better, Figure, Limit, Of, Part, Row, SectionResult, Sense
from steerguard.files import Kind, Malformed
from steerguard.metrics import Interval

MAX_BYTES = 64 * 2**20
_NULL = type(None)
_NUMBER: Kind = (float, _NULL)


def write(card: Card, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """The card as JSON. Raises as `files.write_atomically`."""
    return files.write_json(path, {"schema": SCHEMA, **as_json(card)}, overwrite=overwrite)


def read(path: str | os.PathLike[str]) -> Card:
    """The card in a file. Raises ResultError: one sentence with the path."""
    try:
        return card_of(files.strict_json(files.read_bounded(path, limit=MAX_BYTES, error=ResultError)))
    except Malformed as error:
        raise ResultError(f"{path} {error}") from error


def card_of(record: object) -> Card:
    """The card in a JSON value. Raises Malformed: one clause that follows the file's name."""
    if not isinstance(record, dict) or "schema" not in record:
        raise Malformed("is no card of an evaluation: it must be an object with the key 'schema'")
    if record["schema"] != SCHEMA or isinstance(record["schema"], bool):
        got = files.shown(record["schema"])
        raise Malformed(f"has the schema {got}, this version reads {SCHEMA}; use the steerguard that wrote it")
    try:
        return _card(record)
    except Malformed as error:
        raise Malformed(f"is no sound card: {error}") from error


def _card(record: Mapping[str, Any]) -> Card:
    found = files.take(record, "the card", {
        "schema": int, "subject": dict, "suites": list, "size": str, "made": str, "sampling": dict, "scorer": (dict, _NULL),
        "judge": (dict, _NULL), "seed": int, "versions": dict, "command": str, "sections": list,
    })  # fmt: skip
    del found["schema"]
    own = files.take(found["subject"], "the subject", {
        "guard": str, "digest": str, "rule": str, "layers": list, "positions": str, "model": str, "architecture": str,
        "backend": str, "trait": str, "title": str, "trait_sha256": str,
    })  # fmt: skip
    subject = Subject(**{**own, "layers": _all(own["layers"], "'layers' of the subject", int)})
    sections = tuple(section_of(one) for one in found["sections"])
    if len({section.section for section in sections}) < len(sections):
        raise Malformed("a section stands there twice")
    versions = {key: files.of_kind(value, f"the version of {files.shown(key)}", str) for key, value in found["versions"].items()}
    suites = _all(found["suites"], "'suites'", str)
    return Card(**{**found, "subject": subject, "suites": suites, "versions": versions, "sections": sections})


def section_of(value: object) -> SectionResult:
    """A section's result. Raises Malformed."""
    found = files.take(value, "a section", {
        "section": str, "title": str, "question": str, "rows": list, "details": list, "notes": list, "settings": dict,
        "seconds": float, "ran": bool,
    })  # fmt: skip
    name = files.shown(found["section"])
    for key in ("rows", "details"):
        found[key] = tuple(_row(one, f"a row of the section {name}") for one in found[key])
    names = [row.figure.name for row in (*found["rows"], *found["details"])]
    if len(set(names)) < len(names):
        raise Malformed(f"the section {name} has a figure twice")
    found["notes"] = _all(found["notes"], f"'notes' of the section {name}", str)
    return SectionResult(**found)


def _row(value: object, what: str) -> Row:
    found = files.take(value, what, {"figure": dict, "value": (dict, _NULL), "note": str})
    figure = _figure(found["figure"])
    return Row(figure, _value(found["value"], f"the value of {files.shown(figure.name)}"), found["note"])


def _figure(value: object) -> Figure:
    found = files.take(value, "a figure", {
        "name": str, "label": str, "unit": str, "better": str, "part": str, "limit": (dict, _NULL), "about": str,
    })  # fmt: skip
    what = f"the figure {files.shown(found['name'])}"
    _among(found["better"], get_args(Better), f"'better' of {what}")
    _among(found["part"], get_args(Part), f"'part' of {what}")
    if found["limit"] is not None:
        limit = files.take(found["limit"], f"the limit of {what}", {"sense": str, "bound": float, "source": str, "of": str})
        _among(limit["sense"], get_args(Sense), f"'sense' of the limit of {what}")
        _among(limit["of"], get_args(Of), f"'of' of the limit of {what}")
        found["limit"] = Limit(**limit)
    return Figure(**found)


def _value(value: object, what: str) -> Interval | Paired | None:
    if value is None:
        return None
    if isinstance(value, dict) and "mean" in value:
        return _interval(value, what)
    found = files.take(value, what, {"unguarded": (dict, _NULL), "guarded": (dict, _NULL), "change": (dict, _NULL)})
    return Paired(**{key: None if one is None else _interval(one, f"{key!r} of {what}") for key, one in found.items()})


def _interval(value: object, what: str) -> Interval:
    found = files.take(value, what, {"mean": float, "low": _NUMBER, "high": _NUMBER, "n": int, "unscored": int})
    if found["n"] < 0 or found["unscored"] < 0 or (found["low"] is None) != (found["high"] is None):
        raise Malformed(f"{what} is no interval")
    if found["low"] is not None and found["low"] > found["high"]:
        raise Malformed(f"{what} ends before it begins")
    return Interval(**found)


def _all(value: list[Any], what: str, kind: type) -> tuple[Any, ...]:
    return tuple(files.of_kind(one, what, kind) for one in value)


def _among(value: str, allowed: tuple[str, ...], what: str) -> None:
    if value not in allowed:
        raise Malformed(f"{what} must be one of {', '.join(map(repr, allowed))}, got {files.shown(value)}")
