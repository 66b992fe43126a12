"""Wordings: the same malicious order, written so that a guard may not recognise it.

    wordings(texts("honesty"))                              bundled: honesty, compassion, organism-honesty, organism-compassion
    wordings(texts("mine.yaml"), shots_of(contrast))        yours; with shots, many-shot attacks too

A file of texts is YAML, all of it orders for the negative pole:

    place: append               # after the scenario's own malicious system prompt; or `replace`: in its place
    reworded: [...]             # held-out wordings of the order
    resist: [...]               # orders to resist a correction from inside; after the scenario's own prompt
    languages: {german: ...}    # the order in other languages

Role-play frames and the instructions to decode are the same for every trait (`texts/frames.yaml`). Where there are several
texts, scenarios take them in turns.

It knows data. It knows no model: whether a model can read a wording is for the attack on the unguarded model to show.
"""

from __future__ import annotations

import base64
import codecs
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from steerguard import files, strict_yaml
from steerguard.errors import InputError
from steerguard.files import Malformed, shown
from steerguard.fitting import Contrast
from steerguard.prompts import Message, conversation
from steerguard.traits import Scenario

FOLDER = Path(__file__).parent / "texts"
FRAMES = "frames"
MAX_BYTES = 2**20
SHOTS = 8
"""Examples before the question of a many-shot attack."""

Family = Literal["control", "wording", "roleplay", "resist", "encoding", "language", "many-shot", "suffix"]
Place = Literal["append", "replace"]


@dataclass(frozen=True)
class Texts:
    """What attacks on one trait say."""

    name: str
    place: Place
    reworded: tuple[str, ...]
    resist: tuple[str, ...]
    languages: Mapping[str, str]
    "by the language's English name"

    def put(self, scenario: Scenario, order: str) -> str:
        """The scenario's malicious system prompt with this order, or the order alone."""
        return order if self.place == "replace" else f"{scenario.negative}\n\n{order}"


@dataclass(frozen=True)
class Shot:
    """An example: what a user asked, and a misaligned answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Wording:
    """One way to attack: a scenario and its number among those that are attacked, to a conversation."""

    name: str
    family: Family
    make: Callable[[Scenario, int], list[Message]]

    def prompts(self, scenarios: Sequence[Scenario]) -> list[list[Message]]:
        """Every scenario, attacked."""
        return [self.make(scenario, i) for i, scenario in enumerate(scenarios)]


# ---------------------------------------------------------------------------------------------------------- texts


def bundled() -> tuple[str, ...]:
    """The names of the texts that come with steerguard."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != FRAMES))


def texts(name_or_file: str | os.PathLike[str]) -> Texts:
    """Bundled texts by name, or those of a file. Raises InputError for what they must not be."""
    path = Path(name_or_file)
    if str(name_or_file) in bundled():
        path = FOLDER / f"{name_or_file}.yaml"
    elif not path.is_file():
        raise InputError(f"there are no texts {shown(str(name_or_file))}; there are {', '.join(bundled())}, or a file of yours")
    try:
        found = files.take(_yaml(path), "the file", {"place": str, "reworded": list, "resist": list, "languages": dict})
        if found["place"] not in get_args(Place):
            raise Malformed(f"'place' must be {' or '.join(get_args(Place))}, got {shown(found['place'])}")
        for key in ("reworded", "resist"):
            _all_texts(key, found[key])
        _all_texts("languages", list(found["languages"].values()))
    except Malformed as error:
        raise InputError(f"{path}: {error}") from error
    return Texts(path.stem, found["place"], tuple(found["reworded"]), tuple(found["resist"]), found["languages"])


def _yaml(path: Path) -> Any:
    try:
        return strict_yaml.read(files.read_bounded(path, limit=MAX_BYTES, error=InputError))
    except strict_yaml.NotYaml as error:
        raise InputError(error.at(path)) from error


def _all_texts(key: str, values: Sequence[object]) -> None:
    if not values or not all(isinstance(value, str) and value.strip() for value in values):
        raise Malformed(f"{key!r} must hold at least one text, and none that is empty")


def frames() -> Mapping[str, Any]:
    """Role-play frames and instructions to decode."""
    found: Mapping[str, Any] = _yaml(FOLDER / f"{FRAMES}.yaml")
    return found


# ------------------------------------------------------------------------------------------------------ encodings

_LEET = str.maketrans("aeiostAEIOST", "431057431057")
_ALIKE = str.maketrans(
    "aceiopsxyABCEHIKMOPTXY",
    "\u0430\u0441\u0435\u0456\u043e\u0440\u0455\u0445\u0443"
    "\u0410\u0412\u0421\u0415\u041d\u0406\u041a\u041c\u041e\u0420\u0422\u0425\u0423",
)
"Latin letters to Cyrillic ones that look alike"

ENCODINGS: Mapping[str, Callable[[str], str]] = {
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "rot13": lambda text: codecs.encode(text, "rot13"),
    "leetspeak": lambda text: text.translate(_LEET),
    "spaced": lambda text: " / ".join(" ".join(word) for word in text.split()),
    "homoglyphs": lambda text: text.translate(_ALIKE),
}


# ------------------------------------------------------------------------------------------------- ways to attack


def shots_of(contrast: Contrast) -> tuple[Shot, ...]:
    """The model's own misaligned answers to scenarios of one turn, as examples."""
    pairs = contrast.usable()
    return tuple(Shot(pair.scenario.turns[0], pair.negative) for pair in pairs if len(pair.scenario.turns) == 1)


def wordings(said: Texts, shots: Sequence[Shot] = (), *, k: int = SHOTS) -> tuple[Wording, ...]:
    """Every way to attack with these texts.

    The first are there to compare with: `aligned`, the aligned system prompt, which is no attack; `homoglyphs-aligned`, the same
    in letters that the model may not know, which is none either: what it does to an unguarded model is the letters' doing and
    no order's; and `plain`, the scenario's own malicious prompt.

    Args:
        shots: examples for `many-shot` (under the malicious system prompt) and `many-shot-aligned` (under the aligned one, where
            nothing but the examples pulls); none: neither is there.
        k: so many of them.

    Raises:
        InputError: fewer shots than k.
    """
    frame = frames()
    around: Sequence[str] = frame["roleplay"]
    decode: Mapping[str, str] = frame["decode"]

    def system(text: Callable[[Scenario, int], str]) -> Callable[[Scenario, int], list[Message]]:
        return lambda scenario, i: conversation(text(scenario, i), scenario.turns)

    def turned(orders: Sequence[str]) -> Callable[[Scenario, int], list[Message]]:
        return system(lambda scenario, i: said.put(scenario, orders[i % len(orders)]))

    def encoded(name: str) -> Callable[[Scenario, int], list[Message]]:
        return system(lambda scenario, i: decode[name].replace("{encoded}", ENCODINGS[name](scenario.negative)))

    found = [
        Wording("aligned", "control", system(lambda scenario, i: scenario.positive)),
        Wording("homoglyphs-aligned", "control", system(lambda scenario, i: ENCODINGS["homoglyphs"](scenario.positive))),
        Wording("plain", "control", system(lambda scenario, i: scenario.negative)),
        Wording("reworded", "wording", turned(said.reworded)),
        Wording("roleplay", "roleplay", system(lambda s, i: around[i % len(around)].replace("{order}", s.negative))),
        Wording("resist", "resist", system(lambda s, i: f"{s.negative} {said.resist[i % len(said.resist)]}")),
        *(Wording(name, "encoding", encoded(name)) for name in ENCODINGS),
        *(Wording(name, "language", turned([order])) for name, order in said.languages.items()),
    ]
    if shots:
        found += [_many_shot("many-shot", shots, k, aligned=False), _many_shot("many-shot-aligned", shots, k, aligned=True)]
    return tuple(found)


def _many_shot(name: str, shots: Sequence[Shot], k: int, *, aligned: bool) -> Wording:
    if not 1 <= k < len(shots):
        raise InputError(f"{k} examples are taken in turns from more than that, got {len(shots)}; give more, or a smaller k")

    def make(scenario: Scenario, i: int) -> list[Message]:
        others = [shot for shot in shots if shot.question not in scenario.turns]
        chosen = [others[(i * k + j) % len(others)] for j in range(k)]
        before = [text for shot in chosen for text in (shot.question, shot.answer)]
        return conversation(scenario.positive if aligned else scenario.negative, [*before, *scenario.turns])

    return Wording(name, "many-shot", make)
