"""Backends by name, and `load`.

A backend is one line in `_BACKENDS`: a name and where its `load` stands. Nothing heavy is imported before a model is
loaded with it. What a backend must keep is written in `base`, and the conformance suite runs whatever is listed here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from steerguard.backends.base import Backend
from steerguard.errors import InputError, ModelError

__all__ = ["backends", "load"]

BUNDLED = {"organism": Path(__file__).parent.parent / "organism" / "model"}
"""Models that come with steerguard, by the name that `load` takes."""

_BACKENDS: dict[str, str] = {
    "hf": "steerguard.backends.hf:load",
    "vllm": "steerguard.backends.vllm.client:load",
    "fake": "steerguard.backends.fake:load",
}


def backends() -> Iterator[str]:
    """The names of the registered backends."""
    return iter(_BACKENDS)


def load(name_or_folder: str | PathLike[str], *, backend: str = "hf", **options: Any) -> Backend:
    """Load a model: a hub name such as `Qwen/Qwen3-32B`, a local folder, or `organism`, the bundled model.

    Args:
        backend: hf (transformers), or another of `backends()`.
        options: the backend's own, such as `dtype=`, `device_map=`, `quantization=` of hf.

    Raises:
        ModelError: there is no such backend, or the model cannot be loaded with it.
        InputError: an option that the backend does not have.
    """
    if backend not in _BACKENDS:
        raise ModelError(f"there is no backend {backend!r}; there are {', '.join(_BACKENDS)}")
    factory = _factory(backend)
    known = list(inspect.signature(factory).parameters)[1:]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise InputError(f"the {backend} backend has no option {', '.join(unknown)}; it has {', '.join(known)}")
    name = fspath(name_or_folder)
    if name not in BUNDLED:
        return factory(name, **options)
    model = factory(str(BUNDLED[name]), **options)
    model.identity = replace(model.identity, name=name)
    return model


def _factory(backend: str) -> Callable[..., Backend]:
    module, _, function = _BACKENDS[backend].partition(":")
    factory: Callable[..., Backend] = getattr(import_module(module), function)
    return factory
