"""How alike texts are, cheaply: the cosine of their character 5-grams, weighted by TF-IDF."""

from __future__ import annotations

from collections.abc import Sequence

from sklearn.feature_extraction.text import TfidfVectorizer


def most_alike(texts: Sequence[str], sides: Sequence[str] | None = None) -> tuple[float, str, str]:
    """The highest cosine of two texts, and the two; with `sides`, only of texts on different sides."""
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(5, 5), sublinear_tf=True).fit_transform(texts)
    cosines = (vectors @ vectors.T).toarray()
    places = [(i, j) for i in range(len(texts)) for j in range(i) if sides is None or sides[i] != sides[j]]
    cosine, i, j = max((cosines[i, j], i, j) for i, j in places)
    return float(cosine), texts[i], texts[j]
