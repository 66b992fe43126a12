"""MT-Bench and AlpacaEval as tasks of inspect-ai: the model and its unguarded twin in one evaluation, graded by a third.

    inspect eval steerguard/mt_bench -T questions=question.jsonl -T references=reference_answer/gpt-4.jsonl \\
        --model steerguard/Qwen/Qwen3-8B -M guards=honesty.guard \\
        --model-role baseline=steerguard/Qwen/Qwen3-8B --model-role grader=openai/gpt-5

Both roles must be bound: a grader that is not named would be the model under test, and a figure without its twin says
nothing of a guard. A sample's score is its change; the metrics are those of the library (`mt_bench`, `alpaca`), with
intervals, and every answer and verdict is in the score's metadata.

It knows Inspect's tasks. The questions, their wording and the figures are the library's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from steerguard.errors import InputError, JudgeError
from steerguard.evaluate import alpaca
from steerguard.evaluate import mt_bench as mt
from steerguard.evaluate.grading import Judged
from steerguard.evaluate.length_control import Gamed, read_gamed
from steerguard.evaluate.provider import INSTALL
from steerguard.evaluate.results import ARMS, as_json
from steerguard.judging.prompts import Question
from steerguard.judging.verdict import NoVerdict, read_verdict

try:
    from inspect_ai import Task, task
    from inspect_ai.dataset import Sample
    from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser, GenerateConfig, get_model
    from inspect_ai.model._generate_config import active_generate_config  # a role does not inherit what a task sets
    from inspect_ai.scorer import Score, metric, scorer
    from inspect_ai.solver import solver
except ImportError as error:  # pragma: no cover
    raise InputError(f"tasks of Inspect need inspect-ai, and {error.name} is not there; {INSTALL}") from error

__all__ = ["alpaca_eval", "mt_bench"]

ATTEMPTS = 3
"""Calls for one verdict."""
_SAID = "steerguard: answers by arm"


@task
def mt_bench(questions: str, references: str | None = None) -> Task:
    """MT-Bench on FastChat's files, or yours in their format; see `steerguard.evaluate.mt_bench`."""
    asked = mt.read_questions(questions, references)
    samples = [Sample(input=one.turns[0], id=one.id, metadata={"question": asdict(one)}) for one in asked]
    return Task(dataset=samples, solver=both_arms(), scorer=grades())


@task
def alpaca_eval(instructions: str, gamed: str | None = None, seed: int = 42) -> Task:
    """AlpacaEval on its own file, or yours in its format; see `steerguard.evaluate.alpaca`."""
    asked = alpaca.read_instructions(instructions)
    samples = [
        Sample(input=one.text, id=one.number, metadata={"question": {"turns": [one.text]}, "instruction": asdict(one)})
        for one in asked
    ]
    return Task(dataset=samples, solver=both_arms(), scorer=choices(seed), metrics=[alpaca_figures(gamed, seed)])


# ------------------------------------------------------------------------------------------------------- answers


def twins() -> dict[str, Any]:
    """The models of both arms. Raises InputError unless one is the other with guards."""
    models = dict(zip(ARMS, (get_model(role="baseline", required=True), get_model()), strict=True))
    plain, guarded = (str(models[arm]) for arm in ARMS)
    ours = all(name.startswith("steerguard/") for name in (plain, guarded))
    if plain == guarded or (ours and not guarded.startswith(f"{plain}+")):
        raise InputError(
            f"the role baseline must be the model under test without its guards: the model is {guarded}, the baseline {plain}"
        )
    return models


def drawn(models: Mapping[str, Any]) -> GenerateConfig:
    """How both arms are drawn: as the model under test is. Raises InputError for a baseline with settings of its own."""
    config = models["guarded"].config.merge(active_generate_config())
    for name, value in models["unguarded"].config.model_dump(exclude_none=True).items():
        if value != getattr(config, name):
            raise InputError(
                f"the baseline has its own {name} = {value}, the model under test {getattr(config, name)}: twins are drawn "
                "alike; set it for the evaluation, and not for the role"
            )
    return config


@solver
def both_arms() -> Any:
    """Let both arms answer every turn, each after its own answers."""

    async def solve(state: Any, generate: Any) -> Any:
        said: dict[str, list[str]] = {}
        models = twins()
        config = drawn(models)
        for arm, model in models.items():
            talk: list[Any] = []
            said[arm] = []
            for turn in state.metadata["question"]["turns"]:
                output = await model.generate([*talk, ChatMessageUser(content=turn)], config=config)
                said[arm].append(output.completion)
                talk += [ChatMessageUser(content=turn), ChatMessageAssistant(content=output.completion)]
            if arm == "guarded":
                state.messages, state.output = talk, output
        state.store.set(_SAID, said)
        return state

    return solve


# ------------------------------------------------------------------------------------------------------- verdicts


async def ask_grader(question: Question) -> Judged:
    """What the grader says. Raises JudgeError if it is the model under test."""
    grader = get_model(role="grader", required=True)
    for model in twins().values():
        if str(grader) == str(model) or grader.api is model.api:
            raise JudgeError(f"the grader {grader} is the model under test: a model that grades itself measures its own taste")
    why = "it was not asked"
    messages = [ChatMessageSystem(content=question.system), ChatMessageUser(content=question.user)]
    for attempt in range(ATTEMPTS):
        # a cache would give the reply that held no verdict again
        config = GenerateConfig(cache=False) if attempt else GenerateConfig()
        output = await grader.generate(messages, config=config)
        try:
            verdict = read_verdict(question.kind, output.completion)
        except NoVerdict as error:
            why = str(error)
        else:
            return Judged(verdict.value, verdict.reason)
    return Judged(None, why)


@metric
def mt_figures() -> Callable[[Sequence[Any]], Mapping[str, float]]:
    """Both arms' means, the change and its interval."""

    def figures(scores: Sequence[Any]) -> Mapping[str, float]:
        found = [mt.Grade(**grade) for one in scores for grade in one.score.metadata["grades"]]
        return _flat(mt.figures(found)["overall"], "")

    return figures


@scorer(metrics=[mt_figures()])
def grades() -> Any:
    """Every answer graded from 1 to 10 by the role `grader`."""

    async def score(state: Any, target: Any) -> Score:
        question = mt.MTQuestion(**{key: _fixed(value) for key, value in state.metadata["question"].items()})
        said = state.store.get(_SAID)
        found = []
        for arm in ARMS:
            for turn, answer in enumerate(said[arm]):
                verdict = await ask_grader(mt.grade_of(question, said[arm], turn))
                found.append(mt.grade(question, turn, arm, answer, verdict))
        return _scored(mt.figures(found)["overall"].change, {"grades": as_json(found)})

    return score


@metric
def alpaca_figures(gamed: str | None = None, seed: int = 42) -> Callable[[Sequence[Any]], Mapping[str, float]]:
    """The length-controlled and the raw win rate with their intervals, and the bias of the order."""
    known: Gamed | None = None if gamed is None else read_gamed(gamed)

    def figures(scores: Sequence[Any]) -> Mapping[str, float]:
        found = [alpaca.Preference(**one.score.metadata["preference"]) for one in scores]
        told = alpaca.figures(found, gamed=known, seed=seed)
        controlled = told["length_controlled"]
        intervals = {
            "length_controlled": None if controlled is None else controlled.win_rate, "win_rate": told["win_rate"],
            "first_shown": told["first_shown"],
        }  # fmt: skip
        return {key: value for name, one in intervals.items() for key, value in _interval(name, one).items()}

    return figures


@scorer(metrics=[alpaca_figures()])
def choices(seed: int = 42) -> Any:
    """Which arm's answer the role `grader` prefers: 1 the guarded one, 0 the other, 0.5 a tie."""

    async def score(state: Any, target: Any) -> Score:
        one = alpaca.Instruction(**state.metadata["instruction"])
        (unguarded,), (guarded,) = (state.store.get(_SAID)[arm] for arm in ARMS)
        verdict = None
        if not alpaca.same(unguarded, guarded):
            verdict = await ask_grader(alpaca.question_of(one.text, unguarded, guarded, seed))
        found = alpaca.preference_of(one, unguarded, guarded, seed, verdict)
        metadata = {"preference": as_json(found)}
        if found.value is None:
            return Score.unscored(explanation=found.reason, metadata=metadata)
        return Score(value=found.value, explanation=found.reason, metadata=metadata)

    return score


def _scored(change: Any, metadata: Mapping[str, Any]) -> Score:
    if change is None:
        return Score.unscored(explanation="no answer has a grade in both arms", metadata=dict(metadata))
    return Score(value=change.mean, metadata=dict(metadata))


def _fixed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _flat(paired: Any, name: str) -> dict[str, float]:
    return {key: value for part in (*ARMS, "change") for key, value in _interval(f"{name}{part}", getattr(paired, part)).items()}


def _interval(name: str, found: Any) -> dict[str, float]:
    """An interval as Inspect's metrics: what is not known is NaN, never zero."""
    nan = float("nan")
    values = {"": "mean", "_low": "low", "_high": "high", "_n": "n"}
    told = {f"{name}{end}": getattr(found, field, None) for end, field in values.items()}
    return {key: nan if value is None else float(value) for key, value in told.items()}
