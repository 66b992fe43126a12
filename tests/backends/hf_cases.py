"""What the tests of the transformers backend share: one tiny Llama, and guards that move about half its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from architectures import ARCHITECTURES, build, tokenizer
from steerguard.backends.base import Answer, Sampling
from steerguard.backends.hf import TransformersModel, wrap
from steerguard.backends.hf_read import read_forward
from steerguard.guard import Guard, Positions
from steerguard.prompts import as_conversation, render
from steerguard.rules import Rule, StMP
from tiny import guard as make_guard
from tiny import probe

PROMPTS = ("tell me the truth", "what is the answer to the long question of the day, and of the week?", "a")
STEPS = Sampling(temperature=0.0, max_new_tokens=10)
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


def tiny_model(name: str = "llama", **options: Any) -> TransformersModel:
    return wrap(build(BY_NAME[name]), tokenizer(), name=name, **options)


def guard_of(
    model: TransformersModel,
    layers: Sequence[int],
    rule: Rule = StMP(2),
    positions: Positions = "all",
    seed: int = 0,
) -> Guard:
    """A guard whose boundary stands amid the prompts' own projections, so that about half the tokens move."""
    residuals = np.concatenate([model.residuals(prompt) for prompt in PROMPTS], axis=1)
    probes = []
    for layer in layers:
        one = probe(layer, model.identity.width, rho=residuals[layer], seed=seed)
        # in the widest gap of the middle: a boundary that stands on a token is crossed by a rounding
        middle = np.sort(one.project(residuals[layer]))[len(residuals[layer]) // 3 : -(len(residuals[layer]) // 3)]
        widest = int(np.diff(middle).argmax())
        probes.append(replace(one, m=float(middle[widest : widest + 2].mean())))
    return make_guard(model.identity, rule, tuple(probes), positions=positions)


def uncached(model: TransformersModel, prompt: str, steps: int, guards: tuple[Guard, ...] = ()) -> list[int]:
    """Greedy token ids, the whole sequence read anew for every token."""
    read = render(model.tokenizer, as_conversation(prompt))
    ids = list(read.ids)
    for _ in range(steps):
        output = read_forward(model.module, model.blocks, torch.tensor([ids]), [read.answer_start], [guards], head=True)
        ids.append(int(output.logits[0, -1].argmax()))
        if ids[-1] == model.tokenizer.eos_token_id:
            break
    return ids[len(read.ids) :]


def ids_of(answers: Sequence[Answer]) -> list[tuple[int, ...]]:
    return [answer.ids for answer in answers]


def hooks_of(model: TransformersModel) -> list[int]:
    """Every hook on the model, by its number: what must be the same before and after."""
    return [hook for m in model.module.modules() for hook in (*m._forward_hooks, *m._forward_pre_hooks)]
