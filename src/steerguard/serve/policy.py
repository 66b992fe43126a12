"""The policy, and the one decision: which guards act on a request, at what strength, where, in which mode.

`decide` is a pure function of the policy, the request's body, who asks and the model's name that was asked for. Both
servers use it: ours as it is, vLLM's through the settings that `vllm` makes of the same file. What a request may choose is
decided by the plugin's own catalogue, so the two cannot differ.

A guard that is `required` is in every decision, no weaker than its file says; only what the operator gave to a key, or to a
model name that is kept for named keys, is an exception. A policy in which a request could do otherwise is refused when it is
read. This module knows no HTTP, no model and no engine.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from steerguard import files
from steerguard.backends.vllm.catalogue import ASKED, Catalogue, Entry, Settings
from steerguard.errors import InputError
from steerguard.files import Malformed, canonical_json, shown
from steerguard.guard import Guard, Positions
from steerguard.identity import ModelIdentity
from steerguard.serve.policy_file import UNGUARDED, Alias, ApiKey, Change, Mode, PolicyFile, ServedGuard, key_digest
from steerguard.serve.strength import weaker

XARGS = "vllm_xargs"
Reason = Literal["model_not_found", "model_not_allowed", "steering_not_allowed", "trace_not_allowed"]
ACTS: Mapping[Mode, int] = {"off": 0, "shadow": 1, "enforce": 2}
"""How much of a guard is left in each mode."""


@dataclass(frozen=True)
class Ruled:
    """One guard as one request gets it."""

    name: str
    digest: str
    "of the guard at this strength and these positions"
    strength: float | None
    positions: Positions
    mode: Mode
    "enforce or shadow"
    required: bool
    guard: Guard
    "at this strength and these positions"


@dataclass(frozen=True)
class Decision:
    """What a request gets."""

    acts: tuple[Ruled, ...]
    "in order"
    trace: bool = False
    "the projections of every token go into the answer"

    @property
    def enforced(self) -> tuple[Ruled, ...]:
        return tuple(act for act in self.acts if act.mode == "enforce")


@dataclass(frozen=True)
class Refusal:
    """Why a request gets nothing."""

    reason: Reason
    status: int
    message: str
    param: str


@dataclass(frozen=True, eq=False)
class _View:
    """What holds for one model name and one key."""

    catalogue: Catalogue
    modes: Mapping[str, Mode]
    implied: tuple[str, ...] | None
    "guards that the name itself chooses"


@dataclass(frozen=True, eq=False)
class Policy:
    """A policy with its guards, checked. `load` and `build` make one."""

    file: PolicyFile
    name: str
    "the model's, without alias"
    guards: tuple[Guard, ...]
    digest: str
    "SHA-256 of what the operator wrote and of the guards; 64 hexadecimal digits"
    keys: Mapping[str, str]
    "SHA-256 of an API key -> its id; empty if nobody needs one"
    admin: str | None
    "SHA-256 of the admin key"
    views: Mapping[tuple[str | None, str], _View]

    @property
    def aliases(self) -> list[str]:
        """Every name under which the model may be asked for, by somebody."""
        return list(dict.fromkeys(alias for _, alias in self.views))

    def open_to(self, key: str | None) -> list[str]:
        """The names that this key may use; `NAME:unguarded` only where no guard is required."""
        return [
            alias for (who, alias) in self.views if who == key and isinstance(decide(self, {}, key, alias), Decision)
        ]  # fmt: skip

    def key_of(self, secret: str | None) -> str | None:
        """The id of an API key; None for a key that is not known."""
        return None if secret is None else self.keys.get(key_digest(secret))

    def described(self) -> dict[str, Any]:
        """The policy as JSON values for people: no key, no hash of one, no path of a file."""
        file = self.file
        return {
            "digest": self.digest,
            "model": self.name,
            "guards": [
                {
                    "name": guard.name, "digest": guard.digest, "rule": str(guard.rule), "layers": list(guard.layers),
                    **one.model_dump(mode="json", exclude={"file"}), "own_strength": guard.rule.strength,
                    "own_positions": guard.positions,
                }
                for one, guard in zip(file.guards, self.guards, strict=True)
            ],
            "default": list(file.default) if file.default is not None else [guard.name for guard in self.guards],
            "models": {name: one.model_dump(mode="json", exclude_none=True) for name, one in file.models.items()},
            "keys": [one.model_dump(mode="json", exclude={"env", "sha256"}, exclude_none=True) for one in file.keys],
            "trace": file.trace,
            "admin": file.admin is not None,
        }  # fmt: skip


# ----------------------------------------------------------------------------------------------------- a decision


def decide(policy: Policy, request: Mapping[str, Any], key: str | None, alias: str) -> Decision | Refusal:
    """What a request gets: its guards, or why not.

    Args:
        request: the body; what it says beside `steering` and `vllm_xargs` does not count.
        key: the id of the API key; None where the policy has none.
        alias: the model's name that was asked for.
    """
    view = policy.views.get((key, alias))
    if view is None:
        if alias in policy.aliases:
            return Refusal("model_not_allowed", 403, f"this key may not use the model name {shown(alias)}", "model")
        there_are = ", ".join(policy.open_to(key))
        return Refusal("model_not_found", 404, f"there is no model {shown(alias)}; there are {there_are}", "model")
    try:
        asked, trace = _said(request)
        if view.implied is not None:
            if asked is not None and "guards" in asked:
                raise InputError(
                    f"the model name {shown(alias)} chooses guards; ask for {policy.name}, or leave out {ASKED}.guards"
                )
            asked = {**(asked or {}), "guards": list(view.implied)}
        choice = view.catalogue.choose(asked)
    except InputError as error:
        return Refusal("steering_not_allowed", 400, str(error), ASKED)
    if trace and not policy.file.trace:
        return Refusal("trace_not_allowed", 403, f"this server shows no projections; leave out {ASKED}.trace", f"{ASKED}.trace")
    acts = tuple(
        Ruled(
            act.name, act.digest, act.strength, act.positions, view.modes[act.name], view.catalogue[act.name].required,
            view.catalogue.guard_of(act),
        )
        for act in choice.acts
    )  # fmt: skip
    return Decision(acts, trace)


def _said(request: Mapping[str, Any]) -> tuple[dict[str, Any] | None, bool]:
    """What a body says of guards (None: nothing), and whether it asks for projections. Raises InputError."""
    xargs = request.get(XARGS)
    if xargs is not None and not isinstance(xargs, Mapping):
        raise InputError(f"{XARGS} must be an object, got {shown(xargs)}")
    for place in (request, xargs or {}):
        strange = [key for key in place if "steer" in key.casefold() and key != ASKED]
        if strange:
            raise InputError(f"there is no key {', '.join(map(shown, strange))}; guards are chosen under {ASKED!r}")
    unknown = sorted(set(xargs or {}) - {ASKED})
    if unknown:
        raise InputError(f"{XARGS} has no key {', '.join(map(shown, unknown))} here; it has {ASKED}")
    asked = request.get(ASKED)
    if xargs and ASKED in xargs:
        if ASKED in request:
            raise InputError(f"{ASKED!r} stands in the body and in {XARGS}; say it once")
        asked = xargs[ASKED]
        if not isinstance(asked, str):
            raise InputError(f"write {ASKED!r} as a JSON string in {XARGS}, or beside it as it is; got {shown(asked)}")
    if isinstance(asked, str):
        try:
            asked = files.strict_json(asked)
        except Malformed as error:
            raise InputError(f"{ASKED} {error}") from error
    if asked is None:
        return None, False
    if not isinstance(asked, dict):
        raise InputError(f'{ASKED} must be an object such as {{"guards": ["honesty"]}}, got {shown(asked)}')
    trace = asked.get("trace", False)
    if not isinstance(trace, bool):
        raise InputError(f"{ASKED}.trace must be true or false, got {shown(trace)}")
    return {name: value for name, value in asked.items() if name != "trace"}, trace


# ------------------------------------------------------------------------------------------------------- building


def build(
    file: PolicyFile, *, name: str, identity: ModelIdentity | None = None, environ: Mapping[str, str] = os.environ
) -> Policy:
    """Open the guards of a policy and check that no request can do what the operator did not allow.

    Args:
        name: what the model is called in requests.
        identity: the model's; guards of another are refused. None: a server checks it that loads the model itself.
        environ: where keys are looked up that are given by a variable's name.

    Raises:
        GuardFileError: a guard that cannot be read.
        GuardMismatch: a guard that was made for another model.
        InputError: everything else that is wrong; the message has the place and the next step.
    """
    guards = [Guard.load(Path(one.file)) for one in file.guards]
    if identity is not None:
        guards = [guard.for_model(identity, allow_mismatch=file.allow_mismatch) for guard in guards]
    names = [guard.name for guard in guards]
    _check_names(file, names)
    keys = _secrets(file, environ)
    admin = None if file.admin is None else file.admin.digest("admin", environ)
    if admin in keys:
        raise InputError(f"the admin key is also the key of {keys[str(admin)]!r}; give the admin routes a key of their own")
    content = [file.model_dump(mode="json", by_alias=True), [guard.digest for guard in guards], sorted(keys.items())]
    return Policy(
        file, name, tuple(guards), hashlib.sha256(canonical_json(content).encode()).hexdigest(), keys, admin,
        dict(_views(file, name, guards)),
    )  # fmt: skip


def _check_names(file: PolicyFile, names: Sequence[str]) -> None:
    """Raise InputError for what is named and is not there."""
    if not names:
        raise InputError("the policy serves no guards; name at least one under guards")
    if len(set(names)) < len(names) or UNGUARDED in names:
        raise InputError(f"guards need names of their own, and none may be called {UNGUARDED!r}; got {', '.join(names)}")
    taken = [alias for alias in file.models if alias in (*names, UNGUARDED) or not files.NAME.fullmatch(alias)]
    if taken:
        raise InputError(f"models: {', '.join(map(shown, taken))} is no name, or is one already: NAME:GUARD chooses that guard")
    ids = [key.id for key in file.keys]
    if len(set(ids)) < len(ids):
        raise InputError(f"keys: every id stands once, got {', '.join(ids)}")
    for where, named, known in _named(file, names, ids):
        unknown = [one for one in named if one not in known]
        if unknown:
            raise InputError(f"{where}: there is no {', '.join(map(shown, unknown))}; there are {', '.join(known) or 'none'}")


def _named(file: PolicyFile, names: Sequence[str], ids: Sequence[str]) -> Iterator[tuple[str, Sequence[str], Sequence[str]]]:
    """(place, what is named there, what it may name)."""
    yield "default", file.default or (), names
    for alias, model in file.models.items():
        yield f"models.{alias}.guards", list(model.guards), names
        yield f"models.{alias}.default", model.default or (), names
        yield f"models.{alias}.keys", model.keys or (), ids
    for key in file.keys:
        yield f"keys.{key.id}.guards", list(key.guards), names
        yield f"keys.{key.id}.models", key.models or (), (*file.models, *names, UNGUARDED)


def _secrets(file: PolicyFile, environ: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for key in file.keys:
        digest = key.digest(f"keys.{key.id}", environ)
        if digest in found:
            raise InputError(f"keys: {found[digest]!r} and {key.id!r} have the same key; give each its own")
        found[digest] = key.id
    return found


def _views(file: PolicyFile, name: str, guards: Sequence[Guard]) -> Iterator[tuple[tuple[str | None, str], _View]]:
    """What holds for every key and every name that it may use."""
    keys: list[ApiKey | None] = [*file.keys] or [None]
    plain: Mapping[str, Alias | None] = dict.fromkeys(["", *(guard.name for guard in guards), UNGUARDED])
    for key in keys:
        for short, model in {**plain, **file.models}.items():
            barred = short and key is not None and key.models is not None and short not in key.models
            kept = model is not None and model.keys is not None and (key is None or key.id not in model.keys)
            if not barred and not kept:
                where = f"models.{short}" if model is not None else "guards" if key is None else f"keys.{key.id}"
                try:
                    view = _view(file, guards, short, model, key)
                except InputError as error:
                    raise InputError(f"{where}: {error}") from error
                yield (None if key is None else key.id, f"{name}:{short}" if short else name), view


def _view(file: PolicyFile, guards: Sequence[Guard], short: str, model: Alias | None, key: ApiKey | None) -> _View:
    catalogue = Catalogue(Settings())
    modes: dict[str, Mode] = {}
    for one, guard in zip(file.guards, guards, strict=True):
        now = one
        if model is not None and guard.name in model.guards:
            now = _changed(now, model.guards[guard.name])
            if model.keys is None:
                _check_loosened(one, now, guard.name)
        if key is not None and guard.name in key.guards:
            now = _changed(now, key.guards[guard.name])
        if now.mode != "off":
            _check_entry(now, guard)
            catalogue.add(Entry(guard, now.strength, now.positions, now.required))
            modes[guard.name] = now.mode
    chosen = model.default if model is not None and model.default is not None else file.default
    catalogue.default = [name for name in (catalogue if chosen is None else chosen) if name in catalogue]
    implied: tuple[str, ...] | None = None
    if short == UNGUARDED:
        implied = ()
    elif short and model is None:
        required = {name for name in catalogue if catalogue[name].required}
        implied = tuple(guard.name for guard in guards if guard.name in {short, *required})
    if implied is None:
        catalogue.choose({})  # raises for a required guard that is no default
    return _View(catalogue, modes, implied)


def _changed(one: ServedGuard, change: Change) -> ServedGuard:
    return one.model_copy(update=change.model_dump(exclude_none=True))


def _check_loosened(before: ServedGuard, after: ServedGuard, name: str) -> None:
    """Raise InputError for a required guard that anybody could escape from by another model name."""
    if before.required and (not after.required or ACTS[after.mode] < ACTS[before.mode]):
        raise InputError(
            f"guard {name!r} is required, and under this name anybody would be free of it; say under keys who may use the name"
        )


def _check_entry(one: ServedGuard, guard: Guard) -> None:
    """Raise InputError for what a request may choose and should not be able to."""
    entry = Entry(guard, one.strength, one.positions, one.required)
    if one.strength is not None and (guard.rule.strength is None or not one.strength[0] <= one.strength[1]):
        raise InputError(f"guard {guard.name!r} ({guard.rule}): the strengths {list(one.strength)} are no range of its rule")
    ends = {guard.rule.strength, *(one.strength or ())}
    for strength in ends:
        for positions in {guard.positions, *one.positions}:
            why = weaker(entry.variant(strength, positions), guard)
            if one.required and why is not None:
                raise InputError(
                    f"guard {guard.name!r} is required, and a request could weaken it: {why}; allow less, or do not require it"
                )
