"""Free text, graded by a judge: MT-Bench and AlpacaEval, on files that the user brings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from steerguard.evaluate.alpaca import alpaca_eval, read_instructions
from steerguard.evaluate.length_control import read_gamed
from steerguard.evaluate.mt_bench import mt_bench, read_questions
from steerguard.evaluate.section import Context, Estimate, Figure, Limit, Section, SectionResult
from steerguard.evaluate.sections.shared import digest, local
from steerguard.recipes.prompts import spread

MT_QUICK = 16
ALPACA_QUICK = 64
QUESTIONS, REFERENCES = ("mt_bench", "question.jsonl"), ("mt_bench", "reference_answer", "gpt-4.jsonl")
INSTRUCTIONS, GAMED = ("alpaca_eval", "alpaca_eval.json"), ("alpaca_eval", "df_gamed.csv")
JUDGE = "a judge (--judge MODEL@URL)"


class MTBench(Section):
    """MT-Bench, 1 to 10."""

    name, title = "mt_bench", "MT-Bench"
    question = "Are its answers in free text, over two turns, as good as they were?"
    figures = (
        Figure(
            "mt_bench.grade", "grade by the judge", "1 to 10", "higher", "costs", Limit("at least", -0.5, "ours", of="change"),
        ),
    )  # fmt: skip

    def missing(self, context: Context) -> str:
        return _missing(context, QUESTIONS, REFERENCES)

    def inputs(self, context: Context) -> Mapping[str, str | None]:
        return {"questions": digest(local(context, *QUESTIONS)), "references": digest(local(context, *REFERENCES))}

    def estimate(self, context: Context) -> Estimate:
        asked = spread(read_questions(_file(context, QUESTIONS), _file(context, REFERENCES)), context.take(MT_QUICK))
        turns = [turn for question in asked for turn in question.turns]
        return context.cost(2 * len(turns), turns, times=3, judged=len(turns))

    def run(self, context: Context) -> SectionResult:
        assert context.judge is not None
        asked = spread(read_questions(_file(context, QUESTIONS), _file(context, REFERENCES)), context.take(MT_QUICK))
        found = mt_bench(
            context.model, asked, context.guard, context.judge, sampling=context.sampling, store=context.store(self.name),
            cache=context.store(f"{self.name}-verdicts"), limit=context.budget, batch=context.batch, progress=context.progress,
        )  # fmt: skip
        parts = [*((f"turn {name}", value) for name, value in found.turns.items()), *found.categories.items()]
        details = [self.detail("mt_bench.grade", name, name, value) for name, value in parts]
        return self.result(
            context, {"mt_bench.grade": found.overall}, details=details,
            notes=["the judge's wording is ours: not comparable with leaderboards", f"judging: {found.spent}"],
            settings={"questions": found.n, "judge": dict(found.judge)},
        )  # fmt: skip


class AlpacaEval(Section):
    """AlpacaEval against the model itself."""

    name, title = "alpaca_eval", "AlpacaEval"
    question = "Put beside the unguarded model's answers, are the guarded ones preferred as often?"
    figures = (
        Figure(
            "alpaca_eval.length_controlled", "length-controlled win rate against the unguarded model", "%", "higher", "costs",
            Limit("not below", 50, "the field's"), "50: no difference",
        ),
        Figure("alpaca_eval.raw", "win rate as it is", "%", "higher", "costs"),
        Figure("alpaca_eval.characters", "length of an answer", "characters", "", "costs"),
        Figure(
            "alpaca_eval.first_shown", "comparisons that the answer shown first won", "%", "", "costs",
            about="50: the judge does not mind the order",
        ),
    )  # fmt: skip

    def missing(self, context: Context) -> str:
        return _missing(context, INSTRUCTIONS)

    def inputs(self, context: Context) -> Mapping[str, str | None]:
        return {"instructions": digest(local(context, *INSTRUCTIONS)), "gamed": digest(local(context, *GAMED))}

    def estimate(self, context: Context) -> Estimate:
        asked = spread(read_instructions(_file(context, INSTRUCTIONS)), context.take(ALPACA_QUICK))
        cost = context.cost(2 * len(asked), [one.text for one in asked], times=2, judged=len(asked))
        return Estimate(cost.answers, cost.prompt_tokens, cost.answer_tokens, 0, len(asked), cost.judge_tokens / 2)

    def run(self, context: Context) -> SectionResult:
        assert context.judge is not None
        asked = spread(read_instructions(_file(context, INSTRUCTIONS)), context.take(ALPACA_QUICK))
        gamed = local(context, *GAMED)
        found = alpaca_eval(
            context.model, asked, context.guard, context.judge, sampling=context.sampling,
            gamed=None if gamed is None else read_gamed(gamed), seed=context.seed, store=context.store(self.name),
            cache=context.store(f"{self.name}-verdicts"), limit=context.budget, batch=context.batch, progress=context.progress,
        )  # fmt: skip
        controlled = None if found.length_controlled is None else found.length_controlled.win_rate
        return self.result(
            context,
            {
                "alpaca_eval.length_controlled": controlled, "alpaca_eval.raw": found.win_rate,
                "alpaca_eval.characters": found.characters, "alpaca_eval.first_shown": found.first_shown,
            },
            notes=[
                f"{found.same} of {found.n} pairs were one text twice: ties without a judge",
                "with AlpacaEval's own difficulties" if gamed else "without AlpacaEval's own difficulties (df_gamed.csv)",
                f"judging: {found.spent}",
            ],
            settings={"instructions": found.n, "judge": dict(found.judge)},
        )  # fmt: skip


def _file(context: Context, parts: tuple[str, ...]) -> Path:
    found = local(context, *parts)
    assert found is not None, parts  # `missing` was empty
    return found


def _missing(context: Context, *needed: tuple[str, ...]) -> str:
    lacking = ["/".join(parts) for parts in needed if local(context, *parts) is None]
    wanted = [] if context.judge is not None else [JUDGE]
    wanted += [f"{' and '.join(lacking)} (in --data DIR)"] if lacking else []
    return " and ".join(wanted)
