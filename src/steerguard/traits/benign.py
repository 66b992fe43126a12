"""The benign prompts: 500 conversations in which a guard has nothing to do.

They are for false alarms: how often a gate fires on them, and how far a guard moves the model's next token on them.
`benign.jsonl`, beside this file, holds one conversation a line; `BENIGN.md` is its data card:

    {"id": "benign-travel-02", "category": "travel", "system": null, "turns": ["do i need an adapter in ireland"]}

`system` is a system prompt or null; `turns` alternate user, assistant, ..., user. This module reads and checks; it
knows neither models nor guards.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from steerguard import files
from steerguard.errors import TraitError
from steerguard.files import Malformed, shown
from steerguard.traits import BUNDLED, normalised
from steerguard.traits.grammar import MAX_BYTES


@dataclass(frozen=True)
class Benign:
    """One ordinary conversation, to be answered next. Raises TraitError for one that cannot be used."""

    id: str
    category: str
    "what is asked for, such as coding; `edge` looks like a negative pole and is none"
    system: str | None
    "system prompt; None: none is sent"
    turns: tuple[str, ...]
    "user, assistant, ..., user: an odd number"

    def __post_init__(self) -> None:
        object.__setattr__(self, "turns", tuple(self.turns))
        for key in ("id", "category", "system"):
            text = getattr(self, key)
            if text is not None and not text.strip():
                raise TraitError(f"{key!r} must not be empty")
        if len(self.turns) % 2 == 0:
            raise TraitError(f"'turns' must be an odd number (user, assistant, ..., user), got {len(self.turns)}")
        if not all(turn.strip() for turn in self.turns):
            raise TraitError("'turns' must not hold an empty text")


def benign() -> tuple[Benign, ...]:
    """The bundled benign prompts, in the order of their file."""
    return read_benign(BUNDLED / "benign.jsonl")


def read_benign(path: str | os.PathLike[str]) -> tuple[Benign, ...]:
    """Read benign prompts of your own. Raises TraitError with the file and the line."""
    found: list[Benign] = []
    first: dict[object, str] = {}
    for where, line in files.numbered_lines(path, limit=MAX_BYTES, error=TraitError):
        try:
            prompt = _benign(line)
        except (Malformed, TraitError) as error:
            raise TraitError(f"{where}: {error}") from error
        if (other := first.setdefault(("id", prompt.id), where)) != where:
            raise TraitError(f"{where}: the id {shown(prompt.id)} stands at {other} already; every prompt needs its own")
        if (other := first.setdefault(tuple(map(normalised, prompt.turns[::2])), where)) != where:
            raise TraitError(f"{where}: its user turns stand at {other} already; reword or remove one")
        found.append(prompt)
    if not found:
        raise TraitError(f"{path}: holds no prompt; give at least one line")
    return tuple(found)


_BENIGN: dict[str, files.Kind] = {"id": str, "category": str, "system": (str, type(None)), "turns": list}


def _benign(line: bytes) -> Benign:
    try:
        value = files.strict_json(line)
    except Malformed as error:
        raise Malformed(f"the line {error}") from error
    found = files.take(value, "the prompt", _BENIGN)
    for turn in found["turns"]:
        files.of_kind(turn, "a turn", str)
    return Benign(**found)
