"""A tiny model, a guard that changes what it says, and the endpoint of the judges' tests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "judging"))

import steerguard as sg
import tiny
from steerguard.backends import load
from steerguard.judging import JudgeConfig


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def model(folder: Path) -> sg.Backend:
    return load(folder, backend="fake")


@pytest.fixture(scope="session")
def guard(model: sg.Backend) -> sg.Guard:
    return tiny.guard(model.identity, sg.SwFC(3), (tiny.probe(2, 48),), name="honesty")


@pytest.fixture(scope="session")
def judge_at() -> Callable[..., JudgeConfig]:
    """A judge at an endpoint, which waits hardly at all."""

    def make(url: str, **more: Any) -> JudgeConfig:
        quick: dict[str, Any] = {"wait": 0.01, "longest_wait": 0.05, "timeout": 5.0, "attempts": 3, "max_tokens": 500}
        return JudgeConfig(**({"model": "gpt-oss-120b", "base_url": url} | quick | more))

    return make
