"""What an attacker who has the weights can compute: how far a suffix is from making the *guarded* model lie, and what helps.

The loss of a suffix in one conversation, through the acting guard:

    mean -log p(target | prompt with suffix)  +  weight * mean over answer tokens and gates of max(0, margin - s)

with s = (rho - m) / delta_mu, the place of a token before the gate acts on it, in class separations from the boundary. The first
term asks for the malicious answer that the unguarded model gives; the second that it be given by tokens that the guard takes for
aligned ones, which it leaves alone and a monitor does not see. The guard acts by `rules.correct`, the reference that backends'
kernels are tested against, which has a gradient everywhere but at the knee.

Nothing here decides whether an attack succeeds: that is for real generation to show. One thread at a time, outside `guarded`.

It knows tensors, gates and blocks. It knows no search and no text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from steerguard.backends.base import checked
from steerguard.errors import InputError, NotSteering
from steerguard.guard import Guard
from steerguard.layers import input_device, residual_out
from steerguard.rules import correct

if TYPE_CHECKING:
    from steerguard.backends.hf import TransformersModel

Ids = Sequence[int]


@dataclass(frozen=True)
class Attacked:
    """One conversation with room for a suffix, and the answer that is wanted."""

    before: tuple[int, ...]
    "token ids of the prompt up to the suffix"
    after: tuple[int, ...]
    "and from the suffix to the answer"
    target: tuple[int, ...]
    "the answer's first tokens"


@dataclass(frozen=True)
class _Gate:
    """What acts on one layer."""

    v: Tensor
    gate: Tensor
    m: float
    spread: float
    response: bool


class Objective:
    """The loss of suffixes in one conversation, and its gradient.

    Args:
        guard: None for the unguarded model.
        weight: of the second term.
        margin: in class separations.

    Raises:
        InputError: a target without tokens, or class means that are the same.
        GuardMismatch: a guard of another model.
    """

    def __init__(
        self, model: TransformersModel, guard: Guard | None, asked: Attacked, *, weight: float = 1.0, margin: float = 0.0
    ) -> None:
        if not asked.target:
            raise InputError("an attack needs an answer to aim at, and the target has no token")
        self._model, self.asked, self._weight, self._margin = model, asked, weight, margin
        self._gates: dict[int, _Gate] = {}
        for one in checked(guard, model.identity):
            for probe, gate in one.gates():
                if probe.delta_mu == 0:
                    raise InputError(f"guard {one.name!r}: the class means of layer {probe.layer} are the same")
                v = torch.from_numpy(np.array(probe.v, np.float32))
                row = torch.from_numpy(gate.row())
                self._gates[probe.layer] = _Gate(v, row, probe.m, probe.delta_mu, one.positions == "response")
        self._keeps = "logits_to_keep" in signature(model.module.forward).parameters

    def losses(self, suffixes: Sequence[Ids]) -> npt.NDArray[np.float64]:
        """The loss of each suffix, all of one length; `[suffixes]`."""
        rows = torch.tensor([self._row(suffix) for suffix in suffixes])
        at_once = max(1, self._model.batch_tokens // rows.shape[1])
        with torch.no_grad():
            parts = [self._loss(rows[i : i + at_once]).double().cpu().numpy() for i in range(0, len(rows), at_once)]
        return np.concatenate(parts)

    def gradient(self, suffix: Ids) -> Tensor:
        """How the loss changes with the embedding of each of the suffix's tokens: `[length, d]` float32."""
        nudge = torch.zeros(len(suffix), self._width, requires_grad=True)
        loss = self.nudged(suffix, nudge)
        (found,) = torch.autograd.grad(loss, nudge)
        return found

    def nudged(self, suffix: Ids, nudge: Tensor) -> Tensor:
        """The loss `[]` with `nudge` `[length, d]` added to the embeddings of the suffix."""
        start = len(self.asked.before)

        def add(module: Any, args: Any, embedded: Tensor) -> Tensor:
            whole = torch.nn.functional.pad(nudge, (0, 0, start, embedded.shape[1] - start - len(suffix)))
            return embedded + whole.to(embedded.device, embedded.dtype)

        handle = self._model.module.get_input_embeddings().register_forward_hook(add)
        try:
            return self._loss(torch.tensor([self._row(suffix)]))[0]
        finally:
            handle.remove()

    def scores(self, suffix: Ids) -> npt.NDArray[np.float32]:
        """How the loss would change if a token became another, to first order: `[length, vocabulary]`, up to a constant each."""
        weights = self._model.module.get_input_embeddings().weight.detach()
        slope = self.gradient(suffix).to(weights.device, weights.dtype)
        found: npt.NDArray[np.float32] = (slope @ weights.T).float().cpu().numpy()
        return found

    @property
    def _width(self) -> int:
        return int(self._model.module.get_input_embeddings().weight.shape[1])

    def _row(self, suffix: Ids) -> list[int]:
        """What is read to predict the target: all but its last token."""
        return [*self.asked.before, *suffix, *self.asked.after, *self.asked.target[:-1]]

    def _loss(self, rows: Tensor) -> Tensor:
        """`[rows]`, of token ids `[rows, tokens]`."""
        n = len(self.asked.target)
        start = rows.shape[1] - n + 1
        places: list[Tensor] = []
        with self._acting(start, places):
            more: dict[str, Any] = {"logits_to_keep": n} if self._keeps else {}
            output = self._model.module(input_ids=rows.to(input_device(self._model.module)), use_cache=False, **more)
        if len(places) != len(self._gates):
            raise NotSteering(f"{len(places)} of {len(self._gates)} gates fired in a forward; the attack would not see the guard")
        logits = output.logits[:, -n:].float()
        wanted = torch.tensor(self.asked.target, device=logits.device).expand(len(rows), n)
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none").mean(1)
        if places and n > 1:
            short = torch.stack([(self._margin - place.to(loss.device)).clamp(min=0).mean(1) for place in places])
            loss = loss + self._weight * short.mean(0)
        return loss

    @contextmanager
    def _acting(self, start: int, places: list[Tensor]) -> Iterator[None]:
        """Inside, the gates act; `places` gets s of the answer's tokens, `[rows, tokens]`, gate by gate."""

        def hook(one: _Gate) -> Any:
            def act(module: Any, args: Any, output: Any) -> Any:
                h = residual_out(output)
                if h is None:
                    raise NotSteering("a guarded block returned no residual; the attack would not see the guard")
                moved, rho, _ = correct(h, one.v.to(h.device), one.gate.to(h.device))
                places.append((rho[:, start:] - one.m) / one.spread)
                if one.response:
                    moved = torch.cat([h[:, :start], moved[:, start:]], dim=1)
                return moved if isinstance(output, Tensor) else type(output)((moved, *output[1:]))

            return act

        with ExitStack() as hooks:
            for layer, one in self._gates.items():
                hooks.callback(self._model.blocks.modules[layer].register_forward_hook(hook(one)).remove)
            yield
