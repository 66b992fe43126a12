"""Similarity: how alike answers mean, by the cosine of sentence embeddings. Needs the extra `steerguard[similarity]`.

Texts of other words and one meaning come out near 1, unrelated ones near 0. A lie and the truth about the same thing
are often close: a low similarity tells that an answer wandered off, a high one does not tell that it is right.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from steerguard.embeddings import embed_texts
from steerguard.errors import InputError
from steerguard.traits.grammar import sentences

ALIKE = 0.8
"""A sentence whose cosine to an earlier one is above this says it again. Source: arXiv 2604.08169."""


def similarity(texts: Sequence[str], to: Sequence[str]) -> list[float | None]:
    """The cosine of each text to the text at its place in `to`, -1 to 1; None where either is blank.

    Raises:
        InputError: another number of texts, or the extra is not installed.
    """
    if len(texts) != len(to):
        raise InputError(f"every text needs one to be compared with, got {len(texts)} and {len(to)}")
    pairs = [(i, a, b) for i, (a, b) in enumerate(zip(texts, to, strict=True)) if a.strip() and b.strip()]
    out: list[float | None] = [None] * len(texts)
    if pairs:
        places = {text: i for i, text in enumerate(dict.fromkeys(text for _, a, b in pairs for text in (a, b)))}
        vectors = embed_texts(list(places))
        for i, a, b in pairs:
            out[i] = float(np.clip(vectors[places[a]] @ vectors[places[b]], -1, 1))
    return out


def similarity_across(turns: Sequence[str], *, limit: float = ALIKE) -> list[float | None]:
    """For each of one speaker's turns, the share of its sentences that say a sentence of an earlier turn again.

    None for the first turn, which has none before it, and for a turn without sentences.

    Args:
        limit: the cosine above which two sentences say the same.

    Source: arXiv 2604.08169, semantic repetition across turns.
    """
    said = [sentences(turn) for turn in turns]
    every = [sentence for turn in said for sentence in turn]
    alike = (vectors := embed_texts(every)) @ vectors.T if every else np.zeros((0, 0))
    out: list[float | None] = []
    start = 0
    for i, turn in enumerate(said):
        again = alike[start : start + len(turn), :start].max(axis=1, initial=-1.0) > limit
        out.append(float(again.mean()) if i > 0 and turn else None)
        start += len(turn)
    return out
