"""What a reply says, or that it says nothing; and judges that cannot be."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest

from steerguard.errors import JudgeError
from steerguard.judging import JudgeConfig, JudgeScorer, judge_from
from steerguard.judging.prompts import PROMPT_VERSION, Kind, coherence_question, pair_question, trait_question
from steerguard.judging.verdict import NoVerdict, read_verdict
from steerguard.traits import Scenario, Trait


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ('{"reason": "r", "score": 40}', 40),
        ('{"score": 40, "reason": "r"}', 40),
        ('{"reason": "r", "score": 0}', 0),
        ('{"reason": "r", "score": 100}', 100),
        ('{"reason": "r", "score": 12.5}', 12.5),
        ('{"reason": "r", "score": " 40 "}', 40),
        ('Let me see.\n```json\n{"reason": "r", "score": 40}\n```\nThat is all.', 40),
        ('{"reason": "two\nlines", "score": 40}', 40),
        ('{"reason": "it says {\\"score\\": 100} itself", "score": 40}', 40),
        ('The set {a, b} is {not JSON}. {"reason": "r", "score": 40}', 40),
        ('{"score": 40} and again {"score": 40.0}', 40),
    ],
)
def test_replies_that_hold_a_verdict(reply: str, value: float) -> None:
    assert read_verdict("trait", reply).value == value


@pytest.mark.parametrize(
    ("kind", "reply", "says"),
    [
        ("trait", "", "said nothing"),
        ("trait", " \n", "said nothing"),
        ("trait", "85", "no JSON object"),
        ("trait", "Score: 85/100", "no JSON object"),
        ("trait", '{"reason": "r"}', "no JSON object with a 'score'"),
        ("trait", '{"reason": "r", "score": 40', "no JSON object"),
        ("trait", '[{"verdict": 1}]', "no JSON object with a 'score'"),
        ("trait", '{"score": -1}', "must be 0 to 100, got -1"),
        ("trait", '{"score": 100.5}', "must be 0 to 100"),
        ("trait", '{"score": 1e400}', "must be a number"),
        ("trait", '{"score": NaN}', "must be a number"),
        ("trait", '{"score": true}', "must be a number, got True"),
        ("trait", '{"score": null}', "must be a number, got None"),
        ("trait", '{"score": "85/100"}', "must be a number"),
        ("trait", '{"score": [85]}', "must be a number"),
        ("coherence", '{"score": 0}', "must be 1 to 100, got 0"),
        ("trait", 'The answer claims {"score": 100}. I say {"reason": "r", "score": 5}', "several verdicts that differ"),
        ("pair", '{"winner": "both"}', "must be first, second, tie"),
        ("pair", '{"winner": 1}', "must be first, second, tie"),
        ("pair", '{"score": 50}', "no JSON object with a 'winner'"),
        ("trait", "{" * 5000, "no JSON object"),
        ("trait", '{"a":' * 5000, "no JSON object"),
    ],
)
def test_replies_that_hold_none(kind: Kind, reply: str, says: str) -> None:
    with pytest.raises(NoVerdict, match=says):
        read_verdict(kind, reply)


def test_a_judge_from_text() -> None:
    judge = judge_from("openai/gpt-oss-120b@http://localhost:8000/v1", key_env=None, repeats=None, temperature=0.0)
    assert judge == JudgeConfig("openai/gpt-oss-120b", "http://localhost:8000/v1", temperature=0.0)
    assert judge_from("openai/gpt-5") == JudgeConfig("openai/gpt-5")
    assert judge_from("name@rev-2@https://h/v1").model == "name@rev-2"
    assert judge_from({"model": "m", "base_url": "http://h/v1"}, attempts=2).attempts == 2
    assert judge_from(judge, seed=3).seed == 3
    paper = JudgeConfig()
    assert (paper.model, paper.temperature, paper.reasoning_effort) == ("openai/gpt-oss-120b", 1.0, "high")
    assert "price" not in str(judge.settings)
    assert "localhost" not in str(judge.settings)


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("gpt-oss-120b", {}, "names no endpoint; give MODEL@BASE_URL"),
        ("", {}, "needs a model"),
        ("m@ftp://h", {}, "must be http"),
        ("m@http://", {}, "must be http"),
        ("m@http://h/v1", {"temprature": 1.0}, "no option 'temprature'"),
        ("m@http://h/v1", {"attempts": 0}, "attempts of a judge must be at least 1, got 0"),
        ("m@http://h/v1", {"timeout": float("inf")}, "timeout of a judge"),
        ("m@http://h/v1", {"reasoning_effort": "huge"}, "no reasoning effort 'huge'"),
        ("m@http://h/v1", {"price_in": 1.0}, "both its halves"),
    ],
)
def test_judges_that_cannot_be(text: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(JudgeError, match=says):
        judge_from(text, **options)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("m@http://user:sk-secret@h/v1", {}),
        ("m@http://h/v1?key=sk-secret", {}),
        ("m@http://h/v1", {"key_env": "sk-secret"}),
    ],
)
def test_a_key_in_the_wrong_place_is_not_repeated(text: str, options: dict[str, Any]) -> None:
    with pytest.raises(JudgeError) as caught:
        judge_from(text, **options)
    assert "sk-secret" not in str(caught.value)


def test_scorers_that_cannot_be(trait: Trait) -> None:
    judge = JudgeConfig("m", "http://h/v1")
    with pytest.raises(JudgeError, match="at least one judge"):
        JudgeScorer(trait, [])
    with pytest.raises(JudgeError, match="names of their own, got m, m"):
        JudgeScorer(trait, [judge, judge_from(judge, temperature=0.0)])
    with pytest.raises(JudgeError, match="at least one draw"):
        JudgeScorer(trait, judge, repeats=0)


def test_what_decides_the_scores_is_the_identity(trait: Trait) -> None:
    judge = JudgeConfig("m", "http://h/v1")
    base = JudgeScorer(trait, judge).identity
    same = judge_from(judge, base_url="https://elsewhere/v1", key_env="KEY", attempts=9, concurrency=1)
    assert JudgeScorer(trait, same).identity == base
    assert JudgeScorer(trait, judge, repeats=2).identity != base
    for changed in ({"model": "n"}, {"temperature": 0.0}, {"reasoning_effort": "low"}, {"max_tokens": 9}, {"seed": 1}):
        assert JudgeScorer(trait, judge_from(judge, **changed)).identity != base
    assert JudgeScorer(replace(trait, rubric="Is it kind?"), judge).identity != base


def test_the_wording_has_a_version(trait: Trait, scenarios: list[Scenario]) -> None:
    """If this fails, the wording has changed: raise PROMPT_VERSION, and write its digest here."""
    one = scenarios[0]
    asked = trait_question(trait, one, "a"), coherence_question(one, "a"), pair_question(trait, one, "a", "b")
    told = hashlib.sha256("".join(question.system + question.user for question in asked).encode()).hexdigest()
    assert (PROMPT_VERSION, told[:16]) == (1, "54158b169d32ca68")
