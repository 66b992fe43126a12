"""What settings cost on benign prompts: KL, fire rate, and what the answers are worth.

The prompts are answered unguarded once, and read again under each guard. It knows guards and prompts; it knows no
scenarios and chooses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from steerguard.backends.base import Backend
from steerguard.fitting import Fit, Stage
from steerguard.journal import Journal, content_key
from steerguard.metrics.benign import Fired, fires
from steerguard.metrics.likelihood import divergences
from steerguard.metrics.reading import Exchange
from steerguard.prompts import Prompt
from steerguard.sweeping.answers import Answers, Kept, Row
from steerguard.sweeping.choice import Cost
from steerguard.sweeping.points import Setting


@dataclass(frozen=True)
class Benign:
    """Prompts that no guard should harm, and what an answer to each is worth. Like `select`, never what is reported on."""

    prompts: tuple[Prompt, ...]
    score: Callable[[int, str], float] | None = None
    "(index of the prompt, answer) -> 0 to 100; None: what answers are worth is not known, and settings give no answers"

    def mean(self, answers: Sequence[Kept]) -> float:
        """What answers to these prompts are worth, 0-100."""
        assert self.score is not None
        return float(np.mean([self.score(i, answer.text) for i, answer in enumerate(answers)]))


class BenignCosts:
    """Measures settings on benign prompts; whatever was measured before comes from the journal.

    Calling it with settings gives each one's `Cost`.
    """

    def __init__(
        self, model: Backend, probes: Fit, benign: Benign, answers: Answers, journal: Journal, progress: Stage | None
    ) -> None:
        self._model, self._probes, self._benign, self._answers = model, probes, benign, answers
        self._journal, self._progress = journal, progress
        self._unguarded = answers.of([Row(prompt) for prompt in benign.prompts], "benign prompts answered", whole=True)
        self._read: list[Exchange] = [(p, kept.ids) for p, kept in zip(benign.prompts, self._unguarded, strict=True)]
        self._content = content_key([[prompt, list(ids)] for prompt, ids in self._read])
        self._kl: dict[str, float | None] = {}
        self._fired: dict[Setting, list[Fired]] = {}
        for record in journal.records:
            if record.get("read") == self._content:
                self._kl |= record["kl"]

    def __call__(self, settings: Sequence[Setting]) -> Mapping[Setting, Cost]:
        guards = {setting: setting.guard(self._probes) for setting in settings}
        # 1. where gates fire: one forward for each prompt
        fired = self._fires(settings)
        # 2. KL: one forward more for each prompt and guard that fires there
        missing = {guard.digest: setting for setting, guard in guards.items() if guard.digest not in self._kl}
        if missing:
            idle = {digest: [one.moved == 0 for one in fired[setting]] for digest, setting in missing.items()}
            of = {digest: guards[setting] for digest, setting in missing.items()}
            found = divergences(self._model, self._read, of, idle=idle, progress=self._progress)
            new = {digest: _mean(values) for digest, values in found.items()}
            self._journal.add({"read": self._content, "kl": new})
            self._kl |= new
        # 3. what answers are worth, where that is known
        answers = self._guarded(settings)
        return {
            setting: Cost(
                gated=gated(setting, self._probes), kl=self._kl[guard.digest], fire_rate=_rates(fired[setting])[0],
                lost=None if own is None else self._benign.mean(self._unguarded) - self._benign.mean(own),
                changed=None if own is None else _changed(own, self._unguarded), n=len(self._benign.prompts),
            )
            for (setting, guard), own in zip(guards.items(), answers, strict=True)
        }  # fmt: skip

    def fire_rates(self, settings: Sequence[Setting]) -> dict[Setting, tuple[float | None, float]]:
        """Of each setting, the share of benign tokens that it would move, and how far: mean |delta| in class separations."""
        return {setting: _rates(found) for setting, found in self._fires(settings).items()}

    def _fires(self, settings: Sequence[Setting]) -> dict[Setting, list[Fired]]:
        """What each setting would do to each prompt's conversation."""
        missing = {s: s.guard(self._probes) for s in settings if s not in self._fired}
        if missing:
            self._fired |= fires(self._model, self._read, missing, progress=self._progress)
        return {setting: self._fired[setting] for setting in settings}

    def _guarded(self, settings: Sequence[Setting]) -> list[list[Kept]] | list[None]:
        """The answers of each setting to the prompts; None where nothing could be learnt from them."""
        if self._benign.score is None:
            return [None] * len(settings)
        rows = [Row(prompt, (setting.guard(self._probes),)) for setting in settings for prompt in self._benign.prompts]
        flat = self._answers.of(rows, "benign prompts answered under settings")
        n = len(self._benign.prompts)
        return [flat[i : i + n] for i in range(0, len(flat), n)]


def _rates(found: Sequence[Fired]) -> tuple[float | None, float]:
    """The share of tokens that would be moved, and the mean |delta| in class separations."""
    seen = sum(one.seen for one in found)
    return (sum(one.moved for one in found) / seen, sum(one.total_shift for one in found) / seen) if seen else (None, 0.0)


def gated(setting: Setting, probes: Fit) -> bool:
    """Whether the rule leaves some tokens alone."""
    gates = [setting.rule.compile(probes[layer]) for layer in setting.layers]
    return any(gate.above_a == gate.above_b == 0 for gate in gates)


def _changed(answers: Sequence[Kept], unguarded: Sequence[Kept]) -> float:
    """Share of the answers whose text is another than the unguarded one."""
    return float(np.mean([a.text != b.text for a, b in zip(answers, unguarded, strict=True)]))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
