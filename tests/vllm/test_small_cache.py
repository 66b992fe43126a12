"""Where a token's place in the forward says nothing of its place in the conversation: chunked prompts and preemption."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from serving import PROMPTS, ask, engine, guards, ids, save, tokens

import steerguard as sg
from steerguard.guard import Guard

pytest.importorskip("vllm", reason="vLLM is not installed; `make test` installs its CPU build")
pytestmark = pytest.mark.slow

LONG = "Say what you know about the town, the river that runs through it, its people and what they do all day. " * 12
ASKED: list[Any] = [
    None,
    {"guards": ["stp"]},
    {"guards": [{"name": "add", "strength": 12}]},
    {"guards": [{"name": "add", "strength": 12, "positions": "all"}]},
    {"guards": ["two", "late"]},
]
STEPS = 200


@pytest.fixture(scope="module")
def hf() -> Any:
    return sg.load("organism")


@pytest.fixture(scope="module")
def made(hf: Any) -> dict[str, Guard]:
    return guards(hf)


@pytest.fixture(scope="module")
def rows(hf: Any) -> list[tuple[list[int], Any]]:
    """Prompts of several lengths under every configuration."""
    prompts = [ids(hf, LONG), *(ids(hf, prompt) for prompt in PROMPTS[:3])]
    return [(prompt, asked) for prompt in prompts for asked in ASKED]


@pytest.fixture(scope="module")
def files(made: dict[str, Guard], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return save(made, tmp_path_factory.mktemp("guards"))


@pytest.fixture(scope="module")
def alone(files: list[dict[str, Any]], rows: list[tuple[list[int], Any]]) -> list[tuple[int, ...]]:
    """Each row by itself, in one chunk, on an empty cache."""
    with engine({"guards": files, "default": []}, enforce_eager=True, enable_prefix_caching=False) as llm:
        return [tokens(ask(llm, [prompt], [asked], steps=STEPS, ignore_eos=True))[0] for prompt, asked in rows]


@pytest.fixture(scope="module")
def tight(files: list[dict[str, Any]], alone: Any) -> Iterator[Any]:
    """After the other engine, one that reads at most 48 tokens at a time and has room for twelve blocks of keys and values."""
    with engine(
        {"guards": files, "default": []}, enforce_eager=True, max_num_batched_tokens=48, max_num_seqs=12,
        num_gpu_blocks_override=12, max_model_len=640, disable_log_stats=False,
    ) as llm:  # fmt: skip
        yield llm


def preemptions(llm: Any) -> int:
    return sum(int(metric.value) for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


def test_chunks_and_preemptions_change_nothing(
    tight: Any, rows: list[tuple[list[int], Any]], alone: list[tuple[int, ...]]
) -> None:
    outputs = ask(tight, [prompt for prompt, _ in rows], [asked for _, asked in rows], steps=STEPS, ignore_eos=True)
    assert max(len(prompt) for prompt, _ in rows) > 5 * 48, "a prompt comes in many chunks"
    assert preemptions(tight) > 3, "requests were sent back, or this shows nothing of preemption"
    for output, expected, (_, asked) in zip(outputs, alone, rows, strict=True):
        assert tokens([output])[0] == expected, asked
    tight.collective_rpc("steerguard_counters")
    assert len(set(alone)) > 12
