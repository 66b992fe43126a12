"""The command from end to end: on the bundled model the quick suite gives a card; a broken guard gets a red one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))

import steerguard as sg
import tiny
from steerguard.cli import main
from steerguard.evaluate import card_file
from steerguard.evaluate.matching import shuffled_direction, standing_as
from steerguard.fitting import CONTRAST, Contrast, Fit, collect, embed, fit, prompts_of
from steerguard.organism.demo import SAMPLING
from steerguard.probe import fit_probe

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
LAYER = 4
Run = Callable[..., tuple[object, str, str]]


def told(at: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "steerguard.cli", *arguments]
    return subprocess.run(command, cwd=at, env=ENVIRONMENT, capture_output=True, text=True, check=False)


# ------------------------------------------------------------------------------------------------ without the model


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """The command line in this process: exit status, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["steerguard", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return (ended.value.code, *capsys.readouterr())

    return call


def test_the_figures_are_listed(run: Run) -> None:
    code, out, _ = run("evaluate", "--figures")
    assert code == 0 and "benign.kl" in out and "at most 0.1" in out


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--suite", "slow"], "there is no suite 'slow'"), (["--fail-below", "none.yaml"], "there is no file none.yaml"),
        (["--size", "huge"], "there is no size"), (["--data", "none"], "--data must be a folder"),
        (["--trait", "none"], "there is no trait"), ([], "was fitted on a trait 'honesty' that is not among the bundled ones"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_one_sentence(
    model: sg.Backend, folder: Path, tmp_path: Path, run: Run, more: list[str], why: str
) -> None:
    record = {"trait": {"name": "honesty", "sha256": "0"}}
    guard = replace(tiny.guard(model.identity, sg.StTP(3), (tiny.probe(2, 48),)), provenance=record)
    guard.save(tmp_path / "own.guard")
    code, _, err = run("evaluate", "own.guard", "--backend", "fake", "--model", str(folder), *more)
    assert code == 2 and why in err
    assert not (tmp_path / "own.evaluation").exists()


# ------------------------------------------------------------------------------------------------ on the bundled model


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fit of the bundled model on compassion, and a guard of it."""
    at = tmp_path_factory.mktemp("evaluation")
    model, trait = sg.load("organism"), sg.trait("organism-compassion")
    fitted = fit(model, trait, sampling=SAMPLING, store=at / "fit" / CONTRAST)
    fitted.save(at / "fit")
    fitted.guard(sg.StTP(24), LAYER).save(at / "good.guard")
    return at


@pytest.mark.slow
def test_the_quick_suite_ends_in_a_card(home: Path) -> None:
    plan = told(home, "evaluate", "good.guard", "--fit", "fit", "--dry-run")
    assert plan.returncode == 0 and "controls" in plan.stdout and not (home / "good.evaluation").exists()
    (home / "limits.yaml").write_text("trait.recovered: {at_least: 60}\nbenign.kl: measured\ncontrols.random: not exceeded\n")
    done = told(home, "evaluate", "good.guard", "--fit", "fit", "--fail-below", "limits.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    card = card_file.read(home / "good.evaluation" / "card.json")
    assert card.verdict in " ".join(done.stdout.split())
    for name in ("trait", "benign", "capability", "turns", "controls", "prompts"):
        section = next(one for one in card.sections if one.section == name)
        assert section.ran and any(row.value is not None for row in section.rows)
    recovered, random = card.row("trait.recovered"), card.row("controls.random")
    assert recovered is not None and recovered.verdict == "within"
    assert random is not None and random.held is not None and random.held.mean < 10
    for row in card.rows():
        assert row.held is None or row.n > 0
        assert row.held is not None or row.note
    # the same command is refused, and with --overwrite it asks the model nothing new
    assert told(home, "evaluate", "good.guard", "--fit", "fit").returncode == 2
    again = told(home, "evaluate", "good.guard", "--fit", "fit", "--overwrite")
    assert again.returncode == 0 and "trait, guarded" not in again.stderr
    # a gate on what is not good enough, or was not measured, fails
    (home / "strict.yaml").write_text("trait.score: {at_most: 1}\nmt_bench.grade: measured\n")
    failed = told(home, "card", "good.evaluation", "--fail-below", "strict.yaml")
    assert failed.returncode == 1 and failed.stdout.count("FAILED") == 2


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wrong layer", "shuffled labels"])
def test_a_broken_guard_gets_a_red_card(home: Path, how: str) -> None:
    broken(home, how).save(home / "broken.guard", overwrite=True)
    out = how.replace(" ", "-")
    done = told(home, "evaluate", "broken.guard", "--suite", "trait", "--suite", "benign", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    card = card_file.read(home / out / "card.json")
    assert card.light == "red" and card.verdict.startswith("Do not deploy as it is")
    assert "share of the gap brought back" in card.verdict


def broken(home: Path, how: str) -> sg.Guard:
    """The guard with its probe on a layer that it was not fitted on, or with a direction of labels drawn by lot."""
    good = sg.Guard.load(home / "good.guard")
    if how == "wrong layer":  # the last; on earlier ones than its own this direction steers as well
        return replace(good, probes=(replace(good.probes[0], layer=good.model.depth - 1),))
    model, trait = sg.load("organism"), sg.trait("organism-compassion")
    contrast: Contrast = collect(model, trait, sampling=SAMPLING, store=home / "fit" / CONTRAST)
    at = list(Fit.load(home / "fit")).index(LAYER)
    pos, neg = (rows[:, at] for rows in embed(model, contrast))
    v = shuffled_direction(pos, neg, good.probes[0], np.random.default_rng(0))
    tokens = np.concatenate([model.residuals(prompts_of(one)[1])[LAYER] for one in trait.test[:8]]).astype(np.float64)
    rho, on_v = tokens @ good.probes[0].v.astype(np.float64), tokens @ v.astype(np.float64)
    return replace(good, probes=(standing_as(good.probes[0], v, rho, on_v),), allow_weak=True)


@pytest.mark.slow
def test_a_direction_of_true_labels_is_another(home: Path) -> None:
    """The negation of the shuffled one: fitted on the labels as they are, it is the guard's."""
    model, trait = sg.load("organism"), sg.trait("organism-compassion")
    contrast = collect(model, trait, sampling=SAMPLING, store=home / "fit" / CONTRAST)
    pos, neg = (rows[:, 0] for rows in embed(model, contrast, layers=[LAYER]))
    own = sg.Guard.load(home / "good.guard").probes[0]
    assert float(fit_probe(pos, neg, layer=LAYER, groups=np.arange(len(pos))).v @ own.v) > 0.99
    assert abs(float(broken(home, "shuffled labels").probes[0].v @ own.v)) < 0.7
