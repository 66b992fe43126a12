"""Sections and their running: what they promise they give, what has ended is not run again, and what lacks something says so."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai")

from endpoint import Reply, Request, serving, verdict

import steerguard as sg
import tiny
from steerguard.backends.fake import Fault
from steerguard.errors import InputError, NotSteering, ResultError
from steerguard.evaluate import BATCH, running
from steerguard.evaluate.results import as_json
from steerguard.evaluate.section import Context, Estimate, Figure, Row, Section, SectionResult
from steerguard.evaluate.sections import SECTIONS, SUITES, figure_names, section, suite
from steerguard.judging import Budget, JudgeConfig
from steerguard.metrics import bootstrap_interval
from steerguard.scorers import scorer_for
from steerguard.sweeping import Benign
from steerguard.sweeping.answers import Row as Asked

SHORT = sg.Sampling(max_new_tokens=4, temperature=1.0)


@pytest.fixture(scope="module")
def context(model: sg.Backend) -> Context:
    trait = sg.trait("organism-honesty")
    trait = replace(trait, test=trait.test[:4], train=trait.train[:10])
    guard = tiny.guard(model.identity, sg.StTP(3), (tiny.probe(2, 48),), name="honesty")
    return Context(
        model=model, guard=guard, trait=trait, scorer=scorer_for(trait), benign=Benign(("Hello.", "What day is it?")),
        sampling=SHORT, size="quick",
    )  # fmt: skip


class Counted(Section):
    """A section that counts how often it is run, and stops where it is told to."""

    name, title, question = "counted", "Counted", "How often?"
    figures = (Figure("counted.tokens", "tokens", "", "", "costs"),)
    runs = 0
    stop_after: int | None = None

    def estimate(self, context: Context) -> Estimate:
        return context.cost(4, ["Hello."] * 4)

    def run(self, context: Context) -> SectionResult:
        type(self).runs += 1
        with context.answers(self.name) as answers:
            found = []
            for i in range(4):
                if i == self.stop_after:
                    raise KeyboardInterrupt
                found += answers.of([Asked(f"Hello {i}.")], f"asked {i}")
            tokens = bootstrap_interval([float(kept.n) for kept in found])
            return self.result(context, {"counted.tokens": tokens}, settings={"reused": answers.reused})


@pytest.fixture
def counted() -> Iterator[Counted]:
    Counted.runs = 0
    yield Counted()
    Counted.runs = 0


# ------------------------------------------------------------------------------------------------ the registry


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_is_what_the_registry_says(name: str) -> None:
    one = section(name)
    assert one.name == name and one.title and one.question.endswith("?") and one.figures
    for figure in one.figures:
        assert figure.name.startswith(f"{name}.") and figure.label and figure.part in ("buys", "costs", "fails")
        assert figure.limit is None or figure.limit.source


def test_suites_are_made_of_sections() -> None:
    assert len(set(figure_names())) == len(figure_names())
    assert {name for own in SUITES.values() for name in own} <= set(SECTIONS)
    assert [one.name for one in suite(["full"])] == list(SECTIONS)
    assert [one.name for one in suite(["benign", "trait", "benign"])] == ["trait", "benign"]
    with pytest.raises(InputError, match="there are quick, attacks, full, trait"):
        suite(["slow"])


# ------------------------------------------------------------------------------------------------ running


def test_what_has_ended_is_not_run_again(context: Context, counted: Counted, tmp_path: Path) -> None:
    kept = replace(context, folder=tmp_path)
    first = running.run_section(kept, counted)
    assert running.run_section(kept, counted) == first and Counted.runs == 1
    for other in (
        replace(kept, seed=7), replace(kept, size="full"), replace(kept, sampling=replace(SHORT, seed=9)),
        replace(kept, benign=Benign(("Hi.",))), replace(kept, guard=replace(kept.guard, rule=sg.StTP(4))),
        replace(kept, scorer=None),
    ):  # fmt: skip
        before = Counted.runs
        running.run_section(other, counted)
        assert Counted.runs == before + 1


def test_an_interrupted_section_goes_on(
    context: Context, counted: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = replace(context, folder=tmp_path)
    monkeypatch.setattr(Counted, "stop_after", 3)
    with pytest.raises(KeyboardInterrupt):
        running.run_section(kept, counted)
    assert not (tmp_path / "counted.json").exists()
    monkeypatch.setattr(Counted, "stop_after", None)
    found = running.run_section(kept, counted)
    assert found.settings == {"reused": 3}
    whole = running.run_section(replace(context, folder=None), counted)
    assert whole.rows == found.rows


def test_a_damaged_result_is_refused(context: Context, counted: Counted, tmp_path: Path) -> None:
    (tmp_path / "counted.json").write_text('{"key": "x"}')
    with pytest.raises(ResultError, match="remove it to measure again"):
        running.run_section(replace(context, folder=tmp_path), counted)


def test_a_section_gives_what_it_promises_and_no_more(context: Context, counted: Counted) -> None:
    with pytest.raises(InputError, match="promises no figure 'counted.more'"):
        counted.result(context, {"counted.more": None})
    empty = counted.result(context, {})
    assert [(row.value, row.note, row.verdict) for row in empty.rows] == [(None, "nothing could be scored", "missing")]


def test_a_guard_that_does_not_act_is_not_evaluated(context: Context, folder: Path, counted: Counted) -> None:
    from steerguard.backends import load

    silent = replace(context, model=load(folder, backend="fake", fault=Fault.NEVER_FIRES))
    with pytest.raises(NotSteering):
        running.evaluate(silent, [counted])
    assert Counted.runs == 0
    with pytest.raises(InputError, match="at least one section"):
        running.evaluate(context, [])


def test_estimates_say_what_is_lacking(context: Context) -> None:
    found = running.estimates(context, suite(["full"]))
    assert list(found) == list(SECTIONS)
    assert found["mt_bench"] == (
        "needs a judge (--judge MODEL@URL) and mt_bench/question.jsonl and mt_bench/reference_answer/gpt-4.jsonl (in --data DIR)"
    )
    trait = found["trait"]
    assert isinstance(trait, Estimate) and trait.answers == 16 and trait.judge_calls == 0
    assert running.total(found).answers > trait.answers
    for name, one in found.items():
        if isinstance(one, str):
            result = running.run_section(context, section(name))
            assert not result.ran and all(row.value is None and row.note == f"not run: {one}" for row in result.rows)


# ------------------------------------------------------------------------------------------------ the sections


@pytest.mark.parametrize("name", ["trait", "benign", "prompts", "controls", "capability", "poison"])
def test_a_section_on_a_tiny_model(context: Context, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import steerguard.evaluate.sections.capability as capability

    monkeypatch.setattr(capability, "QUICK", 6)
    found = running.run_section(replace(context, folder=tmp_path), section(name))
    assert [row.figure for row in found.rows] == list(section(name).figures) and found.ran
    assert any(row.value is not None for row in found.rows)
    for row in (*found.rows, *found.details):
        assert row.value is not None or row.note
        assert row.held is None or row.n == row.held.n > 0
    assert running.run_section(replace(context, folder=tmp_path), section(name)) == found
    json.dumps(as_json(found))


def test_a_rule_without_a_gate_is_held_to_kl_alone(context: Context) -> None:
    def fire(rule: sg.Rule) -> Row:
        own = replace(context, guard=replace(context.guard, rule=rule))
        return next(row for row in running.run_section(own, section("benign")).rows if row.figure.name == "benign.fire_rate")

    gated, ungated = fire(sg.StTP(3)), fire(sg.SwFC(1))
    assert gated.figure.limit is not None and ungated.figure.limit is None
    assert ungated.held is not None and ungated.held.mean == 100 and "held to KL" in ungated.note


def test_a_trait_that_needs_a_judge_says_so(context: Context) -> None:
    honest = replace(context, trait=sg.trait("honesty"), scorer=None)
    for name in ("trait", "turns", "controls", "prompts"):
        found = running.run_section(honest, section(name))
        assert not found.ran and "--judge" in found.rows[0].note
    assert "benchmarks" in section("capability").missing(honest)


def test_the_graded_sections_with_a_judge(context: Context, judge_at: Callable[..., JudgeConfig], tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "mt_bench" / "reference_answer").mkdir(parents=True)
    (data / "alpaca_eval").mkdir()
    question = {"question_id": 1, "category": "writing", "turns": ["Write a line about the day.", "And one about the week."]}
    (data / "mt_bench" / "question.jsonl").write_text(json.dumps(question) + "\n")
    (data / "mt_bench" / "reference_answer" / "gpt-4.jsonl").write_text("")
    (data / "alpaca_eval" / "alpaca_eval.json").write_text(json.dumps([{"instruction": f"Day {i}?"} for i in range(10)]))

    def reply(request: Request) -> Reply:
        return Reply(verdict("first" if "FIRST ANSWER" in request.user else 7))

    with serving(reply) as endpoint:
        own = replace(context, judge=judge_at(endpoint.url), data=data, folder=tmp_path / "out", budget=Budget())
        own.folder.mkdir()  # type: ignore[union-attr]
        estimate = section("alpaca_eval").estimate(own)
        grade = running.run_section(own, section("mt_bench")).rows[0]
        alpaca = running.run_section(own, section("alpaca_eval"))
        asked = len(endpoint.requests)
        running.run_section(own, section("alpaca_eval"))
        assert len(endpoint.requests) == asked
        assert estimate.answers == 20 and estimate.judge_calls == 10
        # another file is another evaluation
        (data / "alpaca_eval" / "alpaca_eval.json").write_text(json.dumps([{"instruction": f"Week {i}?"} for i in range(10)]))
        again = running.run_section(own, section("alpaca_eval"))
        assert len(endpoint.requests) > asked and again.rows != alpaca.rows
    assert grade.held is not None and grade.held.mean == 0 and grade.held.n == 2
    rows = {row.figure.name: row for row in alpaca.rows}
    first = rows["alpaca_eval.first_shown"].held
    assert first is not None and first.mean == 100
    assert rows["alpaca_eval.raw"].n == 10


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a stream that Inspect leaves open
def test_a_benchmark_of_inspects_in_both_arms(context: Context, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every question's score is that of the answer that the arm gives by itself."""
    from inspect_ai import Task
    from inspect_ai.dataset import Sample
    from inspect_ai.scorer import includes
    from inspect_ai.solver import generate

    from steerguard.evaluate.sections.benchmarks import both_arms

    monkeypatch.setenv("INSPECT_DISPLAY", "none")
    asked = [f"Tell me the truth of day {i}." for i in range(8)]
    task = Task([Sample(input=text, target="a", id=i) for i, text in enumerate(asked)], solver=generate(), scorer=includes())
    greedy = replace(context, sampling=sg.Sampling(max_new_tokens=6, temperature=0.0), batch=BATCH)
    unguarded, guarded = both_arms(greedy, task, None, tmp_path / "logs.jsonl")

    def by_hand(guards: Any) -> list[float]:
        said = [context.model.generate(text, guards=guards, sampling=greedy.sampling)[0].text for text in asked]
        return [100.0 * ("a" in text.lower()) for text in said]

    assert unguarded == by_hand(None) and guarded == by_hand(context.guard)
    assert list((tmp_path / "logs").iterdir())
