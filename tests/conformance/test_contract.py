"""One suite for every registered backend. A backend that is added to the registry is judged here by itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import contract_effect  # noqa: F401 -- fills CONTRACT
import contract_generate  # noqa: F401
import pytest
from bench import CONTRACT, Bench

from conftest import ORGANISM
from steerguard.backends import backends, load
from steerguard.backends.base import Backend
from steerguard.errors import ModelError

OPTIONS: dict[str, dict[str, Any]] = {"vllm": {"kv_cache_memory_bytes": 2**28}}
"""What a backend needs on a small machine."""
ENGINE = (pytest.mark.slow, pytest.mark.vllm)
BACKENDS = [pytest.param(name, marks=ENGINE) if name == "vllm" else name for name in backends()]
MODELS = [
    "tiny",
    "tied",
    pytest.param(
        "organism",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(not (ORGANISM / "config.json").is_file(), reason="not trained yet"),
        ],
    ),
]


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


@pytest.fixture(scope="module", params=BACKENDS)
def bench(request: pytest.FixtureRequest, folder: Path) -> Iterator[Bench]:
    if request.param == "vllm":
        pytest.importorskip("vllm", reason="vLLM is not installed; `make test` installs its CPU build")
    model = load(folder, backend=request.param, **OPTIONS.get(request.param, {}))
    yield Bench(model, folder, apart=12.0 if folder == ORGANISM else 1.0)
    if request.param == "vllm":
        model.close()


ENDLESS = ("a_long_answer_is_steered_to_its_end", "answers_end_at_their_limit_or_at_the_end_of_the_turn")
"""Checks that need a model which does not end its turn by itself: random weights do not, the organism does."""


@pytest.mark.parametrize("check", CONTRACT)
def test_contract(bench: Bench, check: str) -> None:
    if check in ENDLESS and bench.folder == ORGANISM:
        pytest.skip("the bundled model ends its answers by itself")
    CONTRACT[check](bench)


def test_a_backend_has_the_protocols_methods(bench: Bench) -> None:
    assert isinstance(bench.model, Backend)
    assert bench.model.name in backends()


@pytest.mark.parametrize("name", BACKENDS)
def test_what_is_no_model_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchThing"], "model_type": "nothing"}')
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ModelError):
            load(place, backend=name)
