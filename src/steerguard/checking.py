"""Checking: is this guard really steering this model, by how much, is shut really shut, is undone really undone.

The checks are the ones that entering `guarded` runs (`backends.proof`); here they are reported one by one instead of
raised, with what the guard itself did to a short conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

from steerguard.backends.base import Backend
from steerguard.backends.proof import Finding, examine
from steerguard.guard import Guard


@runtime_checkable
class Examines(Protocol):
    """A backend that has more to show than the protocol asks, such as what its cache keeps apart."""

    def examine(self, guards: Sequence[Guard]) -> list[Finding]: ...


@dataclass(frozen=True)
class CheckReport:
    """What was checked, and what was found."""

    guard: str
    "name and digest"
    model: str
    backend: str
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """True if every check passed; False if there was none."""
        return bool(self.findings) and all(finding.passed for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {**asdict(self), "passed": self.passed}


def check(model: Backend, *guards: Guard) -> CheckReport:
    """Check guards on a model, together and in this order. Nothing stays installed.

    Raises:
        GuardMismatch: a guard was made for another model.
    """
    for guard in guards:
        guard.check_model(model.identity)
    named = ", ".join(f"{guard.name} {guard.digest[:12]}" for guard in guards)
    findings = examine(model, guards)
    if isinstance(model, Examines):
        findings += model.examine(guards)
    return CheckReport(named, model.identity.name, model.name, tuple(findings))
