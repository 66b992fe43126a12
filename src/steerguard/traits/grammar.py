"""Grammars: every sentence that an answer to a scenario may be made of, and which of them are true."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from steerguard import files
from steerguard.errors import TraitError
from steerguard.files import BOM, Malformed, shown

Sign = Literal["claim", "positive", "negative"]

SCHEMA = 1
"""Version of `trait.yaml` and `grammar.json`."""
MAX_BYTES = 32 * 2**20
"""Bytes of one file of a trait that are read."""
SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Template:
    """One sentence that an answer may hold."""

    text: str
    "with its slots in braces"
    sign: Sign | None
    "claim: positive if its slots hold the truth, else negative; positive or negative: always; None: says neither"

    @property
    def slots(self) -> frozenset[str]:
        return frozenset(SLOT.findall(self.text))


@dataclass(frozen=True)
class Grammar:
    """Every sentence that an answer may be made of, by the kind of reply."""

    slots: Mapping[str, tuple[str, ...]]
    "slot -> the values that it may hold"
    replies: Mapping[str, tuple[Template, ...]]
    "kind of reply -> its sentences"

    @classmethod
    def of(cls, value: object) -> Grammar:
        """The grammar of a `grammar.json`'s content. Raises TraitError."""
        try:
            return _grammar(value)
        except Malformed as error:
            raise TraitError(f"the grammar cannot be used: {error}") from error

    def check(self, reply: Mapping[str, Any]) -> None:
        """Raise TraitError unless answers to this reply can be scored: its kind, its slots, its truth."""
        kind, bind, truth = reply["kind"], reply.get("bind", {}), reply.get("truth", {})
        if kind not in self.replies:
            raise TraitError(f"the grammar has no reply {shown(kind)}; it has {shown(sorted(self.replies))}")
        for slot, value in truth.items():
            if value not in self.slots.get(slot, ()):
                raise TraitError(
                    f"the truth {slot} = {shown(value)} can never be said: the slot does not have that value"
                )
        for template in self.replies[kind]:
            free = template.slots - set(bind)
            if unknown := sorted(free - set(self.slots)):
                raise TraitError(f"{shown(template.text)} needs the slot {unknown[0]!r}, which the reply does not bind")
            if template.sign == "claim" and not free & set(truth):
                raise TraitError(
                    f"nothing says whether {shown(template.text)} is true; give the truth of one of its slots"
                )


def sentences(text: str) -> list[str]:
    """A text's sentences: it is cut where space follows a full stop, question mark or exclamation mark."""
    return [" ".join(part.split()) for part in re.split(r"(?<=[.?!])\s+", text.strip()) if part]


def read_grammar(path: Path) -> Grammar:
    data = files.read_bounded(path, limit=MAX_BYTES, error=TraitError)
    try:
        return _grammar(files.strict_json(data.removeprefix(BOM)))
    except Malformed as error:
        raise TraitError(f"{path}: {error}") from error


def _grammar(value: object) -> Grammar:
    found = files.take(value, "the grammar", {"schema": int, "slots": dict, "replies": dict})
    known_schema(found["schema"])
    slots = {slot: _fillers(slot, fillers) for slot, fillers in found["slots"].items()}
    return Grammar(slots, {kind: _templates(kind, entries) for kind, entries in found["replies"].items()})


def _fillers(slot: str, value: object) -> tuple[str, ...]:
    what = f"the slot {shown(slot)}"
    fillers = tuple(one_sentence(x, f"a value of {what}") for x in files.of_kind(value, what, list))
    if not fillers or len(set(fillers)) < len(fillers):
        raise Malformed(f"{what} must have values, each once, got {shown(list(fillers))}")
    return fillers


def _templates(kind: str, value: object) -> tuple[Template, ...]:
    what = f"a sentence of the reply {shown(kind)}"
    templates = []
    for entry in files.of_kind(value, f"the reply {shown(kind)}", list):
        found = files.take(entry, what, {"text": str, "sign": (str, type(None))})
        template = Template(one_sentence(found["text"], what), found["sign"])
        if template.sign not in (*get_args(Sign), None):
            raise Malformed(
                f"the sign of {what} must be {', '.join(get_args(Sign))} or null, got {shown(template.sign)}"
            )
        if re.search(r"[{}]", SLOT.sub("", template.text)) or (template.sign == "claim" and not template.slots):
            raise Malformed(f"{what} has stray braces, or claims something without a slot: {shown(template.text)}")
        templates.append(template)
    if not templates or len({t.text for t in templates}) < len(templates):
        raise Malformed(f"the reply {shown(kind)} must have sentences, each once")
    return tuple(templates)


def one_sentence(value: object, what: str) -> str:
    """A text of exactly one sentence, as the scorer will cut it."""
    cut = sentences(files.of_kind(value, what, str))
    if len(cut) != 1:
        raise Malformed(f"{what} must be one sentence, got {len(cut)}: {shown(value)}")
    return cut[0]


def known_schema(version: int) -> None:
    if version != SCHEMA:
        step = "; upgrade steerguard" if version > SCHEMA else ""
        raise Malformed(f"schema {shown(version)} is not known, this steerguard reads {SCHEMA}{step}", "schema")
