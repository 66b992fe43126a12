"""What a request may ask for, and what tells its keys and values apart; no engine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from steerguard.backends.vllm.catalogue import Act, Catalogue, Choice, Entry, Settings, cache_key
from steerguard.errors import InputError
from steerguard.guard import Guard, ModelIdentity
from steerguard.rules import Rule, StMP, StTP, SwFC

IDENTITY = ModelIdentity("tiny", "LlamaForCausalLM", 48, 4, {"w": "0" * 64}, "t", "c")


def guard(name: str, rule: Rule, layer: int = 1, positions: Any = "all", seed: int = 0) -> Guard:
    return tiny.guard(IDENTITY, rule, (tiny.probe(layer, 48, seed=seed),), positions=positions, name=name)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Guard files by name."""
    guards = (guard("honesty", StTP(12)), guard("warmth", SwFC(2), 2, "response", 1), guard("calm", StMP(1), 1, "all", 2))
    for one in guards:
        one.save(tmp_path / f"{one.name}.guard")
    return {one.name: str(tmp_path / f"{one.name}.guard") for one in guards}


def catalogue(files: dict[str, str], **settings: Any) -> Catalogue:
    guards = [
        files["honesty"],
        {"file": files["warmth"], "strength": [1, 4], "positions": ["all"]},
        {"file": files["calm"]},
    ]
    read = Settings.read({"steerguard": {"guards": guards, **settings}})
    assert read is not None
    return Catalogue(read)


def names(choice: Choice) -> list[str]:
    return [act.name for act in choice.acts]


def test_without_settings_there_is_nothing() -> None:
    assert Settings.read({}) is None
    assert Settings.read({"other": 1}) is None
    assert Settings.read(None) is None


@pytest.mark.parametrize(
    "settings",
    [
        {"guard": []}, {"guards": 3}, {"guards": [{"path": "x"}]}, {"stages": 0}, {"layers": "most"}, {"spare": -1},
        {"guards": [{"file": "x", "strength": [1]}]}, {"guards": [{"file": "x", "positions": ["prompt"]}]},
    ],
)  # fmt: skip
def test_settings_that_are_not_known_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="additional_config"):
        Settings.read({"steerguard": settings})


def test_a_refusal_names_the_keys_that_there_are() -> None:
    with pytest.raises(InputError, match="there are file, strength, positions, required$"):
        Settings.read({"steerguard": {"guards": [{"file": "x", "layer": 3}]}})
    with pytest.raises(InputError, match="there are guards, default, .*inspect$"):
        Settings.read({"steerguard": {"guard": []}})


def test_a_request_that_says_nothing_gets_the_default(files: dict[str, str]) -> None:
    assert names(catalogue(files).choose(None)) == ["honesty", "warmth", "calm"]
    assert names(catalogue(files, default=["calm"]).choose(None)) == ["calm"]
    assert names(catalogue(files, default=[]).choose(None)) == []
    assert names(catalogue(files).choose({})) == ["honesty", "warmth", "calm"]
    with pytest.raises(InputError, match="nobody"):
        catalogue(files, default=["nobody"])


def test_a_request_chooses_by_name_and_within_what_is_allowed(files: dict[str, str]) -> None:
    served = catalogue(files)
    assert names(served.choose({"guards": ["calm", "honesty"]})) == ["calm", "honesty"]
    assert names(served.choose('{"guards": ["calm"]}')) == ["calm"]
    act = served.choose({"guards": [{"name": "warmth", "strength": 3, "positions": "all"}]}).acts[0]
    assert (act.strength, act.positions) == (3.0, "all")
    assert served.guard_of(act).rule == SwFC(3.0)
    assert served.choose({"guards": []}).acts == ()


REFUSED: list[Any] = [
    "", "[]", "{", '{"guards": [], "guards": ["honesty"]}', '{"guards": [NaN]}', 3, [], ["honesty"], True,
    {"guard": []}, {"guards": "honesty"}, {"guards": None}, {"guards": {"name": "honesty"}}, {"guards": [3]},
    {"guards": ["nobody"]}, {"guards": ["Honesty"]}, {"guards": ["honesty "]}, {"guards": ["h\u043enesty"]},
    {"guards": ["honesty", "honesty"]}, {"guards": ["honesty"] * 17}, {"guards": [{"strength": 3}]},
    {"guards": [{"name": "honesty", "strength": 3}]}, {"guards": [{"name": "honesty", "strength": 0}]},
    {"guards": [{"name": "honesty", "positions": "response"}]}, {"guards": [{"name": "honesty", "layer": 3}]},
    {"guards": [{"name": "warmth", "strength": 4.5}]}, {"guards": [{"name": "warmth", "strength": float("nan")}]},
    {"guards": [{"name": "warmth", "strength": float("inf")}]}, {"guards": [{"name": "warmth", "strength": "2"}]},
    {"guards": [{"name": "warmth", "strength": True}]}, {"guards": [{"name": "warmth", "strength": [2]}]},
    {"guards": [{"name": "warmth", "strength": None}]}, {"guards": [{"name": "warmth", "positions": "prompt"}]},
    {"guards": [{"name": "warmth", "strength": 10**400}]}, {"guards": [], "start": 3}, {"guards": [], "read": "all"},
    {"guards": [], "trace": True},
]  # fmt: skip


@pytest.mark.parametrize("asked", REFUSED, ids=repr)
def test_whatever_is_unknown_or_not_allowed_is_refused(files: dict[str, str], asked: object) -> None:
    with pytest.raises(InputError):
        catalogue(files).choose(asked)


def test_required_guards_cannot_be_left_out(files: dict[str, str]) -> None:
    guards = [{"file": files["honesty"], "required": True}, files["calm"]]
    settings = Settings.read({"steerguard": {"guards": guards}})
    assert settings is not None
    served = Catalogue(settings)
    assert names(served.choose({"guards": ["calm", "honesty"]})) == ["calm", "honesty"]
    for asked in ({"guards": []}, {"guards": ["calm"]}):
        with pytest.raises(InputError, match="requires guard 'honesty'"):
            served.choose(asked)
    with pytest.raises(InputError, match="required"):
        served.remove("honesty")
    with pytest.raises(InputError, match="requires"):
        Catalogue(settings.model_copy(update={"default": ("calm",)}))


def test_more_guards_on_a_layer_than_there_are_stages_are_refused(files: dict[str, str]) -> None:
    served = catalogue(files, stages=1, default=[])
    assert served.choose({"guards": ["honesty", "warmth"]}).acts
    with pytest.raises(InputError, match="at most 1 guards"):
        served.choose({"guards": ["honesty", "calm"]})


def test_guards_come_and_go(files: dict[str, str]) -> None:
    served = catalogue(files)
    served.add(Entry(guard("late", StTP(3), seed=4)))
    assert names(served.choose({"guards": ["late"]})) == ["late"]
    assert "late" not in names(served.choose(None)), "a guard that is added acts on those that name it"
    with pytest.raises(InputError, match="already"):
        served.add(Entry(guard("late", StTP(3))))
    served.remove("late")
    with pytest.raises(InputError, match="no guard"):
        served.choose({"guards": ["late"]})
    with pytest.raises(InputError, match="default"):
        served.remove("honesty")


def test_a_choice_travels_as_plain_values(files: dict[str, str]) -> None:
    served = catalogue(files, inspect=True)
    choice = served.choose({"guards": ["honesty", "warmth"], "start": 7, "trace": True, "read": "mean"})
    assert Choice.of_args(json.loads(json.dumps(choice.as_args()))) == choice


def test_another_guard_under_the_same_name_is_noticed(files: dict[str, str]) -> None:
    act = catalogue(files).choose({"guards": ["honesty"]}).acts[0]
    other = Catalogue(Settings())
    other.add(Entry(guard("honesty", StTP(12), seed=9)))
    with pytest.raises(InputError, match="where the request came in"):
        other.guard_of(replace(act))
    with pytest.raises(InputError, match="no guard"):
        other.guard_of(Act("nobody", act.digest, 12.0, "all"))


# ------------------------------------------------------------------------------------------------ the cache's key


def keys(choice: Choice, prompt: int, block: int = 16, blocks: int = 6) -> list[Any]:
    args = choice.as_args()
    return [cache_key(args, prompt, i * block, (i + 1) * block) for i in range(blocks)]


def test_blocks_are_marked_from_the_first_one_that_a_guard_touches(files: dict[str, str]) -> None:
    served = catalogue(files)
    unguarded = keys(served.choose({"guards": []}), 40)
    everywhere = keys(served.choose({"guards": ["honesty"]}), 40)
    response = keys(served.choose({"guards": ["warmth"]}), 40)
    both = keys(served.choose({"guards": ["honesty", "warmth"]}), 40)
    assert unguarded == [None] * 6
    assert [key is not None for key in everywhere] == [True, *[False] * 5], "later blocks hang on it"
    assert [key is not None for key in response] == [False, False, True, False, False, False], "the block of token 40"
    assert [key is not None for key in both] == [True, False, True, False, False, False]
    assert len({str(k) for k in (everywhere[0], response[2], both[2])}) == 3
    assert both[0] == everywhere[0], "the prompt's part is the same"


def test_where_the_answer_begins_counts(files: dict[str, str]) -> None:
    response = catalogue(files).choose({"guards": ["warmth"]})
    assert keys(response, 40)[2] != keys(response, 41)[2]
    assert keys(response, 48) == [None, None, None, *keys(response, 48)[3:]], "a prompt of whole blocks is everybody's"
    assert keys(response, 48)[3] is not None
    assert keys(replace(response, start=20), 40)[1] is not None


def test_strength_order_and_positions_count_and_names_do_not(files: dict[str, str]) -> None:
    served = catalogue(files)

    def first(*guards: Any) -> Any:
        return keys(served.choose({"guards": list(guards)}), 40)[0]

    strengths = [first({"name": "warmth", "strength": s, "positions": "all"}) for s in (1, 2, 2.5)]
    assert len(set(strengths)) == 3
    assert first("honesty", "calm") != first("calm", "honesty")
    served.add(Entry(replace(served["honesty"].guard, name="alias")))
    assert first("alias") == first("honesty")


def test_a_gate_that_moves_nothing_shares_with_everybody(files: dict[str, str]) -> None:
    served = catalogue(files)
    served.add(Entry(guard("off", SwFC(0.0))))
    choice = served.choose({"guards": ["off"]})
    assert choice.acts
    assert keys(choice, 40) == [None] * 6
