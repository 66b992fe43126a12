"""The command that evaluates a guard: `evaluate`, and `card`, which shows what it found."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steerguard.cli.shared import (
    Allow,
    BackendName,
    DeviceMap,
    Dtype,
    Engine,
    ModelOption,
    Overwrite,
    Quantization,
    app,
    engine_options,
    open_both,
    progressing,
)
from steerguard.errors import InputError

if TYPE_CHECKING:
    from steerguard.evaluate.card import Card
    from steerguard.evaluate.gate import Demand

DEFAULT = "quick"

Suites = Annotated[list[str], typer.Option("--suite", "-s", help="quick (the default), full, or a section's name; repeat")]
Demands = Annotated[
    Path | None, typer.Option(metavar="FILE", help="limits by figure as YAML; exit 1 if one is not kept, or not measured")
]


@app.command()
def evaluate(
    guard: Annotated[Path | None, typer.Argument(metavar="GUARD", help="a .guard file")] = None,
    suite: Suites = [],  # noqa: B006
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="folder for the card and all that it is made of; else GUARD.evaluation")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print answers, tokens and judge calls; do nothing")] = False,
    figures: Annotated[bool, typer.Option("--figures", help="print the name of every figure and its limit; do nothing")] = False,
    fail_below: Demands = None,
    fit: Annotated[Path | None, typer.Option(help="the folder of `steerguard fit` that the guard came from")] = None,
    data: Annotated[Path | None, typer.Option(help="folder with local copies of benchmarks; see docs/evaluation.md")] = None,
    trait: Annotated[str | None, typer.Option("--trait", "-t", help="by default the bundled trait that the guard names")] = None,
    benign: Annotated[Path | None, typer.Option(help="a JSON-lines file of ordinary prompts; else the bundled ones")] = None,
    judge: Annotated[list[str], typer.Option(metavar="MODEL@URL", help="a judge's endpoint; repeat for several")] = [],  # noqa: B006
    judge_key_env: Annotated[str | None, typer.Option(help="NAME of the environment variable with the judge's key")] = None,
    max_calls: Annotated[int | None, typer.Option(min=0, help="the most calls of judges")] = None,
    size: Annotated[str | None, typer.Option(help="quick or full: how much is asked; by default as the suite says")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="longest answer; by default as the guard was fitted")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="by default as the guard was fitted")] = None,
    batch: Annotated[int, typer.Option(min=1, help="rows that are answered at a time")] = 32,
    model: ModelOption = None, allow_mismatch: Allow = [],  # noqa: B006
    backend: BackendName = "hf", dtype: Dtype = "auto", device_map: DeviceMap = None, quantization: Quantization = None,
    engine: Engine = [],  # noqa: B006
    overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """What a guard buys, what it costs and where it fails, on one card.

    Interrupted, it goes on where it was; what has ended is not measured again. Exit 1 if --fail-below is not met.
    """
    from dataclasses import replace
    from datetime import date

    from steerguard.evaluate import card_page, gate, running, sections, setting
    from steerguard.evaluate.terminal import show_card, show_estimates, show_figures
    from steerguard.guard import Guard
    from steerguard.report.terminal import note

    if figures:
        show_figures(sections.suite(["full"]))
        return
    if guard is None:
        raise InputError("which guard? Give its file: steerguard evaluate honesty.guard")
    wanted = suite or [DEFAULT]
    chosen = sections.suite(wanted)
    demands = () if fail_below is None else gate.read_demands(fail_below, sections.figure_names())
    folder = out or guard.with_suffix(".evaluation")
    if not dry_run:
        card_page.refuse_existing(folder, overwrite=overwrite)
    asked = setting.Asked(
        trait=trait, benign=benign, judges=tuple(judge), judge_key_env=judge_key_env, max_calls=max_calls, data=data, fit=fit,
        size=setting.size_of(wanted, size), max_new_tokens=max_new_tokens, seed=seed, batch=batch,
    )  # fmt: skip
    setting.check(Guard.load(guard), asked)
    options = {"dtype": dtype, "device_map": device_map, "quantization": quantization, **engine_options(engine)}
    loaded_guard, loaded = open_both(guard, model, allow_mismatch, backend, **options)
    context = setting.context(loaded, loaded_guard, asked, folder=None if dry_run else folder)
    if dry_run:
        show_estimates(running.estimates(context, chosen), context)
        return
    with progressing() as progress:
        command = shlex.join(["steerguard", *sys.argv[1:]])
        made = date.today().isoformat()
        found = running.evaluate(replace(context, progress=progress), chosen, suites=wanted, made=made, command=command)
    paths = card_page.write(found, folder, overwrite=True)
    show_card(found)
    note(f"card: {', '.join(map(str, paths))}")
    _gate(found, demands)


@app.command()
def card(
    path: Annotated[Path, typer.Argument(metavar="CARD", help="card.json of an evaluation, or its folder")],
    fail_below: Demands = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="as Markdown, for a model card")] = False,
) -> None:
    """What an evaluation found, again: on the terminal, as Markdown, or against other limits."""
    from steerguard.evaluate import card_file, card_markdown, card_page, gate, sections
    from steerguard.evaluate.terminal import show_card
    from steerguard.report.terminal import note

    found = card_file.read(path / card_page.JSON if path.is_dir() else path)
    demands = () if fail_below is None else gate.read_demands(fail_below, sections.figure_names())
    if markdown:
        note(card_markdown.markdown(found))
    else:
        show_card(found)
    _gate(found, demands)


def _gate(found: Card, demands: tuple[Demand, ...]) -> None:
    """Say what is not kept, and exit 1 if anything is not."""
    from steerguard.evaluate import gate
    from steerguard.report.terminal import note

    failed = gate.failures(found, demands)
    for one in failed:
        note(f"FAILED: {one}")
    if failed:
        raise typer.Exit(1)


