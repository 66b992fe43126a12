"""The backend protocol: what a loaded model must be able to do, and the contract that the conformance suite holds it to.

A backend captures residuals, generates, and can be guarded. It knows gates (six numbers and a direction), never rules
by name. The residual of layer i is the output of decoder block i, the whole residual stream, before the final norm.

What every backend must keep:

* A guard acts on the residual of its layers at every position that `positions` names, at every forward of the
  generation, by absolute position; padding is never a token.
* Projection and delta in float32, whatever the model's dtype. A token that no gate moves is left bit for bit.
* Rows of a batch are independent: the guards, the sampling and the text of a row do not depend on its neighbours.
* Several guards on one row act in the order in which they are given; on one layer each sees what the one before left.
* Installing is all or nothing; entering `guarded` proves the effect with a probe forward or raises NotSteering;
  leaving it restores the model exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from steerguard.errors import InputError, NotSteering
from steerguard.guard import Guard
from steerguard.identity import ModelIdentity
from steerguard.prompts import Prompt, Reply

Floats = npt.NDArray[np.float32]
Guards = Guard | Sequence[Guard] | None
"""What may guard one conversation: nothing, one guard, or several in order."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. The defaults are the paper's.

    A row's draws depend on the seed, the row's own prompt, and its number among the rows of one call that have the same
    prompt and the same guards; never on its neighbours. So batched and one by one give the same text, and two guards
    answer with the same luck.
    """

    temperature: float = 0.6
    "0 is greedy"
    top_p: float = 0.9
    seed: int = 42
    max_new_tokens: int = 1024
    stop: tuple[str, ...] = ()
    "generation of a row ends after any of these texts; the text is left out of the answer"

    def __post_init__(self) -> None:
        sound = (
            0 <= self.temperature < math.inf and 0 < self.top_p <= 1 and self.max_new_tokens >= 1 and self.seed >= 0
            and isinstance(self.stop, tuple) and all(self.stop)
        )  # fmt: skip
        if not sound:
            raise InputError(
                f"{self}: temperature must be at least 0, top_p above 0 and at most 1, max_new_tokens at least 1, the seed not "
                "negative, and stop a tuple of texts that are not empty"
            )


GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True, eq=False)
class Trace:
    """What the gates of one answer saw and did at one guard and layer, over the whole sequence."""

    guard: int
    "index of the guard in the row's guards"
    layer: int
    rho: Floats
    """[len(prompt_ids) + len(ids) - 1] projection before correction, prompt first, no padding; the last token drawn is
    never read"""
    delta: Floats
    "[as rho] shift of the projection; 0 where the gate left the token alone"


@dataclass(frozen=True, eq=False)
class Answer:
    """One generated answer."""

    text: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    "the answer's token ids, the end-of-turn token included if the model ended by itself"
    finished: Literal["stop", "length"]
    "`stop`: the model ended its turn or a stop text appeared; `length`: max_new_tokens were generated"
    tokens_seen: int = 0
    "token-gate pairs that guards looked at: the tokens that `positions` names, times the guarded layers"
    tokens_moved: int = 0
    "token-gate pairs of which the projection was changed"
    shift: float = 0.0
    "sum of |delta| over the token-gate pairs, in units of the residual stream"
    traces: tuple[Trace, ...] = ()
    "only if `trace=True`: per guard and layer"

    def __str__(self) -> str:
        return self.text


def one_by_one(prompts: Prompt | Sequence[Prompt], guards: Guards | Sequence[Guards]) -> tuple[list[Prompt], list[Guards]]:
    """The prompts one by one, and what guards each. Raises InputError for a list of guards of another length."""
    one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], dict))
    asked: list[Any] = [prompts] if one else list(prompts)
    if not isinstance(guards, list):
        return asked, [guards] * len(asked)  # type: ignore[list-item]
    if len(guards) != len(asked):
        raise InputError(
            f"a list of guards has one entry per prompt: got {len(guards)} for {len(asked)} prompts; several guards for every "
            "prompt are a tuple"
        )
    return asked, guards


def checked(guards: Guards, identity: ModelIdentity) -> tuple[Guard, ...]:
    """The guards of one row, each of them made for this model.

    Raises:
        InputError: something that is no guard.
        GuardMismatch: a guard of another model.
        NotSteering: a layer that is not there, or a direction of another width.
    """
    own = (guards,) if isinstance(guards, Guard) else tuple(guards or ())
    for guard in own:
        if not isinstance(guard, Guard):
            raise InputError(f"a guard must be a steerguard.Guard, got {type(guard).__name__}")
        guard.check_model(identity)
        for probe in guard.probes:
            if not 0 <= probe.layer < identity.depth or len(probe.v) != identity.width:
                raise NotSteering(
                    f"guard {guard.name!r} steers layer {probe.layer} with width {len(probe.v)}; {identity.name} has layers "
                    f"0 to {identity.depth - 1} and width {identity.width}"
                )
    return own


def chosen_layers(layers: Sequence[int] | None, identity: ModelIdentity) -> list[int]:
    """The layers that were asked for, all by default. Raises InputError for one that is not there."""
    chosen = list(range(identity.depth) if layers is None else layers)
    missing = sorted(layer for layer in chosen if not 0 <= layer < identity.depth)
    if missing:
        raise InputError(f"there are no layers {missing}; {identity.name} has 0 to {identity.depth - 1}")
    return chosen


def numbers_of(prompts: Sequence[tuple[int, ...]], guards: Sequence[Guards]) -> list[int]:
    """Each row's number among the rows with its prompt and its guards: what tells the draws of equal rows apart."""
    seen: dict[Hashable, int] = {}
    out = []
    for prompt, own in zip(prompts, guards, strict=True):
        several = (own,) if isinstance(own, Guard) else tuple(own or ())
        row = (prompt, tuple(guard.digest for guard in several))
        out.append(seen.get(row, 0))
        seen[row] = out[-1] + 1
    return out


@runtime_checkable
class Backend(Protocol):
    """A loaded model. `sg.load` returns one."""

    name: str
    "name of the backend in the registry: hf, vllm, fake"
    identity: ModelIdentity

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        guards: Guards | Sequence[Guards] = None,
        sampling: Sampling = Sampling(),
        trace: bool = False,
        on_token: Callable[[int, str], None] | None = None,
    ) -> list[Answer]:
        """Answer each prompt.

        Args:
            guards: for every prompt (a tuple: several, in order); or a list with one entry per prompt, a different guard
                for each row. Inside `guarded`, the entered guards come first.
            trace: keep rho and delta of every token at every guarded layer.
            on_token: called with (row, new text) as text comes.
        """
        ...

    def capture(
        self, conversations: Sequence[tuple[Prompt, Reply]], *, layers: Sequence[int] | None = None, guards: Guards = None
    ) -> Floats:
        """Answer-averaged residuals `[answers, layers, d]` float32 of (prompt, answer) pairs, in one pass over each batch."""
        ...

    def residuals(self, prompt: Prompt, answer: Reply | None = None, *, guards: Guards = None) -> Floats:
        """Residuals `[layers, tokens, d]` float32 of one conversation, every layer, after the guards acted."""
        ...

    def logits(self, prompt: Prompt, answer: Reply | None = None, *, guards: Guards = None) -> Floats:
        """Logits `[tokens, vocabulary]` float32 of one conversation."""
        ...

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each token adds; joined, they are the text of the whole."""
        ...

    def guarded(self, *guards: Guard) -> AbstractContextManager[Backend]:
        """Guard every generation and forward inside the block. Proves the effect on entry, undone on exit, or raises."""
        ...
