"""Recipes: every setting of one line of work, from a model to a tested guard, in one YAML file.

    model: meta-llama/Llama-3.3-70B-Instruct
    trait: honesty
    grid: {rules: {StTP: [6, 12, 18]}, layers: [20-40], positions: [all]}

`Recipe` lists every key with its default; what is not given is the paper's. `recipe("paper/llama-3.3-70b-honesty")` reads
one of the bundled ones, or a file of yours; `plan` says what it will take, `run` does it.

It knows settings. It loads no model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from steerguard import files, strict_yaml
from steerguard.backends.base import Sampling
from steerguard.errors import InputError, RecipeError
from steerguard.files import shown
from steerguard.fitting import Context, Fit
from steerguard.guard import Positions
from steerguard.probe import Direction
from steerguard.rules import RULES, rule
from steerguard.sweeping import PAPER_RULES, Limits, Search, Setting
from steerguard.sweeping import grid as settings_of
from steerguard.traits import bundled as bundled_traits
from steerguard.traits import trait

BUNDLED = Path(__file__).parent
MAX_BYTES = 2**20


class _Part(BaseModel):
    """A part of a recipe: no key that is not known, no value that is not of its kind."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Load(_Part):
    """How the model is loaded; as `sg.load` takes it."""

    backend: str = "hf"
    dtype: str = "auto"
    device_map: str | None = None
    quantization: Literal["4bit", "8bit"] | None = None
    engine: dict[str, Any] = Field(default_factory=dict)
    "further options of the backend, such as tensor_parallel_size"


class Drawing(_Part):
    """How answers are drawn."""

    temperature: float = Field(0.6, ge=0)
    top_p: float = Field(0.9, gt=0, le=1)
    seed: int = Field(42, ge=0)
    max_new_tokens: int = Field(1024, ge=1)


class Fitting(_Part):
    """How directions are learnt."""

    direction: Direction | Literal["given"] = "logistic"
    "given: on directions of another tool, which `steerguard fit --directions` has put into the folder"
    context: Context = "own"
    allow_weak: bool = False


class Grid(_Part):
    """What is tried: every strength of every rule, on every layer, at every choice of positions."""

    rules: dict[str, list[float]] = Field(default_factory=lambda: {name: list(RULES[name].grid) for name in PAPER_RULES})
    "rule -> strengths; [] are the rule's own"
    layers: Literal["all"] | list[int | str | list[int]] = "all"
    'such as [10, "20-30", [26, 27]]: a layer, a stretch of layers, several that are steered together'
    positions: list[Positions] = Field(default=["all", "response"])

    @field_validator("rules")
    @classmethod
    def _known(cls, value: dict[str, list[float]]) -> dict[str, list[float]]:
        for name, strengths in value.items():
            own = (RULES.get(name) or type(rule(name))).grid  # which raises, naming what there is
            if not strengths and not own:
                raise ValueError(f"{name} has no strengths of its own; give some")
            for strength in strengths:
                rule(name, strength)
        return value

    def groups(self) -> list[int | tuple[int, ...]] | None:
        """The layers one by one; None for all."""
        if self.layers == "all":
            return None
        out: list[int | tuple[int, ...]] = []
        for one in self.layers:
            if isinstance(one, str):
                out += stretch(one)
            else:
                out.append(one if isinstance(one, int) else tuple(one))
        return out

    def settings(self, probes: Fit) -> list[Setting]:
        """The settings of this grid on fitted probes."""
        strengths = {name: own for name, own in self.rules.items() if own}
        return settings_of(
            probes, rules=list(self.rules), layers=self.groups(), positions=self.positions, strengths=strengths
        )  # fmt: skip


class Bars(_Part):
    """What a setting must keep to be chosen; see `sweeping.Limits`."""

    coherence_kept: float = Field(Limits.coherence_kept, ge=0)
    kl: float | None = Field(Limits.kl, ge=0)
    fire_rate: float | None = Field(Limits.fire_rate, ge=0)
    benign_lost: float | None = Limits.benign_lost


class Searching(_Part):
    """How to go over a large grid faster; see `sweeping.Search`."""

    screen: int | None = Field(None, ge=1)
    finalists: int = Field(4, ge=1)
    stride: int = Field(1, ge=1)


class Judging(_Part):
    """Who judges, for a trait that is scored by a judge; as `steerguard.judging.JudgeConfig` takes it, and the budget."""

    judges: list[dict[str, Any]] = Field(default_factory=list)
    "settings of each judge, what is not given being the paper's; none for a trait that is scored exactly"
    repeats: int = Field(1, ge=1)
    max_calls: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    max_money: float | None = Field(None, gt=0)


class Estimate(_Part):
    """What a plan reckons with. Assumptions, not measurements: set them to what your machine gives."""

    hardware: str = "not named"
    tokens_per_second: float | None = Field(None, gt=0)
    "generated tokens per second, all requests together"
    answer_tokens: int = Field(350, ge=1)
    "mean length of an answer"
    characters_per_token: float = Field(4.0, gt=0)
    layers: int | None = Field(None, ge=1)
    "the model's depth, for a plan before the model is there"


class Recipe(_Part):
    """One line of work. What is not given is the paper's."""

    schema_: Literal[1] = Field(1, alias="schema")
    title: str = ""
    notes: str = ""
    "for people: where it departs from the paper"
    model: str
    trait: str
    load: Load = Load()
    sampling: Drawing = Drawing()
    fit: Fitting = Fitting()
    grid: Grid = Field(default_factory=Grid)
    search: Searching = Searching()
    limits: Bars = Bars()
    benign: str = "bundled"
    "bundled (500 conversations), organism, none, or a file of yours"
    benign_prompts: int | None = Field(None, ge=1)
    "at most so many of them, spread evenly"
    beside: list[str] = Field(default_factory=list)
    "guard files of other traits that are on throughout"
    judge: Judging = Field(default_factory=Judging)
    test: bool = True
    "whether the test split is read and reported"
    batch: int | None = Field(None, ge=1)
    "answers that are asked for at a time"
    estimate: Estimate = Estimate()

    @model_validator(mode="after")
    def _sound(self) -> Recipe:
        for name in ("model", "trait"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name} must not be empty")
        self.grid.groups()
        return self

    def as_sampling(self) -> Sampling:
        return Sampling(**self.sampling.model_dump())

    def as_limits(self) -> Limits:
        return Limits(**self.limits.model_dump())

    def as_search(self) -> Search:
        return Search(**self.search.model_dump())

    def as_dict(self) -> dict[str, Any]:
        """Every setting, defaults included, as JSON values."""
        return self.model_dump(mode="json", by_alias=True)


def stretch(text: str) -> list[int]:
    """The layers of "20-30", "7" or "0-40:4" (every fourth). Raises RecipeError for anything else."""
    ends, colon, step = text.partition(":")
    first, dash, last = ends.partition("-")
    numbers = [first, *([last] if dash else []), *([step] if colon else [])]
    if not all(part.strip().isdecimal() for part in numbers) or (colon and (not dash or int(step) < 1)):
        raise RecipeError(f"layers are written 7, 20-30 or 0-40:4, got {shown(text)}")
    found = list(range(int(first), int(last if dash else first) + 1, int(step) if colon else 1))
    if not found:
        raise RecipeError(f"the layers {shown(text)} are none; write the smaller one first")
    return found


# ------------------------------------------------------------------------------------------------ reading


def bundled() -> tuple[str, ...]:
    """The names of the recipes that come with steerguard, such as paper/llama-3.3-70b-honesty."""
    return tuple(sorted(str(path.relative_to(BUNDLED).with_suffix("")) for path in BUNDLED.glob("*/*.yaml")))


def recipe(
    name_or_file: str | os.PathLike[str], overrides: Sequence[str] = (), *, given: Mapping[str, Any] | None = None
) -> Recipe:
    """A bundled recipe by its name, or a file of yours.

    Args:
        overrides: "KEY=VALUE" each, the key dotted, the value as YAML reads it: "sampling.seed=7".
        given: dotted key -> value, as a program has them.

    Raises:
        RecipeError: there is no such recipe, or it holds what a recipe cannot.
    """
    name = str(name_or_file)
    path = BUNDLED / f"{name.removesuffix('.yaml')}.yaml" if name.removesuffix(".yaml") in bundled() else Path(name)
    if not path.exists():
        raise RecipeError(f"there is no recipe and no file {shown(name)}; bundled are {', '.join(bundled())}")
    try:
        value = strict_yaml.read(files.read_bounded(path, limit=MAX_BYTES, error=RecipeError))
    except strict_yaml.NotYaml as error:
        raise RecipeError(error.at(path)) from error
    return build(value, overrides, given=given, source=str(path))


def of_fit(folder: Path, overrides: Sequence[str] = (), *, given: Mapping[str, Any] | None = None) -> Recipe:
    """The paper's grid on what `steerguard fit` left in a folder: its model, its trait, its sampling.

    Raises:
        FitFileError: the folder holds no probes.
        RecipeError: a setting that cannot be.
    """
    probes = Fit.load(folder)
    drawn = probes.provenance["fit"]["sampling"]
    value = {
        "model": probes.model.name, "trait": _trait_of(probes, given or {}),
        "sampling": {key: drawn[key] for key in Drawing.model_fields},
        "fit": {"direction": probes.provenance["fit"]["direction"], "context": probes.provenance["fit"]["context"]},
        "benign": "organism" if probes.model.name == "organism" else "bundled",
    }  # fmt: skip
    return build(value, overrides, given=given, source=str(folder))


def _trait_of(probes: Fit, given: Mapping[str, Any]) -> str:
    """The trait that probes were fitted on: what was given, or the bundled one of the same content."""
    of = probes.provenance["trait"]
    names = [given["trait"]] if "trait" in given else [name for name in bundled_traits() if trait(name).digest == of["sha256"]]
    if not names:
        raise RecipeError(
            f"the probes were fitted on a trait {of['name']!r} that is not among the bundled ones, or on another version; "
            "give its folder with --trait"
        )
    return str(names[0])


def build(
    value: object, overrides: Sequence[str] = (), *, given: Mapping[str, Any] | None = None, source: str = "the recipe"
) -> Recipe:
    """A recipe of a mapping. Raises RecipeError: one sentence that names the key."""
    if not isinstance(value, dict):
        raise RecipeError(f"{source} must be a mapping of settings, got {shown(value)}")
    new = {**(given or {}), **_read(overrides)}
    try:
        return Recipe.model_validate(_overridden(value, new))
    except (ValidationError, InputError) as error:
        raise RecipeError(f"{source}: {_sentence(error)}") from error


def _read(overrides: Sequence[str]) -> dict[str, Any]:
    """Dotted key -> value of "KEY=VALUE" texts."""
    try:
        return strict_yaml.assignments(overrides)
    except strict_yaml.NotYaml as error:
        raise RecipeError(f"an override, such as sampling.seed=7: {error}") from error


def _overridden(value: Mapping[str, Any], new_values: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping with values put in at dotted keys."""
    out = dict(value)
    for key, new in new_values.items():
        *path, last = key.split(".")
        at = out
        for part in path:
            inner = at.get(part)
            at[part] = dict(inner) if isinstance(inner, dict) else {}
            at = at[part]
        at[last] = new
    return out


def _sentence(error: ValidationError | InputError) -> str:
    """The first thing that is wrong, with the key that it is wrong at."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"] if not isinstance(part, int) and "[" not in str(part)) or "it"
    if first["type"] == "extra_forbidden":
        return f"there is no setting {key}; see `python -c 'import steerguard.recipes; help(steerguard.recipes.Recipe)'`"
    if first["type"] == "missing":
        return f"the setting {key} is missing"
    return f"{key}: {first['msg'].removeprefix('Value error, ')}, got {shown(first['input'])}"
