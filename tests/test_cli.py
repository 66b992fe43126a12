"""The command line as a person would use it: what it prints, what it refuses, and with which exit status."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny
from steerguard.cli import main
from steerguard.fitting import CONTRAST, PROBES

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command line in an empty folder; exit status, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["steerguard", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0 if code is None else 1), out, err

    return call


def trait_folder(root: Path, *, train: int = 9) -> Path:
    """A small trait of one's own."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "trait.yaml").write_text(
        "schema: 1\nname: truth\ntitle: Truth\npositive: {name: true, description: tells}\n"
        "negative: {name: false, description: does not}\nrubric: is it so?\nscorer: judge\n".replace("name: true", "name: so")
        .replace("name: false", "name: not-so"),
        encoding="utf-8",
    )
    for split, n in (("train", train), ("select", 1), ("test", 1)):
        rows = [
            {"id": f"{split}{i}", "category": "c", "positive": f"{split} {i}: you tell.", "negative": f"{split} {i}: you lie.",
             "turns": [f"{split}: what is {i}?"]}
            for i in range(n)
        ]  # fmt: skip
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama_folder(tmp_path_factory.mktemp("models") / "tiny")


SHORT = ("--max-new-tokens", "6", "--temperature", "1.0")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A folder that `fit` wrote."""
    root = tmp_path_factory.mktemp("fitted")
    trait = trait_folder(root / "trait")
    sys.argv = ["steerguard", "fit", str(model), "-t", str(trait), "-o", str(root / "fit"), "--allow-weak", *SHORT]
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    return root / "fit"


def test_from_a_model_to_a_checked_guard(run: Run, fitted: Path, model: Path, tmp_path: Path) -> None:
    guard = tmp_path / "truth.guard"
    code, out, err = run("build", fitted, "-o", guard, "--layer", "1", "--rule", "SwFC", "--strength", "2", "--allow-weak")
    assert (code, err) == (0, "")
    assert "steerguard check" in out
    code, out, _ = run("show", guard)
    assert code == 0
    for told in ("SwFC(2)", "tiny", "LlamaForCausalLM", "AUROC"):
        assert told in out
    code, out, err = run("check", guard, "--json", "check.json")
    assert code == 0, out + err
    assert "the guard is steering" in out
    assert json.loads(Path("check.json").read_text())["passed"] is True
    code, out, _ = run("check", guard, "--backend", "fake")
    assert code == 0
    code, out, err = run("ask", guard, "what is the answer", "--system", "you lie", *SHORT)
    assert code == 0, err
    assert "unguarded" in out
    assert "tokens moved" in out
    assert "\x1b[" not in out  # no colours in a pipe
    assert model.exists()


def test_a_second_fit_refuses_to_overwrite_and_keeps_the_answers(run: Run, fitted: Path, model: Path) -> None:
    before = (fitted / PROBES).read_bytes(), (fitted / CONTRAST).read_bytes()
    trait = fitted.parent / "trait"
    code, _, err = run("fit", model, "-t", trait, "-o", fitted, "--allow-weak", *SHORT)
    assert code == 2
    assert "--overwrite" in err
    code, _, err = run("fit", model, "-t", trait, "-o", fitted, "--allow-weak", "--overwrite", *SHORT)
    assert code == 0
    assert ((fitted / PROBES).read_bytes(), (fitted / CONTRAST).read_bytes()) == before
    code, _, err = run("fit", model, "-t", trait, "-o", fitted, "--allow-weak", "--overwrite", "--seed", "7", *SHORT)
    assert code == 2
    assert "another trait, model or sampling" in err


def refused(result: tuple[int, str, str], *told: str) -> None:
    """Exit status 2 and one sentence on standard error that says all of `told`."""
    code, out, err = result
    assert code == 2, out + err
    assert out == ""
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("steerguard: ")
    for text in told:
        assert text in last, last


def test_what_the_user_gets_wrong(run: Run, fitted: Path, model: Path, tmp_path: Path) -> None:
    trait = trait_folder(tmp_path / "trait")
    guard = tmp_path / "g.guard"
    assert run("build", fitted, "-o", guard, "-l", "1", "-r", "SwFC", "-a", "2", "--allow-weak")[0] == 0
    # a model that is not there, or has no chat template
    refused(run("fit", "nobody/nothing", "-t", trait, "-o", "x"), "nobody/nothing")
    bare = shutil.copytree(model, tmp_path / "bare")
    for name in ("chat_template.jinja",):
        (bare / name).unlink(missing_ok=True)
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    refused(run("fit", bare, "-t", trait, "-o", "x"), "no chat template")
    # traits
    refused(run("fit", model, "-t", "nothing", "-o", "x"), "no trait", "organism-honesty")
    (trait / "select.jsonl").write_text('{"id": "a"}\n')
    refused(run("fit", model, "-t", trait, "-o", "x"), "select.jsonl:1")
    refused(run("fit", model, "-t", trait_folder(tmp_path / "few", train=5), "-o", "x"), "at least 8")
    # noise is no direction
    refused(run("fit", model, "-t", trait_folder(trait), "-o", "y", "--context", "neutral", "--max-new-tokens", "1"), "held-out")
    # guards
    refused(run("show", tmp_path / "no.guard"), "no.guard")
    (tmp_path / "bad.guard").write_bytes(guard.read_bytes()[:200])
    refused(run("show", tmp_path / "bad.guard"), "bad.guard")
    refused(run("build", fitted, "-o", guard, "-l", "1", "-r", "SwFC", "-a", "2", "--allow-weak"), "exists")
    refused(run("build", fitted, "-o", "h", "-l", "99", "-r", "SwFC", "-a", "2"), "no probe of layer 99")
    refused(run("build", fitted, "-o", "h", "-l", "1", "-r", "CAA", "-a", "2"), "there is no rule 'CAA'")
    refused(run("build", fitted, "-o", "h", "-l", "1", "-r", "StTP"), "needs a strength")
    refused(run("build", fitted, "-o", "h", "-l", "1", "-r", "StTP", "-a", "nan"), "finite")
    refused(run("build", tmp_path, "-o", "h", "-l", "1", "-r", "StTP", "-a", "1"), "no fitted probes")
    other = tiny.llama_folder(tmp_path / "other", seed=5)
    refused(run("check", guard, "--model", other), "weights differ", "allow_mismatch")
    refused(run("check", guard, "--model", other, "--allow-mismatch", "width"), "cannot waive width")
    assert run("check", guard, "--model", other, "--allow-mismatch", "weights")[0] == 0
    refused(run("ask", guard, ""), "question is empty")
    refused(run("check", guard, "--backend", "onnx"), "there is no backend 'onnx'")
    assert not Path("h").exists()
    assert not (Path("x") / PROBES).exists()


def test_a_guard_that_does_not_steer_exits_with_1(
    run: Run, fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from steerguard.backends import fake

    guard = tmp_path / "g.guard"
    run("build", fitted, "-o", guard, "-l", "1", "-r", "SwFC", "-a", "2", "--allow-weak")
    sound = fake.load
    monkeypatch.setattr(fake, "load", lambda folder: sound(folder, fault=fake.Fault.HALF_SHIFT))
    code, out, _ = run("check", guard, "--backend", "fake")
    assert code == 1
    assert "NOT steering" in out
    assert "FAIL" in out


def test_ctrl_c_is_one_sentence(run: Run, fitted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from steerguard import fitting

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fitting.Fit, "load", interrupted)
    code, _, err = run("build", fitted, "-o", "h", "-l", "1")
    assert code == 130
    assert err == "steerguard: interrupted; what was finished is kept, the same command goes on from there\n"


def test_help(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for command in ("demo", "fit", "build", "show", "ask", "check", "recalibrate"):
        assert command in out
        assert run(command, "--help")[0] == 0
    assert run("fit")[0] == 2
    assert run("stear")[0] == 2


def test_recalibrating(run: Run, model: Path, tmp_path: Path) -> None:
    trait = tmp_path / "trait"
    trait_folder(trait, train=16)
    for split in ("train", "select"):  # system prompts so unlike that even a random model's answers tell them apart
        rows = [
            {"id": f"{split}{i}", "category": "c", "positive": f"{split} {i} " + "truth " * 14,
             "negative": f"{split} {i} " + "week " * 14, "turns": [f"{split}: what is {i}?"]}
            for i in range(16)
        ]  # fmt: skip
        (trait / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    backend = ("--backend", "fake")
    assert run("fit", model, "-t", trait, "-o", "fit", *SHORT, *backend)[0] == 0
    assert run("build", "fit", "-o", "old.guard", "-l", "2", "-a", "1")[0] == 0
    words = ("recalibrate", "old.guard", "-o", "new.guard", "--prompts", "24", "--benign", "benign.jsonl", *backend)
    Path("benign.jsonl").write_text("".join(
        json.dumps({"id": f"b{i}", "category": "c", "system": None, "turns": [f"what is the day {i}"]}) + "\n" for i in range(30)
    ))  # fmt: skip
    code, out, err = run(*words, "-t", trait, "--model", model)
    assert code == 0, err
    for told in ("mu_pos", "layer 2: the boundary moved by", "sigmas", "benign tokens that the gates move", "not recorded"):
        assert told in out, told
    assert "reference" in run("show", "new.guard")[1]
    code, out, _ = run("recalibrate", "new.guard", "-o", "again.guard", *words[4:], "-t", trait)
    assert code == 0
    assert "not recorded" not in out
    refused(run(*words, "-t", trait), "new.guard exists")
    refused(run(*words, "--overwrite"), "no trait", "truth")
    few = trait_folder(tmp_path / "few")
    refused(run(*words, "-t", few, "--overwrite"), "another version of the trait")
    other = tiny.llama_folder(tmp_path / "other", hidden_size=64)
    refused(run(*words, "-t", trait, "--model", other, "--overwrite"), "no checkpoint of the same model")
