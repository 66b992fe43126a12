"""What the guard does where it has nothing to do."""

from __future__ import annotations

from dataclasses import replace

from steerguard.evaluate.section import Context, Estimate, Figure, Limit, Section, SectionResult
from steerguard.evaluate.sections.shared import hundredfold
from steerguard.metrics.benign import measure_benign
from steerguard.prompts import as_conversation
from steerguard.recipes.prompts import spread
from steerguard.sweeping.answers import Row as Asked
from steerguard.sweeping.choice import Limits

METRICS = ("kl", "fire_rate", "shift", "norm_ratio")
QUICK = 64
FULL = 500
BARS = Limits()
"""What a sweep holds settings to; the same here."""


class Benign(Section):
    """KL, fire rate, displacement and norm on benign prompts."""

    name, title = "benign", "Where there is nothing to do"
    question = "What does the guard do to ordinary prompts, which it has no business with?"
    figures = (
        Figure(
            "benign.kl", "KL of the next token to the unguarded model", "nats per token", "lower", "costs",
            Limit("at most", BARS.kl or 0.0, "the field's"), "0: the model's predictions are untouched",
        ),
        Figure(
            "benign.fire_rate", "tokens of ordinary prompts that it moves", "%", "lower", "costs",
            Limit("at most", 100 * (BARS.fire_rate or 0.0), "ours, for rules with a gate"),
        ),
        Figure("benign.shift", "how far it moves a token there, on average", "class separations", "lower", "costs"),
        Figure("benign.norm_ratio", "norm of the residual after and before", "", "", "costs", about="1: unchanged"),
    )  # fmt: skip

    def missing(self, context: Context) -> str:
        return "" if context.benign.prompts else "benign prompts (--benign FILE)"

    def estimate(self, context: Context) -> Estimate:
        prompts = spread(context.benign.prompts, context.take(QUICK, FULL))
        read = ["".join(message["content"] for message in as_conversation(prompt)) for prompt in prompts]
        return context.cost(len(prompts), read) + Estimate(forwards=3 * len(prompts))

    def run(self, context: Context) -> SectionResult:
        prompts = spread(context.benign.prompts, context.take(QUICK, FULL))
        with context.answers(self.name) as answers:
            kept = answers.of([Asked(prompt) for prompt in prompts], "ordinary prompts", whole=True)
        measured = measure_benign(
            context.model, prompts, {"guard": context.guard}, answers=[one.answer for one in kept], progress=context.progress
        )
        found = {metric: measured.interval("guard", metric, seed=context.seed) for metric in METRICS}
        found["fire_rate"] = hundredfold(found["fire_rate"])
        result = self.result(
            context, {f"benign.{metric}": value for metric, value in found.items()}, settings={"prompts": len(prompts)},
            notes=["read with the unguarded model's own answers; one value for each prompt"],
        )  # fmt: skip
        if any(gate.above_a == gate.above_b == 0 for _, gate in context.guard.gates()):
            return result
        # a rule without a gate moves every token by design, and is held to KL: the same bars as the sweep's
        rows = [
            replace(row, figure=replace(row.figure, limit=None), note=f"{context.guard.rule} has no gate: held to KL alone")
            if row.figure.name == "benign.fire_rate" else row
            for row in result.rows
        ]  # fmt: skip
        return replace(result, rows=tuple(rows))
