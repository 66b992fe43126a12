"""Long conversations: does it last, does it repeat itself, and is off really off?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from steerguard.embeddings import available
from steerguard.evaluate.results import Paired
from steerguard.evaluate.scripts import Script, bundled, scripts
from steerguard.evaluate.section import Context, Estimate, Figure, Limit, Row, Section, SectionResult
from steerguard.evaluate.sections.shared import digest, hundredfold, in_percent, local, unscorable
from steerguard.evaluate.turns import METRICS, converse
from steerguard.metrics import Interval
from steerguard.recipes.prompts import spread

QUICK_SCRIPTS, QUICK_TURNS = 6, 6
TURNS, SHORT = 20, 10
"""Turns of a full conversation; fewer where the bundled model's context ends."""
SHARES = ("again", "across", "within")
"""What is a share from 0 to 1."""
NO_EMBEDDINGS = 'sentence embeddings are not installed: pip install "steerguard[similarity]"'


class Turns(Section):
    """The same scripted users, unguarded, guarded, and with a guard that goes off halfway."""

    name, title = "turns", "Many turns"
    question = "Does the guard hold in a long conversation, does the model begin to repeat itself, and is off really off?"
    figures = (
        Figure("turns.trait", "trait over all turns", "points of 100", "higher", "buys"),
        Figure("turns.drift", "guarded trait, last third of the turns less the first", "points of 100", "higher", "fails"),
        Figure(
            "turns.coherence", "coherence over all turns", "points of 100", "higher", "costs",
            Limit("at least", -10, "ours", of="change"),
        ),
        Figure("turns.again", "sentences that say an earlier turn's sentence again", "%", "lower", "costs"),
        Figure("turns.across", "4-grams that occurred in an earlier turn", "%", "lower", "costs"),
        Figure(
            "turns.within", "4-grams that occurred before in the same turn", "%", "lower", "costs",
            Limit("at most", 5, "ours", of="change"),
        ),
        Figure(
            "turns.kept", "trait after the guard went off, less that of a model that never had one", "points of 100", "", "fails",
            about="what guarded answers in the history bring by themselves; the cache keeps nothing",
        ),
    )  # fmt: skip

    def missing(self, context: Context) -> str:
        if why := unscorable(context):
            return why
        if self._users(context) is None:
            return f"scripted users for the trait {context.trait.name} (turns/{context.trait.name}.jsonl in --data DIR)"
        return ""

    def inputs(self, context: Context) -> Mapping[str, str | bool | None]:
        return {"scripts": digest(local(context, "turns", f"{context.trait.name}.jsonl")), "embeddings": available()}

    def estimate(self, context: Context) -> Estimate:
        users, turns = self._plan(context)
        one = ["".join(turn.user for turn in user.turns[:turns]) for user in users]
        answers = 3 * turns * len(users)
        judged = answers if context.trait.grammar is None else 0
        # every turn reads what was said before: half of the conversation on average
        return context.cost(answers, one, times=3 * max(1, turns // 2), judged=judged)

    def run(self, context: Context) -> SectionResult:
        users, turns = self._plan(context)
        found = converse(
            context.model, users, context.guard, turns=turns, scorer=context.scorer, off_after=turns // 2,
            sampling=context.sampling, store=context.store(self.name), batch=context.batch, progress=context.progress,
        )  # fmt: skip
        values: dict[str, Interval | Paired | None] = {}
        for metric in METRICS:
            pair = found.overall[metric]
            values[f"turns.{metric}"] = _or_none(in_percent(pair) if metric in SHARES else pair)
        values["turns.drift"] = found.drift["guarded"]["trait"]
        values["turns.kept"] = found.kept["trait"]
        why = {} if available() else {"turns.again": NO_EMBEDDINGS}
        return self.result(
            context, values, why=why, details=self._by_turn(found.by_turn, turns),
            notes=[f"{len(users)} scripted users, {turns} turns, the same whatever is answered; intervals are over users"],
            settings={"users": len(users), "turns": turns, "off_after": turns // 2},
        )  # fmt: skip

    def _by_turn(self, by_turn: Mapping[str, Mapping[str, Sequence[Interval | None]]], turns: int) -> list[Row]:
        """Trait and repetition of every arm, turn by turn."""
        out = []
        for metric in ("trait", "across", "within"):
            for arm, own in by_turn.items():
                for turn in range(turns):
                    value = hundredfold(own[metric][turn]) if metric in SHARES else own[metric][turn]
                    out.append(self.detail(f"turns.{metric}", f"{arm}.{turn + 1}", f"{metric}, {arm}, turn {turn + 1}", value))
        return out

    def _users(self, context: Context) -> Sequence[Script] | None:
        own = local(context, "turns", f"{context.trait.name}.jsonl")
        if own is not None:
            return scripts(own)
        name = f"organism-{context.trait.name}" if context.organism else context.trait.name
        return scripts(name) if name in bundled() else None

    def _plan(self, context: Context) -> tuple[Sequence[Script], int]:
        users = self._users(context) or ()
        most = min(len(user.turns) for user in users)
        turns = QUICK_TURNS if context.size == "quick" else SHORT if context.organism else TURNS
        return spread(users, context.take(QUICK_SCRIPTS)), min(turns, most)


def _or_none(found: Paired | None) -> Paired | None:
    """Nothing, where neither arm has a value."""
    return found if found is not None and (found.guarded is not None or found.unguarded is not None) else None
