"""Would a sentence do as well?"""

from __future__ import annotations

from steerguard.evaluate.prompting import SHOTS, Prompted, prompting
from steerguard.evaluate.section import Context, Estimate, Figure, Row, Section, SectionResult
from steerguard.evaluate.sections.shared import answers_needed, contrast, scenarios, texts, unscorable

QUICK, FULL = 24, 96
ARMS = 6


class Prompts(Section):
    """An aligned reminder, examples, and both beside the guard."""

    name, title = "prompts", "Prompts instead"
    question = "Would a reminder or a few examples in the prompt do as well as the guard?"
    figures = (
        Figure(
            "prompts.reminder", "an aligned reminder after the malicious prompt: trait less the guard's", "points of 100", "",
            "buys", about="above 0: a sentence does more than the guard",
        ),
        Figure("prompts.few_shot", "a few aligned exchanges: trait less the guard's", "points of 100", "", "buys"),
        Figure("prompts.both", "reminder and guard: trait less the guard's", "points of 100", "", "buys"),
    )  # fmt: skip

    def missing(self, context: Context) -> str:
        return unscorable(context)

    def estimate(self, context: Context) -> Estimate:
        asked = scenarios(context, QUICK, FULL)
        n = ARMS * len(asked)
        judged = n if context.trait.grammar is None else 0
        return context.cost(n + answers_needed(context), texts(asked), times=2 * ARMS, judged=judged)

    def run(self, context: Context) -> SectionResult:
        assert context.scorer is not None
        asked = scenarios(context, QUICK, FULL)
        found = prompting(
            context.model, asked, context.guard, contrast(context).usable(), scorer=context.scorer, sampling=context.sampling,
            store=context.store(self.name), batch=context.batch, progress=context.progress,
        )  # fmt: skip
        arms = {"prompts.reminder": "reminder", "prompts.few_shot": "few-shot", "prompts.both": "reminder+guard"}
        return self.result(
            context, {name: found.arm(arm).less_than_guard for name, arm in arms.items()},
            why={name: f"{found.arm(arm).added:.0f} characters more to read" for name, arm in arms.items()},
            details=[row for arm in found.arms for row in self._arm(arm)],
            notes=[
                f"{SHOTS} exchanges; whoever writes the malicious prompt can write another after the reminder: not measured"
            ],
            settings={"scenarios": len(asked), "shots": SHOTS},
        )  # fmt: skip

    def _arm(self, arm: Prompted) -> list[Row]:
        parts = {
            "trait": (arm.trait, "points of 100"), "coherence": (arm.coherence, "points of 100"),
            "recovered": (arm.recovered, "%"),
        }  # fmt: skip
        return [
            Row(Figure(f"prompts.arm.{arm.name}.{key}", f"{arm.name}: {key}", unit, "", "buys"), value)
            for key, (value, unit) in parts.items()
            if value is not None
        ]
