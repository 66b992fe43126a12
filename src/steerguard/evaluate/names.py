"""What a guarded model is called in logs and caches of other harnesses, which know a model by its name and by nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import PurePath
from typing import Any

from steerguard.backends.base import Backend
from steerguard.files import canonical_json
from steerguard.guard import Guard

DIGITS = 16
"""Hexadecimal digits of a digest in a model's name."""


def canonical_name(name: str, model: Backend, options: Mapping[str, Any], guards: Sequence[Guard]) -> str:
    """What a model is called in logs and caches: its name, a digest of the model, and each guard with its digest."""
    identity = asdict(model.identity)
    del identity["name"]
    digest = hashlib.sha256(canonical_json([model.name, identity, plain(options)]).encode()).hexdigest()
    short = name if not PurePath(name).is_absolute() else PurePath(name).name
    return "".join([f"{short}@{digest[:DIGITS]}", *(f"+{guard.name}@{guard.digest[:DIGITS]}" for guard in guards)])


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON values; what is none by its text."""
    return {key: value if isinstance(value, str | int | float | bool | None) else repr(value) for key, value in options.items()}
