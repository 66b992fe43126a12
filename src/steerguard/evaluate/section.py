"""What a part of an evaluation is: the figures that it promises, what it needs, and what it gives. Every section is one of these.

A section declares its figures, each with a unit, which way is better and, where there is one, a limit. `run` gives one row
for each of them; a row without a value says why. So it is known before anything is run which names a gate may ask for, and
a section that cannot be run gives rows that say so: nothing measured is not zero.

    KL = Figure("benign.kl", "KL on benign prompts", "nats per token", "lower", "costs", Limit("at most", 0.1, "the field's"))

    class Benign(Section):
        name, title = "benign", "Where there is nothing to do"
        question = "What does the guard do to prompts that it has no business with?"
        figures = (KL,)

        def missing(self, context: Context) -> str:
            return "" if context.benign.prompts else "benign prompts (--benign FILE)"

        def estimate(self, context: Context) -> Estimate:
            return Estimate(answers=len(context.benign.prompts))

        def run(self, context: Context) -> SectionResult:
            answers = context.answers("benign")                    # a journal of its own, kept in the folder
            kl = bootstrap_interval([...], seed=context.seed)
            return self.result(context, {"benign.kl": kl}, notes=["read with the unguarded model's answers"])

and one line in `steerguard.evaluate.sections`. `run` is called only if `missing` is empty, and not again once it has ended,
unless something that it depends on has changed: the guard, the model, the trait, scorer, judge, prompts, sampling, seed, size,
the section's `version`, or what its `inputs` says beside these. It knows no section.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from steerguard.backends.base import Backend, Sampling
from steerguard.errors import InputError
from steerguard.evaluate import BATCH
from steerguard.evaluate.results import Paired
from steerguard.files import shown
from steerguard.guard import Guard
from steerguard.journal import Journal
from steerguard.metrics import Interval
from steerguard.scorers import Scorer
from steerguard.sweeping import Benign
from steerguard.sweeping.answers import Answers
from steerguard.traits import Trait

if TYPE_CHECKING:
    from steerguard.fitting import Stage
    from steerguard.judging import Budget, JudgeConfig

Size = Literal["quick", "full"]
Better = Literal["higher", "lower", ""]
"""`""` where neither is."""
Part = Literal["buys", "costs", "fails"]
"""Where a figure stands on the card: what the guard buys, what it costs, where it fails."""
Sense = Literal["at most", "at least", "not below"]
Of = Literal["guarded", "change"]
Verdict = Literal["over", "undecided", "within", "free", "missing"]
"""Of a figure and its limit: exceeded; not to be told from this many cases; kept; no limit; not measured."""
FEW = 8
"""Cases below which nothing is decided: an interval over so few says little, and one of no width nothing."""


@dataclass(frozen=True)
class Limit:
    """What a figure is held to.

    `at most` and `at least` are exceeded where the whole interval is beyond the bound, kept where it is within, and else
    undecided. `not below` is exceeded likewise and kept otherwise: for figures that stand at their bound if all is well.
    """

    sense: Sense
    bound: float
    source: str
    "whose limit it is, such as `the field's` or `ours`"
    of: Of = "guarded"
    "which of a `Paired` is held to it"

    def verdict(self, found: Interval | None) -> Verdict:
        """What is to be said of an interval."""
        if found is None:
            return "missing"
        if found.low is None or found.high is None or found.n < FEW:
            return "undecided"
        sign = 1 if self.sense == "at most" else -1
        near, far = sorted((sign * found.low, sign * found.high))
        if near > sign * self.bound:
            return "over"
        return "within" if far <= sign * self.bound or self.sense == "not below" else "undecided"

    def __str__(self) -> str:
        return f"{self.sense} {self.bound:g}"


@dataclass(frozen=True)
class Figure:
    """A figure that a section promises."""

    name: str
    "what a gate calls it: the section's name, a dot, and words with dots and underscores"
    label: str
    "what people read"
    unit: str
    "`points of 100`, `%`, `nats per token`, ...; empty for a count"
    better: Better
    part: Part
    limit: Limit | None = None
    about: str = ""
    "one sentence for whoever does not know it"


@dataclass(frozen=True)
class Row:
    """One figure as it was measured."""

    figure: Figure
    value: Interval | Paired | None
    "None: unscored or not measured, and `note` says why"
    note: str = ""

    @property
    def held(self) -> Interval | None:
        "the interval that is held to the limit, or shown first: of a pair without a limit, the guarded arm's"
        if not isinstance(self.value, Paired):
            return self.value
        of = "guarded" if self.figure.limit is None else self.figure.limit.of
        return self.value.change if of == "change" else self.value.guarded

    @property
    def verdict(self) -> Verdict:
        if self.held is None:
            return "missing"
        return "free" if self.figure.limit is None else self.figure.limit.verdict(self.held)

    @property
    def n(self) -> int:
        "cases that were measured"
        return 0 if self.held is None else self.held.n


@dataclass(frozen=True)
class SectionResult:
    """What came of a section."""

    section: str
    title: str
    question: str
    rows: tuple[Row, ...]
    "one for each figure that it promises, in their order"
    details: tuple[Row, ...] = ()
    "more of the same kind, by category, turn, arm: shown, and not to be gated; their names go on from a figure's"
    notes: tuple[str, ...] = ()
    "what a reader must know to read the figures right"
    settings: Mapping[str, Any] = field(default_factory=dict)
    "JSON values: what is needed to do it again, beside what the card has for all"
    seconds: float = 0.0
    ran: bool = True
    "False: it was not run, and every row says why"


@dataclass(frozen=True)
class Estimate:
    """What a section will take, before it is run."""

    answers: int = 0
    "generations"
    prompt_tokens: float = 0.0
    "that are read for them, all together"
    answer_tokens: float = 0.0
    "that are generated, at most"
    forwards: int = 0
    "passes over conversations that generate nothing"
    judge_calls: int = 0
    judge_tokens: float = 0.0

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(*(getattr(self, f) + getattr(other, f) for f in self.__dataclass_fields__))


def in_the_small_world(trait: Trait) -> bool:
    """Whether a trait's sentences are all of the bundled model's world."""
    from steerguard.organism.capability import scorer

    return trait.grammar is not None and set(trait.grammar.replies) <= set(scorer().grammar.replies)


@dataclass(frozen=True, eq=False)
class Context:
    """What every section is given."""

    model: Backend
    guard: Guard
    trait: Trait
    scorer: Scorer | None
    "of the trait; None where the trait needs a judge and none was named"
    benign: Benign
    "prompts that the guard has no business with, and, on the bundled model, what answers to them are worth"
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 42
    size: Size = "full"
    folder: Path | None = None
    "where journals and results are kept; None: nowhere"
    data: Path | None = None
    "local copies of benchmarks; see docs/evaluation.md for the layout"
    fit: Path | None = None
    "the folder of `steerguard fit` that the guard came from: its answers under both poles"
    judge: JudgeConfig | None = None
    budget: Budget | None = None
    "what judging may spend, for all sections together"
    batch: int = BATCH
    "rows that are answered at a time"
    progress: Stage | None = None

    @property
    def organism(self) -> bool:
        "whether the trait is one of the bundled model's world, in which every answer can be scored exactly"
        return in_the_small_world(self.trait)

    def take(self, quick: int, full: int | None = None) -> int | None:
        """How many of something this size looks at; None: all."""
        return quick if self.size == "quick" else full

    def store(self, name: str) -> Path | None:
        """Where a section keeps answers or verdicts as they come: a file of that name, without its suffix."""
        return None if self.folder is None else self.folder / f"{name}.jsonl"

    @contextmanager
    def answers(self, name: str) -> Iterator[Answers]:
        """The model's answers, kept in a journal of that name; closed in the end."""
        with Journal(self.store(name)) as journal:
            yield Answers(self.model, self.sampling, journal, batch=self.batch, progress=self.progress)

    def cost(self, answers: int, texts: Sequence[str], *, times: int = 1, judged: int = 0) -> Estimate:
        """The estimate of answering prompts of about these texts so many times: four characters to a token."""
        read = sum(map(len, texts)) / 4 * times
        calls = judged * 2 if self.judge is not None else 0
        length = float(self.sampling.max_new_tokens)
        each = 900 + (read / answers if answers else 0) + length + (0 if self.judge is None else self.judge.typical_tokens)
        return Estimate(answers, read, answers * length, judge_calls=calls, judge_tokens=calls * each)


class Section(ABC):
    """One part of an evaluation."""

    name: ClassVar[str]
    "what the command line calls it"
    title: ClassVar[str]
    question: ClassVar[str]
    "what it answers, as a deployer would ask it"
    figures: ClassVar[tuple[Figure, ...]]
    version: ClassVar[int] = 1
    "raised when the same inputs would give other figures"

    def missing(self, context: Context) -> str:
        """What it needs and has not got, as it stands after `needs`; empty if it can be run."""
        del context
        return ""

    def inputs(self, context: Context) -> Mapping[str, Any]:
        """What its figures depend on beside what every section's do, as JSON values: digests of files, above all."""
        del context
        return {}

    @abstractmethod
    def estimate(self, context: Context) -> Estimate:
        """What it will take. Loads nothing and asks nobody."""

    @abstractmethod
    def run(self, context: Context) -> SectionResult:
        """Measure. Interrupted, the same call goes on from its journals."""

    # --------------------------------------------------------------------------------- what sections are made with

    def result(
        self,
        context: Context,
        values: Mapping[str, Interval | Paired | None],
        *,
        why: Mapping[str, str] | None = None,
        details: Sequence[Row] = (),
        notes: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> SectionResult:
        """The section's result from its values by name. Raises InputError for a name that it does not promise.

        Args:
            why: name -> a remark, or why there is no value.
        """
        del context
        known = {figure.name for figure in self.figures}
        if other := sorted((set(values) | set(why or {})) - known):
            raise InputError(f"the section {self.name!r} promises no figure {other[0]!r}; it promises {', '.join(sorted(known))}")
        told = {figure.name: "nothing could be scored" for figure in self.figures if values.get(figure.name) is None}
        told |= why or {}
        return SectionResult(
            section=self.name, title=self.title, question=self.question,
            rows=tuple(Row(figure, values.get(figure.name), told.get(figure.name, "")) for figure in self.figures),
            details=tuple(details), notes=tuple(notes), settings=dict(settings or {}),
        )  # fmt: skip

    def not_run(self, why: str) -> SectionResult:
        """A result without a single value."""
        rows = tuple(Row(figure, None, f"not run: {why}") for figure in self.figures)
        return SectionResult(self.name, self.title, self.question, rows, ran=False)

    def figure(self, name: str) -> Figure:
        """The promised figure of that name. Raises InputError."""
        found = {figure.name: figure for figure in self.figures}
        if name not in found:
            raise InputError(f"the section {self.name!r} promises no figure {shown(name)}; it promises {', '.join(found)}")
        return found[name]

    def detail(self, name: str, end: str, label: str, value: Interval | Paired | None, note: str = "") -> Row:
        """A row beside the promised figure of that name, called `NAME.END`; it has no limit."""
        own = self.figure(name)
        figure = Figure(f"{name}.{end}", label, own.unit, own.better, own.part)
        return Row(figure, value, note or ("" if value is not None else "nothing could be scored"))

