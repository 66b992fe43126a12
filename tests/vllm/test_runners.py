"""Both of vLLM's model runners, and several ranks: the same text as transformers, the same counts on each rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serving import PROMPTS, guards, ids, reference, save

import steerguard as sg
from steerguard.backends.vllm.worker import check_stages
from steerguard.errors import NotSteering, Unsupported

pytest.importorskip("vllm", reason="vLLM is not installed; `make test` installs its CPU build")
HERE = Path(__file__).parent
STEPS = 16


def run(script: str, tmp_path: Path) -> tuple[dict[str, Any], list[tuple[int, ...]]]:
    """What a script printed of the prompts under four configurations, and what transformers says."""
    hf = sg.load("organism")
    made = guards(hf)
    asked: list[Any] = [None, {"guards": ["stp"]}, {"guards": ["add"]}, {"guards": ["two", "late"]}]
    meant = [None, made["stp"], made["add"], (made["two"], made["late"])]
    prompts = [ids(hf, prompt) for prompt in PROMPTS[:3]]
    given = {"guards": save(made, tmp_path), "asked": asked, "prompts": prompts, "steps": STEPS}
    path = os.pathsep.join([str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(HERE / script)], input=json.dumps(given), capture_output=True, text=True, timeout=900,
        env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    expected = [tokens for one in meant for tokens in reference(hf, PROMPTS[:3], one, STEPS)]
    assert len(set(expected)) > 6
    return json.loads(done.stdout.strip().splitlines()[-1]), expected


@pytest.mark.slow
@pytest.mark.parametrize("script", ["run_v2.py", "run_tp.py"])
def test_the_text_is_that_of_transformers(script: str, tmp_path: Path) -> None:
    found, expected = run(script, tmp_path)
    assert list(map(tuple, found["tokens"])) == expected
    ranks = 2 if script == "run_tp.py" else 1
    assert len(found["counters"]) == len(found["proved"]) == ranks
    assert all(len(told) == 4 for told in found["proved"]), "two layers at two sizes, on every rank"
    for rank in found["counters"]:
        assert all(one["seen"] == one["expected"] for one in rank)
        moved = {one["guard"]: one["moved"] for one in rank}
        assert moved["stp"] > 0
        assert [one["seen"] for one in rank] == [one["seen"] for one in found["counters"][0]]
        assert [one["moved"] for one in rank] == [one["moved"] for one in found["counters"][0]]


def test_every_layer_stands_in_exactly_one_pipeline_stage() -> None:
    """The stages' own lists; vLLM's CPU runner cannot run two stages, with or without us."""
    check_stages((3, 9), [[3], [9]])
    check_stages((3, 9), [[3, 9]])
    check_stages((3, 9), [[], [3, 9], []])
    for stages in ([[3], []], [[], []], [[3, 9], [9]], [[3], [9, 10]]):
        with pytest.raises(NotSteering, match="exactly one"):
            check_stages((3, 9), stages)


def test_a_stage_finds_its_own_blocks_by_their_number_in_the_whole_model() -> None:
    """A stage as vLLM builds it: placeholders for the blocks of others."""
    from torch import nn

    PPMissingLayer = pytest.importorskip("vllm.model_executor.models.utils", reason="needs vLLM").PPMissingLayer

    from steerguard.backends.vllm.blocks import find_blocks

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([PPMissingLayer(), PPMissingLayer(), nn.Linear(2, 2), nn.Linear(2, 2)])

    stage = Stage()
    assert find_blocks(stage, 4) == {2: stage.layers[2], 3: stage.layers[3]}
    with pytest.raises(Unsupported, match="0 lists of 5 decoder blocks"):
        find_blocks(stage, 5)
    stage.more = nn.ModuleList([nn.Linear(2, 2) for _ in range(4)])
    with pytest.raises(Unsupported, match="2 lists"):
        find_blocks(stage, 4)


def test_a_runner_that_is_not_known_is_refused() -> None:
    from steerguard.backends.vllm.runner import attach

    with pytest.raises(Unsupported, match="not a model runner that steerguard supports"):
        attach(object(), None)  # type: ignore[arg-type]
