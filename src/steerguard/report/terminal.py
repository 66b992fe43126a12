"""The terminal: progress on standard error, results on standard output.

It works in a pipe: without a terminal there are no colours and no moving bars, and moved tokens stand in brackets.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from steerguard.metrics import recovered
from steerguard.probe import ranges

if TYPE_CHECKING:
    from steerguard.backends.base import Answer, Backend, Floats
    from steerguard.checking import CheckReport
    from steerguard.fitting import Fit, Stage
    from steerguard.guard import Guard
    from steerguard.organism.demo import DemoResult, Example, Tokens, TraitResult
    from steerguard.recalibrating import Change, Recalibrated
    from steerguard.recipes import Recipe
    from steerguard.recipes.plan import Plan
    from steerguard.recipes.run import Outcome
    from steerguard.sweeping import Arm, Figures

PLAIN_WIDTH = 100


@cache
def _out() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH, soft_wrap=False)


@cache
def _err() -> Console:
    return Console(stderr=True, highlight=False)


def note(text: str) -> None:
    """A line of result."""
    _out().print(Text(text))


def show(what: RenderableType) -> None:
    """A table, or a text of several styles, of result."""
    _out().print(what)


# ------------------------------------------------------------------------------------------------ progress


@contextmanager
def loading(name: str) -> Iterator[None]:
    """A model is being loaded; transformers' own bars show how far, on a terminal only."""
    _err().print(f"loading {name} ...", markup=False)
    if not _err().is_terminal:
        from transformers.utils import logging

        logging.disable_progress_bar()
    yield


@contextmanager
def progress() -> Iterator[Stage]:
    """A function that is told how far work is: bars on a terminal, a line per finished step elsewhere."""
    if not _err().is_terminal:
        yield _lines
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
    )  # fmt: skip
    with Progress(*columns, console=_err(), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int, rate: float = 0.0, /) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total, rate="")
            bars.update(tasks[what], completed=done, total=total, rate=f"{rate:,.0f} tokens/s" if rate else "")

        yield report


def _lines(what: str, done: int, total: int, rate: float = 0.0, /) -> None:
    if done == total:
        _err().print(f"{what}: {total}" + (f", {rate:,.0f} tokens/s" if rate else ""))


# ------------------------------------------------------------------------------------------------ tokens


def coloured(
    tokens: Sequence[str], rho: Floats, moved: Sequence[bool], *, boundary: float, spread: float, plain: bool | None = None
) -> Text:
    """Tokens coloured by their projection: red below the boundary, green above; moved ones underlined.

    Args:
        rho: `[tokens]` projections before correction.
        spread: the distance from the boundary at which the colour is full, in units of the residual stream.
        plain: brackets instead of colours; by default where standard output is no terminal.
    """
    text = Text()
    plain = not _out().is_terminal if plain is None else plain
    for i, token in enumerate(tokens):
        if plain and moved[i]:
            lead = len(token) - len(token.lstrip())
            text.append(f"{token[:lead]}[{token[lead:]}]")
        else:
            text.append(token, style=_colour((float(rho[i]) - boundary) / max(spread, 1e-9)) + (" underline" if moved[i] else ""))
    return text


def _colour(x: float) -> str:
    """A shade for -1 (full red) .. 0 (grey) .. 1 (full green)."""
    x = max(-1.0, min(1.0, x))
    strength = abs(x)
    base, far = np.array([150, 150, 150]), np.array([220, 60, 60]) if x < 0 else np.array([40, 170, 90])
    red, green, blue = (base + (far - base) * strength).astype(int)
    return f"rgb({red},{green},{blue})"


def answer_text(model: Backend, answer: Answer, guard: Guard) -> Text:
    """A traced answer with its tokens coloured by the projection on the guard's first probe."""
    probe = guard.probes[0]
    trace = answer.traces[0]
    start = len(answer.prompt_ids)
    rho, delta = trace.rho[start:], trace.delta[start:]
    tokens = model.pieces(answer.ids)[: len(rho)]
    body = coloured(tokens, rho, [bool(d) for d in delta], boundary=probe.m, spread=probe.delta_mu)
    rest = answer.text[len("".join(tokens)) :]
    return body.append(rest) if rest and answer.finished == "length" else body


# ------------------------------------------------------------------------------------------------ commands


def show_answers(model: Backend, guard: Guard, unguarded: Answer, guarded: Answer) -> None:
    """What `ask` prints."""
    moved = f"{guarded.tokens_moved} of {guarded.tokens_seen} tokens moved"
    console = _out()
    console.print(Text("unguarded", style="bold"))
    console.print(Text(unguarded.text), "", sep="\n")
    console.print(Text.assemble(("guarded", "bold"), f"  {guard.rule} at {_layers(guard)}, {guard.positions} positions: {moved}"))
    console.print(answer_text(model, guarded, guard))


def show_fit(probes: Fit, folder: Path) -> None:
    """What `fit` prints: the evidence of every layer."""
    table = Table(title=f"{probes.provenance['trait']['name']}: held-out evidence by layer", title_justify="left")
    for column in ("layer", "AUROC", "95 % interval", "Cohen's d", "split-half cosine", "cosine with mean difference", ""):
        table.add_column(column, justify="right")
    for layer, probe in probes.items():
        e = probe.evidence
        table.add_row(
            str(layer), f"{e.auroc:.3f}", f"{e.auroc_low:.3f} - {e.auroc_high:.3f}", f"{e.cohens_d:.2f}",
            f"{e.split_half:.2f}", f"{e.cosine_mean_difference:.2f}", "weak" if e.weak else "",
        )  # fmt: skip
    _out().print(table)
    dropped = probes.provenance["contrast"]["dropped"]
    if dropped:
        note(f"{dropped} pairs were left out: an answer was empty")
    turned = probes.provenance["fit"].get("directions", {}).get("turned_round")
    if turned:
        note(f"given directions that pointed to the negative pole were turned round on layers {ranges(turned)}")
    note(f"probes and answers: {folder}")
    note("where a trait reads best is not where steering works best; to steer with every layer and strength, and choose:")
    judge = "" if probes.provenance["trait"].get("scorer") == "exact" else " --judge MODEL@URL"
    note(f"  steerguard sweep {folder}{judge} -o guard.guard        (add --dry-run to see what it takes)")


def show_guard(guard: Guard) -> None:
    """What `show` prints."""
    _out().print(guard.describe(), markup=False)


def show_check(report: CheckReport) -> None:
    """What `check` prints: each check, and the verdict."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for item in report.findings:
        table.add_row(Text("pass", "green") if item.passed else Text("FAIL", "bold red"), item.check, Text(item.detail))
    _out().print(table)
    verdict = "the guard is steering" if report.passed else "the guard is NOT steering as it should"
    _out().print(Text(verdict, "bold green" if report.passed else "bold red"))


def show_demo(result: DemoResult) -> None:
    """What `demo` prints."""
    for trait in result.traits:
        _out().print(_trait_table(trait), "", sep="\n")
    for trait in result.traits:
        for example in trait.examples:
            _out().print(_example(example))
    for refusal in result.refused:
        note(f"* {refusal}")
    note(f"all of it in {result.seconds:.0f} s; guard files:")
    for path in result.guards:
        note(f"  {path}")
    note(f"next: steerguard show {result.guards[0]}" if result.guards else "no guard was written")


def show_recalibrated(found: Recalibrated, path: Path) -> None:
    """What `recalibrate` prints: every number before and after, what that means, and what was not measured again."""
    table = Table(title=f"{found.guard.name}: statistics of the direction, before and after", title_justify="left")
    for column in ("layer", "", "old", "new", "change, in sigmas"):
        table.add_column(column, justify="left" if not column else "right")
    for change in found.changes:
        table.add_row(str(change.layer), change.name, f"{change.old:.4g}", f"{change.new:.4g}", _sigmas(change))
    _out().print(table)
    for change in found.boundary:
        side = "" if change.new == change.old else f" towards the {'aligned' if change.new > change.old else 'misaligned'} side"
        note(f"layer {change.layer}: the boundary moved by {_sigmas(change)} sigmas{side}")
    note(f"benign tokens that the gates move on this model: {_share(found.fire_before)} before, {_share(found.fire_after)} after")
    for i, layer in enumerate(found.guard.layers):
        was = "not recorded" if found.below_before is None else _share(found.below_before[i])
        now = _share(found.below_after[i])
        note(f"layer {layer}: tokens of benign answers below the boundary: {was} in the old reference, {now} in the new")
    if not found.follows:
        note(f"{found.guard.rule} does not depend on these numbers: its gate stands where it stood; choose it anew")
    note("what a sweep measured is of the old checkpoint and was not measured again; `steerguard check`, then evaluate")
    note(f"{found.guard}\n{path}")


def _sigmas(change: Change) -> str:
    return "no spread" if change.sigmas is None else f"{change.sigmas:+.2f}"


def _share(value: float | None) -> str:
    return "none seen" if value is None else f"{100 * value:.1f} %"


def draw_examples(result: DemoResult, path: Path) -> None:
    """The first example of each trait as an SVG picture, for a page; fonts are the reader's own, nothing is fetched."""
    console = Console(record=True, width=132, file=StringIO(), force_terminal=True, color_system="truecolor", highlight=False)
    for trait in result.traits:
        for example in trait.examples[:1]:
            console.print(_example(example, plain=False))
    svg_format = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(console.export_svg(title="steerguard demo", code_format=svg_format), encoding="utf-8")


def _trait_table(trait: TraitResult) -> Table:
    title = f"{trait.name}, {trait.arms[0].figures.n} held-out scenarios (test split)"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("operating point")
    for column in ("trait", "recovered", "coherence", "capability", "repetition", "tokens moved"):
        table.add_column(column, justify="right")
    for arm in trait.arms:
        f = arm.figures
        refused = "*" if arm.name in trait.sweep.refused else ""
        table.add_row(
            arm.name + refused, "" if arm.setting is None else str(arm.setting), number(f.trait), percent(trait.recovered(arm)),
            number(f.coherence), number(trait.capability.get(arm.name)), f"{f.repetition:.3f}", _moved(arm),
        )  # fmt: skip
    return table


def _moved(arm: Arm) -> str:
    return "" if arm.setting is None else f"{100 * arm.figures.moved:.0f} %"


def number(value: float | None) -> str:
    return "unscored" if value is None else f"{value:.1f}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} %"


def _example(example: Example, *, plain: bool | None = None) -> RenderableType:
    """One conversation side by side: the system prompt and the question above three answers."""
    head = Text.assemble(("system  ", "bold"), example.system, "\n", ("user    ", "bold"), example.question)
    answers = Table.grid(padding=(0, 2), expand=True)
    for _ in example.answers:
        answers.add_column(ratio=1)
    answers.add_row(*(Text(name, "bold") for name, _ in example.answers))
    answers.add_row(*(_cell(text, tokens, plain) for _, (text, tokens) in example.answers))
    return Panel(Group(head, "", answers), title=example.title, title_align="left")


def _cell(text: str, tokens: Tokens | None, plain: bool | None) -> Text:
    if tokens is None:
        return Text(text)
    return coloured(tokens.pieces, tokens.rho, tokens.moved, boundary=tokens.m, spread=tokens.spread, plain=plain)


def _layers(guard: Guard) -> str:
    layers = [str(p.layer) for p in guard.probes]
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(layers)}"


# ------------------------------------------------------------------------------------------------ sweeps


def show_plan(recipe: Recipe, plan: Plan) -> None:
    """What `sweep --dry-run` prints."""
    table = Table(title=recipe.title or f"{recipe.model}, {recipe.trait}", title_justify="left")
    table.add_column("step")
    for column in ("answers", "prompt tokens", "answer tokens", "judged"):
        table.add_column(column, justify="right")
    for step in plan.steps:
        table.add_row(step.what, *map(_count, (step.answers, step.prompt_tokens, step.answer_tokens, step.judged)))
    table.add_section()
    read, drawn = (sum(getattr(step, key) for step in plan.steps) for key in ("prompt_tokens", "answer_tokens"))
    table.add_row("all", *map(_count, (plan.answers, read, drawn, sum(step.judged for step in plan.steps))))
    _out().print(table)
    note(f"{_count(plan.settings)} settings on {plan.layers} layers; {_count(plan.forwards)} forwards on benign prompts at most")
    e = recipe.estimate
    if plan.hours is None:
        note("how long it takes is not reckoned: set estimate.tokens_per_second to what your machine gives")
    else:
        note(
            f"about {plan.hours:.1f} hours on {plan.hardware}, if it generates {e.tokens_per_second:,.0f} tokens/s and an answer "
            f"has {e.answer_tokens} tokens: assumptions of the recipe, not measurements"
        )
    if plan.judge_calls:
        money = "not reckoned: no judge has price_in and price_out" if plan.judge_money is None else f"{plan.judge_money:,.2f}"
        note(f"{_count(plan.judge_calls)} judge calls, {_count(plan.judge_tokens)} tokens; money: {money}")
    if recipe.notes:
        note(recipe.notes.strip())


def _count(value: float) -> str:
    return f"{value:,.0f}" if value else ""


def show_sweep(outcome: Outcome) -> None:
    """What `sweep` prints: each rule's operating point, what it reaches on test, and what it costs."""
    found = outcome.sweep
    arms = {arm.name: arm.figures for arm in outcome.arms}
    table = Table(title=f"{outcome.result.trait.title}: each rule's operating point", title_justify="left")
    table.add_column("")
    table.add_column("operating point")
    for column in ("select", "wins", "benign KL", "fires", "test", "recovered", "coherence"):
        table.add_column(column, justify="right")
    for name, figures in (("aligned", found.aligned), ("malicious", found.malicious)):
        own = arms.get(name)
        table.add_row(name, "", number(figures.trait), "", "", "", *_tested(own, None, None))
    for name, setting in {**found.barred, **found.best}.items():
        cost, sure = found.costs.get(setting), found.sure.get(name)
        table.add_row(
            name + ("" if name in found.best else "*"), str(setting), number(found.points[setting].trait),
            "" if sure is None else f"{100 * sure.wins:.0f} %",
            "" if cost is None or cost.kl is None else f"{cost.kl:.3f}",
            "" if cost is None or cost.fire_rate is None else f"{100 * cost.fire_rate:.0f} %",
            *_tested(arms.get(name), arms.get("aligned"), arms.get("malicious")),
        )  # fmt: skip
    _out().print(table)
    note(f"select: {found.aligned.n} scenarios, {found.tried} settings; wins: how often other scenarios would choose the same")
    for name, why in found.refused.items():
        note(f"{'* ' if name in found.barred else ''}{name} has no operating point: {why}")
    for text in (found.not_looked, found.changed):
        if text:
            note(text)
    for path in outcome.guards.values():
        note(f"guard: {path}")
    note(f"figures and answers: {outcome.path}")


def _tested(own: Figures | None, aligned: Figures | None, malicious: Figures | None) -> tuple[str, str, str]:
    """Trait, share recovered and coherence on test; empty where it was not read."""
    if own is None:
        return "", "", ""
    share = None
    if aligned is not None and malicious is not None:
        share = recovered(malicious=malicious.trait, aligned=aligned.trait, steered=own.trait)
    return number(own.trait), percent(share), number(own.coherence)
