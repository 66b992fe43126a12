"""A recipe from beginning to end on the bundled model: the same file again, whatever interrupts it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small import small_recipe, small_trait

import steerguard as sg
from steerguard.errors import RecipeError
from steerguard.recipes import recipe
from steerguard.recipes.run import RESULT, run
from steerguard.sweeping import result_file

pytestmark = pytest.mark.slow

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
KILLS = 10


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "steerguard.cli", *arguments]


def told(at: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=at, env=ENVIRONMENT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("recipe")
    small_recipe(small_trait(at / "trait"), at / "recipe.yaml")
    return at


@pytest.fixture(scope="module")
def whole(home: Path) -> Path:
    """The folder of a sweep that nothing interrupted."""
    at = home / "whole"
    at.mkdir()
    done = told(at, "sweep", "work", "--recipe", "../recipe.yaml", "-o", "best.guard", "--report", "page.html")
    assert done.returncode == 0, done.stderr
    for said in ("StTP(30)", "select: 8 scenarios, 3 settings", "guard: work/StTP.guard", "page.html"):
        assert said in done.stdout
    assert "settings steered: 24" in done.stderr
    return at


def test_what_comes_of_it(whole: Path) -> None:
    result = result_file.read(whole / "work" / RESULT)
    assert result.select.best == "StTP"
    chosen = result.select.chosen["StTP"]
    assert chosen.wins == 1.0
    assert result.settings.command.startswith("steerguard sweep work --recipe ../recipe.yaml")
    assert result.settings.recipe is not None
    assert result.test is not None
    assert [arm.name for arm in result.test.arms][:2] == ["aligned", "malicious"]
    aligned, malicious, steered = (result.test.arm(name) for name in ("aligned", "malicious", "StTP"))
    assert aligned is not None
    assert malicious is not None
    assert steered is not None
    assert steered.recovered is not None
    assert steered.recovered.mean > 50
    assert steered.projections is not None
    assert sum(steered.projections.moved) > 0 == sum(aligned.projections.moved if aligned.projections else [1])
    assert set(steered.metrics) >= {"cross_entropy", "target_distance", "repetition", "distinct_2", "compression"}
    for arm in result.test.arms:
        assert len(arm.rows) == 10
        assert all(row.tokens for row in arm.rows)
    guard = sg.Guard.load(whole / "best.guard")
    assert guard.digest == result.guards["StTP"].digest
    assert guard.provenance["chosen"]["wins"] == 1.0
    page = (whole / "page.html").read_text(encoding="utf-8")
    assert "StTP(30)" in page
    assert (whole / "page-points.csv").exists()


def test_killed_at_ten_random_moments_it_ends_in_the_same_file(home: Path, whole: Path) -> None:
    journals = ("contrast.jsonl", "sweep.jsonl", "test.jsonl")

    def written(work: Path) -> int:
        return sum((work / name).stat().st_size for name in journals if (work / name).exists())

    at = home / "killed"
    at.mkdir()
    seed = int.from_bytes(os.urandom(4), "little")
    rng = random.Random(seed)
    full = written(whole / "work")
    sweep = command("sweep", "work", "--recipe", "../recipe.yaml", "-o", "best.guard", "--report", "page.html", "--overwrite")
    for moment in sorted(rng.uniform(0, full) for _ in range(KILLS)):
        process = subprocess.Popen(sweep, cwd=at, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and written(at / "work") < moment:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(rng.choice([signal.SIGKILL, signal.SIGINT, signal.SIGTERM]))
        process.wait()
    done = subprocess.run(sweep, cwd=at, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (seed, done.stderr)
    ours, theirs = (json.loads((folder / "work" / RESULT).read_text()) for folder in (at, whole))
    theirs["settings"]["command"] = ours["settings"]["command"]  # which says --overwrite
    assert ours == theirs, seed
    for name in journals:  # and nothing was answered twice
        records = [json.loads(line)["record"] for line in (at / "work" / name).read_text().splitlines()]
        keys = [key for record in records for key in record.get("answers", {})]
        assert len(keys) == len(set(keys)), seed


def test_ctrl_c_says_how_to_go_on(home: Path) -> None:
    at = home / "stopped"
    at.mkdir()
    sweep = command("sweep", "work", "--recipe", "../recipe.yaml")
    process = subprocess.Popen(sweep, cwd=at, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (at / "work" / "contrast.jsonl").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    assert said.strip().endswith("interrupted; what was finished is kept, the same command goes on from there")
    assert "Traceback" not in said


def test_probes_of_another_trait_are_not_taken(whole: Path, home: Path) -> None:
    other = recipe(home / "recipe.yaml", [f"trait={'organism-compassion'}"])
    with pytest.raises(RecipeError, match="holds probes of the trait 'honesty', or of another version"):
        run(other, whole / "work", model=sg.load("organism"))


def test_a_report_of_a_folder(whole: Path) -> None:
    done = told(whole, "report", "work")
    assert done.stdout.split() == ["work/report.html", "work/report-points.csv", "work/report-answers.csv"]
    again = told(whole, "report", "work")
    assert again.returncode == 2
    assert "exists already" in again.stderr
    nothing = told(whole.parent, "report", "trait")
    assert nothing.returncode == 2
    assert "there is no file" in nothing.stderr


def test_the_papers_grid_on_what_fit_left(whole: Path, home: Path) -> None:
    """Without a recipe: the model, the trait and the sampling are those of the fit."""
    done = told(whole, "sweep", "work", "--trait", "../trait", "--dry-run")
    assert done.returncode == 0, done.stderr
    strong = sum(not probe.evidence.weak for probe in sg.Fit.load(whole / "work").values())
    assert f"{38 * strong} settings on {strong} layers" in done.stdout
    assert f"{38 * strong} settings on 8 select scenarios" in done.stdout
    assert "to learn from" not in done.stdout  # that was done
    unknown = told(whole, "sweep", "work", "--dry-run")
    assert unknown.returncode == 2
    assert "give its folder with --trait" in unknown.stderr
    fewer = told(
        whole, "sweep", "work", "--trait", "../trait", "--dry-run", "--screen", "4", "--stride", "3",
        "--set", "grid.layers=['4-7']",
    )  # fmt: skip
    assert "152 settings on 4 layers" in fewer.stdout
    assert "12 finalists on all 8" in fewer.stdout
    for wrong, message in (
        (["--set", "grid=3"], "grid: "), (["--judge", "a/b"], "is scored exactly"),
        (["--screen", "0"], "greater than or equal to 1"),
        (["--beside", "nothing.guard", "--no-test"], ""),
    ):  # fmt: skip
        refused = told(whole, "sweep", "work", "--trait", "../trait", "--dry-run", *wrong)
        assert (refused.returncode, message in refused.stderr) == ((2, True) if message else (0, True)), refused.stderr


def test_a_fit_and_a_sweep_of_it_give_the_guard_of_the_recipe(whole: Path) -> None:
    done = told(
        whole, "sweep", "work", "--trait", "../trait", "-o", "again.guard", "--set", "grid.rules={StTP: [30]}",
        "--set", "grid.layers=[3]", "--set", "grid.positions=[all]", "--set", "batch=8", "--set", "sampling.max_new_tokens=60",
        "--no-test",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sg.Guard.load(whole / "again.guard").digest == sg.Guard.load(whole / "best.guard").digest


def test_a_trait_that_needs_a_judge_says_so_before_the_long_work(tmp_path: Path) -> None:
    done = told(tmp_path, "sweep", "work", "--recipe", "organism/honesty", "--set", "trait=honesty", "--set", "benign=none")
    assert done.returncode == 2
    assert "the trait honesty is scored by a judge, and none is named: --judge MODEL@BASE_URL" in done.stderr
    judge = ("--dry-run", "--judge", "model")
    named = told(tmp_path, "sweep", "w", "--recipe", "organism/honesty", "--set", "trait=honesty", *judge)
    assert named.returncode == 2
    assert "names no endpoint" in named.stderr
