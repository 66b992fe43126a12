"""Many attacks on one guard: `attacks`.

    said, shots = texts("organism-honesty"), shots_of(contrast)
    result = attacks(model, trait.test[:16], guard, wordings(said, shots), scorer=scorer, benign=prompts, store=Path("a.jsonl"))
    print(result)
    print(result["base64"].verdict)

It knows ways to attack as functions of a scenario, and what a trial gives. Optimised suffixes are in `suffix`, poisoned pairs in
`poison`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerguard.backends.base import Backend, Sampling
from steerguard.errors import InputError
from steerguard.evaluate import BATCH
from steerguard.evaluate.attacks.trial import LIVE, Attack, Trial
from steerguard.evaluate.attacks.wordings import Wording
from steerguard.evaluate.results import by_name
from steerguard.guard import Guard
from steerguard.journal import Journal
from steerguard.prompts import Prompt
from steerguard.scorers import Scorer
from steerguard.traits import Scenario

if TYPE_CHECKING:
    from steerguard.fitting import Stage


@dataclass(frozen=True)
class Attacks(Mapping[str, Attack]):
    """What every attack did, by its name."""

    results: tuple[Attack, ...]
    scenarios: int
    benign: int
    "benign answers that thresholds were set on"
    model: str
    guard: str
    "its digest"
    scorer: Mapping[str, Any]
    sampling: Sampling

    def __getitem__(self, name: str) -> Attack:
        return by_name(self.results, name, "attack")

    def __iter__(self) -> Iterator[str]:
        return (one.name for one in self.results)

    def __len__(self) -> int:
        return len(self.results)

    @property
    def gone_through(self) -> tuple[str, ...]:
        """The attacks that the guard does not stop; the controls are none, but for the plain malicious prompt."""
        return tuple(
            one.name for one in self.results
            if one.verdict == "gets through" and (one.family != "control" or one.name == "plain")
        )  # fmt: skip

    def __str__(self) -> str:
        head = f"{self.scenarios} scenarios, {self.benign} benign answers; a success below {LIVE:.0%} counts as none"
        return "\n".join([head, *map(str, self.results)])


def attacks(
    model: Backend,
    scenarios: Sequence[Scenario],
    guard: Guard,
    ways: Sequence[Wording],
    *,
    scorer: Scorer,
    benign: Sequence[Prompt] = (),
    sampling: Sampling = Sampling(),
    store: Path | None = None,
    batch: int = BATCH,
    progress: Stage | None = None,
) -> Attacks:
    """Try every way to attack on every scenario, with the guard and without.

    Args:
        benign: prompts in which there is nothing to notice, for detection; none: it is not measured.
        store: a journal that answers are kept in as they come, and found again in.

    Raises:
        InputError: no scenario, no way or two of one name, or a model inside `guarded`.
        PromptError: an attack that does not fit into the model's context.
    """
    if not scenarios or not ways or len({way.name for way in ways}) < len(ways):
        raise InputError(f"attacks need scenarios and ways with names of their own, got {len(scenarios)} and {len(ways)}")
    with closing(Journal(store)) as journal:
        trial = Trial(model, guard, scorer, journal, benign=benign, sampling=sampling, batch=batch, progress=progress)
        found = tuple(attack(trial, scenarios, way) for way in ways)
        return Attacks(found, len(scenarios), trial.benign, model.identity.name, guard.digest, dict(scorer.identity), sampling)


def attack(trial: Trial, scenarios: Sequence[Scenario], way: Wording) -> Attack:
    """One way to attack, on every scenario."""
    return trial.attack(way.name, way.family, scenarios, way.prompts(scenarios))
