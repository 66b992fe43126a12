"""The headline: what was chosen, what it buys, what it costs, and how sure the choice is. In words and a few figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from steerguard.metrics import Interval
from steerguard.report import wording
from steerguard.sweeping.result import Limits, Point, SweepResult, TestedArm

Verdict = Literal["within", "over", "missing", ""]
"""Whether a figure keeps its limit; empty where there is none."""


@dataclass(frozen=True)
class Tile:
    """One figure of the headline."""

    label: str
    value: str
    detail: str
    "interval, n, and what it is held against"
    verdict: Verdict = ""


@dataclass(frozen=True)
class Rival:
    """One point in the table of what else might have been chosen."""

    point: Point
    role: str
    wins: float | None
    best: bool


def best_point(result: SweepResult) -> Point | None:
    """The setting that the guard was made of; None if no setting is eligible."""
    best = result.select.best
    return None if best is None else result.select.points[result.select.chosen[best].point]


def lead(result: SweepResult) -> str:
    """One sentence: what the guard does to the trait on the test scenarios."""
    best, test = result.select.best, result.test
    if best is None:
        return "No setting of the grid is eligible, so there is no guard to ship."
    if test is None:
        return "The test scenarios were not answered: every figure here is of the scenarios that the choice was made on."
    guarded, malicious, aligned = (test.arm(name) for name in (best, "malicious", "aligned"))
    if guarded is None:
        return f"{best} did not answer the test scenarios: every figure of it here is of those that the choice was made on."
    if guarded.trait is None:
        return f"The test answers under {best} are unscored, so nothing can be said of what the guard buys."
    ends = wording.span(guarded.trait)
    reached = f"On {len(test.scenarios)} held-out scenarios the guarded model reaches {wording.number(guarded.trait.mean)}"
    reached += f" {ends}" if ends else ""
    pair = [(name, arm.trait) for name, arm in (("malicious", malicious), ("aligned", aligned)) if arm is not None]
    against = " and ".join(f"{wording.number(_mean(trait))} {name}" for name, trait in pair)
    return f"{reached} of 100, against {against}." if against else f"{reached} of 100."


def buys(result: SweepResult) -> list[Tile]:
    """What the guard buys on the test; nothing if there is no test."""
    guarded = None if result.test is None else result.test.arm(result.select.best)
    if guarded is None:
        return []
    malicious, aligned = (result.test.arm(name) if result.test else None for name in ("malicious", "aligned"))
    return [
        _interval("trait, guarded", guarded.trait),
        _interval("trait, malicious", None if malicious is None else malicious.trait),
        _interval("trait, aligned", None if aligned is None else aligned.trait),
        _interval(
            "share of the gap recovered", guarded.recovered, digits=0, unit="\N{NO-BREAK SPACE}%", missing=wording.NOT_MEASURED
        ),
    ]


def costs(result: SweepResult) -> list[Tile]:
    """What the guard costs, each figure held against its limit."""
    point, best = best_point(result), result.select.best
    if point is None:
        return []
    limits, benign = result.settings.constraints, point.benign
    guarded, aligned = (result.test.arm(name) if result.test else None for name in (best, "aligned"))
    n = "" if benign is None else f"{benign.n} benign prompts"
    kl, fire, lost = (None, None, None) if benign is None else (benign.kl, benign.fire_rate, benign.lost)
    fires_at_most = None if benign is None else fire_limit(point, limits)
    return [
        _coherence(result, point, guarded, aligned),
        _limited("benign KL", wording.compact(kl), kl, limits.kl, wording.compact(limits.kl), n),
        _limited(
            "fire rate on benign tokens", wording.percent(fire, 1), fire, fires_at_most, wording.percent(fires_at_most), n
        ),
        _limited(
            "lost on benign prompts", wording.number(lost, missing=wording.NOT_MEASURED), lost, limits.benign_lost,
            wording.number(limits.benign_lost), n,
        ),
        _repetition(point, guarded, aligned),
    ]  # fmt: skip


def _coherence(result: SweepResult, point: Point, guarded: TestedArm | None, aligned: TestedArm | None) -> Tile:
    kept = result.settings.constraints.coherence_kept
    if guarded is None:  # no test: what the choice was made on
        value, bar = point.figures.coherence, result.coherence_bar
        shown, known = wording.number(value), f"n\N{NO-BREAK SPACE}{point.figures.n}, select"
    else:
        value = _mean(guarded.coherence)
        reference = None if aligned is None else _mean(aligned.coherence)
        bar = None if reference is None else kept * reference
        shown, known = wording.number(value), f"{wording.span(guarded.coherence)} {wording.counted(guarded.coherence)}".strip()
    limit = "the bar is not known" if bar is None else f"bar {wording.number(bar)}, {wording.percent(kept)} of the aligned"
    verdict: Verdict = "missing" if value is None else "" if bar is None else "within" if value >= bar else "over"
    return Tile("coherence", shown, "; ".join(part for part in (known, limit) if part), verdict)


def _repetition(point: Point, guarded: TestedArm | None, aligned: TestedArm | None) -> Tile:
    value = point.figures.repetition if guarded is None else guarded.repetition
    n = point.figures.n if guarded is None else len(guarded.rows)
    detail = f"n\N{NO-BREAK SPACE}{n}"
    if aligned is not None:
        detail += f"; aligned {wording.percent(aligned.repetition, 1)}"
    return Tile("repeated 4-grams", wording.percent(value, 1), detail)


def _limited(label: str, shown: str, value: float | None, limit: float | None, limit_shown: str, n: str) -> Tile:
    """A figure that must not exceed a limit."""
    held = "no limit was set" if limit is None else f"limit {limit_shown}"
    if value is None:
        return Tile(label, wording.NOT_MEASURED, held, "missing")
    verdict: Verdict = "" if limit is None else "over" if value > limit else "within"
    return Tile(label, shown, "; ".join(part for part in (n, held) if part), verdict)


def _interval(label: str, value: Interval | None, *, digits: int = 1, unit: str = "", missing: str = wording.UNSCORED) -> Tile:
    if value is None:
        return Tile(label, missing, "", "missing")
    detail = " ".join(part for part in (wording.span(value, digits), wording.counted(value)) if part)
    return Tile(label, wording.number(value.mean, digits) + unit, detail)


def sureness(result: SweepResult) -> str:
    """One sentence on how often the choice would be the same."""
    best = result.select.best
    if best is None:
        return ""
    wins = result.select.chosen[best].wins
    if wins is None:
        return "How often this point would win if the scenarios were drawn anew was not measured."
    return f"This point wins in {wording.percent(wins)} of the bootstrap draws of the {result.select.n} select scenarios."


def rivals(result: SweepResult) -> list[Rival]:
    """The choice, its second best, then the other rules' choices with theirs."""
    out: list[Rival] = []
    chosen = sorted(result.select.chosen.items(), key=lambda one: one[0] != result.select.best)
    for rule, choice in chosen:
        best = rule == result.select.best
        out.append(Rival(result.select.points[choice.point], "chosen" if best else f"best of {rule}", choice.wins, best))
        if choice.second is not None:
            role = "second best" if best else f"second of {rule}"
            out.append(Rival(result.select.points[choice.second], role, None, False))
    return out


def fire_limit(point: Point, limits: Limits) -> float | None:
    """What a setting's fire rate is held against: nothing where the rule has no gate, and moves every token."""
    return limits.fire_rate if point.benign is not None and point.benign.gated else None


def over(figure: float | None, limit: float | None) -> bool:
    """Whether a figure exceeds its limit; what was not measured or not limited does not."""
    return figure is not None and limit is not None and figure > limit


def parts_answered(points: Sequence[Point], asked: int) -> int:
    """How many settings answered only some of the scenarios."""
    return sum(point.scenarios < asked for point in points)


def _mean(interval: Interval | None) -> float | None:
    return None if interval is None else interval.mean
