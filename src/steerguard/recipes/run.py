"""Doing what a recipe says: load, fit, sweep, test, and write it all down in one folder.

    contrast.jsonl, probes.safetensors      the answers and what was learnt from them (`steerguard fit`)
    sweep.jsonl, test.jsonl, verdicts.jsonl answers and judges' verdicts, as they came
    result.json                             the sweep, the choice and the report; what `steerguard report` shows
    StTP.guard, ...                         the guard of each rule that has an operating point

Every step goes on where it was interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from steerguard import files
from steerguard.backends import load
from steerguard.backends.base import Backend
from steerguard.embeddings import available
from steerguard.errors import RecipeError
from steerguard.fitting import CONTRAST, PROBES, Fit, Stage, fit
from steerguard.guard import Guard
from steerguard.judging import JudgeScorer, SpendLimit
from steerguard.metrics import Measured
from steerguard.metrics.arms import measure
from steerguard.recipes import Recipe
from steerguard.recipes.plan import judges
from steerguard.recipes.prompts import benign_of
from steerguard.scorers import Scorer, scorer_for
from steerguard.sweeping import JOURNAL, TEST_JOURNAL, Arm, Sweep, compare, sweep
from steerguard.sweeping.document import document
from steerguard.sweeping.result import SweepResult
from steerguard.sweeping.result_file import of as result_of
from steerguard.traits import Trait, trait

RESULT, VERDICTS = "result.json", "verdicts.jsonl"


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a recipe came to."""

    sweep: Sweep
    arms: tuple[Arm, ...]
    "aligned, malicious and each rule on the test split; none if it was not read"
    result: SweepResult
    path: Path
    "the result's file"
    guards: dict[str, Path]
    "rule -> its guard's file"


def run(
    recipe: Recipe, folder: Path, *, model: Backend | None = None, command: str = "", progress: Stage | None = None
) -> Outcome:
    """Do what a recipe says.

    Args:
        folder: what comes of it, and what was there already: probes are fitted only if it holds none.
        model: loaded already; by default it is loaded as the recipe says.
        command: how this was started, for whoever reads the result.

    Raises:
        RecipeError: the folder holds probes of another trait.
    """
    data = trait(recipe.trait)
    folder.mkdir(parents=True, exist_ok=True)
    scorer = scorer_of(recipe, data, folder, progress)  # which may refuse, so before the long work
    model = model or open_model(recipe)
    sampling = recipe.as_sampling()
    # 1. directions
    probes = probes_of(recipe, data, folder, model, progress)
    # 2. the grid on `select`
    beside = [Guard.load(path).for_model(model.identity) for path in recipe.beside]
    found = sweep(
        model, data, probes, settings=recipe.grid.settings(probes), scorer=scorer, benign=benign_of(recipe), beside=beside,
        limits=recipe.as_limits(), search=recipe.as_search(), sampling=sampling, batch=recipe.batch, store=folder / JOURNAL,
        progress=progress,
    )  # fmt: skip
    # 3. `test`, read once; what benign prompts alone refused is shown where it would have stood
    shown = {**found.barred, **found.best}
    arms: list[Arm] = []
    measured = None
    if recipe.test:
        arms = compare(
            model, data, {name: found.guard_at(setting) for name, setting in shown.items()}, scorer=scorer, beside=beside,
            sampling=sampling, store=folder / TEST_JOURNAL, progress=progress,
        )  # fmt: skip
        measured = _measured(model, data, arms, found, progress)
    # 4. all of it in one document, read back as others will read it
    record = document(
        found, data, scorer, sampling=sampling, arms=arms, scenarios=data.test, measured=measured, command=command,
        recipe=recipe.as_dict(),
    )  # fmt: skip
    result = result_of(record)
    path = files.write_json(folder / RESULT, record, overwrite=True)
    guards = {name: folder / f"{name}.guard" for name in found.best}
    for name, file in guards.items():
        found.guard_of(name).save(file, overwrite=True)
    return Outcome(found, tuple(arms), result, path, guards)


def open_model(recipe: Recipe) -> Backend:
    """The recipe's model, loaded."""
    options = {"dtype": recipe.load.dtype, "device_map": recipe.load.device_map, "quantization": recipe.load.quantization}
    given = {key: value for key, value in options.items() if value not in (None, "auto")}
    return load(recipe.model, backend=recipe.load.backend, **given, **recipe.load.engine)


def probes_of(recipe: Recipe, data: Trait, folder: Path, model: Backend, progress: Stage | None) -> Fit:
    """The folder's probes, fitted now if there are none."""
    if (folder / PROBES).exists():
        probes = Fit.load(folder)
        of = probes.provenance["trait"]
        if of["sha256"] != data.digest:
            raise RecipeError(
                f"{folder} holds probes of the trait {of['name']!r}, or of another version of it; choose another folder, or "
                f"fit them again: steerguard fit {recipe.model} --trait {recipe.trait} -o {folder} --overwrite"
            )
        return probes
    if recipe.fit.direction == "given":
        raise RecipeError(f"{folder} holds no probes on given directions; fit first, with --directions FILE -o {folder}")
    probes = fit(
        model, data, direction=recipe.fit.direction, context=recipe.fit.context, allow_weak=recipe.fit.allow_weak,
        sampling=recipe.as_sampling(), store=folder / CONTRAST, progress=progress,
    )  # fmt: skip
    probes.save(folder)
    return probes


def scorer_of(recipe: Recipe, data: Trait, folder: Path, progress: Stage | None = None) -> Scorer:
    """The scorer that the trait asks for: exact, or the recipe's judges with their verdicts kept in the folder."""
    named = judges(recipe, data)
    if data.grammar is not None:
        return scorer_for(data)
    if not named:
        raise RecipeError(
            f"the trait {recipe.trait} is scored by a judge, and none is named: --judge MODEL@BASE_URL, such as "
            "openai/gpt-oss-120b@http://localhost:8000/v1, or judge.judges in the recipe"
        )
    limit = SpendLimit(calls=recipe.judge.max_calls, tokens=recipe.judge.max_tokens, money=recipe.judge.max_money)
    return JudgeScorer(
        data, named, repeats=recipe.judge.repeats, cache=folder / VERDICTS, limit=limit, progress=progress
    )  # fmt: skip


def _measured(model: Backend, data: Trait, arms: Sequence[Arm], found: Sweep, progress: Stage | None) -> Measured:
    """What needs no judge, of every arm."""
    first = next((arm.setting for arm in arms if arm.setting is not None), None)
    metrics = ["repetition", "distinct_1", "distinct_2", "compression", "cross_entropy"]
    metrics += ["similarity"] if available() else []
    metrics += ["target_distance"] if first is not None else []
    return measure(
        model, data.test, {arm.name: [kept.answer for kept in arm.answers] for arm in arms},
        probe=None if first is None else found.probes[first.layers[0]], metrics=metrics, progress=progress,  # type: ignore[arg-type]
    )  # fmt: skip
