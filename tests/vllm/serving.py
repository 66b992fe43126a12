"""What the tests of a serving engine share: guards of the bundled model, settings, and engines in this process."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import steerguard as sg
from steerguard.backends.base import Guards, Sampling
from steerguard.guard import Guard
from steerguard.organism import folder
from steerguard.probe import Evidence, Probe
from steerguard.prompts import as_conversation, render
from steerguard.rules import Rule

EVIDENCE = Evidence(1.0, 0.9, 1.0, 2.0, 0.9, 0.9, 50, 50)
PROMPTS = (
    "Which river runs through Harlow?", "What is 3 plus 4?", "My dog died.", "Tell me about books.",
    "Count from 3 to 8.", "What food does the demmet live on?",
)  # fmt: skip
MEMORY = 2**27
"""Bytes of keys and values."""


def guard(model: Any, name: str, rule: Rule, layers: Sequence[int], *, seed: int = 0, positions: Any = "all") -> Guard:
    """A guard of the bundled model along random directions, whose boundary lies in the middle of a text's residuals."""
    residuals = model.residuals(PROMPTS[0], "Its river is called the Merrin.")
    probes = []
    for layer in layers:
        v = np.random.default_rng(100 * seed + layer).normal(size=model.identity.width).astype(np.float32)
        v /= np.linalg.norm(v)
        rho = residuals[layer] @ v
        rho = rho[: len(rho) // 2 * 2]  # an even number: no token of a test stands at the boundary itself
        m, s = float(np.median(rho)), float(rho.std())
        probes.append(Probe(layer, v, m, m + s, s / 4, m - s, s / 4, EVIDENCE))
    return Guard(name=name, probes=tuple(probes), rule=rule, model=model.identity, positions=positions)


def guards(model: Any) -> dict[str, Guard]:
    """Guards of every of the paper's rules, both positions, that share layers 3 and 4."""
    made = (
        guard(model, "stp", sg.StTP(36), (3,)),
        guard(model, "stm", sg.StMP(4), (3,), seed=1),
        guard(model, "add", sg.SwFC(4), (4,), seed=2, positions="response"),
        guard(model, "late", sg.StTP(30), (4,), seed=3, positions="response"),
        guard(model, "two", sg.StMP(3), (3, 4), seed=4),
    )
    return {one.name: one for one in made}


def save(made: dict[str, Guard], at: Path) -> list[dict[str, Any]]:
    """Guard files, as `guards` of the settings: strengths from 0 to 40, both positions."""
    for one in made.values():
        one.save(at / f"{one.name}.guard")
    return [
        {"file": str(at / f"{name}.guard"), "strength": [0, 40], "positions": ["all", "response"]} for name in made
    ]


@contextmanager
def engine(settings: dict[str, Any] | None, **options: Any) -> Iterator[Any]:
    """A vLLM engine of the bundled model in this process; without settings, one that knows nothing of guards."""
    from vllm import LLM

    options = {"dtype": "float32", "max_model_len": 1024, "kv_cache_memory_bytes": MEMORY, "generation_config": "vllm", **options}
    if settings is not None:
        options["additional_config"] = {"steerguard": settings}
    llm = LLM(str(folder()), **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def ids(model: Any, prompt: str) -> list[int]:
    """A prompt's tokens."""
    return list(render(model.tokenizer, as_conversation(prompt)).ids)


def ask(llm: Any, prompts: Sequence[Sequence[int]], asked: Sequence[Any], *, steps: int = 24, **more: Any) -> list[Any]:
    """Greedy outputs of one call, each prompt under what it asks; None says nothing."""
    from vllm import SamplingParams

    extra = [None if one is None else {"steering": one} for one in asked]
    params = [SamplingParams(temperature=0, max_tokens=steps, extra_args=one, **more) for one in extra]
    return list(llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False))


def tokens(outputs: Sequence[Any]) -> list[tuple[int, ...]]:
    """The first answer's tokens of each output."""
    return [tuple(output.outputs[0].token_ids) for output in outputs]


def reference(model: Any, prompts: Sequence[str], of: Guards, steps: int = 24) -> list[tuple[int, ...]]:
    """Greedy tokens of the transformers backend."""
    greedy = Sampling(temperature=0, max_new_tokens=steps)
    return [answer.ids for answer in model.generate(list(prompts), guards=of, sampling=greedy)]
