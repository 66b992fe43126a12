"""Recipes: what a file may say, what is said of one that it may not, and what a plan reckons."""

from __future__ import annotations

from pathlib import Path

import pytest
from small import small_recipe, small_trait

import steerguard as sg
from steerguard.errors import InputError, RecipeError
from steerguard.recipes import Recipe, build, bundled, recipe, stretch
from steerguard.recipes.plan import judges, plan, planned
from steerguard.rules import RULES

LEAST = {"model": "m", "trait": "honesty"}


def test_a_recipe_says_what_the_paper_does_where_it_says_nothing() -> None:
    found = build(LEAST)
    assert found.as_sampling() == sg.Sampling()
    assert found.grid.rules == {name: list(RULES[name].grid) for name in ("SwFC", "StTP", "StMP")}
    assert found.grid.positions == ["all", "response"]
    assert found.grid.layers == "all"
    assert (found.as_limits().coherence_kept, found.as_limits().kl) == (0.9, 0.1)
    assert build(found.as_dict()) == found


@pytest.mark.parametrize("name", bundled())
def test_every_bundled_recipe_is_the_papers_grid(name: str) -> None:
    found = recipe(name)
    assert recipe(f"{name}.yaml") == found
    assert found.grid.rules == build(LEAST).grid.rules
    assert sum(map(len, found.grid.rules.values())) == 19
    assert found.grid.positions == ["all", "response"]
    assert (found.sampling.temperature, found.sampling.top_p, found.sampling.seed) == (0.6, 0.9, 42)
    assert found.fit.direction == "logistic"
    assert sg.trait(found.trait).test
    assert planned(found, Path("nowhere")).settings == 19 * 2 * (found.estimate.layers or 0)
    if name.startswith("paper/"):
        assert found.sampling.max_new_tokens == 1024
        (judge,) = judges(found, sg.trait(found.trait))
        assert (judge.model, judge.temperature, judge.reasoning_effort) == ("openai/gpt-oss-120b", 1.0, "high")
        assert "assumption" in found.notes


def test_the_papers_models_and_traits_are_there() -> None:
    models = {"llama-3.3-70b", "qwen3-32b", "qwen3.6-27b"}
    assert {name for name in bundled() if name.startswith("paper/")} == {
        f"paper/{model}-{trait}" for model in models for trait in ("honesty", "compassion")
    }


@pytest.mark.parametrize(("text", "layers"), [("7", [7]), ("2-5", [2, 3, 4, 5]), ("0-8:4", [0, 4, 8])])
def test_stretches_of_layers(text: str, layers: list[int]) -> None:
    assert stretch(text) == layers


@pytest.mark.parametrize("text", ["", "a", "5-2", "-3", "1-", "1-3:0", "4:2", "1-2-3", "1.5"])
def test_a_stretch_that_is_none(text: str) -> None:
    with pytest.raises(RecipeError, match="layers"):
        stretch(text)


def test_layers_one_by_one_and_together() -> None:
    assert build({**LEAST, "grid": {"layers": [1, "3-4", [6, 7]]}}).grid.groups() == [1, 3, 4, (6, 7)]


def test_settings_are_changed_by_key() -> None:
    found = build(LEAST, ["sampling.seed=7", "grid.layers=[1, 2]", "load.engine.tensor_parallel_size=2", "title=a: b"][:3])
    assert (found.sampling.seed, found.grid.layers, found.load.engine) == (7, [1, 2], {"tensor_parallel_size": 2})
    assert found.sampling.temperature == 0.6
    assert build(LEAST, given={"search.screen": 4}).as_search().screen == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": "x"}, "there is no setting modle"),
        ({"sampling": {"temprature": 1}}, "there is no setting sampling.temprature"),
        ({"sampling": {"temperature": "hot"}}, "sampling.temperature: .* got 'hot'"),
        ({"sampling": {"temperature": -1}}, "sampling.temperature: .*greater than or equal to 0, got -1"),
        ({"sampling": {"seed": True}}, "sampling.seed: "),
        ({"model": "  "}, "model must not be empty"),
        ({"grid": {"rules": {"CAA": [1]}}}, "there is no rule 'CAA'"),
        ({"grid": {"rules": {"StTP": [float("nan")]}}}, "StTP"),
        ({"grid": {"rules": {"Ablate": []}}}, "Ablate has no strengths of its own"),
        ({"grid": {"layers": ["9-3"]}}, "the layers '9-3' are none"),
        ({"grid": {"positions": ["prompt"]}}, "grid.positions: .* got 'prompt'"),
        ({"schema": 2}, "schema: .* got 2"),
        ({"search": {"screen": 0}}, "search.screen: "),
    ],
)
def test_what_a_recipe_cannot_say(change: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        build({**LEAST, **change})
    assert "\n" not in str(caught.value)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    for text, message in (
        ("a: 1\na: 2\n", ":2: the key 'a' stands on line 1 already"), ("- 1\n", "must be a mapping"), ("{", "not YAML"),
        ("", "must be a mapping"),
        ("model: m\n", "the setting trait is missing"), ("model: !!python/object:os.system {}\n", "not YAML"),
    ):  # fmt: skip
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(RecipeError, match=message):
            recipe(path)
    with pytest.raises(RecipeError, match="no recipe and no file 'nothing'; bundled are organism/compassion"):
        recipe("nothing")
    for override in ("seed", "=1", "a-b=1", "a..b=1"):
        with pytest.raises(RecipeError, match="such as sampling.seed=7: a setting is KEY=VALUE"):
            build(LEAST, [override])


def test_a_plan_by_hand(tmp_path: Path) -> None:
    found = recipe(small_recipe(small_trait(tmp_path / "trait"), tmp_path / "recipe.yaml"))
    trait = sg.trait(found.trait)
    made = plan(found, trait, 8, ["x" * 40] * 5)
    assert (made.settings, made.layers) == (3, 1)
    assert [(step.what, step.answers) for step in made.steps] == [
        ("answers under both poles, to learn from", 48), ("baselines on the select scenarios", 16),
        ("3 settings on 8 select scenarios", 24), ("benign prompts, unguarded", 5),
        ("test scenarios: aligned, malicious, each rule", 40),
    ]  # fmt: skip
    assert made.steps[3].prompt_tokens == 50  # 5 prompts of 40 characters, 4 to a token
    assert made.answers == 133
    assert made.hours == pytest.approx(133 * 20 / 100 / 3600)
    assert (made.judge_calls, made.judge_money) == (0, None)  # the exact scorer costs nothing
    assert made.forwards == 5 * (2 + 3)
    assert plan(found, trait, 8, ["x"] * 5, scored_benign=True).answers == 133 + 5 * 3
    with pytest.raises(InputError, match="layer 3 is not there: organism has layers 0 to 1"):
        plan(found, trait, 2, [])


def test_a_plan_with_a_judge_and_a_search() -> None:
    value = {
        **LEAST, "judge": {"judges": [{"price_in": 1.0, "price_out": 2.0, "typical_tokens": 500}], "repeats": 3},
        "search": {"screen": 10, "finalists": 2}, "estimate": {"layers": 10}, "test": False,
    }  # fmt: skip
    made = planned(build(value), Path("nowhere"))
    judged = 2 * 40 + 10 * 38 * 10 + 6 * 40
    assert sum(step.judged for step in made.steps) == judged
    assert made.judge_calls == judged * 2 * 3
    assert made.judge_money is not None
    out = made.judge_calls * 500
    assert made.judge_money == pytest.approx((made.judge_tokens - out) * 1e-6 + out * 2e-6)
    deep = {**value, "estimate": {"layers": 60}}
    strided = planned(build({**deep, "search": {"stride": 4}}), Path("nowhere"))
    assert strided.answers < 0.5 * planned(build({**deep, "search": {}}), Path("nowhere")).answers
    with pytest.raises(RecipeError, match="how many layers m has"):
        planned(build(LEAST), Path("nowhere"))


def test_a_recipe_is_a_value() -> None:
    assert isinstance(build(LEAST), Recipe)
    with pytest.raises(Exception, match="frozen"):
        build(LEAST).model = "other"  # type: ignore[misc]
