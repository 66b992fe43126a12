"""The plan of a recipe: how many answers, tokens, hours and judge calls, before anything is loaded or sent.

Counts of answers and calls are exact where the recipe decides them; tokens and hours rest on the recipe's own `estimate`,
which is an assumption and is printed as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerguard.errors import InputError, RecipeError
from steerguard.fitting import PROBES, Fit
from steerguard.judging import JudgeConfig, judge_from
from steerguard.prompts import as_conversation
from steerguard.recipes import Recipe
from steerguard.recipes.prompts import benign_of
from steerguard.rules import RULES
from steerguard.traits import Scenario, Trait, trait

JUDGE_PROMPT = 900
"""Tokens of a judge's instructions and rubric, beside the scenario and the answer."""
FINAL = 10
"""Settings of each rule that are taken to come into question, and so are tried on benign prompts."""


@dataclass(frozen=True)
class Step:
    """One step of the work."""

    what: str
    answers: int
    "generations"
    prompt_tokens: float
    "tokens that are read for them, all together"
    answer_tokens: float
    "tokens that are generated"
    judged: int = 0
    "answers that are judged"


@dataclass(frozen=True)
class Plan:
    """What a recipe will take."""

    steps: tuple[Step, ...]
    settings: int
    layers: int
    hardware: str
    hours: float | None
    "None if the recipe does not say how fast the hardware is"
    judge_calls: int
    judge_tokens: float
    judge_money: float | None
    "None if no judge has prices, or none is asked"
    forwards: int
    "passes over benign prompts for KL and fire rates, at most"

    @property
    def answers(self) -> int:
        return sum(step.answers for step in self.steps)

    @property
    def tokens(self) -> float:
        return sum(step.prompt_tokens + step.answer_tokens for step in self.steps)


def plan(
    recipe: Recipe, trait: Trait, depth: int, benign: Sequence[str], *, scored_benign: bool = False, probes: Fit | None = None
) -> Plan:
    """What a recipe will take on a model of `depth` layers.

    Args:
        benign: the texts of the benign prompts.
        scored_benign: whether answers to them are worth points, so that settings answer them.
        probes: what was learnt already: layers that read nothing are then left out.

    Raises:
        InputError: a layer that the model does not have.
    """
    groups = recipe.grid.groups()
    layers: list[Any] = list(range(depth)) if groups is None else list(groups)
    flat = [i for one in layers for i in ((one,) if isinstance(one, int) else one)]
    if flat and max(flat) >= depth:
        raise InputError(f"layer {max(flat)} is not there: {recipe.model} has layers 0 to {depth - 1}")
    per_layer = sum(len(own) or _own(name) for name, own in recipe.grid.rules.items()) * len(recipe.grid.positions)
    if probes is not None:
        layers = list(dict.fromkeys(setting.layers for setting in recipe.grid.settings(probes)))
    settings, rules = per_layer * len(layers), len(recipe.grid.rules)
    exact = trait.grammar is not None
    coming = min(rules * FINAL, settings)
    learn = [] if probes is not None else [_step(recipe, "answers under both poles, to learn from", trait.train, 2, judged=False)]
    steps = [
        *learn,
        _step(recipe, "baselines on the select scenarios", trait.select, 2, judged=not exact),
        *_grid(recipe, trait.select, settings, rules, judged=not exact),
        _texts(recipe, "benign prompts, unguarded", benign, 1),
    ]
    if scored_benign:
        steps.append(_texts(recipe, "benign prompts under what comes into question, at most", benign, coming))
    if recipe.test:
        steps.append(_step(recipe, "test scenarios: aligned, malicious, each rule", trait.test, 2 + rules, judged=not exact))
    steps = [step for step in steps if step.answers]
    calls, tokens, money = _judged(recipe, steps, trait)
    speed = recipe.estimate.tokens_per_second
    return Plan(
        steps=tuple(steps), settings=settings, layers=len(layers), hardware=recipe.estimate.hardware,
        hours=None if speed is None else sum(step.answer_tokens for step in steps) / speed / 3600,
        judge_calls=calls, judge_tokens=tokens, judge_money=money, forwards=len(benign) * (2 + coming),
    )  # fmt: skip


def planned(recipe: Recipe, folder: Path) -> Plan:
    """The plan of a recipe as things stand in a folder: what was learnt there already is not reckoned with again.

    Raises:
        RecipeError: nothing says how many layers the model has.
        TraitError, InputError: its trait or its benign prompts cannot be read.
    """
    benign = benign_of(recipe)
    texts = [] if benign is None else ["".join(m["content"] for m in as_conversation(prompt)) for prompt in benign.prompts]
    scored = benign is not None and benign.score is not None
    probes = Fit.load(folder) if (folder / PROBES).exists() else None
    depth = _depth(recipe, folder) if probes is None else probes.model.depth
    return plan(recipe, trait(recipe.trait), depth, texts, scored_benign=scored, probes=probes)


def _depth(recipe: Recipe, folder: Path) -> int:
    if recipe.estimate.layers is not None:
        return recipe.estimate.layers
    raise RecipeError(
        f"a plan needs to know how many layers {recipe.model} has: set estimate.layers, or fit first: "
        f"steerguard fit {recipe.model} --trait {recipe.trait} -o {folder}"
    )


def _own(name: str) -> int:
    return len(RULES[name].grid)


def _grid(recipe: Recipe, select: Sequence[Scenario], settings: int, rules: int, *, judged: bool) -> list[Step]:
    """The grid on `select`, or what a search goes over at most."""
    search = recipe.search
    tried = settings if search.stride == 1 else -(-settings // search.stride)
    reach = 4 * (search.stride - 1)  # layers on both sides of a rule's two best
    around = min(settings - tried, reach * settings // max(1, _layers(recipe, settings)))
    screens = search.screen is not None and search.screen < len(select)
    asked = select[: search.screen] if screens else select
    steps = [_step(recipe, f"{tried} settings on {len(asked)} select scenarios", asked, tried, judged=judged)]
    if around:
        steps.append(_step(recipe, f"about {around} settings around the best", asked, around, judged=judged))
    if screens:
        last = min(rules * search.finalists, settings)
        steps.append(_step(recipe, f"{last} finalists on all {len(select)}", select, last, judged=judged))
    return steps


def _layers(recipe: Recipe, settings: int) -> int:
    per_layer = sum(len(own) or _own(name) for name, own in recipe.grid.rules.items()) * len(recipe.grid.positions)
    return settings // per_layer


def _step(recipe: Recipe, what: str, scenarios: Sequence[Scenario], times: int, *, judged: bool) -> Step:
    texts = [s.negative + "".join(s.turns) for s in scenarios]
    step = _texts(recipe, what, texts, times)
    return Step(step.what, step.answers, step.prompt_tokens, step.answer_tokens, step.answers if judged else 0)


def _texts(recipe: Recipe, what: str, texts: Sequence[str], times: int) -> Step:
    tokens = sum(map(len, texts)) / recipe.estimate.characters_per_token
    length = min(recipe.estimate.answer_tokens, recipe.sampling.max_new_tokens)
    return Step(what, len(texts) * times, tokens * times, float(len(texts) * times * length))


def judges(recipe: Recipe, data: Trait) -> tuple[JudgeConfig, ...]:
    """The recipe's judges; none for a trait that is scored exactly.

    Raises:
        RecipeError: a judge for a trait that needs none.
        JudgeError: a judge that cannot be.
    """
    if data.grammar is not None and recipe.judge.judges:
        raise RecipeError(f"the trait {recipe.trait} is scored exactly, so a judge would have nothing to do; leave it out")
    return tuple(judge_from(one.pop("model", JudgeConfig.model), **one) for one in map(dict, recipe.judge.judges))


def _judged(recipe: Recipe, steps: Sequence[Step], trait: Trait) -> tuple[int, float, float | None]:
    """Calls, tokens and money: each answer is judged on its trait and on its coherence, by every judge, every draw."""
    answers = sum(step.judged for step in steps)
    named = judges(recipe, trait)
    if not answers:
        return 0, 0.0, None
    read = sum((step.prompt_tokens + step.answer_tokens) for step in steps if step.judged) / answers + JUDGE_PROMPT
    calls, tokens, money = 0, 0.0, None
    for judge in named or (JudgeConfig(),):  # where none is named yet, the paper's
        own = answers * 2 * recipe.judge.repeats
        calls += own
        tokens += own * (read + judge.typical_tokens)
        cost = judge.money(own * read, own * judge.typical_tokens)
        money = money if cost is None else (money or 0.0) + cost
    return calls, tokens, money
