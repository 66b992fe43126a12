"""Endpoints that answer well, slowly, wrongly or not at all: scores where there are verdicts, unscored where there are none."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from endpoint import Reply, Request, planted, serving, verdict, well
from inspect_ai.model import ModelAPI, ModelOutput, ModelUsage, modelapi

from steerguard.errors import JudgeError
from steerguard.judging import JudgeConfig, JudgeScorer, SpendLimit
from steerguard.scorers import Score, Scorer
from steerguard.traits import Scenario, Trait

Make = Callable[..., JudgeConfig]
ANSWERS = [f"trait={10 * i} coherence={10 * i + 1}" for i in range(10)]
EXPECTED = [(10.0 * i, 10.0 * i + 1) for i in range(10)]


def numbers(scores: list[Score]) -> list[tuple[float | None, float | None]]:
    return [(score.trait, score.coherence) for score in scores]


def test_two_calls_for_each_answer_with_the_papers_settings(trait: Trait, scenarios: list[Scenario], judge_at: Make) -> None:
    steps: list[tuple[str, int, int]] = []
    with serving(well) as endpoint:
        scorer: Scorer = JudgeScorer(trait, judge_at(endpoint.url), progress=lambda *step: steps.append(step))
        scores = scorer.scores(scenarios[:10], ANSWERS)
    assert numbers(scores) == EXPECTED
    assert all("so it is" in score.note for score in scores)
    assert sorted(r.kind for r in endpoint.requests) == ["coherence"] * 10 + ["trait"] * 10
    for request in endpoint.requests:
        assert request.path == "/v1/chat/completions"
        body = request.body
        assert (body["model"], body["temperature"], body["reasoning_effort"]) == ("gpt-oss-120b", 1.0, "high")
        assert request.schema is not None
        assert list(request.schema["properties"]) == ["reason", "score"]
        assert "Hide the loss" not in str(body), "a judge is never shown the malicious system prompt"
        told = "You keep the books" in request.user and "denies the loss" in request.user and "How honest" in request.user
        assert told == (request.kind == "trait"), "who grades the language is not told what is honest"
    assert [step[1:] for step in steps] == [(i, 20) for i in range(1, 21)]


def failing_first(reply: Reply, times: int) -> Callable[[Request], Reply]:
    """A judge that fails on the first calls for each question, and then answers well."""
    seen: dict[str, int] = {}

    def behave(request: Request) -> Reply:
        seen[request.user] = seen.get(request.user, 0) + 1
        return reply if seen[request.user] <= times else well(request)

    return behave


PASSING = {
    "429 with Retry-After": Reply("slow down", status=429, headers={"Retry-After": "0.03"}),
    "429": Reply("slow down", status=429),
    "500": Reply("oh dear", status=500),
    "503": Reply("loading", status=503),
    "no JSON in the text": Reply("I would say it is rather good."),
    "out of range": Reply(verdict(101)),
    "nothing": Reply(""),
    "a body that is no JSON": Reply(raw=b"<html>gateway</html>"),
    "a body that is no object": Reply(raw=b'"fine"'),
    "a closed connection": Reply("so it is, at length", cut=True),
    "cut off": Reply('{"reason": "it beg', finish="length"),
    "refused": Reply("", finish="content_filter"),
    "hanging": Reply(hang=True),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_fails_once_is_asked_again(name: str, trait: Trait, scenarios: list[Scenario], judge_at: Make) -> None:
    with serving(failing_first(PASSING[name], 1)) as endpoint:
        scorer = JudgeScorer(trait, judge_at(endpoint.url, timeout=1.5 if name == "hanging" else 5.0, concurrency=10))
        assert numbers(scorer.scores(scenarios[:5], ANSWERS[:5])) == EXPECTED[:5]
    assert len(endpoint.requests) == 20
    assert (scorer.spent.calls, scorer.spent.failed) == (20, 10)


LASTING = {
    "429": "with status 429: .*slow down",
    "500": "with status 500: .*oh dear",
    "no JSON in the text": "holds no JSON object with a 'score': 'I would say",
    "out of range": "must be 0 to 100, got 101",
    "nothing": "the judge said nothing",
    "a closed connection": "endpoint failed",
    "cut off": r"no JSON object with a 'score'.*cut off at 500 tokens",
    "refused": "said nothing; the endpoint refused or filtered it",
    "hanging": r"did not answer within 1 s \(2 calls\)",
}


@pytest.mark.parametrize("name", LASTING)
def test_what_fails_always_is_unscored_with_the_reason(
    name: str, trait: Trait, scenarios: list[Scenario], judge_at: Make
) -> None:
    """The trait call of one answer fails for ever; everything else is scored."""

    def behave(request: Request) -> Reply:
        return PASSING[name] if request.kind == "trait" and "trait=20" in request.user else well(request)

    began = time.monotonic()
    with serving(behave) as endpoint:
        timeout = 1.0 if name == "hanging" else 5.0
        scorer = JudgeScorer(trait, judge_at(endpoint.url, attempts=2, timeout=timeout, concurrency=10))
        scores = scorer.scores(scenarios[:5], ANSWERS[:5])
    assert time.monotonic() - began < 20, "two calls of a second, and a busy machine"
    assert numbers(scores) == [*EXPECTED[:2], (None, 21.0), *EXPECTED[3:5]]

    assert re.search(f"trait unscored: .*{LASTING[name]}", scores[2].note), scores[2].note
    assert len(endpoint.requests) == 11


def test_an_endpoint_that_is_down_ends_the_work_and_keeps_what_there_is(
    trait: Trait, scenarios: list[Scenario], judge_at: Make, tmp_path: Path
) -> None:
    cache = tmp_path / "verdicts.jsonl"
    with serving(lambda request: well(request) if request.number < 6 else PASSING["500"]) as endpoint:
        scorer = JudgeScorer(trait, judge_at(endpoint.url, concurrency=1, give_up=4), cache=cache)
        with pytest.raises(JudgeError, match=r"taken to be down, after 4 failures in a row.*oh dear; 6 verdicts .* are kept"):
            scorer.scores(scenarios[:10], ANSWERS)
        assert len(endpoint.requests) == 10
    with serving(well) as endpoint:
        scorer = JudgeScorer(trait, judge_at(endpoint.url), cache=cache)
        assert numbers(scorer.scores(scenarios[:10], ANSWERS)) == EXPECTED
        assert len(endpoint.requests) == 14, "only what was missing is asked"


def test_nobody_listening(trait: Trait, scenarios: list[Scenario], judge_at: Make) -> None:
    with serving(well) as endpoint:
        url = endpoint.url
    with pytest.raises(JudgeError, match="taken to be down"):
        JudgeScorer(trait, judge_at(url, give_up=3)).scores(scenarios[:10], ANSWERS)


@pytest.mark.parametrize(("status", "says"), [(401, "refuses the key"), (404, "does not know the model")])
def test_a_judge_that_is_set_up_wrongly_ends_the_work_at_once(
    status: int, says: str, trait: Trait, scenarios: list[Scenario], judge_at: Make
) -> None:
    with serving(lambda request: Reply("no such thing", status=status)) as endpoint:
        with pytest.raises(JudgeError, match=f"{says}.*no such thing"):
            JudgeScorer(trait, judge_at(endpoint.url, concurrency=2, wait=30, longest_wait=30)).scores(scenarios[:10], ANSWERS)
        assert len(endpoint.requests) <= 2


def test_an_endpoint_without_schemas_is_asked_without(trait: Trait, scenarios: list[Scenario], judge_at: Make) -> None:
    def behave(request: Request) -> Reply:
        if request.schema is not None:
            return Reply("response_format is not supported", status=400)
        return Reply(f"I looked at it closely.\n```json\n{verdict(planted(request.user, request.kind))}\n```")

    with serving(behave) as endpoint:
        scorer = JudgeScorer(trait, judge_at(endpoint.url, concurrency=1))
        assert numbers(scorer.scores(scenarios[:3], ANSWERS[:3])) == EXPECTED[:3]
        assert len(endpoint.requests) == 7, "one refusal is enough"
        asked_again = JudgeScorer(trait, judge_at(endpoint.url, structured=False)).scores(scenarios[:3], ANSWERS[:3])
        assert numbers(asked_again) == EXPECTED[:3]


def test_what_an_endpoint_refuses_for_its_content_is_unscored(trait: Trait, scenarios: list[Scenario], judge_at: Make) -> None:
    """One that works may refuse many answers in a row without being taken to be down; one that refuses all is wrong."""

    def behave(request: Request) -> Reply:
        return well(request) if "trait=0" in request.user else Reply("too long", status=400)

    with serving(behave) as endpoint:
        scorer = JudgeScorer(trait, judge_at(endpoint.url, concurrency=1, give_up=3))
        scores = scorer.scores(scenarios[:6], ANSWERS[:6])
    assert numbers(scores) == [EXPECTED[0]] + [(None, None)] * 5
    assert "status 400: Error code: 400 - too long" in scores[3].note
    down = pytest.raises(JudgeError, match="taken to be down, after 3 failures in a row.*no temperature")
    with serving(lambda request: Reply("no temperature", status=400)) as endpoint, down:
        JudgeScorer(trait, judge_at(endpoint.url, concurrency=1, give_up=3)).scores(scenarios[:6], ANSWERS[:6])


def test_no_more_calls_at_once_than_allowed(trait: Trait, scenarios: list[Scenario], judge_at: Make) -> None:
    with serving(lambda request: Reply(verdict(50), wait=0.03)) as endpoint:
        JudgeScorer(trait, judge_at(endpoint.url, concurrency=3)).scores(scenarios[:10], ANSWERS)
    assert endpoint.most_in_flight == 3


def test_several_judges_and_draws_weigh_the_same(trait: Trait, scenarios: list[Scenario], judge_at: Make) -> None:
    """One judge says 20 more in its second draw; one always says 0; one is down and left out."""
    seen: dict[str, int] = {}

    def drawing(request: Request) -> Reply:
        if request.kind == "coherence":
            return well(request)
        seen[request.user] = seen.get(request.user, 0) + 1
        return Reply(verdict(planted(request.user) + 20 * (seen[request.user] - 1)))

    with serving(drawing) as one, serving(lambda r: Reply(verdict(1))) as two, serving(lambda r: PASSING["500"]) as three:
        judges = [judge_at(one.url, model="a"), judge_at(two.url, model="b"), judge_at(three.url, model="c", give_up=2)]
        scorer = JudgeScorer(trait, judges, repeats=2)
        scores = scorer.scores(scenarios[:4], ANSWERS[:4])
        report = scorer.agreement(scenarios[:4], ANSWERS[:4])
    assert [score.trait for score in scores] == [(10 * i + 10 + 1) / 2 for i in range(4)]
    assert all("c: trait unscored: the judge c" in score.note and "taken to be down" in score.note for score in scores)
    assert report.failed == {"a": dict.fromkeys(("trait", "coherence"), 0), "b": dict.fromkeys(("trait", "coherence"), 0),
                             "c": dict.fromkeys(("trait", "coherence"), 4)}  # fmt: skip
    assert report.repeats["a"]["trait"].difference == 20
    assert report.repeats["b"]["trait"].difference == 0
    assert report.judges["trait"].difference == pytest.approx((9 + 19 + 29 + 39) / 4)
    assert len(one.requests) == len(two.requests) == 16


def test_draws_have_seeds_of_their_own(trait: Trait, scenarios: list[Scenario], judge_at: Make) -> None:
    with serving(well) as endpoint:
        JudgeScorer(trait, judge_at(endpoint.url, seed=7), repeats=3).scores(scenarios[:1], ANSWERS[:1])
    assert sorted(r.body["seed"] for r in endpoint.requests) == [7, 7, 8, 8, 9, 9]


def test_inside_a_loop_that_is_running(trait: Trait, scenarios: list[Scenario], judge_at: Make) -> None:
    async def notebook() -> list[Score]:
        return JudgeScorer(trait, judge_at(endpoint.url)).scores(scenarios[:2], ANSWERS[:2])

    with serving(well) as endpoint:
        assert numbers(asyncio.run(notebook())) == EXPECTED[:2]


@modelapi(name="planted")
def planted_api() -> type[ModelAPI]:
    class Planted(ModelAPI):
        """A provider of inspect-ai's kind that is no OpenAI's."""

        async def generate(self, input: Any, tools: Any, tool_choice: Any, config: Any) -> ModelOutput:
            if self.model_name == "broken":
                raise KeyError("a mistake in a provider")
            output = ModelOutput.from_content("planted", verdict(planted(input[-1].text)))
            output.usage = ModelUsage(input_tokens=10, output_tokens=5, input_tokens_cache_read=7)
            return output

    return Planted


def test_any_provider_of_inspect_ai(trait: Trait, scenarios: list[Scenario]) -> None:
    scorer = JudgeScorer(trait, JudgeConfig("planted/model", price_in=1.0, price_out=2.0))
    assert scorer.scores(scenarios[:1], ["trait=70"])[0].trait == 70
    assert (scorer.spent.tokens_in, scorer.spent.tokens_out) == (34, 10), "what came from the provider's cache counts"
    assert scorer.spent.money == pytest.approx((34 + 2 * 10) / 1e6)
    with pytest.raises(JudgeError, match="nobody/knows cannot be set up"):
        JudgeScorer(trait, JudgeConfig("nobody/knows")).scores(scenarios[:1], ["Fine."])


def test_an_inspect_ai_that_is_too_old(trait: Trait, scenarios: list[Scenario], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.3.69")
    with pytest.raises(JudgeError, match=r"need inspect-ai 0\.3\.285 or newer, got 0\.3\.69; pip install"):
        JudgeScorer(trait, JudgeConfig("planted/model")).scores(scenarios[:1], ["trait=70"])


def test_a_mistake_is_not_taken_for_a_bad_endpoint(trait: Trait, scenarios: list[Scenario]) -> None:
    scorer = JudgeScorer(trait, JudgeConfig("planted/broken"), limit=SpendLimit(calls=100))
    with pytest.raises(KeyError, match="a mistake in a provider"):
        scorer.scores(scenarios[:1], ["trait=70"])
    assert scorer.budget.idle, "no call is held for ever"


KEY = "sk-verysecret-0123456789"


def test_the_key_is_sent_and_shown_nowhere(
    trait: Trait, scenarios: list[Scenario], judge_at: Make, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """An endpoint that repeats the key in everything it says: verdicts, prose, errors."""
    monkeypatch.setenv("A_JUDGE", KEY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caplog.set_level(logging.DEBUG)
    sent: list[str] = []

    def behave(request: Request) -> Reply:
        sent.append(request.headers["authorization"])
        got = sent[-1].removeprefix("Bearer ")
        number = len(sent)
        if number > 20:
            return Reply(f"bad key {got}", status=401, headers={"X-Echo": got})
        if "trait=30" in request.user:
            return Reply(f"{got} is no JSON")
        return Reply(f"key {got}", status=500) if number % 3 == 0 else Reply(verdict(50, f"your key is {got}"))

    shown: list[str] = []
    with serving(behave) as endpoint:
        judge = judge_at(endpoint.url, key_env="A_JUDGE", attempts=2)
        scorer = JudgeScorer(trait, judge, cache=tmp_path / "verdicts.jsonl")
        shown += [repr(scorer.scores(scenarios[:5], ANSWERS[:5])), repr(scorer), repr(judge), str(scorer.identity)]
        shown += [repr(scorer.cache.__dict__), str(scorer.spent), str(scorer.estimate(scenarios[:5], ANSWERS[:5]))]
        with pytest.raises(JudgeError) as caught:
            while True:
                scorer.repeats += 1
                scorer.scores(scenarios[:5], ANSWERS[:5])
        error: BaseException | None = caught.value
        shown += traceback.format_exception(error)
        while error is not None:
            shown += [repr(error), str(error.args)]
            error = error.__cause__ or error.__context__
    assert set(sent) == {f"Bearer {KEY}"}
    written = [path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    assert any("your key is [key]" in text for text in written)
    out, err = capfd.readouterr()
    for text in (*shown, *written, caplog.text, out, err, *map(str, (r.__dict__ for r in caplog.records))):
        assert KEY not in text
    with pytest.raises(AssertionError):  # this test can fail
        assert KEY not in os.environ["A_JUDGE"]


def test_a_key_that_is_not_there(trait: Trait, scenarios: list[Scenario], judge_at: Make) -> None:
    with serving(well) as endpoint:
        judge = judge_at(endpoint.url, key_env="NOT_SET_ANYWHERE")
        with pytest.raises(JudgeError, match="NOT_SET_ANYWHERE is not set"):
            JudgeScorer(trait, judge).scores(scenarios[:1], ["Fine."])
        assert not endpoint.requests
