"""Identities: which model a probe or a guard belongs to.

A backend takes the identity of the model that it loaded; this module compares two, and knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from steerguard import files
from steerguard.errors import InputError

_KINDS: dict[str, files.Kind] = {
    "name": str, "architecture": str, "width": int, "depth": int, "weights": dict, "tokenizer": str,
    "chat_template": str,
}  # fmt: skip


@dataclass(frozen=True)
class ModelIdentity:
    """Which model a guard was made for. Cheap to take on 70B."""

    name: str
    "hub name or folder, as it was given to `load`; for people and for loading it again, never compared"
    architecture: str
    "configuration's first architecture, such as LlamaForCausalLM"
    width: int
    "size of the residual stream"
    depth: int
    "number of decoder blocks"
    weights: Mapping[str, str]
    "parameter name -> SHA-256 of a few of its rows, rounded to bfloat16; a few parameters spread over the depth"
    tokenizer: str
    "SHA-256 of the vocabulary"
    chat_template: str
    "SHA-256 of the chat template, empty if there is none"

    WAIVABLE: ClassVar[tuple[str, ...]] = ("architecture", "weights", "tokenizer", "chat_template")
    "what may differ if it is named; a guard of another width or depth would act on something else"

    def __post_init__(self) -> None:
        if self.width < 1 or self.depth < 1:
            raise InputError(f"a model has a width and a depth of at least 1, got {self.width} and {self.depth}")
        if not self.weights:
            raise InputError(f"{self.name!r} has no fingerprint of its weights: any model would match it")
        for key, value in (("width", int(self.width)), ("depth", int(self.depth)), ("weights", dict(self.weights))):
            object.__setattr__(self, key, value)

    def differences(self, other: ModelIdentity) -> dict[str, str]:
        """What differs, by name, each with what this identity expects and what the other has."""
        found = {
            key: f"{key} expected {_brief(getattr(self, key))}, got {_brief(getattr(other, key))}"
            for key in ("width", "depth", "architecture", "tokenizer", "chat_template")
            if getattr(self, key) != getattr(other, key)
        }
        names = sorted({*self.weights, *other.weights})
        changed = [name for name in names if self.weights.get(name) != other.weights.get(name)]
        if changed:
            was, now = (_brief(identity.weights.get(changed[0])) for identity in (self, other))
            first = f"{changed[0]} expected {was}, got {now}"
            found["weights"] = f"weights differ in {len(changed)} of {len(names)} fingerprinted parameters ({first})"
        return found


def read_identity(record: object) -> ModelIdentity:
    """The identity in a file's metadata. Raises Malformed or InputError."""
    found = files.take(record, "its model", _KINDS)
    for name, value in found["weights"].items():
        files.of_kind(value, f"the fingerprint of {files.shown(name)}", str)
    return ModelIdentity(**found)


def _brief(value: object) -> str:
    """A hash by its beginning; anything else as it is."""
    if value is None or value == "":
        return "none"
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else files.shown(value)
