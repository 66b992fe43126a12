"""What can be counted in a text: repetition, variety, redundancy. Texts in, one number for each out.

It knows no model and no language: words are runs of letters and digits.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Sequence

from steerguard.errors import InputError

Gram = tuple[str, ...]

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def words(text: str) -> list[str]:
    """A text's words for counting repetition: NFKC, case folded, punctuation and underscores dropped, apostrophes kept.

    Scripts that put no space between words come out as one word to a run.
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def repetition(text: str, n: int = 4) -> float:
    """Share of a text's n-grams of words that occurred in it before, 0 to 1. A text of fewer than n words repeats none.

    Source: arXiv 2604.08169, repetition within a turn (n = 4).
    """
    grams = _grams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def repetition_across(turns: Sequence[str], n: int = 4) -> list[float | None]:
    """For each of one speaker's turns, the share of its n-grams of words that occurred in an earlier turn, 0 to 1.

    None for the first turn, which has none before it. A turn of fewer than n words repeats none.

    Source: arXiv 2604.08169, repetition across turns (n = 4).
    """
    out: list[float | None] = []
    before: set[Gram] = set()
    for i, turn in enumerate(turns):
        grams = _grams(turn, n)
        out.append(None if i == 0 else sum(gram in before for gram in grams) / len(grams) if grams else 0.0)
        before.update(grams)
    return out


def distinct(text: str, n: int) -> float | None:
    """Distinct-n: different n-grams of words per n-gram of words, above 0 to 1. None for a text of fewer than n words.

    It falls with length, since words come again in any long text: compare answers of like length.

    Source: Li et al. 2016, arXiv 1510.03055.
    """
    grams = _grams(text, n)
    return len(set(grams)) / len(grams) if grams else None


def compression(text: str) -> float:
    """Compression ratio: bytes of the text in UTF-8 per byte that zlib (level 9) makes of them, at least 1.

    Plain prose of a few hundred words comes to about 2, a loop to 10 and more. A text that zlib cannot make shorter
    counts as it is, so that short texts, and the empty one, have a ratio of 1.
    """
    raw = text.encode("utf-8", "surrogatepass")
    return max(1.0, len(raw) / len(zlib.compress(raw, 9)))


def _grams(text: str, n: int) -> list[Gram]:
    """Every run of n words, in order."""
    if n < 1:
        raise InputError(f"n-grams have at least one word, got n = {n}")
    said = words(text)
    return [tuple(said[i : i + n]) for i in range(len(said) - n + 1)]
