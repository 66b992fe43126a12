"""Guards: what ships.

A guard is probes x rule x layers x positions, the identity of the model that it belongs to, and the record of how it
was made. One safetensors file holds it all. This module reads and writes that file, and trusts nothing in it: a file
that is not exactly what `save` writes is refused in one sentence.

It knows no model: it compares identities that backends give it.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from steerguard import files, guard_card, probe_file
from steerguard.errors import GuardFileError, GuardMismatch, InputError, RuleError, WeakProbe
from steerguard.files import Malformed, canonical_json
from steerguard.identity import ModelIdentity as ModelIdentity
from steerguard.identity import read_identity
from steerguard.probe import Probe
from steerguard.rules import RULES, Gate, Rule, Watch, rule

Positions = Literal["all", "response"]
"""`all`: prompt and answer, the paper's headline setting; `response`: generated tokens only."""

SCHEMA = 1
"""Version of the guard file."""
MAX_BYTES = 256 * 2**20
"""Bytes of a guard file that are read; 80 layers of a 70B model are 3 MB."""


@dataclass(frozen=True, eq=False)
class Guard:
    """A rule on one or more layers, bound to a model.

    Where several probes stand on several layers, each acts on its own layer in the order of the forward pass.

    Raises:
        InputError: a name, layer, width, position or provenance that a guard cannot have.
        RuleError: the rule does not compile with one of the probes, or leaves the range of float32.
        WeakProbe: a probe that reads no held-out answers, unless `allow_weak`.
    """

    name: str
    "what a server and a request call it: letters, digits, dot, dash, underscore"
    probes: tuple[Probe, ...]
    "one per steered layer, by increasing layer"
    rule: Rule
    model: ModelIdentity
    positions: Positions = "all"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    "JSON values: trait and contrast hashes, seeds, library versions, evidence, how the operating point was chosen"
    allow_weak: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "probes", tuple(self.probes))
        if not files.NAME.fullmatch(self.name):
            raise InputError(
                f"a guard's name is 1 to 64 letters, digits, dots, dashes or underscores and starts with a letter or "
                f"digit, got {files.shown(self.name)}"
            )
        if self.positions not in get_args(Positions):
            raise InputError(f"positions must be {' or '.join(get_args(Positions))}, got {files.shown(self.positions)}")
        self._check_probes()
        self._check_rule()
        try:
            provenance = files.strict_json(canonical_json(dict(self.provenance)))
        except Malformed as error:
            raise InputError(f"guard {self.name!r}: the provenance {error}") from error
        object.__setattr__(self, "provenance", provenance)

    def _check_probes(self) -> None:
        if not self.probes:
            raise InputError(f"guard {self.name!r} needs at least one probe, got none")
        layers = self.layers
        if any(b <= a for a, b in pairwise(layers)) or layers[-1] >= self.model.depth:
            raise InputError(
                f"guard {self.name!r}: layers must increase and be below the model's depth {self.model.depth}, "
                f"got {files.shown(list(layers))}"
            )
        for probe in self.probes:
            if len(probe.v) != self.model.width:
                raise InputError(
                    f"guard {self.name!r}: the probe of layer {probe.layer} has width {len(probe.v)}, "
                    f"the model's residual stream {self.model.width}"
                )
            if not all(map(math.isfinite, asdict(probe.evidence).values())):
                raise InputError(f"guard {self.name!r}: the evidence of layer {probe.layer} is not finite")
            if probe.evidence.weak and not self.allow_weak:
                raise WeakProbe(
                    f"guard {self.name!r}: the probe of layer {probe.layer} reads nothing held out: {probe.evidence}. "
                    "Choose another layer, or pass allow_weak=True to steer along it all the same"
                )

    def _check_rule(self) -> None:
        if RULES.get(self.rule.name) is not type(self.rule):
            raise RuleError(f"{self.rule} is not a registered rule; there are {', '.join(RULES)}")
        for probe, row in zip(self.probes, self._rows(), strict=True):
            if not np.isfinite(row[1:5]).all():
                raise RuleError(
                    f"{self.rule} on layer {probe.layer} leaves the range of float32 and would move nothing; "
                    "choose a smaller strength"
                )

    @property
    def layers(self) -> tuple[int, ...]:
        """The steered layers, by increasing layer."""
        return tuple(int(probe.layer) for probe in self.probes)

    def gates(self) -> Iterator[tuple[Probe, Gate]]:
        """The compiled gate of every steered layer."""
        return ((probe, self.rule.compile(probe)) for probe in self.probes)

    def _rows(self) -> npt.NDArray[np.float32]:
        """`[layers, 6]` float32."""
        with np.errstate(over="ignore"):
            return np.stack([gate.row() for _, gate in self.gates()])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that decides what the guard does, as 64 hexadecimal digits.

        Directions, gates, layers, positions, rule and model count; the name, the evidence and the provenance do not.
        """
        model = asdict(self.model)
        del model["name"]
        strength = self.rule.strength
        content = {
            "layers": self.layers,
            "v": [hashlib.sha256(probe.v.astype("<f4").tobytes()).hexdigest() for probe in self.probes],
            "gates": self._rows().astype("<f4").tobytes().hex(),
            "positions": self.positions,
            "rule": [self.rule.name, None if strength is None else float(strength)],
            "model": model,
        }
        return hashlib.sha256(canonical_json(content).encode()).hexdigest()

    def check_model(self, identity: ModelIdentity, *, allow_mismatch: Collection[str] = ()) -> None:
        """Refuse a model that this guard was not made for.

        Args:
            identity: the model's, from its backend.
            allow_mismatch: what may differ: architecture, weights, tokenizer, chat_template.

        Raises:
            GuardMismatch: with what differs and was not waived.
            InputError: a waiver that does not exist, or width or depth, which cannot be waived.
        """
        waived = {allow_mismatch} if isinstance(allow_mismatch, str) else set(allow_mismatch)
        unknown = sorted(waived - set(identity.WAIVABLE))
        if unknown:
            raise InputError(
                f"cannot waive {', '.join(unknown)}; allow_mismatch can waive {', '.join(identity.WAIVABLE)}"
            )
        found = {key: text for key, text in self.model.differences(identity).items() if key not in waived}
        if not found:
            return
        if set(found) <= set(identity.WAIVABLE):
            step = f"fit a guard for it, or name what you waive: allow_mismatch={tuple(found)!r}"
        else:
            step = "fit a guard for it; another width or depth cannot be waived"
        made_for, got = files.shown(self.model.name), files.shown(identity.name)
        message = (
            f"guard {self.name!r} was made for {made_for}, not for {got}: {'; '.join(found.values())}. To go on, {step}"
        )
        raise GuardMismatch(message, tuple(found))

    def for_model(self, identity: ModelIdentity, *, allow_mismatch: Collection[str] = ()) -> Guard:
        """This guard on a model that differs from its own in what is waived by name; the provenance records the waiver.

        Raises:
            GuardMismatch: with what differs and was not waived.
        """
        self.check_model(identity, allow_mismatch=allow_mismatch)
        waived = sorted(self.model.differences(identity))
        if not waived:
            return self
        provenance = {**self.provenance, "waived": {"model": self.model.name, "differs": waived}}
        return replace(self, model=identity, provenance=provenance)

    def watching(self, positions: Positions | None = None) -> Guard:
        """The same guard without an effect: it reads every token that it would read, and moves none, bit for bit.

        Args:
            positions: where it reads; by default as this one.
        """
        return replace(self, rule=Watch(), positions=positions or self.positions)

    # ------------------------------------------------------------------------------------------------- the file

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the guard to one safetensors file, whole or not at all; returns its path.

        Raises:
            OutputExists: the file exists and `overwrite` is not set.
            InputError: it cannot be written there.
        """
        files.refuse_existing(path, overwrite=overwrite)
        return files.write_atomically(path, self.to_bytes(), overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Guard:
        """Read a guard and check everything in it. Raises GuardFileError: one sentence with the path."""
        tensors, text = files.read_tensors(path, key=_KEY, dtypes=_DTYPES, limit=MAX_BYTES, error=GuardFileError)
        try:
            return _decode(tensors, text)
        except (Malformed, InputError) as error:
            raise GuardFileError(f"{path} is not a guard that can be used: {error}") from error

    def to_bytes(self) -> bytes:
        """The content of the guard's file. Raises InputError for a provenance that is too long."""
        tensors, evidence = probe_file.pack(self.probes)
        tensors["gates"] = self._rows()
        record: dict[str, Any] = {
            "schema": SCHEMA,
            "name": self.name,
            "digest": self.digest,
            "rule": {"name": self.rule.name, "strength": self.rule.strength},
            "positions": self.positions,
            "layers": self.layers,
            "model": asdict(self.model),
            "evidence": evidence,
            "allow_weak": self.allow_weak,
            "provenance": self.provenance,
        }
        try:
            record["checksum"] = probe_file.checksum(record, tensors)
            return files.tensors_to_bytes(tensors, key=_KEY, text=canonical_json(record))
        except Malformed as error:
            raise InputError(f"guard {self.name!r} {error}; shorten its provenance") from error

    # -------------------------------------------------------------------------------------------- people and the hub

    def card(self, repo_id: str = "OWNER/REPOSITORY") -> str:
        """The guard as a Hugging Face model card: Markdown with YAML front matter."""
        return guard_card.card(self, repo_id)

    def describe(self) -> str:
        """What is in this guard, for which model and from what, on several lines; what `steerguard show` prints."""
        return guard_card.describe(self)

    def __str__(self) -> str:
        return guard_card.line(self)

    def __repr__(self) -> str:
        return f"Guard({guard_card.line(self)})"

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, revision: str | None = None, token: str | None = None
    ) -> str:
        """Upload the guard and its card to a Hugging Face repository, in one commit; returns the commit's address.

        Raises:
            InputError: the hub refuses, or cannot be reached; the message has its reason.
        """
        contents = {guard_card.HUB_FILE: self.to_bytes(), "README.md": self.card(repo_id).encode()}
        return guard_card.upload(repo_id, contents, message=str(self), private=private, revision=revision, token=token)

    @classmethod
    def from_hub(cls, repo_id: str, *, revision: str | None = None, token: str | None = None) -> Guard:
        """Download a guard that `push_to_hub` uploaded, and load it.

        Raises:
            InputError: there is no such repository, revision or file, or the hub cannot be reached.
            GuardFileError: what was downloaded is no guard.
        """
        return cls.load(guard_card.download(repo_id, revision=revision, token=token))


# ------------------------------------------------------------------------------------------------- reading the file

_KEY = "steerguard"
_DTYPES = {**probe_file.DTYPES, "gates": "F32"}
_RECORD: dict[str, files.Kind] = {
    "schema": int, "name": str, "digest": str, "rule": dict, "positions": str, "layers": list, "model": dict,
    "evidence": list, "allow_weak": bool, "provenance": dict, "checksum": str,
}  # fmt: skip
_RULE: dict[str, files.Kind] = {"name": str, "strength": (float, type(None))}


def _decode(tensors: Mapping[str, npt.NDArray[Any]], text: str) -> Guard:
    """The guard of a file's tensors and metadata. Raises Malformed, or what building the guard raises."""
    # 1. the record, of a version that is known, undamaged
    record = probe_file.open_record(text, _RECORD, SCHEMA, tensors)
    # 2. its parts
    probes = probe_file.unpack(record["layers"], record["evidence"], tensors)
    guard = Guard(
        name=record["name"], probes=probes, rule=_rule(record["rule"]), model=read_identity(record["model"]),
        positions=record["positions"], provenance=record["provenance"], allow_weak=record["allow_weak"],
    )  # fmt: skip
    # 3. what it did when it was written is what it would do now
    rows = guard._rows()
    if tensors["gates"].shape != rows.shape or tensors["gates"].tobytes() != rows.tobytes():
        raise Malformed(f"its gates are not what {guard.rule} compiles to in this steerguard; choose its point again")
    if record["digest"] != guard.digest:
        raise Malformed(f"its digest is {guard.digest}, not {files.shown(record['digest'])} as it says")
    return guard


def _rule(record: object) -> Rule:
    """The rule by its exact name: case is forgiven to people, not to files."""
    known = files.take(record, "its rule", _RULE)
    if known["name"] not in RULES:
        raise Malformed(f"there is no rule {files.shown(known['name'])}; there are {', '.join(RULES)}")
    return rule(known["name"], known["strength"])
