"""The public benchmarks through Inspect's maintained tasks, guarded beside unguarded on the same questions.

The tasks are those of inspect-evals and their data is not ours: it is read from the Hugging Face cache and, with
HF_HUB_OFFLINE=1, from nowhere else. What is not installed or not there is not run, and said.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from steerguard.errors import InputError
from steerguard.evaluate.results import Paired
from steerguard.evaluate.section import Context, Estimate, Figure, Section, SectionResult
from steerguard.evaluate.sections.capability import LOSS

QUICK, FULL = 100, 1000
"""Questions of each benchmark, at most."""
INSTALL = 'pip install "steerguard[evaluate]"'


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: its task among Inspect's, and the data set that must be in the cache."""

    name: str
    label: str
    task: str
    dataset: str
    "as the hub calls it"
    characters: int
    "of a typical prompt, for estimates"


BENCHMARKS = (
    Benchmark("mmlu", "MMLU, generative", "inspect_evals/mmlu_0_shot", "cais/mmlu", 600),
    Benchmark("gsm8k", "GSM8K", "inspect_evals/gsm8k", "openai/gsm8k", 3500),
    Benchmark("truthfulqa", "TruthfulQA, multiple choice", "inspect_evals/truthfulqa", "truthfulqa/truthful_qa", 700),
)


class Benchmarks(Section):
    """MMLU, GSM8K, TruthfulQA."""

    name, title = "benchmarks", "Public benchmarks"
    question = "Does it still know and reason as it did?"
    figures = tuple(
        Figure(f"benchmarks.{one.name}", one.label, "points of 100", "higher", "costs", LOSS) for one in BENCHMARKS
    )

    def missing(self, context: Context) -> str:
        if context.organism:
            return "a model that knows this world; the bundled one knows its own, see `capability`"
        if find_spec("inspect_evals") is None:
            return f"inspect-evals: {INSTALL}"
        if not any(cached(one.dataset) for one in BENCHMARKS):
            return f"the data sets in the Hugging Face cache: {', '.join(one.dataset for one in BENCHMARKS)}"
        return ""

    def inputs(self, context: Context) -> Mapping[str, Any]:
        return {"inspect": metadata.version("inspect-ai"), "there": [one.name for one in BENCHMARKS if cached(one.dataset)]}

    def estimate(self, context: Context) -> Estimate:
        n = context.take(QUICK, FULL) or FULL
        out = Estimate()
        for one in BENCHMARKS:
            if cached(one.dataset):
                out += context.cost(2 * n, ["x" * one.characters] * n, times=2)
        return out

    def run(self, context: Context) -> SectionResult:
        values: dict[str, Paired | None] = {}
        why = {}
        for one in BENCHMARKS:
            key = f"benchmarks.{one.name}"
            if not cached(one.dataset):
                why[key] = f"not run: needs {one.dataset} in the Hugging Face cache"
                continue
            arms = both_arms(context, one.task, context.take(QUICK, FULL), context.store(f"inspect-{one.name}"))
            values[key] = Paired.of(*arms, seed=context.seed)
        return self.result(
            context, values, why=why, notes=["through inspect-evals; the first questions of each benchmark, not all of it"],
            settings={"questions": context.take(QUICK, FULL), "inspect": metadata.version("inspect-ai")},
        )  # fmt: skip


def cached(dataset: str) -> bool:
    """Whether a data set of the hub is in the cache of this machine."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return (Path(HF_HUB_CACHE) / f"datasets--{dataset.replace('/', '--')}" / "snapshots").is_dir()


def both_arms(
    context: Context, task: Any, limit: int | None, logs: Path | None
) -> tuple[list[float | None], list[float | None]]:
    """What each question's answer is worth to a task of Inspect's, 0 to 100: unguarded and guarded, in the same order.

    Args:
        task: a name of a task, or a task.
        logs: where Inspect keeps its logs (beside this file, in a folder); None: nowhere.

    Raises:
        InputError: the task did not end, or its scores are of no known kind.
    """
    from steerguard.evaluate.provider import guarded_model

    twins = [guarded_model(context.model, batch=context.batch), guarded_model(context.model, context.guard, batch=context.batch)]
    with tempfile.TemporaryDirectory() as nowhere:
        folder = nowhere if logs is None else str(logs.with_suffix(""))
        by_arm = [_scores(task, model, limit, folder, context) for model in twins]
    ids = list(by_arm[0])
    return [by_arm[0][one] for one in ids], [by_arm[1].get(one) for one in ids]


def _scores(task: Any, model: Any, limit: int | None, folder: str, context: Context) -> dict[str, float | None]:
    """One arm's scores by question."""
    from inspect_ai import eval as inspect_eval
    from inspect_ai.scorer import value_to_float

    sampling = context.sampling
    (log,) = inspect_eval(
        task, model=model, limit=limit, log_dir=folder, display="none", seed=context.seed, temperature=sampling.temperature,
        top_p=sampling.top_p, max_tokens=sampling.max_new_tokens, fail_on_error=True,
    )  # fmt: skip
    if log.status != "success":
        raise InputError(f"{task} ended with {log.status}: {log.error.message if log.error else 'no reason given'}")
    worth = value_to_float()
    found = {}
    for sample in log.samples or ():
        values: Sequence[Any] = [score.value for score in (sample.scores or {}).values()]
        first = values[0] if values else None
        if isinstance(first, Mapping) or (isinstance(first, Sequence) and not isinstance(first, str)):
            raise InputError(f"{task} scores an answer with {type(first).__name__}, of which there is no one figure")
        found[f"{sample.id}#{sample.epoch}"] = None if first is None else 100 * float(worth(first))
    return found
