"""Answers of a sweep: many rows, each with guards of its own, in batches, kept as they come and never asked for twice.

Every answer has a key made of all that decides it: model, backend, conversation, guards, sampling. A batch is written to
the journal whole; interrupted, a sweep loses the batch in flight. The batches of a list of rows do not depend on what
is kept already, so that what a resumed sweep answers anew it answers in the same company.

It knows prompts, guards and texts. It knows no scores.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from steerguard.backends.base import Answer, Backend, Sampling, Trace
from steerguard.errors import InputError
from steerguard.fitting import Stage
from steerguard.guard import Guard
from steerguard.journal import Journal, content_key
from steerguard.prompts import Prompt, as_conversation

DIGITS = 5
"""Significant digits of projections that are kept."""


@dataclass(frozen=True)
class Row:
    """One conversation to be answered under guards, in their order."""

    prompt: Prompt
    guards: tuple[Guard, ...] = ()


@dataclass(frozen=True, eq=False)
class Kept:
    """One answer, as much of it as a sweep needs again."""

    text: str
    finished: str
    n: int
    "tokens of the answer"
    tokens_seen: int
    tokens_moved: int
    shift: float
    "sum of |delta| over the token-gate pairs"
    ids: tuple[int, ...] = ()
    "the answer's tokens; kept with `whole` only"
    pieces: tuple[str, ...] = ()
    "the text that each token adds; with `whole`"
    rho: tuple[float, ...] = ()
    "[tokens of prompt and answer - 1] projections on the first layer of the row's last guard; with `whole`, if it has guards"
    delta: tuple[float, ...] = ()
    "[as rho] what that gate moved them by"

    @property
    def answer(self) -> Answer:
        """As a backend would give it, but for the prompt's tokens and the traces."""
        return Answer(
            text=self.text, prompt_ids=(), ids=self.ids, finished="stop" if self.finished == "stop" else "length",
            tokens_seen=self.tokens_seen, tokens_moved=self.tokens_moved, shift=self.shift,
        )  # fmt: skip


class Answers:
    """A model's answers, from the journal or asked for now.

    Args:
        batch: rows that are answered, and written, at a time.
    """

    def __init__(
        self, model: Backend, sampling: Sampling, journal: Journal, *, batch: int, progress: Stage | None = None
    ) -> None:
        if batch < 1:
            raise InputError(f"a batch has at least one row, got {batch}")
        self._model, self._sampling, self._journal, self._batch, self._progress = model, sampling, journal, batch, progress
        identity = asdict(model.identity)
        del identity["name"]
        self._content = [model.name, identity, asdict(sampling)]
        self._kept: dict[str, Kept] = {}
        self.tokens = 0
        "tokens that were generated since this was made"
        self.reused = 0
        "answers that were there already"
        for record in journal.records:
            if "answers" in record:
                self._kept |= {key: Kept(**_tuples(fields)) for key, fields in record["answers"].items()}
        self._before = set(self._kept)

    def of(self, rows: Sequence[Row], what: str, *, whole: bool = False) -> list[Kept]:
        """The answer of every row, in order. Rows that are alike in all are answered once.

        Args:
            what: told with the progress.
            whole: keep tokens and projections too.
        """
        keys = [self._key(row, whole) for row in rows]
        unique = dict(zip(keys, rows, strict=True))
        self.reused += sum(key in self._before for key in unique)
        order = list(unique)
        started, before = time.monotonic(), self.tokens
        for start in range(0, len(order), self._batch):
            self._tell(what, start, len(order), before, started)
            part = order[start : start + self._batch]
            missing = [key for key in part if key not in self._kept]
            if missing:
                self._add(missing, [unique[key] for key in missing], whole)
        self._tell(what, len(order), len(order), before, started)
        return [self._kept[key] for key in keys]

    def _add(self, keys: Sequence[str], rows: Sequence[Row], whole: bool) -> None:
        answers = self._model.generate(
            [row.prompt for row in rows], guards=[row.guards for row in rows], sampling=self._sampling, trace=whole
        )
        new = {key: self._keep(answer, whole) for key, answer in zip(keys, answers, strict=True)}
        self.tokens += sum(len(answer.ids) for answer in answers)
        self._journal.add({"answers": {key: _fields(kept) for key, kept in new.items()}})
        self._kept |= new

    def _keep(self, answer: Answer, whole: bool) -> Kept:
        kept = Kept(
            answer.text, answer.finished, len(answer.ids), answer.tokens_seen, answer.tokens_moved, float(f"{answer.shift:.9g}")
        )
        if not whole:
            return kept
        rho, delta = _traced(answer.traces)
        pieces = tuple(self._model.pieces(answer.ids))
        return Kept(**{**vars(kept), "ids": answer.ids, "pieces": pieces, "rho": rho, "delta": delta})

    def _key(self, row: Row, whole: bool) -> str:
        conversation = [dict(message) for message in as_conversation(row.prompt)]
        return content_key(*self._content, conversation, [guard.digest for guard in row.guards], whole)

    def _tell(self, what: str, done: int, total: int, before: int, started: float) -> None:
        if self._progress is not None:
            seconds = time.monotonic() - started
            rate = (self.tokens - before) / seconds if seconds > 0 else 0.0
            self._progress(what, done, total, rate)


def _traced(traces: Sequence[Trace]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """rho and delta of the last guard's first layer."""
    if not traces:
        return (), ()
    last = max(trace.guard for trace in traces)
    first = next(trace for trace in traces if trace.guard == last)
    return _rounded(first.rho), _rounded(first.delta)


def _rounded(values: Any) -> tuple[float, ...]:
    return tuple(float(f"{value:.{DIGITS}g}") for value in values.tolist())


def _fields(kept: Kept) -> dict[str, Any]:
    """A kept answer as JSON values, without what is empty."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(kept).items() if value != ()}


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}


# ---------------------------------------------------------------------------------------------- what has changed


def note_inputs(journal: Journal, inputs: Mapping[str, Any]) -> str:
    """Record what a sweep is made with; returns a sentence if the last one in this journal was made with something else.

    Answers to other inputs are kept and not used: their keys differ.
    """
    before = [record["inputs"] for record in journal.records if "inputs" in record]
    now = {key: content_key(value) for key, value in inputs.items()}
    if before and before[-1] == now:
        return ""
    journal.add({"inputs": now})
    if not before:
        return ""
    changed = sorted(key for key in now.keys() | before[-1].keys() if now.get(key) != before[-1].get(key))
    return f"{', '.join(changed)} changed since the last sweep in {journal.path}; answers that were made otherwise are not used"


__all__ = ["Answers", "Kept", "Row", "note_inputs"]
