"""Which guards a vLLM engine serves, which of them a request may choose, and what it chose.

The operator's settings stand under `steerguard` in vLLM's `additional_config`:

    {"steerguard": {
        "guards": ["honesty.guard",
                   {"file": "compassion.guard", "strength": [1, 4], "positions": ["all", "response"], "required": true}],
        "default": ["honesty", "compassion"],
        "layers": [20, 21],
        "allow_mismatch": []}}

A request says what it wants under `steering`, in `SamplingParams.extra_args` or (as a JSON string) in `vllm_xargs`:

    {"guards": ["honesty", {"name": "compassion", "strength": 2, "positions": "response"}]}

A request that says nothing gets `default`, which is every guard unless it is set. What a request may say of a guard is
its own strength and positions, and what the settings allow beyond that. Whatever is unknown or not allowed is refused.

This module is the same in the frontend and in every worker; it knows neither vLLM nor torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from steerguard import files
from steerguard.errors import InputError
from steerguard.files import Malformed, shown
from steerguard.guard import Guard, Positions
from steerguard.rules import rule

SETTINGS = "steerguard"
"""The key of the settings in vLLM's `additional_config`."""
ASKED = "steering"
"""The key under which a request says what it wants."""
RESOLVED = "steerguard"
"""The key under which the frontend tells the engine what a request gets; no request may carry it."""
DRAW = "draw"
"""The key under which a request of the library carries [draw key, temperature, top_p]; see `drawing`."""
HEADER = "x-steering-guard"
"""The header of an answer that says what acted on it."""
MAX_ASKED = 16
"""Guards that one request may name."""


# ------------------------------------------------------------------------------------------------------ settings

RESOLVED_SETTINGS = ("open_layers", "abi")
"""Settings that nobody writes by hand."""


class GuardSettings(BaseModel):
    """One guard that is served."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    strength: tuple[float, float] | None = None
    "lowest and highest strength that a request may choose; None: only the file's own"
    positions: tuple[Positions, ...] = ()
    "positions that a request may choose besides the file's own"
    required: bool = False
    "no request may leave this guard out"


class Settings(BaseModel):
    """What the operator configured. `Settings.read` makes one of `additional_config`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    guards: tuple[GuardSettings, ...] = ()
    default: tuple[str, ...] | None = None
    "names of the guards of a request that chooses none; None: every guard"
    layers: tuple[int, ...] | Literal["all"] = ()
    "layers that are open to guards added at run time, besides those of the guards"
    spare: int = Field(default=16, ge=0, le=1024)
    "guards that may be added at run time, per layer"
    stages: int = Field(default=4, ge=1, le=16)
    "guards that may act on one layer for one request"
    allow_mismatch: tuple[str, ...] = ()
    "what may differ between a guard's model and this one"
    inspect: bool = False
    "requests may read residuals, and may act as if an answer began elsewhere: for fitting and checks, not for serving"
    open_layers: tuple[int, ...] | None = None
    "every layer with an op in the graph; set when the engine's configuration is made, so that it is part of its hash"
    abi: int | None = None
    "version of what is traced into the graph; set likewise"

    @classmethod
    def read(cls, additional_config: object) -> Settings | None:
        """The settings in vLLM's `additional_config`; None if there are none. Raises InputError."""
        if not isinstance(additional_config, Mapping) or SETTINGS not in additional_config:
            return None
        given = additional_config[SETTINGS]
        try:
            if isinstance(given, Mapping) and isinstance(given.get("guards"), list | tuple):
                given = {**given, "guards": [{"file": g} if isinstance(g, str) else g for g in given["guards"]]}
            return cls.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or SETTINGS
            model: type[BaseModel] = GuardSettings if first["loc"][:1] == ("guards",) and len(first["loc"]) > 2 else cls
            known = [name for name in model.model_fields if name not in RESOLVED_SETTINGS]
            raise InputError(
                f"additional_config[{SETTINGS!r}]: {where}: {first['msg']}, got {shown(first['input'])}; "
                f"there are {', '.join(known)}"
            ) from error


# ----------------------------------------------------------------------------------------------------- a request


@dataclass(frozen=True)
class Act:
    """One guard as one request gets it."""

    name: str
    digest: str
    "of the guard at this strength and these positions"
    strength: float | None
    positions: Positions


def header(acts: Iterable[tuple[str, str]]) -> str:
    """What acts, as `HEADER` says it: names and digests in order."""
    return ", ".join(f"{name}@{digest[:12]}" for name, digest in acts) or "none"


@dataclass(frozen=True)
class Choice:
    """What acts on one request, in order."""

    acts: tuple[Act, ...]
    prompt_key: str = ""
    "names the effect on the prompt's keys and values; empty if there is none"
    answer_key: str = ""
    "names the effect on the answer's"
    start: int | None = None
    "position at which the answer begins; None: where the prompt ends"
    trace: bool = False
    "keep rho and delta of every token"
    read: Literal["all", "mean"] | None = None
    "keep the residual of every token at every open layer, or the sum over the answer's"

    def as_args(self) -> dict[str, Any]:
        """Plain values, to travel in a request's `extra_args`."""
        acts = [[a.name, a.digest, a.strength, a.positions] for a in self.acts]
        return {
            "acts": acts, "keys": [self.prompt_key, self.answer_key], "start": self.start, "trace": self.trace, "read": self.read
        }  # fmt: skip

    @classmethod
    def of_args(cls, args: Mapping[str, Any]) -> Choice:
        prompt_key, answer_key = args["keys"]
        acts = tuple(Act(*act) for act in args["acts"])
        return cls(acts, prompt_key, answer_key, args["start"], args["trace"], args["read"])


def cache_key(args: Mapping[str, Any], prompt_tokens: int, start: int, end: int) -> tuple[str, str] | None:
    """What tells the block of tokens `start` to `end` of a request from the same tokens without its guards.

    Keys and values differ from the first token on that a guard moves, so the first block with such a token is marked;
    later blocks hang on it through their parent's hash. A guard on the answer marks where the answer begins, too: the
    same tokens are moved or not according to it.
    """
    prompt_key, answer_key = args["keys"]
    begins = prompt_tokens if args["start"] is None else args["start"]
    parts = [prompt_key] if start == 0 and prompt_key else []
    if answer_key and start <= begins < end:
        parts.append(f"{answer_key}@{begins}")
    return (RESOLVED, "+".join(parts)) if parts else None


# ----------------------------------------------------------------------------------------------------- catalogue


@dataclass(frozen=True, eq=False)
class Entry:
    """A guard, and what a request may say of it."""

    guard: Guard
    strength: tuple[float, float] | None = None
    positions: tuple[Positions, ...] = ()
    required: bool = False
    _variants: dict[tuple[float | None, str], Guard] = field(default_factory=dict)

    def variant(self, strength: float | None, positions: Positions) -> Guard:
        """The guard at that strength and those positions. Raises RuleError for a strength that the rule cannot have."""
        key = (strength, positions)
        if key not in self._variants:
            if len(self._variants) >= 4096:
                self._variants.clear()
            own = (self.guard.rule.strength, self.guard.positions)
            chosen = rule(self.guard.rule.name, strength) if strength != own[0] else self.guard.rule
            self._variants[key] = self.guard if key == own else replace(self.guard, rule=chosen, positions=positions)
        return self._variants[key]

    @cached_property
    def layers(self) -> tuple[int, ...]:
        return self.guard.layers


class Catalogue:
    """The guards that are served, by name."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._entries: dict[str, Entry] = {}
        for one in settings.guards:
            self.add(Entry(Guard.load(Path(one.file)), one.strength, one.positions, one.required))
        unknown = [name for name in settings.default or () if name not in self._entries]
        if unknown:
            known = ", ".join(self._entries) or "no guards"
            raise InputError(f"default names {', '.join(map(shown, unknown))}; there are {known}")
        self.default = list(self._entries if settings.default is None else settings.default)
        "what a request gets that chooses nothing; guards added at run time act on requests that name them"
        self._check_required(self.default)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __getitem__(self, name: str) -> Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise InputError(f"there is no guard {shown(name)}; there are {', '.join(self._entries) or 'none'}") from None

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def add(self, entry: Entry) -> None:
        """Serve one more guard. Raises InputError for a name that is taken."""
        name = entry.guard.name
        if name in self._entries:
            raise InputError(f"there is a guard {name!r} already; remove it first, or save yours under another name")
        self._entries[name] = entry

    def remove(self, name: str) -> None:
        """Serve a guard no more. Raises InputError for one that is not there, is required, or is a default."""
        if self[name].required or name in self.default:
            raise InputError(f"guard {name!r} is required or a default of this server; it cannot be removed while it runs")
        del self._entries[name]

    @property
    def layers(self) -> tuple[int, ...]:
        """Every layer that a guard steers."""
        return tuple(sorted({layer for entry in self._entries.values() for layer in entry.layers}))

    def choose(self, asked: object) -> Choice:
        """What a request gets, of what it says under `steering` (None: it says nothing). Raises InputError."""
        if isinstance(asked, str):
            try:
                asked = files.strict_json(asked)
            except Malformed as error:
                raise InputError(f"{ASKED}: {error}") from error
        if asked is None:
            return self._choice([self._act(name) for name in self.default], {})
        if not isinstance(asked, Mapping):
            example = f'{{"guards": ["{next(iter(self), "honesty")}"]}}'
            raise InputError(f"{ASKED} must be an object such as {example}, got {shown(asked)}")
        extra = {key: asked[key] for key in ("start", "trace", "read") if key in asked} if self.settings.inspect else {}
        unknown = sorted(map(str, set(asked) - {"guards"} - set(extra)))
        if unknown:
            raise InputError(f"{ASKED} has no key {', '.join(map(shown, unknown))}; it has guards")
        wanted = asked.get("guards", self.default)
        if not isinstance(wanted, Sequence) or isinstance(wanted, str) or len(wanted) > MAX_ASKED:
            raise InputError(f"{ASKED}.guards must be a list of at most {MAX_ASKED} guards, got {shown(wanted)}")
        acts = [self._wanted(one) for one in wanted]
        self._check_required([act.name for act in acts])
        return self._choice(acts, extra)

    def _wanted(self, one: object) -> Act:
        if isinstance(one, str):
            return self._act(one)
        if not isinstance(one, Mapping) or not isinstance(one.get("name"), str):
            raise InputError(f'a guard is a name, or {{"name": ..., "strength": ..., "positions": ...}}, got {shown(one)}')
        unknown = sorted(map(str, set(one) - {"name", "strength", "positions"}))
        if unknown:
            raise InputError(f"a guard has no key {', '.join(map(shown, unknown))}; it has name, strength, positions")
        return self._act(one["name"], **{key: one[key] for key in ("strength", "positions") if key in one})

    def _act(self, name: str, **chosen: Any) -> Act:
        entry = self[name]
        own = entry.guard
        strength = chosen.get("strength", own.rule.strength)
        if strength != own.rule.strength or isinstance(strength, bool):
            low, high = entry.strength or (math.nan, math.nan)
            number = isinstance(strength, int | float) and not isinstance(strength, bool)
            if strength is None or not number or not low <= strength <= high:
                allowed = f"{own.rule.strength}" if entry.strength is None else f"{low:g} to {high:g}"
                raise InputError(f"guard {name!r}: strength {shown(strength)} is not allowed here; allowed is {allowed}")
        positions = chosen.get("positions", own.positions)
        if positions != own.positions and positions not in entry.positions:
            allowed = ", ".join(dict.fromkeys((own.positions, *entry.positions)))
            raise InputError(f"guard {name!r}: positions {shown(positions)} are not allowed here; allowed is {allowed}")
        strength = None if strength is None else float(strength)
        return Act(name, entry.variant(strength, positions).digest, strength, positions)

    def _check_required(self, names: Sequence[str]) -> None:
        if len(set(names)) < len(names):
            raise InputError(f"a request names each guard once, got {', '.join(names)}")
        missing = [name for name, entry in self._entries.items() if entry.required and name not in names]
        if missing:
            raise InputError(f"this server requires guard {', '.join(map(repr, missing))}; a request cannot leave it out")

    def _choice(self, acts: Sequence[Act], extra: Mapping[str, Any]) -> Choice:
        start = extra.get("start")
        if not (start is None or (isinstance(start, int) and start >= 0)):
            raise InputError(f"{ASKED}.start must be a position, got {shown(start)}")
        read = extra.get("read")
        if read not in (None, "all", "mean"):
            raise InputError(f"{ASKED}.read must be all or mean, got {shown(read)}")
        self._check_stages(acts)
        live = [a for a in acts if not all(gate.shut for _, gate in self.guard_of(a).gates())]
        return Choice(
            tuple(acts),
            prompt_key=_key([a for a in live if a.positions == "all"]),
            answer_key=_key(live) if any(a.positions == "response" for a in live) else "",
            start=start, trace=bool(extra.get("trace", False)), read=read,
        )  # fmt: skip

    def _check_stages(self, acts: Sequence[Act]) -> None:
        on: dict[int, int] = {}
        for act in acts:
            for layer in self[act.name].layers:
                on[layer] = on.get(layer, 0) + 1
        if on and max(on.values()) > self.settings.stages:
            most = self.settings.stages
            raise InputError(f"at most {most} guards may act on one layer here, got {max(on.values())}; see `stages`")

    def guard_of(self, act: Act) -> Guard:
        """The guard of an act. Raises InputError if this catalogue has another guard under its name."""
        found = self[act.name].variant(act.strength, act.positions)
        if found.digest != act.digest:
            raise InputError(f"guard {act.name!r} is {found.digest[:12]} here and {act.digest[:12]} where the request came in")
        return found


def _key(acts: Sequence[Act]) -> str:
    return hashlib.sha256(json.dumps([act.digest for act in acts]).encode()).hexdigest()[:32] if acts else ""


assert set(get_args(Positions)) == {"all", "response"}
