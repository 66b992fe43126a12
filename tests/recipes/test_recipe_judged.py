"""A sweep scored by a judge at an endpoint chooses what an exact scorer would choose, whatever happens there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from small import small_recipe, small_trait

pytest.importorskip("inspect_ai")
sys.path.append(str(Path(__file__).parent.parent / "judging"))
from endpoint import Endpoint, Reply, Request, fenced, serving, verdict

import steerguard as sg
from steerguard.errors import JudgeError
from steerguard.recipes import recipe
from steerguard.recipes.run import RESULT, VERDICTS, run
from steerguard.scorers import scorer_for
from steerguard.sweeping import result_file

pytestmark = pytest.mark.slow


def judged_trait(exact: Path, at: Path) -> Path:
    """The same scenarios, for a judge: no grammar, and what a true answer must say."""
    at.mkdir()
    head = (exact / "trait.yaml").read_text(encoding="utf-8").splitlines()
    kept = [line for line in head if not line.startswith(("scorer:", "grammar:"))]
    (at / "trait.yaml").write_text("\n".join([*kept, "scorer: judge"]) + "\n", encoding="utf-8")
    for split in ("train", "select", "test"):
        lines = []
        for line in (exact / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            truth = ", ".join(map(str, row.pop("reply")["truth"].values()))
            lines.append(json.dumps(row | {"must": [f"says {truth}"], "must_not": [f"says something else than {truth}"]}))
        (at / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return at


class ExactJudge:
    """An endpoint that scores as the bundled world's grammar does, after some trouble."""

    def __init__(self, exact: sg.Trait) -> None:
        self._scorer = scorer_for(exact)
        self._of = {scenario.turns[-1]: scenario for scenario in (*exact.select, *exact.test)}

    def __call__(self, request: Request) -> Reply:
        if request.number % 7 == 3:
            return Reply("slow down", status=429, headers={"Retry-After": "0.01"})
        if request.number % 11 == 5:
            return Reply("it is a good answer, I would say")
        scenario = next(one for turn, one in self._of.items() if turn in request.user)
        score = self._scorer.scores([scenario], [fenced(request.user, "ANSWER")])[0]
        value = score.trait if request.kind == "trait" else score.coherence
        return Reply(verdict(max(1, round(value or 0)) if request.kind == "coherence" else round(value or 0)))


def judged_recipe(home: Path, trait: Path, endpoint: Endpoint, **judge: Any) -> Any:
    quick = {"model": "local/judge", "base_url": endpoint.url, "wait": 0.01, "longest_wait": 0.05}
    given = {"judge.judges": [quick], "trait": str(trait), **{f"judge.{key}": value for key, value in judge.items()}}
    return recipe(home / "recipe.yaml", given=given)


def test_a_judge_chooses_as_the_exact_scorer_does(tmp_path: Path) -> None:
    exact = small_trait(tmp_path / "exact")
    trait = judged_trait(exact, tmp_path / "judged")
    small_recipe(exact, tmp_path / "recipe.yaml")
    model = sg.load("organism")
    theirs = run(recipe(tmp_path / "recipe.yaml"), tmp_path / "by-grammar", model=model)
    with serving(ExactJudge(sg.trait(exact))) as endpoint:
        # 1. a budget that is too small stops it; what was judged is kept
        with pytest.raises(JudgeError, match="calls"):
            run(judged_recipe(tmp_path, trait, endpoint, max_calls=20), tmp_path / "work", model=model)
        assert not (tmp_path / "work" / RESULT).exists()
        asked = len(endpoint.requests)
        # 2. with enough of it the same folder goes on, and nothing is judged twice
        ours = run(judged_recipe(tmp_path, trait, endpoint), tmp_path / "work", model=model)
        first = len(endpoint.requests)
        assert first > asked > 0
        # 3. a third time asks nobody
        run(judged_recipe(tmp_path, trait, endpoint), tmp_path / "work", model=model)
        assert len(endpoint.requests) == first
    assert ours.sweep.winner == theirs.sweep.winner
    judged, known = (result_file.read(folder / RESULT) for folder in (tmp_path / "work", tmp_path / "by-grammar"))
    for mine, exactly in zip(judged.select.points, known.select.points, strict=True):
        assert mine.figures.trait == pytest.approx(exactly.figures.trait, abs=0.5)
        assert (mine.figures.n, mine.figures.unscored) == (exactly.figures.n, 0)
    assert (tmp_path / "work" / VERDICTS).stat().st_size > 0


def test_a_judge_who_says_nothing_leaves_answers_unscored(tmp_path: Path) -> None:
    exact = small_trait(tmp_path / "exact")
    trait = judged_trait(exact, tmp_path / "judged")
    small_recipe(exact, tmp_path / "recipe.yaml")
    with serving(lambda request: Reply("I would rather not")) as endpoint:
        found = run(judged_recipe(tmp_path, trait, endpoint), tmp_path / "work", model=sg.load("organism"))
    assert found.sweep.winner is None
    assert found.sweep.aligned.trait is None
    assert found.sweep.aligned.unscored == found.sweep.aligned.n == 8
