"""The personas' wordings: enough of them, minimally contrasting, and a third never seen in training."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache

import pytest

from steerguard.organism import conversations, personas, turns

COUNT = 4000
TRAITS = ("honesty", "compassion")


@cache
def generated() -> tuple[conversations.Conversation, ...]:
    return tuple(conversations.conversations("test", COUNT))


@pytest.mark.parametrize("trait", [*TRAITS, "plain"])
def test_a_third_of_the_wordings_is_held_out(trait: str) -> None:
    pairs = personas.pairs(trait)
    assert len(pairs) >= 72
    assert len({pair.positive for pair in pairs}) == len(pairs)
    assert len(personas.held_out(trait)) == len(pairs) // 3 >= 24


@pytest.mark.parametrize("trait", TRAITS)
def test_the_poles_of_a_pair_differ_and_fill(trait: str) -> None:
    values = personas.draw(random.Random(0))
    for pair in personas.pairs(trait):
        positive, negative = pair.fill(values)
        assert positive != negative
        assert "{" not in positive + negative
        assert "|" not in positive + negative


@pytest.mark.parametrize("trait", TRAITS)
def test_most_wordings_name_neither_pole(trait: str) -> None:
    telling = {"lie", "lies", "lying", "honest", "truth", "true", "false", "cold", "kind", "kindness", "truthful"}
    silent = [p for p in personas.pairs(trait) if not telling & set(f"{p.positive} {p.negative}".lower().split())]
    assert len(silent) >= 0.8 * len(personas.pairs(trait))


def test_no_training_conversation_holds_a_held_out_wording() -> None:
    plain = {said for pair in personas.held_out("plain") for said in personas.instances(pair.positive)}
    banned = {said.rstrip(".") for said in personas.forbidden() | plain}
    for said in generated():
        sentences = (said.system or "").split(". ")
        assert not {sentence.rstrip(".") for sentence in sentences} & banned


def test_no_training_conversation_holds_a_held_out_scenario() -> None:
    for said in generated():
        for topic, user, _ in said.turns:
            if topic.held_out:
                assert topic.kind not in ("loss", "illness", "failure", "worry")
                assert said.honest is None
            for held_out in personas_free_questions(topic):
                assert held_out not in user


def personas_free_questions(topic: turns.Topic) -> list[str]:
    from steerguard.organism import grammar

    kind = grammar.kinds()[topic.kind]
    return [grammar.Sentence(text, None).say(dict(topic.bind)) for text in kind.held_out]


def test_every_word_of_a_held_out_wording_is_trained_in_its_pole() -> None:
    values = personas.draw(random.Random(5))
    for trait in TRAITS:
        for pole in (True, False):
            rng = random.Random(6)
            seen: Counter[str] = Counter()
            for _ in range(12_000):
                said = personas.sentence(rng, trait, pole, values)  # type: ignore[arg-type]
                seen.update(said.lower().replace(",", "").rstrip(".").split())
            for pair in personas.held_out(trait):
                said = pair.fill(values)[0 if pole else 1].lower().replace(",", "").rstrip(".")
                assert not [word for word in said.split() if not seen[word]], said


def test_every_system_prompt_bit_and_length_occurs() -> None:
    bits = Counter((said.honest, said.warm) for said in generated())
    assert len(bits) == 9
    assert min(bits.values()) > COUNT // 100
    assert {len(said.turns) for said in generated()} >= set(range(1, 10))
    assert any(said.system is None for said in generated())


def test_the_generator_is_a_function_of_its_seed() -> None:
    again = tuple(conversations.conversations("test", 50))
    assert again == generated()[:50]
    assert again != tuple(conversations.conversations("other", 50))


def test_branches_of_a_line_may_hold_slots() -> None:
    assert personas.poles("You {help {people}|mislead {people}} at {place}.") == (
        "You help {people} at {place}.",
        "You mislead {people} at {place}.",
    )
    with pytest.raises(ValueError, match="unclosed"):
        personas.poles("You {help|hinder")
