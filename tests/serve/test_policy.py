"""The policy without a server: what a file may say, and what is decided on a request.

The theorem: whatever a request says, every guard that is required for it is in the decision, no weaker than its own, in the
operator's mode. Its negation: a guard that is not required can be left out, weakened and asked away.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steerguard.errors import GuardFileError, GuardMismatch, InputError
from steerguard.guard import Guard, ModelIdentity
from steerguard.rules import Ceiling, Floor, Rule, StMP, StTP, SwFC, Target, rule, shift
from steerguard.serve.policy import Decision, Policy, Refusal, build, decide
from steerguard.serve.policy_file import read
from steerguard.serve.strength import moves_less, weaker
from tiny import guard as make_guard
from tiny import probe

IDENTITY = ModelIdentity("tiny", "Toy", 8, 6, {"w": "0" * 64}, "1" * 64, "2" * 64)
KEYS = {"ALICE": "alice's own key 1", "BOB": "bob's own key 234"}
CAROL = "carol's key, hashed"


def guards() -> dict[str, Guard]:
    made = (
        make_guard(IDENTITY, StTP(12), (probe(1, 8),), name="must"),
        make_guard(IDENTITY, StMP(2), (probe(2, 8), probe(3, 8)), positions="response", name="also"),
        make_guard(IDENTITY, SwFC(2), (probe(2, 8, seed=1),), positions="response", name="may"),
    )
    return {one.name: one for one in made}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for one in guards().values():
        one.save(tmp_path / f"{one.name}.guard")
    return tmp_path


def written(folder: Path, value: object) -> Policy:
    """The policy of a file that says this; text is written as it is."""
    path = folder / "policy.yaml"
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return build(read(path), name="m", identity=IDENTITY, environ=KEYS)


RANGES = {"strength": [2, 20], "positions": ["all", "response"]}
FREE: dict[str, Any] = {"guards": [{"file": f"{name}.guard", **RANGES} for name in ("must", "also", "may")], "trace": True}
STRICT: dict[str, Any] = {
    "schema": 1,
    "guards": [
        {"file": "must.guard", "required": True, "strength": [12, 20]},
        {"file": "also.guard", "required": True, "mode": "shadow", "positions": ["all"]},
        {"file": "may.guard", "strength": [-3, 4], "positions": ["all"]},
    ],
    "default": ["must", "also"],
    "models": {
        "strict": {"guards": {"may": {"required": True, "strength": [2, 4]}}, "default": ["must", "also", "may"]},
        "lab": {"guards": {"must": {"mode": "shadow"}, "also": {"required": False}}, "keys": ["bob"]},
    },
    "keys": [
        {"id": "alice", "env": "ALICE"},
        {"id": "bob", "env": "BOB", "guards": {"also": {"mode": "off"}}},
        {"id": "carol", "sha256": hashlib.sha256(CAROL.encode()).hexdigest(), "models": ["strict", "may"]},
    ],
}  # fmt: skip
DUE: dict[tuple[str, str], dict[str, str]] = {
    ("alice", "m"): {"must": "enforce", "also": "shadow"},
    ("alice", "m:strict"): {"must": "enforce", "also": "shadow", "may": "enforce"},
    ("alice", "m:must"): {"must": "enforce", "also": "shadow"},
    ("alice", "m:also"): {"must": "enforce", "also": "shadow"},
    ("alice", "m:may"): {"must": "enforce", "also": "shadow"},
    ("alice", "m:unguarded"): {"must": "enforce", "also": "shadow"},
    ("bob", "m"): {"must": "enforce"},
    ("bob", "m:strict"): {"must": "enforce", "may": "enforce"},
    ("bob", "m:lab"): {"must": "shadow"},
    ("bob", "m:must"): {"must": "enforce"},
    ("bob", "m:also"): {"must": "enforce"},
    ("bob", "m:may"): {"must": "enforce"},
    ("bob", "m:unguarded"): {"must": "enforce"},
    ("carol", "m"): {"must": "enforce", "also": "shadow"},
    ("carol", "m:strict"): {"must": "enforce", "also": "shadow", "may": "enforce"},
    ("carol", "m:may"): {"must": "enforce", "also": "shadow"},
}
"""What is required of each key under each name that it may use, and in which mode; by hand, from STRICT."""


# ------------------------------------------------------------------------------------------------ every request


def ways(names: tuple[str, ...] = ("must", "also", "may")) -> Iterator[Any]:
    """What a request may put under `steering`: every order of every subset, each guard in every form; and nonsense."""
    yield from (
        None,
        {},
        {"guards": None},
        {"guards": []},
        {"guards": {}},
        {"guards": "must"},
        [],
        "",
        "{}",
        "null",
        0,
        False,
        "off",
    )
    yield from ({"enabled": False}, {"guards": ["must"], "mode": "off"}, {"guards": ["MUST"]}, {"guards": ["must", "must"]})
    forms: list[Mapping[str, Any]] = [
        {}, {"strength": 0}, {"strength": 2}, {"strength": 12.0}, {"strength": 20}, {"strength": -3}, {"strength": 1e308},
        {"strength": 10**400}, {"strength": float("nan")}, {"strength": float("inf")}, {"strength": "12"}, {"strength": True},
        {"strength": None}, {"positions": "response"}, {"positions": "all"}, {"positions": []}, {"positions": None},
        {"mode": "off"}, {"required": False}, {"strength": 13, "positions": "response"},
    ]  # fmt: skip
    for size in range(1, len(names) + 1):
        for order in itertools.permutations(names, size):
            yield {"guards": list(order)}
            for place, form in itertools.product(range(size), forms):
                yield {"guards": [{"name": name, **form} if i == place else name for i, name in enumerate(order)]}


def bodies() -> Iterator[dict[str, Any]]:
    """Those ways in every place of a body, and in two."""
    for way in ways():
        yield {"steering": way}
        try:
            text = json.dumps(way)
        except ValueError:
            continue
        yield {"vllm_xargs": {"steering": text}}
        yield {"steering": way, "vllm_xargs": {"steering": '{"guards": []}'}}
    yield from ({}, {"vllm_xargs": None}, {"vllm_xargs": {}}, {"vllm_xargs": {"steering": {"guards": []}}}, {"vllm_xargs": []})
    yield from ({"Steering": {"guards": []}}, {"steering ": {"guards": []}}, {"ﬆeering": {"guards": []}}, {"x_steering": None})
    yield from ({"vllm_xargs": {"STEERING": "{}"}}, {"vllm_xargs": {"steerguard": "{}"}}, {"vllm_xargs": {"other": 1}})


def check_unweakened(policy: Policy, found: Decision | Refusal, due: Mapping[str, str]) -> None:
    if isinstance(found, Refusal):
        return
    acts = {act.name: act for act in found.acts}
    own = {guard.name: guard for guard in policy.guards}
    for name, mode in due.items():
        assert name in acts, f"{name} is not in {sorted(acts)}"
        assert acts[name].mode == mode
        assert acts[name].digest == acts[name].guard.digest
        assert weaker(acts[name].guard, own[name]) is None


@pytest.mark.parametrize(("key", "alias"), list(DUE), ids=str)
def test_under_every_request_the_required_guards_are_there_unweakened(folder: Path, key: str, alias: str) -> None:
    policy = written(folder, STRICT)
    decided = 0
    for body in bodies():
        found = decide(policy, body, key, alias)
        decided += isinstance(found, Decision)
        check_unweakened(policy, found, DUE[key, alias])
    assert decided > 0 or alias in ("m:unguarded", "m:also")


def test_no_other_name_and_no_other_key_is_answered(folder: Path) -> None:
    policy = written(folder, STRICT)
    names = [*policy.aliases, "M", "m:", "m:nothing", ":m", "m:unguarded ", "m:may:unguarded", "", "m\x00", "ｍ"]
    for key, alias in itertools.product(("alice", "bob", "carol", "dave", None, ""), names):
        found = decide(policy, {}, key, alias)  # type: ignore[arg-type]
        if (key, alias) not in DUE:
            assert isinstance(found, Refusal)
            assert found.status in (403, 404)
    assert set(policy.open_to("alice")) == {a for k, a in DUE if k == "alice"} - {"m:unguarded"}
    assert set(policy.open_to("bob")) == {a for k, a in DUE if k == "bob"} - {"m:unguarded", "m:also"}


def test_random_bodies_find_no_way_round(folder: Path) -> None:
    policy, draw = written(folder, STRICT), random.Random(7)
    words: list[Any] = [
        "must",
        "also",
        "may",
        "guards",
        "name",
        "strength",
        "positions",
        "steering",
        "mode",
        "off",
        "",
        0,
        12,
        20,
        None,
    ]
    words += [True, False, 1e9, -1, "all", "response", "trace", "unguarded"]

    def value(depth: int) -> Any:
        kind = draw.random()
        if depth == 0 or kind < 0.4:
            return draw.choice(words)
        if kind < 0.7:
            return [value(depth - 1) for _ in range(draw.randrange(4))]
        return {str(draw.choice(words)): value(depth - 1) for _ in range(draw.randrange(4))}

    decided = 0
    for _ in range(4000):
        said = {"guards": value(3)} if draw.random() < 0.5 else value(3)
        key, alias = draw.choice(list(DUE))
        found = decide(policy, {"steering": said}, key, alias)
        check_unweakened(policy, found, DUE[key, alias])
        decided += isinstance(found, Decision)
    assert decided > 20


def test_what_is_not_required_can_be_asked_away(folder: Path) -> None:
    policy = written(folder, FREE)
    none = decide(policy, {"steering": {"guards": []}}, None, "m")
    assert isinstance(none, Decision)
    assert none.acts == ()
    assert decide(policy, {}, None, "m:unguarded") == none
    weak = decide(policy, {"steering": {"guards": [{"name": "must", "strength": 2, "positions": "response"}]}}, None, "m")
    assert isinstance(weak, Decision)
    assert weaker(weak.acts[0].guard, policy.guards[0]) is not None
    with pytest.raises(AssertionError):
        check_unweakened(policy, weak, {"must": "enforce"})


def test_what_a_request_chooses_is_what_it_gets(folder: Path) -> None:
    policy = written(folder, FREE)
    asked = {"guards": ["may", {"name": "must", "strength": 13, "positions": "response"}], "trace": True}
    for body in ({"steering": asked}, {"steering": json.dumps(asked)}, {"vllm_xargs": {"steering": json.dumps(asked)}}):
        found = decide(policy, body, None, "m")
        assert isinstance(found, Decision)
        assert [(a.name, a.strength, a.positions) for a in found.acts] == [("may", 2.0, "response"), ("must", 13.0, "response")]
        assert found.acts[1].guard.digest == replace(guards()["must"], rule=StTP(13), positions="response").digest
        assert found.trace
    by_name = decide(policy, {}, None, "m:may")
    assert isinstance(by_name, Decision)
    assert [act.name for act in by_name.acts] == ["may"]
    twice = decide(policy, {"steering": {"guards": ["must"]}}, None, "m:may")
    assert isinstance(twice, Refusal)
    assert "chooses guards" in twice.message


def test_what_is_said_twice_or_elsewhere_is_refused_even_if_it_is_allowed(folder: Path) -> None:
    policy, may, text = written(folder, FREE), {"guards": ["may"]}, '{"guards": ["may"]}'
    bad: tuple[dict[str, Any], ...] = (
        {"steering": may, "vllm_xargs": {"steering": text}},
        {"steering": None, "vllm_xargs": {"steering": text}},
        {"vllm_xargs": {"steering": may}},
        {"vllm_xargs": {"steering": text, "other": 1}},
        {"steering": may, "steering_mode": "on"},
        {"steering": text[:-1] + ', "guards": ["may"]}'},
    )
    for body in bad:
        found = decide(policy, body, None, "m")
        assert isinstance(found, Refusal), body
        assert found.param == "steering"


def test_a_guard_that_is_off_is_not_there_and_cannot_be_named(folder: Path) -> None:
    policy = written(folder, {"guards": ["may.guard", {"file": "must.guard", "mode": "off", "required": True}]})
    found = decide(policy, {}, None, "m")
    assert isinstance(found, Decision)
    assert [act.name for act in found.acts] == ["may"]
    assert isinstance(decide(policy, {"steering": {"guards": ["must"]}}, None, "m"), Refusal)
    assert isinstance(decide(policy, {}, None, "m:must"), Refusal)


def test_projections_are_shown_only_where_the_operator_allows_it(folder: Path) -> None:
    found = decide(written(folder, {**FREE, "trace": False}), {"steering": {"trace": True}}, None, "m")
    assert isinstance(found, Refusal)
    assert (found.reason, found.status) == ("trace_not_allowed", 403)
    assert isinstance(decide(written(folder, FREE), {"steering": {"trace": 1}}, None, "m"), Refusal)


# ----------------------------------------------------------------------------------------------------- the file


def guard_in(**words: Any) -> dict[str, Any]:
    return {"guards": [{"file": "must.guard", **words}, "may.guard"]}


def key_in(**words: Any) -> dict[str, Any]:
    return {"guards": ["must.guard"], "keys": [{"id": "alice", **words}]}


BAD: tuple[tuple[Any, str], ...] = (
    ("", "the file"),
    ("guards: [must.guard", "not YAML"),
    ("guards: [must.guard]\nguards: []\n", "'guards' stands on line 1 already"),
    ("guards:\n- {file: must.guard, required: true, required: false}\n", "'required' stands on line 2 already"),
    ("guards: [&a must.guard, *a]", "anchors and aliases are not read"),
    ("guards: !!python/object/apply:os.system ['true']", "not YAML"),
    ("guards: [must.guard]\n1: 2\n", "is no text"),
    ({"guards": []}, "serves no guards"),
    ({"guards": ["must.guard", "must.guard"]}, "names of their own"),
    ({"guards": ["must.guard"], "gaurds": []}, "gaurds: Extra inputs are not permitted"),
    ({"guards": ["must.guard"], "schema": 2}, "schema"),
    (guard_in(requierd=True), "requierd"),
    (guard_in(required="yes"), "required: Input should be a valid boolean"),
    (guard_in(mode="Off"), "mode: Input should be 'enforce', 'shadow' or 'off'"),
    (guard_in(strength=[12]), "strength"),
    (guard_in(strength=[20, 12]), "no range"),
    (guard_in(strength=[-1, 12]), "at least 0"),
    ("guards: [{file: must.guard, strength: [12, .inf]}]", "finite"),
    (guard_in(required=True, strength=[0, 20]), "could weaken it: StTP(0)"),
    (guard_in(required=True, strength=[11.9, 20]), "could weaken it"),
    (guard_in(required=True, positions=["response"]), "leave the prompt out"),
    ({**guard_in(required=True), "default": ["may"]}, "requires guard 'must'"),
    ({**guard_in(), "default": ["nothing"]}, "default: there is no 'nothing'; there are must, may"),
    ({**guard_in(), "models": {"x": {"guards": {"nothing": {}}}}}, "models.x.guards: there is no 'nothing'"),
    ({**guard_in(), "models": {"x": {"keys": ["eve"]}}}, "models.x.keys: there is no 'eve'"),
    ({**guard_in(), "models": {"may": {}}}, "is one already"),
    ({**guard_in(), "models": {"unguarded": {}}}, "is one already"),
    ({**guard_in(), "models": {"a/b": {}}}, "is no name"),
    ({**guard_in(required=True), "models": {"x": {"guards": {"must": {"mode": "shadow"}}}}}, "anybody would be free of it"),
    ({**guard_in(required=True), "models": {"x": {"guards": {"must": {"required": False}}}}}, "anybody would be free of it"),
    ({**guard_in(required=True), "models": {"x": {"guards": {"must": {"strength": [1, 30]}}}}}, "could weaken it"),
    ({**guard_in(required=True), "models": {"x": {"default": ["may"]}}}, "requires guard 'must'"),
    (key_in(), "a key is given by env"),
    (key_in(env="ALICE", sha256="0" * 64), "a key is given by env"),
    (key_in(key="in clear"), "Extra inputs"),
    (key_in(env="NOBODY"), "the environment variable NOBODY must hold at least 16 characters, got nothing"),
    (key_in(sha256="abc"), "sha256"),
    (key_in(env="ALICE", models=["nothing"]), "keys.alice.models: there is no 'nothing'"),
    ({"guards": ["must.guard"], "keys": [{"id": "a", "env": "ALICE"}, {"id": "a", "env": "BOB"}]}, "every id stands once"),
    ({"guards": ["must.guard"], "keys": [{"id": "a", "env": "ALICE"}, {"id": "b", "env": "ALICE"}]}, "have the same key"),
    ({**key_in(env="ALICE"), "admin": {"env": "ALICE"}}, "the admin key is also the key of 'alice'"),
)  # fmt: skip


@pytest.mark.parametrize(("value", "said"), BAD, ids=[said for _, said in BAD])
def test_a_policy_that_is_not_sound_is_refused(folder: Path, value: Any, said: str) -> None:
    with pytest.raises(InputError) as raised:
        written(folder, value)
    assert said in str(raised.value)


def test_a_guard_file_that_is_missing_or_of_another_model_is_refused(folder: Path) -> None:
    with pytest.raises(GuardFileError, match=r"there is no file .*nothing\.guard"):
        written(folder, {"guards": ["nothing.guard"]})
    other = replace(IDENTITY, tokenizer="3" * 64)
    make_guard(other, StTP(1), (probe(1, 8),), name="foreign").save(folder / "foreign.guard")
    with pytest.raises(GuardMismatch):
        written(folder, {"guards": ["foreign.guard"]})
    waived = written(folder, {"guards": ["foreign.guard"], "allow_mismatch": ["tokenizer"]})
    assert waived.guards[0].provenance["waived"]["differs"] == ["tokenizer"]


def test_words_of_yaml_mean_what_they_say(folder: Path) -> None:
    """`off` is false to YAML 1.1; here it is the mode."""
    policy = written(folder, "guards:\n- {file: must.guard, mode: off}\n- {file: may.guard, required: true}\n")
    assert policy.file.guards[0].mode == "off"
    assert policy.file.guards[1].required is True


def test_a_policy_is_shown_without_its_keys(folder: Path) -> None:
    policy = written(folder, {**STRICT, "admin": {"env": "CI"}} | {"admin": None})
    shown = json.dumps(policy.described())
    hidden = [*KEYS, *KEYS.values(), *policy.keys, str(folder), "ALICE", "sha256"]
    assert not [one for one in hidden if one in shown]
    assert '"carol"' in shown
    assert policy.key_of(KEYS["BOB"]) == "bob"
    assert policy.key_of(CAROL) == "carol"
    assert policy.key_of(CAROL + " ") is None
    assert policy.key_of(policy.file.keys[2].sha256) is None


def test_the_digest_is_of_what_decides(folder: Path) -> None:
    one = written(folder, STRICT)
    assert one.digest == written(folder, STRICT).digest
    assert one.digest != written(folder, {**STRICT, "trace": True}).digest
    stronger = make_guard(IDENTITY, StTP(13), (probe(1, 8),), name="must")
    stronger.save(folder / "must.guard", overwrite=True)
    assert (
        one.digest
        != written(folder, {**STRICT, "guards": [{**STRICT["guards"][0], "strength": [13, 20]}, *STRICT["guards"][1:]]}).digest
    )


# ------------------------------------------------------------------------------------------------------- weaker


RULES: tuple[Rule, ...] = (
    StTP(0), StTP(6), StTP(12), StMP(0), StMP(1), StMP(2.5), StMP(40), SwFC(0), SwFC(1), SwFC(2), SwFC(-1), SwFC(-2),
    Floor(), Floor(-0.5), Floor(0.5), Ceiling(), Ceiling(0.5), Target(0), Target(3), rule("Ablate"),
)  # fmt: skip


@pytest.mark.parametrize("asked", RULES, ids=str)
def test_weaker_is_what_a_fine_grid_says(asked: Rule) -> None:
    one = probe(1, 8)
    rho = np.concatenate([np.linspace(-3, 3, 20_001), np.linspace(-1000, 1000, 20_001)])
    for own in RULES:
        ours, theirs = (shift(np, rho, r.compile(one).row().astype(np.float64)) for r in (asked, own))
        less = bool((np.sign(theirs) * ours < np.abs(theirs) * (1 - 1e-5)).any())
        assert (moves_less(asked.compile(one), own.compile(one)) is not None) == less, f"{asked} against {own}"


def test_more_strength_is_not_weaker_and_less_is() -> None:
    one = probe(1, 8)
    for low, high in (
        (StTP(6), StTP(12)),
        (StMP(1), StMP(2.5)),
        (SwFC(1), SwFC(2)),
        (SwFC(-1), SwFC(-2)),
        (Floor(-0.5), Floor(0.5)),
    ):
        assert moves_less(high.compile(one), low.compile(one)) is None
        assert moves_less(low.compile(one), high.compile(one)) is not None
