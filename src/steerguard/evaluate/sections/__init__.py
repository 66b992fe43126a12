"""The sections that there are, by name, and the suites that are made of them.

A section is added by one line here; its module is loaded when it is asked for. What a section is: `evaluate.section`.
It knows names. It knows nothing of what they measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from steerguard.errors import InputError
from steerguard.evaluate.section import (
    Context,
    Estimate,
    Figure,
    Limit,
    Row,
    Section,
    SectionResult,
)

__all__ = [
    "Context", "Estimate", "Figure", "figure_names", "Limit", "Row", "Section", "section", "SectionResult", "SECTIONS",
    "suite", "SUITES",
]  # fmt: skip

_HERE = "steerguard.evaluate.sections"
SECTIONS: dict[str, str] = {
    "trait": f"{_HERE}.trait:Trait",
    "benign": f"{_HERE}.benign:Benign",
    "capability": f"{_HERE}.capability:Capability",
    "benchmarks": f"{_HERE}.benchmarks:Benchmarks",
    "mt_bench": f"{_HERE}.graded:MTBench",
    "alpaca_eval": f"{_HERE}.graded:AlpacaEval",
    "turns": f"{_HERE}.turns:Turns",
    "controls": f"{_HERE}.controls:Controls",
    "prompts": f"{_HERE}.prompts:Prompts",
    "wordings": f"{_HERE}.attacks:Wordings",
    "suffix": f"{_HERE}.attacks:Suffix",
    "poison": f"{_HERE}.attacks:Poison",
}
"""name -> module:class, in the order in which they are run and shown."""
SUITES: dict[str, tuple[str, ...]] = {
    "quick": ("trait", "benign", "capability", "turns", "controls", "prompts"),
    "attacks": ("wordings", "suffix", "poison"),
}
"""name -> the sections of it; `full` is all of them."""


def section(name: str) -> Section:
    """The section of that name. Raises InputError, naming what there is."""
    if name not in SECTIONS:
        raise InputError(f"there is no section {name!r}; there are {', '.join(SECTIONS)}")
    module, _, cls = SECTIONS[name].partition(":")
    made: Section = getattr(import_module(module), cls)()
    return made


def figure_names() -> list[str]:
    """The names of all figures of all sections."""
    return [figure.name for name in SECTIONS for figure in section(name).figures]


def suite(names: Sequence[str]) -> list[Section]:
    """The sections of suites and sections by name, each once, in their own order. Raises InputError."""
    wanted: set[str] = set()
    for name in names:
        if name not in SECTIONS and name not in (*SUITES, "full"):
            raise InputError(f"there is no suite {name!r}; there are {', '.join((*SUITES, 'full', *SECTIONS))}")
        wanted |= set(SECTIONS if name == "full" else SUITES.get(name, (name,)))
    return [section(name) for name in SECTIONS if name in wanted]
