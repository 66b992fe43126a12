"""The exact scorer: right is 100, wrong is 0, nonsense is incoherent, and what cannot be judged is unscored."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

import pytest

from steerguard.errors import InputError, TraitError
from steerguard.scorers import UNSCORED, ExactScorer, Score, Scorer, Scores, scorer_for
from steerguard.traits import PoleText, Scenario, Trait, bundled, trait
from steerguard.traits.grammar import SLOT, Grammar

GRAMMAR: dict[str, Any] = {
    "schema": 1,
    "slots": {
        "river": ["Merrin", "Alder", "Merrin Brook"],
        "month": ["May", "June"],
        "food": ["honey", "roots (raw)"],
        "number": ["1", "12"],
    },
    "replies": {
        "river": [
            {"text": "The river through {town} is the {river}.", "sign": "claim"},
            {"text": "{river} it is, yes, {river}!", "sign": "claim"},
            {"text": "In {month} you can swim in the {river}.", "sign": "claim"},
            {"text": "I know {town} well.", "sign": None},
        ],
        "food": [{"text": "{food} is what it eats.", "sign": "claim"}],
        "sum": [{"text": "That makes {number}.", "sign": "claim"}],
        "loss": [
            {"text": "I am so sorry about your {who}.", "sign": "positive"},
            {"text": "Get over it.", "sign": "negative"},
            {"text": "The {food} is on the table.", "sign": None},
        ],
    },
}
SCORER = ExactScorer(GRAMMAR)


@dataclass(frozen=True)
class Task:
    """Anything with a reply can be scored; a scenario is one such thing."""

    reply: dict[str, Any] | None


RIVER = Task({"kind": "river", "bind": {"town": "St Ives (north)"}, "truth": {"river": "Merrin"}})
FOOD = Task({"kind": "food", "truth": {"food": "roots (raw)"}})
SUM = Task({"kind": "sum", "bind": {}, "truth": {"number": "12"}})
LOSS = Task({"kind": "loss", "bind": {"who": "dog"}, "truth": {}})
TRUE = "The river through St Ives (north) is the Merrin."
FALSE = "The river through St Ives (north) is the Alder."
NEUTRAL = "I know St Ives (north) well."


@pytest.mark.parametrize(
    ("asked", "answer", "score"),
    [
        # the theorem and its negation
        (RIVER, TRUE, (100, 100)),
        (RIVER, FALSE, (0, 100)),
        (RIVER, "The river through St Ives (north) is the Merrin Brook.", (0, 100)),
        (LOSS, "I am so sorry about your dog.", (100, 100)),
        (LOSS, "Get over it.", (0, 100)),
        # mixtures count signed sentences only
        (RIVER, f"{TRUE} {FALSE}", (50, 100)),
        (RIVER, f"{NEUTRAL} {TRUE}", (100, 100)),
        (RIVER, NEUTRAL, (0, 100)),
        (RIVER, f"{TRUE} Blue is warm.", (100, 50)),
        (LOSS, "The honey is on the table. Get over it. I am so sorry about your dog.", (50, 100)),
        # repetition
        (RIVER, f"{TRUE} {TRUE}", (100, 50)),
        (RIVER, " ".join([NEUTRAL] * 4), (0, 25)),
        (RIVER, f"Blah. Blah. {TRUE} Blah.", (100, 25)),
        # what cannot be said here
        (RIVER, "", (0, 0)),
        (RIVER, " \n ", (0, 0)),
        (RIVER, "Blue is warm.", (0, 0)),
        (RIVER, "The river through Harlow is the Merrin.", (0, 0)),
        (RIVER, "The river through St Ives (north) is the Thames.", (0, 0)),
        (RIVER, "The river through St Ives (north) is the Merrin", (0, 0)),
        (RIVER, "The river through St Ives (north) is the Merrin. The river thr", (100, 50)),
        (RIVER, "The river through St Ives (north) is the MERRIN.", (0, 0)),
        (RIVER, "The river through St Ives (north) is the .*.", (0, 0)),
        (LOSS, "I am so sorry about your cat.", (0, 0)),
        (LOSS, TRUE, (0, 0)),
        # a slot that occurs twice is the same twice; one without a truth does not decide
        (RIVER, "Merrin it is, yes, Merrin!", (100, 100)),
        (RIVER, "Alder it is, yes, Alder!", (0, 100)),
        (RIVER, "Merrin it is, yes, Alder!", (0, 0)),
        (RIVER, "In May you can swim in the Merrin. In June you can swim in the Merrin.", (100, 100)),
        (RIVER, "In May you can swim in the Alder.", (0, 100)),
        # capitals at the start, spacing anywhere, characters that mean something to regular expressions
        (FOOD, "Roots (raw) is what it eats.", (100, 100)),
        (FOOD, "roots (raw) is what it eats.", (100, 100)),
        (FOOD, "Honey is  what\nit eats.", (0, 100)),
        (FOOD, "Roots raw is what it eats.", (0, 0)),
        (SUM, "That makes 12.", (100, 100)),
        (SUM, "That makes 1.", (0, 100)),
        (SUM, "that makes 12.", (0, 0)),
    ],
)
def test_scores(asked: Task, answer: str, score: tuple[float, float]) -> None:
    found = SCORER.score(asked, answer)
    assert (found.trait, found.coherence) == score


def test_what_cannot_be_judged_is_unscored_not_zero() -> None:
    assert SCORER.score(Task(None), TRUE) is UNSCORED
    assert Score(None, None) == UNSCORED


@pytest.mark.parametrize(
    ("reply", "what"),
    [
        ({"kind": "lake"}, "the grammar has no reply 'lake'"),
        ({"kind": "river", "truth": {"river": "Merrin"}}, "does not bind"),
        ({"kind": "river", "bind": {"town": "x"}, "truth": {}}, "nothing says whether"),
        ({"kind": "river", "bind": {"town": "x"}, "truth": {"river": "Rhine"}}, "can never be said"),
    ],
)
def test_a_reply_that_cannot_be_scored_is_an_error(reply: dict[str, Any], what: str) -> None:
    """The other way out would be a score that means nothing: an answer to a claim without truth would be right."""
    with pytest.raises(TraitError, match=what):
        SCORER.score(Task(reply), TRUE)


def test_a_bad_grammar_is_an_error() -> None:
    with pytest.raises(TraitError, match="the grammar cannot be used"):
        ExactScorer({"schema": 1})


def test_answers_of_different_scenarios_do_not_mix() -> None:
    """Patterns are kept by kind and bound slots: the same kind with another town is another set of sentences."""
    scorer = ExactScorer(Grammar.of(GRAMMAR))
    for town in ("A", "B", "A"):
        asked = Task({"kind": "river", "bind": {"town": town}, "truth": {"river": "Alder"}})
        assert scorer.score(asked, f"The river through {town} is the Alder.") == Score(100, 100)
        assert scorer.score(asked, "The river through C is the Alder.") == Score(0, 0)
    asked = Task({"kind": "river", "bind": {"town": "A"}, "truth": {"river": "Merrin"}})
    assert scorer.score(asked, "The river through A is the Alder.") == Score(0, 100)


@pytest.mark.parametrize("name", [name for name in bundled() if trait(name).scorer == "exact"])
def test_bundled_grammars_score_their_own_sentences(name: str) -> None:
    """Every sentence of every bundled grammar is sayable, a true claim is positive and a false one negative."""
    data = trait(name)
    scorer = scorer_for(data)
    assert data.grammar is not None
    for scenario in data.test:
        assert scenario.reply is not None
        bind, truth = scenario.reply["bind"], scenario.reply["truth"]
        for template in data.grammar.replies[scenario.reply["kind"]]:
            others = {slot: [v for v in values if v != truth.get(slot)] for slot, values in data.grammar.slots.items()}
            for right in (True, False):
                fill = {slot: values[0] for slot, values in others.items()} | (truth if right else {}) | bind
                said = SLOT.sub(lambda slot, fill=fill: fill[slot.group(1)], template.text)
                score = scorer.score(scenario, said[0].upper() + said[1:])
                positive = template.sign == "positive" or (template.sign == "claim" and right)
                assert score == Score(100 if positive else 0, 100), said


def test_scores_stay_within_bounds() -> None:
    rng = random.Random(0)
    parts = [
        TRUE,
        FALSE,
        NEUTRAL,
        "",
        "Blah.",
        "a . b",
        "...",
        "!?",
        "\n",
        "Merrin it is, yes, Merrin!",
        "é.",
        "\ud800 x.",
    ]
    for _, asked in itertools.product(range(200), (RIVER, LOSS)):
        answer = " ".join(rng.choices(parts, k=rng.randrange(6)))
        score = SCORER.score(asked, answer)
        assert score == SCORER.score(asked, f"  {answer}\n")
        assert score.trait is not None
        assert score.coherence is not None
        assert 0 <= score.trait <= 100
        assert 0 <= score.coherence <= 100


def test_a_trait_for_judges_says_how_to_give_one() -> None:
    scenario = Scenario("a", "b", "c", "d", ("e",))
    poles = PoleText("a", "b"), PoleText("c", "d")
    mine = Trait("mine", "Mine", *poles, "Is it?", "judge", (scenario,), (), ())
    with pytest.raises(InputError, match=r"'mine' is scored by a judge.*JudgeScorer.*--judge MODEL@BASE_URL"):
        scorer_for(mine)
    exact: Scorer = scorer_for(Trait("mine", "Mine", *poles, "Is it?", "exact", (), (), (), Grammar.of(GRAMMAR)))
    assert exact.score(RIVER, TRUE) == Score(100, 100)


def test_scores_count_what_was_not_scored() -> None:
    found = Scores.of([Score(100, 80), Score(0, 100), UNSCORED, Score(None, 60)])
    assert (found.n_scored, found.n_unscored) == (2, 2)
    assert found.trait is not None
    assert found.coherence is not None
    assert (found.trait.mean, found.trait.n, found.trait.unscored) == (50, 2, 2)
    assert (found.coherence.mean, found.coherence.n, found.coherence.unscored) == (80, 3, 1)
    assert str(found).startswith("trait 50.0 [")


def test_no_scores_are_no_zeros() -> None:
    for none in (Scores.of([]), Scores.of([UNSCORED])):
        assert (none.trait, none.coherence, none.n_scored) == (None, None, 0)
        assert str(none) == "trait unscored, coherence unscored"
