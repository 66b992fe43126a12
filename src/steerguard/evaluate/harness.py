"""A guarded model for lm-eval, the other harness: IFEval, multiple choice by likelihood, and its many tasks.

    from lm_eval import simple_evaluate
    from steerguard.evaluate.harness import GuardedLM

    lm = GuardedLM(sg.load("Qwen/Qwen3-8B"), guard)              # without a guard: its unguarded twin
    simple_evaluate(model=lm, tasks=["ifeval"], apply_chat_template=True)
    print(lm.usage)

lm-eval's cache knows a request by its text alone. So the text of every request holds a digest of the model and of every guard
in order: guarded and unguarded can share one cache, and cannot share an entry. It is put there where a chat template is
applied, so `apply_chat_template=True` is asked for, and a request without it is refused.

Likelihoods are of tokens that the harness gives, in the positions after the prompt. A guard with `response` positions does not
look at the prompt, from which the first of them is predicted: one-letter choices would be scored as if it were off. It is
refused there; generation is not.

It knows lm-eval's model interface. It knows no task.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from steerguard.backends.base import Backend, Sampling
from steerguard.errors import InputError
from steerguard.evaluate import BATCH
from steerguard.evaluate.names import canonical_name
from steerguard.files import canonical_json, shown
from steerguard.guard import Guard
from steerguard.metrics.likelihood import surprisal
from steerguard.metrics.reading import check_unguarded

INSTALL = 'pip install "steerguard[harness]"'

try:
    from lm_eval.api.model import LM
except ImportError as error:  # pragma: no cover
    raise InputError(f"evaluating through lm-eval needs lm-eval, and {error.name} is not there; {INSTALL}") from error

__all__ = ["GuardedLM", "Usage"]

LONGEST = 256
"""Tokens of an answer where a task does not say; lm-eval's own."""
HONOURED = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "seed")
"""What a task may ask for."""


@dataclass
class Usage:
    """What was spent since the model was made."""

    calls: int = 0
    "batches"
    prompt_tokens: int = 0
    answer_tokens: int = 0
    "generated, or given and scored"
    tokens_seen: int = 0
    "that a guard looked at while generating"
    tokens_moved: int = 0


class GuardedLM(LM):  # type: ignore[misc]
    """lm-eval's side of a model.

    Args:
        guards: in order; none: the unguarded model.
        tokenizer: for likelihoods; by default the backend's own.
        batch: rows that are answered at a time; all under the same guards.

    Raises:
        NotSteering: a guard that cannot be shown to act on it.
        GuardMismatch: a guard of another model.
        InputError: a model inside `guarded`.
    """

    def __init__(self, model: Backend, *guards: Guard, tokenizer: Any = None, batch: int = BATCH) -> None:
        super().__init__()
        check_unguarded(model)
        if guards:
            with model.guarded(*guards):
                pass
        self.model, self.guards, self.batch, self.usage = model, guards, batch, Usage()
        self.name = canonical_name(model.identity.name, model, {}, guards)
        self._tokenizer: Any = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer

    # ------------------------------------------------------------------------------------------- what texts are

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's cache of built requests goes by: as its cache of answers does."""
        return self.name

    def chat_template(self, chat_template: bool | str = False) -> str:
        """A name for the template, which is the model's own."""
        del chat_template
        return "the model's own"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as a text that `_opened` reads again; the model's own template is applied by its backend."""
        del add_generation_prompt
        return canonical_json({"model": self.name, "messages": chat_history})

    def _opened(self, context: str) -> tuple[list[Any], str]:
        """The conversation of a request, and the words that are put into the model's mouth after it."""
        try:
            found, end = json.JSONDecoder().raw_decode(context)
            if found["model"] != self.name:
                raise InputError(f"a request for {found['model']} came to {self.name}; build the requests of each model anew")
            return list(found["messages"]), context[end:]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"a request must be a conversation, got {shown(context)}; pass apply_chat_template=True to the harness"
            ) from error

    # ------------------------------------------------------------------------------------------- what is asked for

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """An answer to each request, cut where the task says. Raises InputError for what cannot be honoured."""
        del disable_tqdm
        by_setting: dict[Sampling, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            by_setting[sampling_of(request.args[1])].append(i)
        out = [""] * len(requests)
        for sampling, order in by_setting.items():
            for start in range(0, len(order), self.batch):
                part = order[start : start + self.batch]
                for i, text in zip(part, self._answers([requests[i].args[0] for i in part], sampling), strict=True):
                    out[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return out

    def _answers(self, contexts: Sequence[str], sampling: Sampling) -> list[str]:
        prompts = []
        for context in contexts:
            messages, begun = self._opened(context)
            if begun.strip():
                raise InputError(f"the task puts {shown(begun)} into the model's mouth, which does not go on from there")
            prompts.append(messages)
        answers = self.model.generate(prompts, guards=[self.guards] * len(prompts), sampling=sampling)
        self.usage.calls += 1
        for answer in answers:
            self.usage.prompt_tokens += len(answer.prompt_ids)
            self.usage.answer_tokens += len(answer.ids)
            self.usage.tokens_seen += answer.tokens_seen
            self.usage.tokens_moved += answer.tokens_moved
        return [answer.text for answer in answers]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each continuation its log-likelihood in nats, and whether it is what greedy decoding would say.

        Raises:
            InputError: a guard with `response` positions, or no tokenizer.
        """
        del disable_tqdm
        off = [guard.name for guard in self.guards if guard.positions != "all"]
        if off:
            raise InputError(
                f"guard {off[0]!r} acts on answers only, and a likelihood's first token is predicted from the prompt: it would "
                "be scored as if the guard were off; use a guard with `all` positions, or a task that generates"
            )
        if self._tokenizer is None:
            raise InputError(f"likelihoods need a tokenizer, and the backend {self.model.name} shows none; pass tokenizer=")
        out = []
        for request in requests:
            found = self._likelihood(self._tokenizer, *request.args)
            self.cache_hook.add_partial("loglikelihood", request.args, found)
            out.append(found)
        return out

    def _likelihood(self, tokenizer: Any, context: str, continuation: str) -> tuple[float, bool]:
        messages, begun = self._opened(context)
        ids = tuple(tokenizer(begun + continuation, add_special_tokens=False)["input_ids"])
        skip = len(tokenizer(begun, add_special_tokens=False)["input_ids"]) if begun else 0
        logits = self.model.logits(messages, ids[:-1], guards=self.guards)
        predicted = logits[len(logits) - len(ids) :][skip:]
        self.usage.calls += 1
        self.usage.prompt_tokens += len(logits) - len(ids) + 1
        self.usage.answer_tokens += len(ids) - skip
        greedy = bool((np.argmax(predicted, axis=1) == np.asarray(ids[skip:])).all())
        return -float(surprisal(predicted, ids[skip:]).sum()), greedy

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Refused: a text by itself has no prompt, and a guard is defined on conversations."""
        raise InputError("the likelihood of a text without a conversation is not measured here; choose tasks with questions")


def sampling_of(given: Mapping[str, Any]) -> Sampling:
    """How answers are drawn for a task's settings. Raises InputError for one that would have to be ignored."""
    unknown = sorted(key for key, value in given.items() if key not in HONOURED and value not in (None, False))
    if unknown:
        raise InputError(f"a task asks for {unknown[0]} = {shown(given[unknown[0]])}; honoured are {', '.join(HONOURED)}")
    until = given.get("until") or ()
    stop = (until,) if isinstance(until, str) else tuple(until)
    warm = bool(given.get("do_sample")) and float(given.get("temperature") or 0.0) > 0
    return Sampling(
        temperature=float(given["temperature"]) if warm else 0.0,
        top_p=float(given.get("top_p") or 1.0) if warm else 1.0,
        max_new_tokens=int(given.get("max_gen_toks") or LONGEST),
        stop=tuple(text for text in stop if text),
        seed=int(given.get("seed") or Sampling().seed),
    )
