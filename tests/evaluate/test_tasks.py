"""MT-Bench and AlpacaEval as Inspect runs them: both arms in one log, the library's figures, a grader that is a third."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai")

from endpoint import Reply, Request
from inspect_ai import eval
from inspect_ai.model import ModelOutput, ModelUsage, get_model
from test_graded import INSTRUCTIONS, QUESTIONS, REFERENCES, chosen, graded, lines, taste

import steerguard as sg
from steerguard.errors import InputError
from steerguard.evaluate.provider import guarded_model
from steerguard.evaluate.tasks import ATTEMPTS, alpaca_eval, drawn, mt_bench

# streams that Inspect leaves open
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSPECT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("INSPECT_DISPLAY", "none")


class Grader:
    """A judge in this process, by Inspect's own fake, that behaves as an endpoint of the judges' tests does."""

    def __init__(self, behave: Callable[[Request], Reply]) -> None:
        self.asked: list[str] = []
        self._behave = behave
        self.model = get_model("mockllm/gpt-oss-120b", custom_outputs=self._reply)

    def _reply(self, input: Any, tools: Any, tool_choice: Any, config: Any) -> ModelOutput:
        body = {"messages": [{"role": m.role, "content": m.text} for m in input]}
        self.asked.append(body["messages"][-1]["content"])
        text = self._behave(Request(len(self.asked) - 1, "", {}, body)).text
        output = ModelOutput.from_content("gpt-oss-120b", text)
        output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)  # or it fetches a tokenizer
        return output


def run(task: Any, model: Any, tmp_path: Path, **roles: Any) -> Any:
    (log,) = eval(
        task, model=model, model_roles=roles, log_dir=str(tmp_path / "logs"), max_tokens=8, temperature=1.0, log_level="error"
    )  # fmt: skip
    return log


def figures(log: Any) -> dict[str, float]:
    (score,) = log.results.scores
    return {name: metric.value for name, metric in score.metrics.items()}


def mt(tmp_path: Path) -> Any:
    return mt_bench(str(lines(tmp_path / "q.jsonl", QUESTIONS)), str(lines(tmp_path / "r.jsonl", REFERENCES)))


def test_mt_bench_grades_both_arms(model: sg.Backend, guard: sg.Guard, tmp_path: Path) -> None:
    grader = Grader(graded).model
    log = run(mt(tmp_path), guarded_model(model, guard), tmp_path, baseline=guarded_model(model), grader=grader)
    assert log.status == "success", log.error
    rows = [grade for sample in log.samples for grade in sample.scores["grades"].metadata["grades"]]
    assert len(rows) == 12
    sampling = sg.Sampling(max_new_tokens=8, temperature=1.0)
    for row in rows:
        question = next(q for q in QUESTIONS if str(q["question_id"]) == row["question"])
        if row["turn"] == 1:
            on = guard if row["arm"] == "guarded" else None
            assert row["answer"] == model.generate(question["turns"][0], guards=on, sampling=sampling)[0].text
    told = figures(log)
    by_arm = {arm: [row["value"] for row in rows if row["arm"] == arm] for arm in ("guarded", "unguarded")}
    assert told["guarded"] == pytest.approx(sum(by_arm["guarded"]) / 6) and told["guarded_n"] == 6
    assert told["change"] == pytest.approx(told["guarded"] - told["unguarded"])
    assert told["change_low"] <= told["change"] <= told["change_high"]
    assert all(row["value"] in (taste(row["answer"]), taste(row["answer"].strip())) for row in rows)


def test_alpaca_eval_chooses_between_the_arms(model: sg.Backend, guard: sg.Guard, tmp_path: Path) -> None:
    path = tmp_path / "alpaca_eval.json"
    path.write_text(json.dumps(INSTRUCTIONS[:8]))

    def not_of_the_first(request: Request) -> Reply:
        return Reply("no verdict") if "day 0" in request.user else chosen(request)

    grader = Grader(not_of_the_first)
    log = run(alpaca_eval(str(path)), guarded_model(model, guard), tmp_path, baseline=guarded_model(model), grader=grader.model)
    assert log.status == "success", log.error
    found = {sample.id: sample.scores["choices"].metadata["preference"] for sample in log.samples}
    for row in found.values():
        on, off = taste(row["guarded"]), taste(row["unguarded"])
        if row["instruction"] > 0:
            assert row["value"] == (0.5 if on == off else float(on > off))
    unscored = [row for row in found.values() if row["value"] is None]
    assert [row["instruction"] for row in unscored] == ([0] if found[0]["guarded"] != found[0]["unguarded"] else [])
    assert log.results.scores[0].unscored_samples == len(unscored)
    assert sum("day 0" in asked for asked in grader.asked) == ATTEMPTS * len(unscored)
    told = figures(log)
    values = [100 * row["value"] for row in found.values() if row["value"] is not None]
    assert told["win_rate"] == pytest.approx(sum(values) / len(values)) and told["win_rate_n"] == len(values)
    assert told["length_controlled_low"] <= told["length_controlled"] <= told["length_controlled_high"]


@pytest.mark.parametrize("case", ["no grader", "grades its twin", "other model"])
def test_roles_that_cannot_be(case: str, model: sg.Backend, guard: sg.Guard, tmp_path: Path, folder: Path) -> None:
    plain = guarded_model(model)
    other = guarded_model(sg.load(folder, backend="hf")) if case == "other model" else plain
    grader = Grader(graded)
    roles = {
        "no grader": {"baseline": plain},
        "grades its twin": {"baseline": plain, "grader": plain},
        "other model": {"baseline": other, "grader": grader.model},
    }[case]
    log = run(mt(tmp_path), guarded_model(model, guard), tmp_path, **roles)
    assert not grader.asked
    assert log.status == "error"
    why = {"no grader": "grader", "grades its twin": "grades itself", "other model": "without its guards"}
    assert why[case] in str(log.error)


def test_twins_are_drawn_alike(model: sg.Backend, guard: sg.Guard) -> None:
    from inspect_ai.model import GenerateConfig

    twins = {"unguarded": guarded_model(model), "guarded": guarded_model(model, guard)}
    twins["guarded"].config = GenerateConfig(temperature=0.5, seed=3)
    assert drawn(twins) == GenerateConfig(temperature=0.5, seed=3)
    twins["unguarded"].config = GenerateConfig(temperature=0.7)
    with pytest.raises(InputError, match="temperature"):
        drawn(twins)


def test_what_is_not_known_is_no_number() -> None:
    from steerguard.evaluate.tasks import _interval

    assert all(math.isnan(value) for value in _interval("change", None).values())
