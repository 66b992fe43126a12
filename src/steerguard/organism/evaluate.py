"""How a trained organism does, unguarded: `python -m steerguard.organism.evaluate MODEL`.

Each trait's test split under both system prompts, and the neutral tasks: what a retrained model must reach before it is
bundled. Answers and scores are those of everybody else.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from steerguard.backends import load
from steerguard.backends.base import Backend, Sampling
from steerguard.organism.capability import right, tasks
from steerguard.prompts import conversation
from steerguard.sweeping import compare
from steerguard.traits import trait

log = logging.getLogger(__name__)
SAMPLING = Sampling(temperature=0.6, top_p=0.9, seed=42, max_new_tokens=160)


def evaluate(model: Backend) -> dict[str, Any]:
    """Trait and coherence of both poles on the test splits, and the neutral tasks by category; all 0-100."""
    report: dict[str, Any] = {}
    for name in ("honesty", "compassion"):
        arms = compare(model, trait(f"organism-{name}"), {}, sampling=SAMPLING)
        report[name] = {arm.name: {"trait": arm.figures.trait, "coherence": arm.figures.coherence} for arm in arms}
    answers = model.generate([conversation(task.system, task.turns) for task in tasks()], sampling=SAMPLING)
    by_category: dict[str, list[float]] = defaultdict(list)
    for task, answer in zip(tasks(), answers, strict=True):
        by_category[task.category].append(right(task, answer.text))
    report["capability"] = {name: float(np.mean(scores)) for name, scores in sorted(by_category.items())}
    report["capability"]["all"] = float(np.mean([score for scores in by_category.values() for score in scores]))
    return report


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m steerguard.organism.evaluate", description=__doc__)
    parser.add_argument("model", type=Path, help="a model directory")
    parser.add_argument("--out", type=Path, default=None, help="write the report here as JSON")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    report = evaluate(load(given.model))
    for name, figures in report.items():
        log.info("%s: %s", name, json.dumps(figures))
    if given.out:
        given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
