"""Guards that come and go while an engine runs, and what it counted; for the offline engine, `vllm.LLM`.

All ranks or none: a guard that one of them cannot take up is taken from the others again. Which requests may name a
guard is decided where they come in, so it is known there last when it comes, and forgotten there first when it goes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from steerguard.backends.vllm.catalogue import Catalogue, Entry
from steerguard.errors import InputError, NotSteering
from steerguard.guard import Guard, Positions

PATIENCE = 30.0
"""Seconds that `remove` waits for running requests that have the guard."""


def add(
    llm: Any,
    guard: Guard | str | PathLike[str],
    *,
    strength: tuple[float, float] | None = None,
    positions: Sequence[Positions] = (),
) -> str:
    """Serve one more guard; requests may name it from now on. Returns its digest.

    Args:
        strength, positions: what a request may choose, as in `GuardSettings`.

    Raises:
        InputError: a name that is taken, a layer that is not open, or no room; nothing was changed.
        GuardMismatch: a guard of another model.
    """
    engine = llm.llm_engine
    catalogue = _catalogue(engine)
    found = guard if isinstance(guard, Guard) else Guard.load(Path(guard))
    found.check_model(_identity(engine), allow_mismatch=catalogue.settings.allow_mismatch)
    if found.name in catalogue:
        raise InputError(f"there is a guard {found.name!r} already; remove it first, or save yours under another name")
    answers = llm.collective_rpc("steerguard_add", args=(found.to_bytes(), strength, tuple(positions)))
    refused = [str(answer["refused"]) for answer in answers if "refused" in answer]
    if refused:
        llm.collective_rpc("steerguard_remove", args=(found.name,))
        raise InputError(refused[0])
    if {answer["digest"] for answer in answers} != {found.digest}:
        raise NotSteering(f"ranks of the engine took up other guards than they were given: {answers}")
    catalogue.add(Entry(found, strength, tuple(positions)))
    return found.digest


def remove(llm: Any, name: str, *, patience: float = PATIENCE) -> None:
    """Serve a guard no more: new requests are refused at once, running ones end first.

    Raises:
        InputError: no such guard, a required one or a default, or running requests that outlast our patience; then it
            is served as before.
    """
    catalogue = _catalogue(llm.llm_engine)
    entry = catalogue[name]
    catalogue.remove(name)
    _settle(llm)
    until = time.monotonic() + patience
    while not all(llm.collective_rpc("steerguard_remove", args=(name,))):
        if time.monotonic() > until:
            catalogue.add(entry)
            raise InputError(f"guard {name!r} is still in use after {patience:g} s; try again when its requests have ended")
        time.sleep(0.05)


def counters(llm: Any) -> list[list[Mapping[str, Any]]]:
    """What each guard saw and did at each layer, per rank; see `Tables.counters`.

    Raises:
        NotSteering: a gate did not look at every token that it was due.
    """
    found: list[list[Mapping[str, Any]]] = llm.collective_rpc("steerguard_counters")
    return found


def prove(llm: Any) -> list[list[str]]:
    """Run the canary again on every rank. Raises NotSteering."""
    told: list[list[str]] = llm.collective_rpc("steerguard_prove")
    return told


def _settle(llm: Any) -> None:
    """Let an engine core that runs in this process, and only when asked, tell its worker which requests have ended."""
    engine = llm.llm_engine
    if type(engine.engine_core).__name__ == "InprocClient" and not engine.has_unfinished_requests():
        engine.engine_core.get_output()


def _catalogue(engine: Any) -> Catalogue:
    catalogue: Catalogue | None = engine.input_processor.steerguard
    if catalogue is None:
        raise InputError('this engine was started without guards; start it with additional_config={"steerguard": {...}}')
    return catalogue


def _identity(engine: Any) -> Any:
    from steerguard.backends.vllm.model import identity_of

    config = engine.vllm_config
    return identity_of(config.model_config, config.load_config)
