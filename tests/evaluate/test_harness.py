"""A guarded model for lm-eval: what comes back, what is kept apart in its cache, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason='lm-eval is not installed: pip install "steerguard[harness]"')

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

import steerguard as sg
import tiny
from steerguard.backends import load
from steerguard.backends.fake import Fault
from steerguard.errors import InputError, NotSteering
from steerguard.evaluate.harness import GuardedLM, sampling_of

ASKED = [f"Tell me the truth of day {i}." for i in range(6)]
TASK = """
task: days
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
"""
GENERATED = "generation_kwargs: {until: ['week'], max_gen_toks: 6, do_sample: false}\nmetric_list: [{metric: exact_match}]"
CHOSEN = 'doc_to_choice: ["the day", "a week"]\nmetric_list: [{metric: acc}]'


def lm(model: sg.Backend, *guards: sg.Guard) -> GuardedLM:
    return GuardedLM(model, *guards, tokenizer=tiny.tokenizer(), batch=4)


def asked(own: GuardedLM, kind: Any, *rest: Any) -> list[Instance]:
    contexts = [own.apply_chat_template([{"role": "user", "content": text}]) for text in ASKED]
    return [Instance(kind, {}, (context, *rest), i) for i, context in enumerate(contexts)]


def run(own: GuardedLM, folder: Path, kind: str, **more: Any) -> dict[str, Any]:
    """A task of six questions through lm-eval itself."""
    folder.mkdir(exist_ok=True)
    answer = "the day" if kind == "generate_until" else "0"
    (folder / "days.jsonl").write_text("".join(json.dumps({"question": text, "answer": answer}) + "\n" for text in ASKED))
    settings = {"data": folder / "days.jsonl", "kind": kind, "more": GENERATED if kind == "generate_until" else CHOSEN}
    (folder / "days.yaml").write_text(TASK.format(**settings))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found: dict[str, Any] = simple_evaluate(
        model=own, tasks=["days"], task_manager=manager, apply_chat_template=True, bootstrap_iters=0, log_samples=True, **more
    )
    return found


def test_answers_are_those_of_the_backend(model: sg.Backend, guard: sg.Guard) -> None:
    greedy = sg.Sampling(temperature=0.0, top_p=1.0, max_new_tokens=6)
    for guards in ((), (guard,)):
        own = lm(model, *guards)
        said = own.generate_until(asked(own, "generate_until", {"max_gen_toks": 6, "do_sample": False}))
        by_hand = [model.generate(text, guards=guards, sampling=greedy)[0] for text in ASKED]
        assert said == [answer.text for answer in by_hand]
        assert own.usage.calls == 2 and own.usage.answer_tokens == sum(len(answer.ids) for answer in by_hand)
        assert own.usage.prompt_tokens == sum(len(answer.prompt_ids) for answer in by_hand)
        assert own.usage.tokens_moved == sum(answer.tokens_moved for answer in by_hand)
        assert bool(guards) == (own.usage.tokens_moved > 0)


def test_likelihoods_are_those_of_the_logits(model: sg.Backend, guard: sg.Guard) -> None:
    tokens = tiny.tokenizer()("the day", add_special_tokens=False)["input_ids"]
    values = []
    for guards in ((), (guard,)):
        own = lm(model, *guards)
        for (value, greedy), text in zip(own.loglikelihood(asked(own, "loglikelihood", "the day")), ASKED, strict=True):
            logits = model.logits(text, tokens[:-1], guards=guards)[-len(tokens) :].astype(np.float64)
            logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            assert value == pytest.approx(sum(logp[i, token] for i, token in enumerate(tokens)), rel=1e-6)
            assert greedy == all(int(logits[i].argmax()) == token for i, token in enumerate(tokens))
            values.append(value)
    assert values[:6] != values[6:]


@pytest.mark.parametrize("kind", ["generate_until", "multiple_choice"])
def test_a_task_of_lm_evals(model: sg.Backend, guard: sg.Guard, tmp_path: Path, kind: str) -> None:
    """Both arms through one cache: each gets its own answers, twice the same, and the second time asks the model nothing."""
    cache = str(tmp_path / "cache")
    found = {}
    for name, guards in (("unguarded", ()), ("guarded", (guard,))):
        for again in range(2):
            own = lm(model, *guards)
            result = run(own, tmp_path / "task", kind, use_cache=cache)
            samples = [sample["resps"] for sample in result["samples"]["days"]]
            assert found.setdefault(name, samples) == samples
            assert (own.usage.calls == 0) == (again == 1)
    assert found["unguarded"] != found["guarded"]


def test_what_cannot_be_honoured_is_refused(model: sg.Backend, guard: sg.Guard, folder: Path) -> None:
    with pytest.raises(InputError, match="asks for num_beams"):
        sampling_of({"num_beams": 4})
    with pytest.raises(InputError, match="apply_chat_template=True"):
        lm(model).generate_until([Instance("generate_until", {}, ("Tell me.", {}), 0)])
    other = lm(model, guard)
    with pytest.raises(InputError, match="build the requests of each model anew"):
        lm(model).generate_until(asked(other, "generate_until", {}))
    begun = other.apply_chat_template([{"role": "user", "content": "Hi"}]) + "Well,"
    with pytest.raises(InputError, match="into the model's mouth"):
        other.generate_until([Instance("generate_until", {}, (begun, {}), 0)])
    answers_only = lm(model, replace(guard, positions="response"))
    with pytest.raises(InputError, match="acts on answers only"):
        answers_only.loglikelihood(asked(answers_only, "loglikelihood", "the day"))
    with pytest.raises(InputError, match="pass tokenizer="):
        own = GuardedLM(load(folder, backend="fake"))
        own._tokenizer = None
        own.loglikelihood(asked(own, "loglikelihood", "the day"))
    with pytest.raises(InputError, match="without a conversation"):
        other.loglikelihood_rolling([])
    with pytest.raises(NotSteering):
        GuardedLM(load(folder, backend="fake", fault=Fault.NEVER_FIRES), guard)


def test_settings_of_a_task() -> None:
    assert sampling_of({"until": "\n", "do_sample": False, "temperature": 0.7}).temperature == 0
    warm = sampling_of({"until": ["a", ""], "do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_gen_toks": 12})
    assert (warm.temperature, warm.top_p, warm.max_new_tokens, warm.stop) == (0.7, 0.9, 12, ("a",))
