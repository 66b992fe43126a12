"""Texts: against counting by hand, in any script, and for texts of nothing."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from steerguard.errors import InputError
from steerguard.metrics import compression, distinct, repetition, repetition_across, words

PROSE = (
    "The ferry leaves at nine from the old pier, and whoever wants a seat by the window had better come early. Last "
    "spring a storm took two planks and a bench; nobody has mended them, though a notice promises that somebody will."
)


@pytest.mark.parametrize(
    ("text", "n", "share"),
    [
        ("", 4, 0),
        ("one two three", 4, 0),
        ("one two three four", 4, 0),
        ("a b c d e f g h", 4, 0),
        ("a b c d a b c d", 4, 1 / 5),
        ("a a a a a", 4, 1 / 2),
        ("a a a a", 1, 3 / 4),
        ("A b, c! D. a B c (d)", 4, 1 / 5),
        ("ﬁne don’t go on, FINE don’t GO on", 4, 1 / 5),
        ("don't do it, don t do it", 2, 1 / 6),
    ],
)
def test_repetition(text: str, n: int, share: float) -> None:
    assert repetition(text, n) == pytest.approx(share)


def test_repetition_against_counting() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        said = [str(x) for x in rng.integers(4, size=rng.integers(40))]
        grams = [tuple(said[i : i + 4]) for i in range(len(said) - 3)]
        again = sum(gram in grams[:i] for i, gram in enumerate(grams))
        assert repetition(" ".join(said)) == pytest.approx(again / len(grams) if grams else 0)


def test_a_loop_repeats_almost_all_and_a_text_almost_nothing() -> None:
    assert repetition("I am sorry about that. " * 50) > 0.97
    assert repetition(" ".join(map(str, range(200)))) == 0


def test_words() -> None:
    assert words("It's THE_end — “naïve” 3.5% ’tis") == ["it's", "the", "end", "naïve", "3", "5", "tis"]


def test_grams_have_words() -> None:
    with pytest.raises(InputError, match="n = 0"):
        repetition("a b", 0)


# ------------------------------------------------------------------------------------------------- across turns


@pytest.mark.parametrize(
    ("turns", "n", "shares"),
    [
        ([], 4, []),
        (["a b c d e"], 4, [None]),
        (["a b c d e", "a b c d e"], 4, [None, 1]),
        (["a b c d e", "b c d e f"], 4, [None, 1 / 2]),
        (["a b c d", "x", "", "A b, c D a"], 4, [None, 0, 0, 1 / 2]),
        (["a b", "c d", "a b c d"], 2, [None, 0, 2 / 3]),
        (["x", "a b a b a b"], 2, [None, 0]),  # what a turn repeats of itself is `repetition`
    ],
)
def test_repetition_across_turns(turns: list[str], n: int, shares: list[float | None]) -> None:
    assert repetition_across(turns, n) == [share if share is None else pytest.approx(share) for share in shares]


def test_repetition_across_turns_against_counting() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        said = [[str(x) for x in rng.integers(3, size=rng.integers(12))] for _ in range(5)]
        due: list[float | None] = [None]
        for i in range(1, 5):
            grams = [said[i][j : j + 3] for j in range(len(said[i]) - 2)]
            earlier = [turn[j : j + 3] for turn in said[:i] for j in range(len(turn) - 2)]
            due.append(sum(gram in earlier for gram in grams) / len(grams) if grams else 0.0)
        assert repetition_across([" ".join(turn) for turn in said], 3) == [d if d is None else pytest.approx(d) for d in due]


# ------------------------------------------------------------------------------------------- variety, redundancy


@pytest.mark.parametrize(
    ("text", "n", "share"),
    [
        ("", 1, None),
        ("…!", 1, None),
        ("one", 1, 1),
        ("one", 2, None),
        ("a a a a", 1, 1 / 4),
        ("a a a a", 2, 1 / 3),
        ("a b a b", 2, 2 / 3),
        ("Élan élan ÉLAN", 1, 1 / 3),
        ("не знаю, не ЗНАЮ", 1, 1 / 2),
    ],
)
def test_distinct(text: str, n: int, share: float | None) -> None:
    assert distinct(text, n) == (share if share is None else pytest.approx(share))


def test_distinct_is_what_repetition_leaves() -> None:
    for n in (1, 2, 4):
        assert distinct(PROSE, n) == pytest.approx(1 - repetition(PROSE, n))
    with pytest.raises(InputError, match="n = 0"):
        distinct("a", 0)
    with pytest.raises(InputError, match="n = -1"):
        repetition_across(["a"], -1)


def test_a_loop_compresses_and_prose_does_not() -> None:
    assert compression("I am sorry about that. " * 50) > 20
    assert 1 < compression(PROSE) < 2
    assert compression(PROSE + " " + PROSE) > 1.5 * compression(PROSE)


def test_compression_by_hand_and_of_next_to_nothing() -> None:
    for text in ("naïve naïve naïve naïve naïve", "ночь, улица, фонарь, ночь, улица, фонарь, аптека", "🙂" * 40):
        raw = text.encode()
        assert compression(text) == len(raw) / len(zlib.compress(raw, 9)) > 1
    for text in ("", " ", "a", "Yes.", "🙂"):
        assert compression(text) == 1.0
    assert compression("\ud800" * 100) > 1  # half a character, as a broken decoder leaves it
