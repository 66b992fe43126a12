"""Nothing that was judged is lost, whatever ends the work; and no more is spent than was allowed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from endpoint import TOKENS_IN, TOKENS_OUT, Reply, Request, serving, verdict, well

from steerguard.errors import JudgeError, SpendLimitReached
from steerguard.judging import Budget, JudgeConfig, JudgeScorer, SpendLimit, judge_from
from steerguard.judging.cache import Cache, Entry
from steerguard.traits import Scenario, Trait

Make = Callable[..., JudgeConfig]
ANSWERS = [f"trait={10 * i} coherence={10 * i + 1}" for i in range(10)]


def entry(key: str, value: float = 50.0, reason: str = "so it is") -> Entry:
    return Entry(key, "m", "trait", value, reason, 100, 20)


# ------------------------------------------------------------------------------------------------------- the cache


def test_what_is_in_the_cache_is_not_asked(trait: Trait, scenarios: list[Scenario], judge_at: Make, tmp_path: Path) -> None:
    cache = tmp_path / "deep" / "verdicts.jsonl"
    with serving(well) as endpoint:
        judge = judge_at(endpoint.url)
        first = JudgeScorer(trait, judge, cache=cache)
        scores = first.scores(scenarios[:10], ANSWERS)
        assert len(endpoint.requests) == first.spent.calls == 20
        again = JudgeScorer(trait, judge_from(judge, base_url="http://127.0.0.1:9/v1", concurrency=1), cache=cache)
        assert again.estimate(scenarios[:10], ANSWERS).calls == 0
        assert again.scores(scenarios[:10], ANSWERS) == scores, "where a judge runs does not decide what it says"
        assert (again.spent.calls, again.spent.cached) == (0, 20)
        # a further draw, another setting, another rubric, another answer: each is something else
        JudgeScorer(trait, judge, cache=cache, repeats=2).scores(scenarios[:1], ANSWERS[:1])
        assert len(endpoint.requests) == 22
        JudgeScorer(trait, judge_from(judge, temperature=0.0), cache=cache).scores(scenarios[:1], ANSWERS[:1])
        assert len(endpoint.requests) == 24
        JudgeScorer(replace(trait, rubric="Kind?"), judge, cache=cache).scores(scenarios[:1], ANSWERS[:1])
        assert len(endpoint.requests) == 25, "the rubric has no part in coherence"
        JudgeScorer(trait, judge, cache=cache).scores([replace(scenarios[0], positive="You know more.")], ANSWERS[:1])
        assert len(endpoint.requests) == 26
        JudgeScorer(trait, judge, cache=cache).scores([scenarios[0]] * 5, ["trait=3 coherence=4"] * 5)
        assert len(endpoint.requests) == 28, "the same thing is asked once"


def test_what_has_no_verdict_is_asked_the_next_time(
    trait: Trait, scenarios: list[Scenario], judge_at: Make, tmp_path: Path
) -> None:
    cache = tmp_path / "verdicts.jsonl"
    with serving(lambda request: Reply("no idea") if request.kind == "trait" else well(request)) as endpoint:
        (score,) = JudgeScorer(trait, judge_at(endpoint.url), cache=cache).scores(scenarios[:1], ANSWERS[1:2])
    assert (score.trait, score.coherence) == (None, 11)
    with serving(well) as endpoint:
        (score,) = JudgeScorer(trait, judge_at(endpoint.url), cache=cache).scores(scenarios[:1], ANSWERS[1:2])
        assert [request.kind for request in endpoint.requests] == ["trait"]
    assert (score.trait, score.coherence) == (10, 11)


def test_an_interruption_loses_the_calls_in_flight_alone(
    trait: Trait, scenarios: list[Scenario], judge_at: Make, tmp_path: Path
) -> None:
    cache = tmp_path / "verdicts.jsonl"

    def behave(request: Request) -> Reply:
        if request.number == 10:
            os.kill(os.getpid(), signal.SIGINT)
        return Reply(hang=True) if request.number >= 9 else well(request)

    with serving(behave) as endpoint:
        scorer = JudgeScorer(trait, judge_at(endpoint.url, concurrency=2, timeout=30), cache=cache)
        with pytest.raises(KeyboardInterrupt):
            scorer.scores(scenarios[:10], ANSWERS)
        assert scorer.budget.idle
        assert scorer.spent.calls == 11, "a call that was cut short may have cost something"
    assert len(cache.read_bytes().splitlines()) == 9
    with serving(well) as endpoint:
        JudgeScorer(trait, judge_at(endpoint.url), cache=cache).scores(scenarios[:10], ANSWERS)
        assert len(endpoint.requests) == 11


def test_a_first_line_that_was_torn_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    Cache(path).add(entry("a"))
    line = path.read_bytes()
    for length in (0, 1, 5, 10, 50, len(line) - 1):
        path.write_bytes(line[:length])
        assert len(Cache(path)) == 0
        assert path.read_bytes() == b""


@pytest.mark.parametrize("damage", [b"half", b'{"key": "x"', b'{"key": "x"}\n', b"\xff\n", b"\n"])
def test_a_damaged_last_line_is_dropped(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    for key in "abc":
        Cache(path).add(entry(key))
    sound = path.read_bytes()
    path.write_bytes(sound + damage)
    cache = Cache(path)
    assert len(cache) == 3
    cache.add(entry("d"))
    assert path.read_bytes().startswith(sound)
    assert sorted(json.loads(line)["key"] for line in path.read_bytes().splitlines()) == list("abcd")
    assert len(Cache(path)) == 4


def test_a_last_line_that_another_process_left_torn_is_dropped(tmp_path: Path) -> None:
    """It was sound when we opened it; whoever died since must not take our next line along."""
    path = tmp_path / "verdicts.jsonl"
    cache = Cache(path)
    cache.add(entry("a"))
    path.write_bytes(path.read_bytes() + b'{"key": "torn' + b"x" * 100_000)
    cache.add(entry("b"))
    assert {"a", "b"} == {json.loads(line)["key"] for line in path.read_bytes().splitlines()}


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"value":50.0', '"value":90.0', "its check does not fit"),
        ('"value":50.0', '"value":', "is not JSON"),
        ('"model":"m",', "", "lacks the key 'model'"),
        ('{"check"', '{"extra":1,"check"', "unknown key 'extra'"),
    ],
)
def test_damage_elsewhere_is_an_error(old: str, new: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    cache = Cache(path)
    for key in "abc":
        cache.add(entry(key))
    lines = path.read_text().splitlines(keepends=True)
    assert old in lines[1]
    path.write_text(lines[0] + lines[1].replace(old, new) + lines[2])
    before = path.read_bytes()
    with pytest.raises(JudgeError, match=rf"verdicts.jsonl:2 is no verdict of a cache: .*{says}"):
        Cache(path)
    assert path.read_bytes() == before


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    for notes in ("my notes\nof many days\n", "my notes\nof many days", "my notes\n", "my notes", "{}"):
        path.write_text(notes)
        with pytest.raises(JudgeError, match="notes.txt:1 is no verdict"):
            Cache(path)
        assert path.read_text() == notes
    with pytest.raises(JudgeError, match="cannot be opened"):
        Cache(tmp_path)


WRITER = """
import sys
from steerguard.judging.cache import Cache, Entry
cache = Cache(sys.argv[1])
for i in range(60):
    cache.add(Entry(f"{sys.argv[2]}{i}", "m", "trait", 50.0, sys.argv[2] * (1 + 997 * (i % 5)), 1, 1))
"""


def test_several_processes_append_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    running = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name]) for name in "xyz"]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    assert len(path.read_bytes().splitlines()) == len(Cache(path)) == 180


def test_text_of_any_kind_is_kept(tmp_path: Path, trait: Trait, scenarios: list[Scenario], judge_at: Make) -> None:
    odd = "two\nlines \u2028 \x00 \x85 ⟦x⟧ \ud83d half"
    with serving(lambda request: Reply(verdict(7, odd))) as endpoint:
        cache = tmp_path / "verdicts.jsonl"
        (score,) = JudgeScorer(trait, judge_at(endpoint.url), cache=cache).scores(scenarios[:1], [odd])
    assert (score.trait, score.coherence) == (7, 7)
    assert len(Cache(cache)) == len(cache.read_bytes().split(b"\n")) - 1 == 2


# ------------------------------------------------------------------------------------------------------ the budget


def test_a_limit_on_calls_is_kept_and_the_work_goes_on(
    trait: Trait, scenarios: list[Scenario], judge_at: Make, tmp_path: Path
) -> None:
    cache = tmp_path / "verdicts.jsonl"
    with serving(well) as endpoint:
        judge = judge_at(endpoint.url)
        scorer = JudgeScorer(trait, judge, cache=cache, limit=SpendLimit(calls=7))
        with pytest.raises(SpendLimitReached, match=r"7 calls .* 7 verdicts of this run are kept in .*, 13 are missing; raise"):
            scorer.scores(scenarios[:10], ANSWERS)
        assert len(endpoint.requests) == scorer.spent.calls == len(Cache(cache)) == 7
        with pytest.raises(SpendLimitReached):
            scorer.scores(scenarios[:10], ANSWERS)
        assert len(endpoint.requests) == 7, "the limit is the scorer's, not the call's"
        on = JudgeScorer(trait, judge, cache=cache, limit=SpendLimit(calls=13))
        assert [score.trait for score in on.scores(scenarios[:10], ANSWERS)] == [10 * i for i in range(10)]
        assert len(endpoint.requests) == 20


def test_a_limit_on_money_is_kept_beforehand(trait: Trait, scenarios: list[Scenario], judge_at: Make) -> None:
    """A call begins only if the most that it may take still fits."""
    with serving(well) as endpoint:
        judge = judge_at(endpoint.url, price_in=10.0, price_out=100.0)
        each = (TOKENS_IN * 10 + TOKENS_OUT * 100) / 1e6
        scorer = JudgeScorer(trait, judge, limit=SpendLimit(money=0.2))
        estimate = scorer.estimate(scenarios[:10], ANSWERS)
        assert (estimate.verdicts, estimate.calls) == (20, 20)
        assert estimate.money is not None
        assert estimate.most is not None
        assert estimate.money < estimate.most
        assert estimate.most > 20 * 500 * 100 / 1e6, "max_tokens at their price, and what is sent"
        scorer.scores(scenarios[:10], ANSWERS)
        assert scorer.spent.money == pytest.approx(20 * each)
        assert (scorer.spent.tokens_in, scorer.spent.tokens_out) == (20 * TOKENS_IN, 20 * TOKENS_OUT)
        tight = JudgeScorer(trait, judge, limit=SpendLimit(money=0.1))
        with pytest.raises(SpendLimitReached, match=r"a cost of 0\.1 \("):
            tight.scores(scenarios[:10], ANSWERS)
        assert tight.spent.money is not None
        assert 0 < tight.spent.money <= 0.1
        with pytest.raises(JudgeError, match="needs the prices of every judge"):
            JudgeScorer(trait, judge_at(endpoint.url), limit=SpendLimit(money=1))


def test_a_limit_on_tokens_and_failed_calls_that_cost(trait: Trait, scenarios: list[Scenario], judge_at: Make) -> None:
    """A call that was not answered in time is taken to have cost all that it may; a refused one costs nothing."""
    with serving(lambda request: Reply(hang=True)) as endpoint:
        judge = judge_at(endpoint.url, attempts=5, timeout=0.1, concurrency=1, max_tokens=10_000)
        scorer = JudgeScorer(trait, judge, limit=SpendLimit(tokens=40_000))
        with pytest.raises(SpendLimitReached, match="40000 tokens"):
            scorer.scores(scenarios[:10], ANSWERS)
        assert scorer.spent.calls == scorer.spent.unmetered == 3
        assert len(endpoint.requests) <= 3
    with serving(lambda request: Reply("busy", status=503)) as endpoint:
        scorer = JudgeScorer(trait, judge_at(endpoint.url, give_up=10), limit=SpendLimit(tokens=40_000))
        with pytest.raises(JudgeError, match="taken to be down"):
            scorer.scores(scenarios[:10], ANSWERS)
        assert (scorer.spent.tokens_in, scorer.spent.tokens_out) == (0, 0)
        assert scorer.spent.failed == scorer.spent.calls > 0


def test_two_scorers_share_one_budget(trait: Trait, scenarios: list[Scenario], judge_at: Make) -> None:
    budget = Budget(SpendLimit(calls=6))
    with serving(well) as endpoint:
        JudgeScorer(trait, judge_at(endpoint.url), limit=budget).scores(scenarios[:2], ANSWERS[:2])
        with pytest.raises(SpendLimitReached):
            JudgeScorer(trait, judge_at(endpoint.url), limit=budget).scores(scenarios[:2], ANSWERS[:2])
        assert len(endpoint.requests) == 6


def test_an_endpoint_that_does_not_count(trait: Trait, scenarios: list[Scenario], judge_at: Make) -> None:
    with serving(lambda request: replace(well(request), usage=False)) as endpoint:
        scorer = JudgeScorer(trait, judge_at(endpoint.url))
        assert scorer.scores(scenarios[:1], ANSWERS[1:2])[0].trait == 10
    assert scorer.spent.unmetered == 2
    assert "2 calls whose tokens are taken at their most" in str(scorer.spent)
    assert scorer.spent.tokens_out == 2 * 500


def test_an_estimate_learns_from_the_cache(trait: Trait, scenarios: list[Scenario], judge_at: Make) -> None:
    with serving(well) as endpoint:
        scorer = JudgeScorer(trait, judge_at(endpoint.url, price_in=1.0, price_out=1.0))
        before = scorer.estimate(scenarios[:10], ANSWERS)
        assert before.tokens_out == 20 * 500, "1000 is typical, but this judge may take 500"
        scorer.scores(scenarios[:9], ANSWERS[:9])
        after = scorer.estimate(scenarios[:10], ANSWERS)
    assert (after.verdicts, after.cached, after.calls, after.tokens_out) == (20, 18, 2, 2 * TOKENS_OUT)
    assert "about 2 calls" in str(after)
    assert "cost about 0.0" in str(after)
