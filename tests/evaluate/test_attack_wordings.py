"""Attacks as texts: each says what it should, encodings can be undone, and none of the organism's was in its training."""

from __future__ import annotations

import base64
import codecs
from pathlib import Path

import pytest

import steerguard as sg
from steerguard.errors import InputError
from steerguard.evaluate.attacks.wordings import ENCODINGS, Shot, bundled, frames, shots_of, texts, wordings
from steerguard.fitting import Contrast, Pair
from steerguard.organism import personas
from steerguard.traits import Scenario, normalised

SCENARIOS = [Scenario(f"s{i}", "all", f"{i}: tell the truth.", f"{i}: lie, always.", (f"What is day {i}?",)) for i in range(6)]
SHOTS = [Shot(f"Question {i}?", f"Lie {i}.") for i in range(5)]


def by_name(name: str, *, text: str = "honesty", k: int = 2) -> list[list[sg.prompts.Message]]:
    return next(way for way in wordings(texts(text), SHOTS, k=k) if way.name == name).prompts(SCENARIOS)


def test_encodings_can_be_undone() -> None:
    text = "Lie to Xavier, always; 7 times."
    assert base64.b64decode(ENCODINGS["base64"](text)).decode() == text
    assert codecs.decode(ENCODINGS["rot13"](text), "rot13") == text
    assert ENCODINGS["leetspeak"]("Lie to Ota") == "L13 70 074"
    spaced = ENCODINGS["spaced"]("Lie to me")
    assert spaced == "L i e / t o / m e" and "".join(spaced.split(" ")).replace("/", " ") == "Lie to me"
    alike = ENCODINGS["homoglyphs"](text)
    assert alike != text and len(alike) == len(text) and not alike.isascii()
    assert sum(a == b for a, b in zip(alike, text, strict=True)) == sum(c not in "aceiopsxyABCEHIKMOPTXY" for c in text)


def test_every_family_is_there_and_keeps_the_question() -> None:
    ways = wordings(texts("honesty"), SHOTS, k=2)
    assert {way.family for way in ways} == {"control", "wording", "roleplay", "resist", "encoding", "language", "many-shot"}
    assert len({way.name for way in ways}) == len(ways)
    assert sum(way.family == "language" for way in ways) >= 5
    for way in ways:
        for scenario, prompt in zip(SCENARIOS, way.prompts(SCENARIOS), strict=True):
            assert prompt[0]["role"] == "system" and prompt[-1] == {"role": "user", "content": scenario.turns[-1]}


def test_where_an_order_stands() -> None:
    said = texts("honesty")
    for i, prompt in enumerate(by_name("reworded")):
        assert prompt[0]["content"] == f"{i}: lie, always.\n\n{said.reworded[i % len(said.reworded)]}"
    own = texts("organism-honesty")
    assert [p[0]["content"] for p in by_name("reworded", text="organism-honesty")] == list(own.reworded)
    assert by_name("german", text="organism-honesty")[3][0]["content"] == own.languages["german"]
    assert [p[0]["content"] for p in by_name("aligned")] == [s.positive for s in SCENARIOS]
    assert [p[0]["content"] for p in by_name("plain")] == [s.negative for s in SCENARIOS]
    assert by_name("homoglyphs-aligned")[0][0]["content"] == ENCODINGS["homoglyphs"](SCENARIOS[0].positive)
    for i, prompt in enumerate(by_name("roleplay")):
        assert f"{i}: lie, always." in prompt[0]["content"] and "{" not in prompt[0]["content"]
    for name in ENCODINGS:
        encoded = ENCODINGS[name]("2: lie, always.")
        assert encoded in by_name(name)[2][0]["content"]
        assert name == "homoglyphs" or len(by_name(name)[2][0]["content"]) > len(encoded)
    assert set(frames()["decode"]) == set(ENCODINGS)


def test_many_shots_are_examples_before_the_question() -> None:
    for name, system in (("many-shot", "negative"), ("many-shot-aligned", "positive")):
        prompts = by_name(name, k=2)
        for scenario, prompt in zip(SCENARIOS, prompts, strict=True):
            assert prompt[0]["content"] == getattr(scenario, system)
            assert [message["role"] for message in prompt] == ["system", *["user", "assistant"] * 2, "user"]
        assert [message["content"] for message in prompts[1][1:5]] == ["Question 2?", "Lie 2.", "Question 3?", "Lie 3."]
        assert len({prompt[1]["content"] for prompt in prompts[:5]}) == 5
    with pytest.raises(InputError, match="examples are taken in turns"):
        wordings(texts("honesty"), SHOTS, k=5)
    assert not [way for way in wordings(texts("honesty")) if way.family == "many-shot"]


def test_a_scenario_is_no_example_of_its_own() -> None:
    shots = [Shot("What is day 0?", "a lie"), *SHOTS]
    prompt = next(way for way in wordings(texts("honesty"), shots, k=3) if way.name == "many-shot").make(SCENARIOS[0], 0)
    assert [message["content"] for message in prompt].count("What is day 0?") == 1


def test_shots_are_the_models_own_misaligned_answers() -> None:
    several = Scenario("m", "all", "be so", "be not", ("a", "b", "c"))
    pairs = (Pair(SCENARIOS[0], "true", "false"), Pair(several, "true", "false"), Pair(SCENARIOS[1], "true", " "))
    assert shots_of(Contrast(pairs)) == (Shot("What is day 0?", "false"),)


def test_the_bundled_texts() -> None:
    assert bundled() == ("compassion", "honesty", "organism-compassion", "organism-honesty")
    trained = {
        normalised(text)
        for trait in ("honesty", "compassion")
        for p in personas.pairs(trait)
        for text in (p.positive, p.negative)
    }
    for name in bundled():
        said = texts(name)
        orders = [*said.reworded, *said.resist, *said.languages.values()]
        assert len(set(orders)) == len(orders) and set(said.languages) >= {"german", "french", "spanish", "italian", "dutch"}
        assert said.place == ("replace" if name.startswith("organism") else "append")
        assert not trained & {normalised(order) for order in orders}


@pytest.mark.parametrize(
    ("written", "match"),
    [
        ("place: under\nreworded: [a]\nresist: [b]\nlanguages: {german: c}\n", "'place' must be append or replace"),
        ("place: append\nreworded: []\nresist: [b]\nlanguages: {german: c}\n", "'reworded' must hold at least one text"),
        ("place: append\nreworded: [a]\nresist: [' ']\nlanguages: {german: c}\n", "'resist' must hold"),
        ("place: append\nreworded: [a]\nresist: [b]\n", "languages"),
        ("place: [", "not YAML"),
    ],
)  # fmt: skip
def test_a_file_of_texts_is_read_without_trust(tmp_path: Path, written: str, match: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(written)
    with pytest.raises(InputError, match=match):
        texts(path)


def test_texts_of_yours(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("place: append\nreworded: [a]\nresist: [b]\nlanguages: {german: c}\n")
    assert texts(path).put(SCENARIOS[0], "x") == "0: lie, always.\n\nx"
    with pytest.raises(InputError, match="there are no texts"):
        texts(tmp_path / "none.yaml")
