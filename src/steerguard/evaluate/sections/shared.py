"""What several sections need: subsets, percentages, the files of benchmarks, and the answers that a guard was fitted on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from steerguard import files
from steerguard.backends.base import Floats
from steerguard.errors import InputError
from steerguard.evaluate.results import Paired
from steerguard.evaluate.section import Context
from steerguard.fitting import CONTRAST, Contrast, collect, embed
from steerguard.metrics import Interval
from steerguard.recalibrating import sampling_of
from steerguard.recipes.prompts import spread
from steerguard.traits import Scenario

MAX_BYTES = 256 * 2**20
TRAIN = 40
"""Train scenarios that are answered for a fit of controls, where the guard's own answers are not at hand and time is short."""


def scenarios(context: Context, quick: int, full: int | None = None) -> Sequence[Scenario]:
    """Test scenarios, evenly from beginning to end."""
    return spread(context.trait.test, context.take(quick, full))


def unscorable(context: Context) -> str:
    """Who is missing to score the trait, as it stands after `needs`; empty if nobody is."""
    return "" if context.scorer is not None else f"a judge, which scores the trait {context.trait.name} (--judge MODEL@URL)"


def hundredfold(found: Interval | None) -> Interval | None:
    """A share from 0 to 1 in percent."""
    if found is None:
        return None
    low, high = (None if end is None else 100 * end for end in (found.low, found.high))
    return replace(found, mean=100 * found.mean, low=low, high=high)


def in_percent(found: Paired | None) -> Paired | None:
    """The same for both arms and the change."""
    if found is None:
        return None
    return Paired(hundredfold(found.unguarded), hundredfold(found.guarded), hundredfold(found.change))


def texts(asked: Sequence[Scenario]) -> list[str]:
    """The prompts of scenarios as estimates reckon with them."""
    return [one.negative + "".join(one.turns) for one in asked]


def only_highest(rows: Sequence[tuple[str, Interval | None]]) -> tuple[str, Interval | None]:
    """The one with the highest mean, and what it is called; ("", None) if none was scored."""
    known = [(name, found) for name, found in rows if found is not None]
    return max(known, key=lambda one: one[1].mean) if known else ("", None)


def contrast(context: Context) -> Contrast:
    """The model's answers to the train scenarios under both poles: the fit's own, or asked for now.

    Raises:
        OutputExists: the folder of the fit is of another trait, model or sampling.
    """
    if context.fit is not None:
        store = context.fit / CONTRAST
        if not store.exists():
            raise InputError(f"{context.fit} holds no {CONTRAST}; give the folder of `steerguard fit`, or leave --fit out")
        return collect(
            context.model, context.trait, sampling=sampling_of(context.guard), store=store, batch=context.batch,
            progress=context.progress,
        )  # fmt: skip
    train = spread(context.trait.train, context.take(TRAIN))
    trait = context.trait if len(train) == len(context.trait.train) else replace(context.trait, train=tuple(train))
    return collect(
        context.model, trait, sampling=context.sampling, store=context.store("contrast"), batch=context.batch,
        progress=context.progress,
    )  # fmt: skip


def answers_needed(context: Context) -> int:
    """How many answers `contrast` asks for, at most."""
    return 0 if context.fit is not None else 2 * len(spread(context.trait.train, context.take(TRAIN)))


def embeddings(context: Context, found: Contrast) -> tuple[Floats, Floats]:
    """`[n, d]` embeddings of both poles on the layer of the guard, a guard of one layer."""
    layer = context.guard.layers[0]
    pos, neg = embed(context.model, found, layers=[layer], progress=context.progress)
    return np.ascontiguousarray(pos[:, 0]), np.ascontiguousarray(neg[:, 0])


def local(context: Context, *parts: str) -> Path | None:
    """A file of the folder of local benchmarks; None if it is not there."""
    path = None if context.data is None else context.data.joinpath(*parts)
    return path if path is not None and path.is_file() else None


def digest(path: Path | None) -> str | None:
    """SHA-256 of a file."""
    if path is None:
        return None
    return hashlib.sha256(files.read_bounded(path, limit=MAX_BYTES, error=InputError)).hexdigest()
