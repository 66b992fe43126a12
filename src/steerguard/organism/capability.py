"""What the organism can do under neutral system prompts: facts, arithmetic, instructions, comparisons, small talk.

The tasks and their answers are data, scored exactly, as the traits are. Like a trait's scenarios they come in splits:
the sweep looks at `select` (`capability-select.jsonl`), the report at `test` (`capability.jsonl`). Both ask in words that
training never has, and not in the same ones: under wordings that it was trained on, this model loses nothing to guards
that cost it several points elsewhere, and a sweep would be none the wiser.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from steerguard.backends.base import Backend, Guards, Sampling
from steerguard.prompts import conversation
from steerguard.scorers import ExactScorer
from steerguard.sweeping import Benign

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Task:
    """One neutral prompt and what a right answer holds."""

    id: str
    category: str
    system: str | None
    turns: tuple[str, ...]
    reply: dict[str, Any]


Split = Literal["select", "test"]
FILES: dict[Split, str] = {"select": "capability-select.jsonl", "test": "capability.jsonl"}


@cache
def tasks(split: Split = "test") -> tuple[Task, ...]:
    """The bundled tasks of a split."""
    lines = (FOLDER / FILES[split]).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line]
    return tuple(Task(r["id"], r["category"], r["system"], tuple(r["turns"]), r["reply"]) for r in rows)


@cache
def scorer() -> ExactScorer:
    """The organism's whole grammar as a scorer."""
    return ExactScorer(json.loads((FOLDER / "grammar.json").read_text(encoding="utf-8")))


def capability(model: Backend, *, guards: Guards = None, sampling: Sampling = Sampling()) -> float:
    """Mean score under neutral prompts, 0-100: an answer counts as far as what it claims is right and sayable."""
    prompts = [conversation(task.system, task.turns) for task in tasks()]
    answers = model.generate(prompts, guards=guards, sampling=sampling)
    return float(np.mean([right(task, answer.text) for task, answer in zip(tasks(), answers, strict=True)]))


def benign() -> Benign:
    """The `select` tasks as prompts that a sweep must not harm."""
    asked = tasks("select")
    prompts = tuple(conversation(task.system, task.turns) for task in asked)
    return Benign(prompts, lambda i, text: right(asked[i], text))


def right(task: Task, text: str) -> float:
    """0-100: the share of claims that are right, times the share of sentences that make sense here."""
    score = scorer().score(task, text)
    return 0.0 if score.trait is None or score.coherence is None else score.trait * score.coherence / 100
