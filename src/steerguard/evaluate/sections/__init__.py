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
    "Context", "Estimate", "Figure", "Limit", "Row", "Section", "section", "SectionResult", "SECTIONS", "suite", "SUITES",
]  # fmt: skip

SECTIONS: dict[str, str] = {}
"""name -> module:class, in the order in which they are run and shown."""
SUITES: dict[str, tuple[str, ...]] = {"quick": ()}
"""name -> the sections of it; `full` is all of them."""


def section(name: str) -> Section:
    """The section of that name. Raises InputError, naming what there is."""
    if name not in SECTIONS:
        raise InputError(f"there is no section {name!r}; there are {', '.join(SECTIONS)}")
    module, _, cls = SECTIONS[name].partition(":")
    made: Section = getattr(import_module(module), cls)()
    return made


def suite(names: Sequence[str]) -> list[Section]:
    """The sections of suites and sections by name, each once, in their own order. Raises InputError."""
    wanted: set[str] = set()
    for name in names:
        if name not in SECTIONS and name not in (*SUITES, "full"):
            raise InputError(f"there is no suite {name!r}; there are quick, full, and {', '.join(SECTIONS)}")
        wanted |= set(SECTIONS if name == "full" else SUITES.get(name, (name,)))
    return [section(name) for name in SECTIONS if name in wanted]
