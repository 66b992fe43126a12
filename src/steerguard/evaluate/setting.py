"""The setting of an evaluation: from what a command line says to what every section is given.

What was not said is what the guard's own record says: its trait, and how its answers were drawn. It knows names and files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from steerguard import recalibrating
from steerguard.backends.base import Backend, Sampling
from steerguard.errors import InputError
from steerguard.evaluate import BATCH
from steerguard.evaluate.section import Context, Size, in_the_small_world
from steerguard.guard import Guard
from steerguard.judging import Budget, JudgeConfig, JudgeScorer, SpendLimit, judge_from
from steerguard.organism.capability import right, tasks
from steerguard.prompts import conversation
from steerguard.scorers import Scorer, scorer_for
from steerguard.sweeping import Benign
from steerguard.traits import Trait, bundled
from steerguard.traits import trait as find_trait

MOST = 500
"""Benign prompts that are looked at."""
VERDICTS = "verdicts.jsonl"


@dataclass(frozen=True)
class Asked:
    """What a command line says; None: what the guard's record says."""

    trait: str | None = None
    benign: Path | None = None
    judges: tuple[str, ...] = ()
    judge_key_env: str | None = None
    max_calls: int | None = None
    data: Path | None = None
    fit: Path | None = None
    size: Size = "quick"
    max_new_tokens: int | None = None
    seed: int | None = None
    batch: int = BATCH


def size_of(suites: Sequence[str], size: str | None) -> Size:
    """`full` if the full suite is among what was asked for. Raises InputError for a size that there is not."""
    if size is not None and size not in ("quick", "full"):
        raise InputError(f"there is no size {size!r}; there are quick and full")
    if size is None:
        return "full" if "full" in suites else "quick"
    return "full" if size == "full" else "quick"


def check(guard: Guard, asked: Asked) -> None:
    """Refuse what can be refused before a model is loaded, which may take minutes. Raises as `context`."""
    for what, path in (("--data", asked.data), ("--fit", asked.fit)):
        if path is not None and not path.is_dir():
            raise InputError(f"{what} must be a folder, and there is none at {path}")
    _benign(find_trait(asked.trait or _trait_of(guard)), asked.benign)
    _judges(asked)


def context(model: Backend, guard: Guard, asked: Asked, *, folder: Path | None) -> Context:
    """What every section is given.

    Raises:
        InputError: a folder that is not there, or a guard that does not say its trait.
        TraitError, JudgeError: what they say.
    """
    check(guard, asked)
    trait, judges = find_trait(asked.trait or _trait_of(guard)), _judges(asked)
    budget = Budget(SpendLimit(calls=asked.max_calls))
    return Context(
        model=model, guard=guard, trait=trait, scorer=_scorer(trait, judges, budget, folder), benign=_benign(trait, asked.benign),
        sampling=_sampling(guard, asked), seed=42 if asked.seed is None else asked.seed, size=asked.size, folder=folder,
        data=asked.data, fit=asked.fit, judge=judges[0] if judges else None, budget=budget, batch=asked.batch,
    )  # fmt: skip


def _judges(asked: Asked) -> tuple[JudgeConfig, ...]:
    return tuple(judge_from(name, key_env=asked.judge_key_env) for name in asked.judges)


def _trait_of(guard: Guard) -> str:
    """The bundled trait that the guard was fitted on, known by its content. Raises InputError if there is none."""
    name, record = recalibrating.trait_of(guard), guard.provenance["trait"]
    for own in bundled():
        if find_trait(own).digest == record.get("sha256"):
            return own
    raise InputError(
        f"guard {guard.name!r} was fitted on a trait {name!r} that is not among the bundled ones, or on another version of it; "
        "give its folder, or a bundled trait, with --trait"
    )


def _sampling(guard: Guard, asked: Asked) -> Sampling:
    sampling = recalibrating.sampling_of(guard)
    if asked.max_new_tokens is not None:
        sampling = replace(sampling, max_new_tokens=asked.max_new_tokens)
    return sampling if asked.seed is None else replace(sampling, seed=asked.seed)


def _scorer(trait: Trait, judges: Sequence[JudgeConfig], budget: Budget, folder: Path | None) -> Scorer | None:
    """The trait's own; judges where it needs them; None where none was named."""
    if trait.grammar is not None:
        return scorer_for(trait)
    if not judges:
        return None
    return JudgeScorer(trait, judges, cache=None if folder is None else folder / VERDICTS, limit=budget)


def _benign(trait: Trait, path: Path | None) -> Benign:
    """A file's prompts, the bundled world's questions for a trait of that world, or the bundled prompts."""
    if path is None and in_the_small_world(trait):
        asked = tasks()
        prompts = tuple(conversation(task.system, task.turns) for task in asked)
        return Benign(prompts, lambda i, text: right(asked[i], text))
    return Benign(tuple(recalibrating.benign_prompts(path, MOST)))
