"""`steerguard export` and `steerguard fit --directions`, as a person would use them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import tiny
from steerguard.cli import main
from steerguard.exchange import read_directions
from steerguard.fitting import Fit

Run = Callable[..., tuple[int, str, str]]
SHORT = ("--max-new-tokens", "4", "--temperature", "1.0", "--backend", "fake", "--allow-weak")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)

    def call(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["steerguard", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama_folder(tmp_path_factory.mktemp("models") / "tiny")


def trait_folder(root: Path) -> Path:
    root.mkdir()
    (root / "trait.yaml").write_text(
        "schema: 1\nname: truth\ntitle: Truth\npositive: {name: so, description: tells}\n"
        "negative: {name: not-so, description: does not}\nrubric: is it so?\nscorer: judge\n",
        encoding="utf-8",
    )
    for split, n in (("train", 9), ("select", 1), ("test", 1)):
        rows = [
            {"id": f"{split}{i}", "category": "c", "positive": f"{split} {i}: you tell.", "negative": f"{split} {i}: you lie.",
             "turns": [f"{split}: what is {i}?"]}
            for i in range(n)
        ]  # fmt: skip
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return root


def refused(result: tuple[int, str, str], told: str) -> None:
    code, out, err = result
    assert (code, out) == (2, ""), err
    last = err.strip().splitlines()[-1]  # after what was loaded
    assert last.startswith("steerguard: ")
    assert told in last


def test_from_another_tools_vectors_to_a_control_vector(run: Run, model: Path, tmp_path: Path) -> None:
    trait = trait_folder(tmp_path / "trait")
    vectors = np.random.default_rng(0).normal(size=(4, 48))
    np.save(tmp_path / "theirs.npy", vectors)
    code, out, err = run("fit", model, "-t", trait, "-o", "fit", "--directions", "theirs.npy", *SHORT)
    assert code == 0, err
    fitted = Fit.load(tmp_path / "fit")
    how = fitted.provenance["fit"]["directions"]
    assert how["source"] == "theirs.npy"
    assert ("turned round" in out) == bool(how["turned_round"])
    for layer, probe in fitted.items():
        cosine = float(probe.v @ vectors[layer] / np.linalg.norm(vectors[layer]))
        assert cosine == pytest.approx(-1 if layer in how["turned_round"] else 1, abs=1e-5)
    # one vector needs its layer, and gives one probe
    np.save(tmp_path / "one.npy", vectors[3])
    refused(run("fit", model, "-t", trait, "-o", "one", "--directions", "one.npy", *SHORT), "which layer")
    code, out, _ = run("fit", model, "-t", trait, "-o", "one", "--directions", "one.npy", "--directions-layer", "3", *SHORT)
    assert code == 0
    assert "steerguard sweep one --judge MODEL@URL -o guard.guard" in out  # how to go on
    code, out, err = run("sweep", "one", "-t", trait, "--dry-run")  # which takes probes on given directions, too
    assert (code, err) == (0, "")
    assert "settings on" in out
    # a guard of it, exported
    build = ("build", "fit", "-l", "1", "-l", "3", "--allow-weak")
    assert run(*build, "-o", "shift.guard", "-r", "SwFC", "-a", "2")[0] == 0
    code, out, err = run("export", "shift.guard", "--to", "gguf", "-o", "v.gguf")
    assert (code, err) == (0, "")
    assert "--control-vector v.gguf" in out
    assert "layers 1, 3" in out
    assert list(read_directions("v.gguf")) == [1, 3]
    # what is refused
    refused(run("export", "shift.guard", "-o", "v.gguf"), "exists")
    assert run("export", "shift.guard", "-o", "v.gguf", "--overwrite")[0] == 0
    refused(run("export", "shift.guard", "--to", "onnx", "-o", "w.gguf"), "not to 'onnx'")
    assert run(*build, "-o", "gated.guard", "-r", "Floor")[0] == 0
    refused(run("export", "gated.guard", "-o", "w.gguf"), "no gate")
    both = ("fit", model, "-t", trait, "-o", "x", "--directions", "theirs.npy", *SHORT)
    refused(run(*both, "--direction", "logistic"), "one of the two")
    refused(run("fit", model, "-t", trait, "-o", "x", "--directions-layer", "1"), "belongs to --directions")
    np.save(tmp_path / "theirs.npy", vectors[:, :40])
    refused(run(*both), "width 40")
    (tmp_path / "theirs.npy").write_bytes(b"\x80\x05pickle")
    refused(run(*both), "theirs.npy is not a .npy file")
    assert not (tmp_path / "w.gguf").exists()
    assert not (tmp_path / "x" / "probes.safetensors").exists()
