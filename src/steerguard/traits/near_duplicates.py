"""Near-duplicates among a trait's texts, within its splits and across them.

    python -m steerguard.traits.near_duplicates honesty            # by sentence embeddings; exit 1 above the limit
    python -m steerguard.traits.near_duplicates FOLDER --by 5-grams

`steerguard.traits` refuses the same prompt on two sides; this finds the same prompt in other words. User texts are
compared with user texts (all user turns of a conversation together) and system prompts with system prompts. Not
compared are the two poles of one scenario and prompts of one `wording`: they are meant to be alike. A text that occurs
several times in a split counts once.

It measures; what to do about a pair is for its author to decide. Embeddings need the extra `steerguard[similarity]`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from steerguard.embeddings import Matrix, embed_texts
from steerguard.errors import SteerguardError
from steerguard.traits import Split, Trait, normalised, trait

Kind = Literal["user", "system"]
By = Literal["embeddings", "5-grams"]
Similarity = Callable[[Sequence[str]], Matrix]
"""n texts -> [n, n], symmetric, 1 for what is the same."""

LIMITS: dict[By, float] = {"embeddings": 0.6, "5-grams": 0.2}
"""How alike two texts may be. Texts written apart stay below; a text rewritten with other names and numbers comes out
above, always by 5-grams (0.32 and more) and in most cases by embeddings, which see a subject in other words but miss a
skeleton on another subject. Use both; the card of `honesty` has the figures."""


@dataclass(frozen=True)
class Text:
    """One text of a split."""

    kind: Kind
    split: Split
    ids: tuple[str, ...]
    "the scenarios that it occurs in"
    wordings: frozenset[str]
    "of those scenarios"
    text: str


@dataclass(frozen=True)
class Pair:
    """Two texts of one kind and how alike they are."""

    similarity: float
    a: Text
    b: Text

    @property
    def across(self) -> bool:
        """Whether they stand in two splits."""
        return self.a.split != self.b.split

    def __str__(self) -> str:
        return f"{self.similarity:.3f}  {self.a.ids[0]}  {self.b.ids[0]}"


def texts(found: Trait) -> list[Text]:
    """Every user text and every system prompt of a trait, once in each split."""
    places: dict[tuple[Kind, Split, str], list[tuple[str, str | None]]] = {}
    originals: dict[tuple[Kind, Split, str], str] = {}
    for split in get_args(Split):
        for scenario in found.split(split):
            written: list[tuple[Kind, str]] = [
                ("user", "\n".join(scenario.turns[::2])), ("system", scenario.positive), ("system", scenario.negative),
            ]  # fmt: skip
            for kind, text in written:
                key = (kind, split, normalised(text))
                places.setdefault(key, []).append((scenario.id, scenario.wording))
                originals.setdefault(key, text)
    return [
        Text(kind, split, tuple(i for i, _ in at), frozenset(w for _, w in at if w is not None), originals[kind, split, key])
        for (kind, split, key), at in places.items()
    ]


def pairs(found: Trait, similarity: Similarity) -> list[Pair]:
    """All pairs of texts that are not meant to be alike, the most similar first."""
    out = [pair for kind in get_args(Kind) for pair in _pairs([t for t in texts(found) if t.kind == kind], similarity)]
    return sorted(out, key=lambda pair: -pair.similarity)


def _pairs(of_kind: Sequence[Text], similarity: Similarity) -> Iterator[Pair]:
    alike = similarity([t.text for t in of_kind])
    for i, a in enumerate(of_kind):
        ids = set(a.ids)
        for j, b in enumerate(of_kind[:i]):
            if ids.isdisjoint(b.ids) and a.wordings.isdisjoint(b.wordings):
                yield Pair(float(alike[i, j]), b, a)


def by_five_grams(written: Sequence[str]) -> Matrix:
    """Jaccard similarity of the sets of five successive characters, whatever their case, spaces and punctuation."""
    from sklearn.feature_extraction.text import CountVectorizer

    grams = CountVectorizer(analyzer="char", ngram_range=(5, 5), lowercase=False, binary=True, dtype=np.float64)
    found = grams.fit_transform([f" {normalised(text)} ".ljust(5, "_") for text in written])
    common: Matrix = np.asarray((found @ found.T).todense())
    sizes = common.diagonal()
    return common / (sizes[:, None] + sizes[None, :] - common)


def by_embeddings(written: Sequence[str]) -> Matrix:
    """Cosine of the sentence embeddings of all-MiniLM-L6-v2. Raises InputError without the extra `similarity`."""
    embedded = embed_texts(written)
    return embedded @ embedded.T


SIMILARITIES: dict[By, Similarity] = {"embeddings": by_embeddings, "5-grams": by_five_grams}


def report(found: Trait, by: By, *, limit: float, top: int = 5) -> tuple[str, bool]:
    """What to show of a trait, and whether all of it is within the limit."""
    alike = pairs(found, SIMILARITIES[by])
    lines = [f"{found.name}, by {by}, limit {limit:g}"]
    for kind in get_args(Kind):
        for across, where in ((True, "across splits"), (False, "within a split")):
            group = [pair for pair in alike if pair.a.kind == kind and pair.across == across]
            values = [pair.similarity for pair in group]
            if values:
                median, high = np.median(values), np.quantile(values, 0.999)
                lines.append(f"{kind}, {where}: {len(group)} pairs, median {median:.3f}, 99.9 % under {high:.3f}; highest:")
                lines += [f"  {pair}" for pair in group[:top]]
    above = sum(pair.similarity > limit for pair in alike)
    lines.append(f"{above} pairs above the limit")
    return "\n".join(lines), above == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 if a pair is above the limit, 2 if nothing could be measured."""
    program, about = "python -m steerguard.traits.near_duplicates", (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog=program, description=about)
    parser.add_argument("traits", nargs="+", metavar="TRAIT", help="a bundled trait's name, or a trait's folder")
    parser.add_argument("--by", choices=get_args(By), default="embeddings")
    parser.add_argument("--limit", type=float, help=f"default: {LIMITS}")
    parser.add_argument("--top", type=int, default=5, help="pairs shown of each group")
    given = parser.parse_args(arguments)
    limit = LIMITS[given.by] if given.limit is None else given.limit
    sound = True
    try:
        for name in given.traits:
            text, within = report(trait(name), given.by, limit=limit, top=given.top)
            sys.stdout.write(text + "\n")
            sound = sound and within
    except SteerguardError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
