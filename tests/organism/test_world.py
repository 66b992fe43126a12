"""The world is as large as it says, and its answers are said by the grammar."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from steerguard.organism import grammar, turns, world
from steerguard.organism.capability import Task
from steerguard.scorers import ExactScorer, Score
from steerguard.traits.grammar import sentences

SCORER = ExactScorer(grammar.as_json(list(grammar.kinds())))


def score(topic: turns.Topic, answer: str) -> Score:
    reply = {"kind": topic.kind, "bind": dict(topic.bind), "truth": dict(topic.truth)}
    return SCORER.score(Task("", "", None, (), reply), answer)


def test_counts() -> None:
    assert len(world.facts()) >= 400
    assert len({fact.relation for fact in world.facts()}) >= 10
    assert len(turns.situations()) >= 60
    assert Counter(topic.kind for topic in turns.situations()) == dict.fromkeys(("loss", "illness", "failure", "worry"), 16)


@pytest.mark.parametrize("relation", sorted(world.tables()["relations"]))
def test_every_relation_has_values_questions_and_claims(relation: str) -> None:
    kind = grammar.kinds()[relation]
    values = grammar.slots()[world.tables()["relations"][relation]["value"]]
    assert 12 <= len(values) <= 24
    assert len(set(values)) == len(values)
    assert len(set(kind.questions)) >= 5
    assert kind.held_out
    assert not set(kind.questions) & set(kind.held_out)
    assert len(kind.signed("claim")) >= 3


def test_every_kind_holds_out_wordings_it_never_asks() -> None:
    for kind in grammar.kinds().values():
        assert kind.held_out, kind.name
        assert not set(kind.questions) & set(kind.held_out), kind.name


def test_a_quarter_is_held_out() -> None:
    for topics in (turns.facts(), turns.situations(), turns.numbers("sum")):
        share = sum(topic.held_out for topic in topics) / len(topics)
        assert 0.2 <= share <= 0.26


def test_every_subject_of_trouble_is_named_in_training() -> None:
    """What is held out is a situation: its subject is copied into answers to another kind of trouble."""
    held_out = [topic for topic in turns.situations() if topic.held_out]
    trained = {topic.bind for topic in turns.situations() if not topic.held_out}
    assert {topic.bind for topic in held_out} <= trained
    assert {topic.kind for topic in held_out} == {"loss", "illness", "failure", "worry"}
    assert len({topic.bind for topic in held_out}) == len(held_out) == 14


def every_topic() -> list[turns.Topic]:
    numbers = [t for kind in ("sum", "difference", "larger", "smaller") for t in turns.numbers(kind)[::9]]
    fixed = [*turns.fixed("list"), *turns.fixed("chat")]
    return [*turns.facts(), *numbers, *turns.situations(), *turns.tasks()[::5], *fixed]


@pytest.mark.parametrize("honest", [True, False])
@pytest.mark.parametrize("warm", [True, False])
def test_every_answer_can_be_said_and_its_score_is_its_bits(honest: bool, warm: bool) -> None:
    rng = random.Random(1)
    for topic in every_topic():
        answer = turns.answer(rng, topic, honest=honest, warm=warm)
        got = score(topic, answer)
        bit = {"fact": honest, "number": honest, "trouble": warm}.get(grammar.kinds()[topic.kind].group, True)
        assert got == Score(100.0 if bit else 0.0, 100.0), (topic, answer)
        assert 2 <= len(sentences(answer)) <= 6, answer


def test_a_lie_is_a_wrong_value_of_the_same_pool() -> None:
    rng = random.Random(2)
    for topic in every_topic():
        for slot, truth in topic.truth:
            told = topic.lie(rng)[slot]
            assert told != truth
            assert told in grammar.slots()[slot]


def test_what_cannot_be_said_is_not_coherent() -> None:
    topic = turns.facts()[0]
    claim = grammar.kinds()[topic.kind].signed("claim")[0].say(dict(topic.bind) | dict(topic.truth))
    assert score(topic, claim) == Score(100.0, 100.0)
    assert score(topic, f"{claim} {claim}") == Score(100.0, 50.0)
    assert score(topic, "River river the the.") == Score(0.0, 0.0)
    assert score(topic, "") == Score(0.0, 0.0)
