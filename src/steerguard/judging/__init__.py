"""Judges: language models that score answers on a trait and on coherence, and that compare two answers.

    from steerguard.judging import JudgeScorer, SpendLimit, judge_from

    judge = judge_from("openai/gpt-oss-120b@http://localhost:8000/v1", price_in=0.1, price_out=0.5)
    scorer = JudgeScorer(trait, judge, cache="verdicts.jsonl", limit=SpendLimit(money=5))
    print(scorer.estimate(scenarios, answers))      # calls, tokens and money, before anything is sent
    scores = scorer.scores(scenarios, answers)
    print(scorer.spent)

Read from top to bottom: `config` (which judge, with which settings), `fence` (material that cannot command), `prompts`
(what a judge is asked), `verdict` (what it said, or why that is nothing), `cache` (verdicts by content), `budget` (what may
be spent), `endpoint` (one call), `asking` (many: retries, limits), `agreeing`, `scorer`, `comparing` (tournaments).

It knows endpoints only through inspect-ai's model layer, and neither models under test nor guards. No key is stored,
logged, shown or cached.
"""

from __future__ import annotations

from steerguard.judging.agreeing import Agreement, agreement
from steerguard.judging.budget import Budget, Estimate, SpendLimit, Spent
from steerguard.judging.comparing import Comparison, Rating, Tournament, estimate_tournament, tournament
from steerguard.judging.config import JudgeConfig, judge_from
from steerguard.judging.scorer import AgreementReport, Judgement, JudgeScorer

__all__ = [
    "Agreement", "agreement", "AgreementReport", "Budget", "Comparison", "Estimate", "estimate_tournament",
    "JudgeConfig", "judge_from", "Judgement", "JudgeScorer", "Rating", "SpendLimit", "Spent", "Tournament", "tournament",
]  # fmt: skip
