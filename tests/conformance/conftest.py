"""The models that the contract is checked on: tiny folders, and the bundled one where it is."""

from __future__ import annotations

from pathlib import Path

import pytest

import steerguard
import tiny

ORGANISM = Path(steerguard.__file__).parent / "organism" / "model"


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders by name."""
    at = tmp_path_factory.mktemp("models")
    return {
        "tiny": tiny.llama_folder(at / "tiny"),
        "tied": tiny.llama_folder(at / "tied", seed=1, tie_word_embeddings=True, num_key_value_heads=1),
        "organism": ORGANISM,
    }
