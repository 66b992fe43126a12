"""Is it this direction, and is it this rule? Other directions and rules at the guard's own displacement."""

from __future__ import annotations

from collections.abc import Sequence

from steerguard.evaluate.controls import Control, controls
from steerguard.evaluate.results import Paired
from steerguard.evaluate.section import Context, Estimate, Figure, Limit, Row, Section, SectionResult
from steerguard.evaluate.sections.shared import answers_needed, contrast, embeddings, only_highest, scenarios, texts, unscorable
from steerguard.evaluate.wording import shown
from steerguard.metrics import Interval
from steerguard.prompts import Prompt
from steerguard.recipes.prompts import spread
from steerguard.traits import Scenario

QUICK, FULL = 24, 48
BENIGN_QUICK, BENIGN_FULL = 16, 64
ARMS = 11
"""The guard, the rules, the fits and the guard without its gate; and the directions beside them."""
TENTH = Limit("at most", 10, "the field's")
GAINLESS = "the guard raises nothing, so there is nothing to be a share of"
KINDS = ("random", "orthogonal", "shuffled")


def _direction(kind: str, what: str) -> Figure:
    return Figure(f"controls.{kind}", f"share of the guard's change that {what} brings too", "%", "lower", "fails", TENTH)


class Controls(Section):
    """Directions of no meaning, the other fit, other rules, and no gate."""

    name, title = "controls", "Controls at the same displacement"
    question = "Is it this direction and this rule, or would any push of that size do?"
    figures = (
        _direction("random", "a random direction"),
        _direction("orthogonal", "a direction at a right angle"),
        _direction("shuffled", "a direction fitted on shuffled labels"),
        Figure(
            "controls.other_fit", "trait along the other fit (mean difference or logistic) less the guard's", "points of 100", "",
            "fails",
        ),
        Figure(
            "controls.best_rule", "trait of the best other rule less the guard's", "points of 100", "", "fails",
            about="above 0: another rule does more at the same displacement",
        ),
        Figure("controls.ungated", "trait without the gate less the guard's", "points of 100", "", "fails"),
        Figure("controls.ungated_kl", "KL on ordinary prompts without the gate", "nats per token", "lower", "fails"),
    )  # fmt: skip

    def missing(self, context: Context) -> str:
        if why := unscorable(context):
            return why
        if len(context.guard.probes) != 1:
            return f"a guard of one layer; this one has {len(context.guard.probes)}"
        return ""

    def estimate(self, context: Context) -> Estimate:
        asked, benign = self._plan(context)
        arms = ARMS + 2 + len(KINDS) * self._directions(context)
        answers = arms * len(asked) + len(benign) + answers_needed(context)
        judged = arms * len(asked) if context.trait.grammar is None else 0
        return context.cost(answers, texts(asked), times=arms, judged=judged) + Estimate(forwards=len(benign) * arms)

    def run(self, context: Context) -> SectionResult:
        assert context.scorer is not None
        asked, benign = self._plan(context)
        found = controls(
            context.model, asked, context.guard, scorer=context.scorer, benign=benign,
            embeddings=embeddings(context, contrast(context)), directions=self._directions(context), sampling=context.sampling,
            seed=context.seed, store=context.store(self.name), batch=context.batch, progress=context.progress,
        )  # fmt: skip
        arms = {arm.name: arm for arm in found.arms}
        values: dict[str, Interval | Paired | None] = {}
        why: dict[str, str] = {}
        # 1. directions, those of a kind together: the highest of several is the luckiest, too
        for kind in KINDS:
            own = [(arm.name, arm.of_guard) for arm in found.arms if arm.name.startswith(f"{kind}-")]
            name, highest = only_highest(own)
            values[f"controls.{kind}"] = found.pooled[kind]
            together = f"{len(own)} together; the highest, {name}: {shown(highest)}"
            why[f"controls.{kind}"] = GAINLESS if highest is None else together
        # 2. the other fit, the other rules, and no gate
        for key, family in (("other_fit", "fit"), ("best_rule", "rule"), ("ungated", "gate")):
            others = [arm for arm in found.arms if arm.family == family and arm.name != context.guard.rule.name]
            name, value = only_highest([(arm.name, arm.less_than_guard) for arm in others if arm.matched or family == "gate"])
            values[f"controls.{key}"] = value
            why[f"controls.{key}"] = self._told(arms.get(name)) if value is not None else "there is no such arm for this guard"
        if values["controls.other_fit"] is None and found.fits:
            cosines = ", ".join(f"{name} {cosine:.5f}" for name, cosine in found.fits.items())
            why["controls.other_fit"] = f"no other fit to compare: cosine with the guard's direction: {cosines}"
        values["controls.ungated_kl"] = arms["ungated"].kl if "ungated" in arms else None
        if "ungated" not in arms:
            why["controls.ungated_kl"] = "there is no such arm for this guard"
        guard = arms["guard"]
        return self.result(
            context, values, why=why, details=[row for arm in found.arms for row in self._arm(arm)],
            notes=[
                f"every arm moves tokens by {found.target:.3g} on average, over {found.tokens} tokens read with the unguarded "
                "model; arms that cannot are marked",
                f"the guard itself: trait {guard.trait}, coherence {guard.coherence}",
            ],
            settings={"scenarios": len(asked), "benign": len(benign), "directions": self._directions(context)},
        )  # fmt: skip

    def _plan(self, context: Context) -> tuple[Sequence[Scenario], Sequence[Prompt]]:
        return scenarios(context, QUICK, FULL), spread(context.benign.prompts, context.take(BENIGN_QUICK, BENIGN_FULL))

    def _directions(self, context: Context) -> int:
        return context.take(1, 3) or 1

    def _told(self, arm: Control | None) -> str:
        return "" if arm is None else f"{arm.name}{f', {arm.rule}' if arm.rule else ''}"

    def _arm(self, arm: Control) -> list[Row]:
        """One arm's figures."""
        note = "" if arm.matched else f"not matched: mean |delta| {arm.shift:.3g}"
        parts = {
            "trait": (arm.trait, "points of 100"), "coherence": (arm.coherence, "points of 100"),
            "recovered": (arm.recovered, "%"), "kl": (arm.kl, "nats per token"),
        }  # fmt: skip
        return [
            Row(Figure(f"controls.arm.{arm.name}.{key}", f"{arm.name}: {key}", unit, "", "fails"), value, note)
            for key, (value, unit) in parts.items()
            if value is not None
        ]
