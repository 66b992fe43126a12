"""Cards and estimates on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from steerguard.evaluate import running
from steerguard.evaluate.card import LIGHTS, Card
from steerguard.evaluate.section import Context, Estimate, Section
from steerguard.evaluate.wording import VERDICTS, told
from steerguard.report.terminal import note, show

STYLES = {"red": "bold red", "amber": "yellow", "green": "green", "grey": "dim"}


def show_card(card: Card) -> None:
    """Every figure that was measured, its limit, and the line on top; what was not measured below."""
    show(Text(card.verdict, style=STYLES[card.light]))
    for section in card.sections:
        if not any(row.held is not None for row in section.rows):
            continue
        table = Table(title=section.title, title_justify="left", expand=True)
        table.add_column("", ratio=1)
        table.add_column("measured", no_wrap=True)
        table.add_column("n", justify="right", no_wrap=True)
        table.add_column("limit", no_wrap=True)
        table.add_column("", no_wrap=True)
        for row in section.rows:
            if row.held is None:
                continue
            limit = "" if row.figure.limit is None else str(row.figure.limit)
            label = f"{row.figure.label}{f', {row.figure.unit}' if row.figure.unit else ''}"
            verdict = Text(VERDICTS[row.verdict], style=STYLES[LIGHTS[row.verdict]])
            table.add_row(Text(label), told(row.value), str(row.n), limit, verdict)
        show(table)
    for row in card.of("missing"):
        note(f"not measured: {row.figure.label}: {row.note}")


def show_estimates(found: Mapping[str, Estimate | str], context: Context) -> None:
    """What `evaluate --dry-run` prints."""
    table = Table(title=f"{context.guard.name} on {context.model.identity.name}, {context.size}", title_justify="left")
    table.add_column("section")
    for column in ("answers", "prompt tokens", "answer tokens, at most", "forwards", "judge calls", "judge tokens"):
        table.add_column(column, justify="right")
    for name, one in found.items():
        if isinstance(one, str):
            table.add_row(name, Text(f"not run: {one}"))
        else:
            table.add_row(name, *_counts(one))
    all_ = running.total(found)
    table.add_section()
    table.add_row("all", *_counts(all_))
    show(table)
    judge = context.judge
    if judge is not None and all_.judge_calls:
        sent, received = all_.judge_tokens - all_.judge_calls * judge.typical_tokens, all_.judge_calls * judge.typical_tokens
        money = judge.money(sent, received)
        note(f"judge: {judge.model}; money: {'not reckoned: it has no prices' if money is None else f'{money:,.2f}'}")
    note("answers that are kept already are not asked for again; controls and prompts share the answers of the fit")


def show_figures(sections: Sequence[Section]) -> None:
    """What `evaluate --figures` prints: names for a file of limits."""
    table = Table(title="figures, for --fail-below", title_justify="left")
    table.add_column("name", no_wrap=True)
    for column in ("what", "unit", "limit"):
        table.add_column(column)
    for section in sections:
        for figure in section.figures:
            limit = figure.limit
            of = "" if limit is None or limit.of == "guarded" else f" ({limit.of})"
            table.add_row(figure.name, figure.label, figure.unit, "" if limit is None else f"{limit}{of}; {limit.source}")
    show(table)


def _counts(one: Estimate) -> list[str]:
    values = (one.answers, one.prompt_tokens, one.answer_tokens, one.forwards, one.judge_calls, one.judge_tokens)
    return [f"{value:,.0f}" if value else "" for value in values]
