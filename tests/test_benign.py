"""The benign prompts: how many of what, how different, and every way in which a line is refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alike import most_alike
from steerguard.errors import TraitError
from steerguard.traits import normalised
from steerguard.traits.benign import Benign, benign, read_benign

ALL = benign()
LONG = 150
"""Words of one user turn from which on it counts as a long input."""
ALIKE = 0.45
"""Most cosine of two prompts; the data is at 0.33, one with a word changed at 0.9."""


def asked(prompt: Benign) -> str:
    return "\n".join(prompt.turns[::2])


def test_counts() -> None:
    many = [p for p in ALL if len(p.turns) > 1]
    assert (len(ALL), len(many)) == (500, 120)
    assert {len(p.turns) for p in many} == {3, 5, 7}
    assert sum(max(len(turn.split()) for turn in p.turns[::2]) >= LONG for p in ALL) >= 30


def test_categories() -> None:
    sizes = Counter(p.category for p in ALL)
    assert len(sizes) == 24
    assert min(sizes.values()) >= 16
    assert sizes["edge"] >= 30
    for category in sizes:
        assert sum(len(p.turns) > 1 for p in ALL if p.category == category) >= 4
        assert any(p.system for p in ALL if p.category == category)


def test_languages() -> None:
    languages = Counter(p.id.split("-")[2] for p in ALL if p.category == "languages")
    assert sum(languages.values()) >= 40
    assert len(languages) == 18


def test_system_prompts() -> None:
    own = [p.system for p in ALL if p.system]
    assert 0.38 <= len(own) / len(ALL) <= 0.42
    (most, times), (_, second) = Counter(own).most_common(2)
    assert (most, second) == ("You are a helpful assistant.", 1), "all but the plainest one occur once"
    assert times <= 0.15 * len(own)


def test_no_system_prompt_names_a_pole() -> None:
    named = ("honest", "truth", "lie ", "lying", "compassion", "dismiss", "empath", "kind to", "warm")
    assert not [p.id for p in ALL if p.system and p.category != "edge" and any(n in p.system.lower() for n in named)]


def test_no_two_are_alike() -> None:
    cosine, one, other = most_alike([asked(p) for p in ALL])
    assert cosine < ALIKE, f"{one!r} and {other!r}"
    first = Counter(" ".join(normalised(p.turns[0]).split()[:3]) for p in ALL)
    assert first.most_common(1)[0][1] <= 10, first.most_common(5)


def test_a_changed_word_is_noticed() -> None:
    again = asked(ALL[0]).replace("list", "tuple")
    cosine, one, other = most_alike([*(asked(p) for p in ALL), again])
    assert cosine > ALIKE and {one, other} == {again, asked(ALL[0])}


# --------------------------------------------------------------------------------------------------------- refusals

LINE: dict[str, Any] = {"id": "a", "category": "cooking", "system": None, "turns": ["How long do I boil an egg?"]}


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "benign.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), encoding="utf-8")
    return path


def test_reads_prompts_of_your_own(tmp_path: Path) -> None:
    more = {"id": "b", "category": "cooking", "system": "Be brief.", "turns": ["Hello.", "Hi!", "Soup?"]}
    path = write(tmp_path, "\ufeff" + json.dumps(LINE) + "\r", "", more, " ")
    assert read_benign(path) == (
        Benign("a", "cooking", None, ("How long do I boil an egg?",)),
        Benign("b", "cooking", "Be brief.", ("Hello.", "Hi!", "Soup?")),
    )


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in LINE.items() if k != key}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "the line is not JSON"),
        ("[]", "the prompt must be an object, got"),
        (without("system"), "lacks the key 'system'"),
        (LINE | {"positive": "x"}, "has an unknown key 'positive'"),
        (LINE | {"turns": "x"}, "'turns' of the prompt must be a list, got 'x'"),
        (LINE | {"turns": [1]}, "a turn must be text, got 1"),
        (LINE | {"turns": []}, "must be an odd number .* got 0"),
        (LINE | {"turns": ["a", "b"]}, "must be an odd number .* got 2"),
        (LINE | {"turns": [" "]}, "'turns' must not hold an empty text"),
        (LINE | {"system": 1}, "'system' of the prompt must be text or null, got 1"),
        (LINE | {"system": ""}, "'system' must not be empty"),
        (LINE | {"id": " "}, "'id' must not be empty"),
        (LINE | {"category": ""}, "'category' must not be empty"),
        (LINE | {"turns": ["Another question."]}, "the id 'a' stands at .*:1 already"),
        (LINE | {"id": "b", "turns": ["how LONG do I boil an egg"]}, "its user turns stand at .*:1 already"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(TraitError, match=rf"benign\.jsonl:3: .*{message}"):
        read_benign(write(tmp_path, LINE, "", line))


@pytest.mark.parametrize("change", [lambda path: path.unlink(), lambda path: path.write_bytes(b"\n \n")])
def test_no_prompts_are_refused(tmp_path: Path, change: Callable[[Path], object]) -> None:
    path = write(tmp_path, LINE)
    change(path)
    with pytest.raises(TraitError, match="there is no file|holds no prompt"):
        read_benign(path)
