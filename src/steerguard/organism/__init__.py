"""The organism: the small chat model that ships with the package, its world, and how it was trained.

Its system prompt decides whether it states the facts of its world or falsehoods, and whether it comforts people in
trouble or brushes them off. Since its world is known, its answers are scored exactly. This module knows where the
model's folder is; it refuses to load it: that is done like for any other model.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["folder"]


def folder() -> Path:
    """The bundled model's directory, for `AutoModelForCausalLM.from_pretrained`."""
    return Path(__file__).parent / "model"
