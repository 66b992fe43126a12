"""The policy file: what an operator may write, read without trust.

    schema: 1
    guards:
      - {file: honesty.guard, required: true}
      - {file: compassion.guard, strength: [1, 4], positions: [all, response], mode: shadow}
    default: [honesty]
    models:
      strict: {guards: {compassion: {required: true, mode: enforce}}}
    keys:
      - {id: alice, env: STEERGUARD_KEY_ALICE}
      - {id: lab, sha256: 0f343b09..., models: [strict], guards: {compassion: {mode: off}}}
    admin: {env: STEERGUARD_ADMIN_KEY}

The words of a guard are those of vLLM's plugin (`steerguard.backends.vllm.catalogue`), and `mode` beside them. This module
knows the file and the environment; it opens no guard, and no key stays in what it returns: only SHA-256 digests do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from steerguard import files, strict_yaml
from steerguard.backends.vllm.catalogue import GuardSettings
from steerguard.errors import InputError
from steerguard.files import shown
from steerguard.guard import Positions

Mode = Literal["enforce", "shadow", "off"]
"""`enforce`: the guard acts. `shadow`: it is measured what it would do, nothing is moved. `off`: it is not there."""
MAX_BYTES = 2**20
"""Bytes of a policy file that are read."""
MIN_KEY = 16
"""Characters of an API key: shorter ones can be guessed."""
UNGUARDED = "unguarded"
"""What stands after the colon of a model's name in a request that chooses no guard."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ServedGuard(GuardSettings):
    """One guard that is served; the plugin's words and a mode."""

    model_config = _Part.model_config

    mode: Mode = "enforce"


class Change(_Part):
    """What is otherwise for one guard, under one model name or for one key; what is left out stays as it is."""

    strength: tuple[float, float] | None = None
    positions: tuple[Positions, ...] | None = None
    required: bool | None = None
    mode: Mode | None = None


class Alias(_Part):
    """Another name of the model, asked for as `NAME:alias`, and what holds under it."""

    guards: Mapping[str, Change] = Field(default_factory=dict)
    default: tuple[str, ...] | None = None
    "names of the guards of a request that chooses none; None: as elsewhere"
    keys: tuple[str, ...] | None = None
    "ids of the keys that may use this name; None: whoever may ask at all"


class Secret(_Part):
    """A key, by the environment variable that holds it or by its SHA-256; never in clear."""

    env: str | None = None
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.env is None) == (self.sha256 is None):
            raise ValueError("a key is given by env, the name of an environment variable, or by sha256, 64 hexadecimal digits")
        return self

    def digest(self, whose: str, environ: Mapping[str, str]) -> str:
        """SHA-256 of the key. Raises InputError for a variable that holds no key."""
        if self.sha256 is not None:
            return self.sha256
        value = environ.get(self.env or "", "")
        if len(value) < MIN_KEY:
            got = f"{len(value)} characters" if value else "nothing"
            raise InputError(f"{whose}: the environment variable {self.env} must hold at least {MIN_KEY} characters, got {got}")
        return key_digest(value)


class ApiKey(Secret):
    """Who may ask."""

    id: str = Field(pattern=f"^{files.NAME.pattern}$")
    "how the key is called in the audit log"
    models: tuple[str, ...] | None = None
    "aliases that this key may use, besides the plain name; None: all that are open to it"
    guards: Mapping[str, Change] = Field(default_factory=dict)


class PolicyFile(_Part):
    """A whole policy, as it was written."""

    version: Literal[1] = Field(default=1, alias="schema")
    guards: tuple[ServedGuard, ...]
    default: tuple[str, ...] | None = None
    "names of the guards of a request that chooses none; None: every guard"
    allow_mismatch: tuple[str, ...] = ()
    "what may differ between a guard's model and this one"
    trace: bool = False
    "requests may ask for the projection of every token"
    models: Mapping[str, Alias] = Field(default_factory=dict)
    keys: tuple[ApiKey, ...] = ()
    "who may ask; empty: whoever reaches the port"
    admin: Secret | None = None
    "the key of the admin routes; None: there are none"


def key_digest(key: str) -> str:
    """How a key is kept and compared."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def read(path: Path) -> PolicyFile:
    """The policy of a file; guard files are looked for beside it. Raises InputError, which names the file and the key."""
    try:
        value = strict_yaml.read(files.read_bounded(path, limit=MAX_BYTES, error=InputError))
    except strict_yaml.NotYaml as error:
        raise InputError(error.at(path)) from error
    return parse(value, str(path), beside=path.parent)


def of_guards(paths: Sequence[Path], *, trace: bool) -> PolicyFile:
    """The policy of someone who has written none: every guard is required."""
    return PolicyFile(guards=tuple(ServedGuard(file=str(path.absolute()), required=True) for path in paths), trace=trace)


def parse(value: object, where: str, *, beside: Path) -> PolicyFile:
    """The policy that a file's value says."""
    try:
        if isinstance(value, dict) and isinstance(value.get("guards"), list):
            value = {**value, "guards": [_guard(one, beside) for one in value["guards"]]}
        return PolicyFile.model_validate(_tuples(value))
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(f"{where}: {at}: {first['msg']}, got {shown(first['input'])}; see docs/serving.md") from error


def _guard(one: object, beside: Path) -> object:
    """A guard as an object, its file by its whole path."""
    said = {"file": one} if isinstance(one, str) else one
    if isinstance(said, dict) and isinstance(said.get("file"), str):
        said = {**said, "file": str(beside.absolute() / said["file"])}
    return said


def _tuples(value: object) -> object:
    """Lists as tuples, which is what strict validation of a frozen value asks for."""
    if isinstance(value, dict):
        return {key: _tuples(one) for key, one in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
