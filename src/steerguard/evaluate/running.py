"""An evaluation: sections one after the other, each kept as it ends, and the card of all.

    card = evaluate(context, suite(["quick"]))

What has ended is not run again: a section's result is kept in the folder beside a key of everything that decides it. A section
that was interrupted goes on from its journals. It knows sections and nothing of what they measure.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from steerguard import files
from steerguard.errors import InputError, ResultError
from steerguard.evaluate.card import Card, Subject
from steerguard.evaluate.card_file import MAX_BYTES, section_of
from steerguard.evaluate.results import as_json
from steerguard.evaluate.section import Context, Estimate, Section, SectionResult
from steerguard.files import Malformed
from steerguard.fitting import versions
from steerguard.journal import content_key
from steerguard.metrics.reading import check_unguarded
from steerguard.prompts import as_conversation


def evaluate(
    context: Context, sections: Sequence[Section], *, suites: Sequence[str] = (), made: str = "", command: str = ""
) -> Card:
    """Run sections and put their results on one card.

    Args:
        suites: what was asked for, for whoever reads the card.
        made: the day.
        command: how to do it again.

    Raises:
        InputError: no sections, or a model inside `guarded`.
        GuardMismatch, NotSteering: a guard of another model, or one that cannot be shown to act.
    """
    if not sections:
        raise InputError("an evaluation needs at least one section; see `steerguard evaluate --help`")
    check_unguarded(context.model)
    with context.model.guarded(context.guard):  # proves that it acts, before anything is measured of it
        pass
    if context.folder is not None:
        context.folder.mkdir(parents=True, exist_ok=True)
    results = tuple(run_section(context, one) for one in sections)
    return Card(
        subject=_subject(context), suites=tuple(suites), size=context.size, made=made, sampling=_json(asdict(context.sampling)),
        scorer=None if context.scorer is None else _json(dict(context.scorer.identity)),
        judge=None if context.judge is None else _json(context.judge.settings), seed=context.seed, versions=versions(),
        command=command, sections=results,
    )  # fmt: skip


def run_section(context: Context, section: Section) -> SectionResult:
    """One section's result: kept from before, measured now, or none with the reason."""
    if why := section.missing(context):
        return section.not_run(f"needs {why}")
    key = content_key(_inputs(context, section))
    path = None if context.folder is None else context.folder / f"{section.name}.json"
    if path is not None and (before := _kept(path, key)) is not None:
        return before
    started = time.monotonic()
    found = section.run(context)
    found = replace(found, seconds=round(time.monotonic() - started, 1))
    if path is not None:
        files.write_json(path, {"key": key, "result": as_json(found)}, overwrite=True)
    return found


def estimates(context: Context, sections: Sequence[Section]) -> dict[str, Estimate | str]:
    """What each section will take, or what it lacks."""
    return {one.name: f"needs {why}" if (why := one.missing(context)) else one.estimate(context) for one in sections}


def total(found: Mapping[str, Estimate | str]) -> Estimate:
    """All of them together."""
    out = Estimate()
    for one in found.values():
        out = out if isinstance(one, str) else out + one
    return out


def _inputs(context: Context, section: Section) -> dict[str, Any]:
    """Everything that decides a section's figures."""
    identity = asdict(context.model.identity)
    del identity["name"]
    return {
        "section": [section.name, section.version, dict(section.inputs(context))],
        "figures": as_json(section.figures),
        "guard": context.guard.digest, "model": [context.model.name, identity], "trait": context.trait.digest,
        "scorer": None if context.scorer is None else dict(context.scorer.identity),
        "judge": None if context.judge is None else context.judge.settings,
        "benign": [[dict(message) for message in as_conversation(prompt)] for prompt in context.benign.prompts],
        "sampling": asdict(context.sampling), "seed": context.seed, "size": context.size,
    }  # fmt: skip


def _kept(path: Path, key: str) -> SectionResult | None:
    """The result that was kept under that key; None if there is none, or one of other inputs. Raises ResultError."""
    if not path.exists():
        return None
    try:
        record = files.strict_json(files.read_bounded(path, limit=MAX_BYTES, error=ResultError))
        found = files.take(record, "it", {"key": str, "result": dict})
        return section_of(found["result"]) if found["key"] == key else None
    except Malformed as error:
        raise ResultError(f"{path} is no result of an evaluation: {error}; remove it to measure again") from error


def _subject(context: Context) -> Subject:
    guard, model = context.guard, context.model.identity
    return Subject(
        guard=guard.name, digest=guard.digest, rule=str(guard.rule), layers=guard.layers, positions=guard.positions,
        model=model.name, architecture=model.architecture, backend=context.model.name, trait=context.trait.name,
        title=context.trait.title, trait_sha256=context.trait.digest,
    )  # fmt: skip


def _json(value: Mapping[str, Any]) -> dict[str, Any]:
    return dict(as_json(value))
