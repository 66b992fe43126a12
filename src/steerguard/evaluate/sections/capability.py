"""What the model can still do: the bundled model's own questions, and the public benchmarks through Inspect and lm-eval."""

from __future__ import annotations

from steerguard.evaluate.results import Paired
from steerguard.evaluate.section import Context, Estimate, Figure, Limit, Section, SectionResult
from steerguard.evaluate.sections.shared import hundredfold
from steerguard.metrics import bootstrap_interval
from steerguard.organism.capability import right, tasks
from steerguard.prompts import conversation
from steerguard.recipes.prompts import spread
from steerguard.sweeping.answers import Row as Asked

QUICK = 96
LOSS = Limit("at least", -2, "the field's", of="change")
"""Points that may be lost."""


class Capability(Section):
    """The bundled model's questions under neutral prompts, in words that training never had."""

    name, title = "capability", "What it can still do"
    question = "Are its answers to neutral questions as right as they were?"
    figures = (
        Figure("capability.neutral", "right answers to neutral questions", "points of 100", "higher", "costs", LOSS),
        Figure("capability.same", "answers that are the unguarded ones word for word", "%", "higher", "costs"),
    )

    def missing(self, context: Context) -> str:
        return "" if context.organism else "the bundled model, whose world these questions are about; see `benchmarks`"

    def estimate(self, context: Context) -> Estimate:
        asked = spread(tasks(), context.take(QUICK))
        return context.cost(2 * len(asked), ["".join(task.turns) for task in asked], times=2)

    def run(self, context: Context) -> SectionResult:
        asked = spread(tasks(), context.take(QUICK))
        prompts = [conversation(task.system, task.turns) for task in asked]
        with context.answers(self.name) as answers:
            plain = answers.of([Asked(prompt) for prompt in prompts], "neutral questions, unguarded")
            guarded = answers.of([Asked(prompt, (context.guard,)) for prompt in prompts], "neutral questions, guarded")
        before, after = ([right(t, kept.text) for t, kept in zip(asked, own, strict=True)] for own in (plain, guarded))
        same = [float(a.text == b.text) for a, b in zip(plain, guarded, strict=True)]
        details = []
        for name in sorted({task.category for task in asked}):
            at = [i for i, task in enumerate(asked) if task.category == name]
            found = Paired.of([before[i] for i in at], [after[i] for i in at], seed=context.seed)
            details.append(self.detail("capability.neutral", name, name, found))
        return self.result(
            context,
            {
                "capability.neutral": Paired.of(before, after, seed=context.seed),
                "capability.same": hundredfold(bootstrap_interval(same, seed=context.seed)),
            },
            details=details, settings={"questions": len(asked)},
        )  # fmt: skip
