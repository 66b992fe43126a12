"""The sweep: steer with every setting on the `select` scenarios, score the answers, and choose an operating point.

Where a trait reads best is not where writing it steers best, so probe accuracy never chooses. Every setting of the grid
answers the scenarios under the negative system prompt, many settings in one batch; `choice` chooses.

Source: arXiv 2604.08169, section 4 (which selects on its test prompts; we do not).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from steerguard.backends.base import Backend, Sampling
from steerguard.errors import InputError
from steerguard.fitting import Fit, Stage, prompts_of
from steerguard.guard import Guard
from steerguard.journal import Journal, content_key
from steerguard.scorers import Scorer, scorer_for
from steerguard.sweeping.answers import Answers, Row, note_inputs
from steerguard.sweeping.benign import Benign, BenignCosts
from steerguard.sweeping.choice import Cost, Limits, Sureness, choose, coherent, finalists, rank, sureness
from steerguard.sweeping.points import Figures, Scored, Setting, grid
from steerguard.traits import Scenario, Trait

JOURNAL = "sweep.jsonl"
"""The file of a fit's folder that a sweep keeps its answers in."""
BATCH, ENGINE_BATCH = 256, 2048
"""Rows that are answered at a time; more where an engine of its own makes the batches."""


@dataclass(frozen=True)
class Search:
    """How much of the grid is tried on how much. By default every setting answers every scenario."""

    screen: int | None = None
    "every setting answers only so many scenarios first, and of each rule the best `finalists` answer them all"
    finalists: int = 4
    stride: int = 1
    "every n-th layer is tried first, then those between around each rule's two best"

    def __post_init__(self) -> None:
        if min(self.finalists, self.stride, self.screen or 1) < 1:
            raise InputError(f"{self}: each must be at least 1")


@dataclass(frozen=True)
class Sweep:
    """A finished sweep: the baselines, every setting, and the best setting of each rule. All on `select`."""

    probes: Fit
    aligned: Figures
    malicious: Figures
    points: Mapping[Setting, Figures]
    "the settings that answered all scenarios"
    screened: Mapping[Setting, Figures]
    "the settings that answered only some of them, and were left behind"
    best: Mapping[str, Setting]
    "rule name -> its operating point"
    refused: Mapping[str, str]
    "rule name -> why it has no operating point"
    limits: Limits = field(default_factory=Limits)
    barred: Mapping[str, Setting] = field(default_factory=dict)
    "a rule that benign prompts alone refused -> what would have been its operating point without them"
    costs: Mapping[Setting, Cost] = field(default_factory=dict)
    "what the settings that came into question cost on benign prompts"
    sure: Mapping[str, Sureness] = field(default_factory=dict)
    "rule name -> how sure its operating point is"
    beside: tuple[Guard, ...] = ()
    "guards that were on throughout"
    not_looked: str = ""
    "what the search left out; empty if every setting answered every scenario"
    changed: str = ""
    "what was swept otherwise before, in the same journal"
    reused: int = 0
    "answers that were in the journal already"

    @property
    def tried(self) -> int:
        """How many settings answered any scenario."""
        return len(self.points) + len(self.screened)

    @property
    def winner(self) -> str | None:
        """The rule whose operating point is best; None if none has one."""
        return max(self.best, key=lambda name: rank(self.points[self.best[name]]), default=None)

    @property
    def guard(self) -> Guard:
        """The guard at the best operating point over all rules. Raises InputError if no rule has one."""
        if self.winner is None:
            raise InputError("no setting is eligible: " + "; ".join(f"{name}: {why}" for name, why in self.refused.items()))
        return self.guard_of(self.winner)

    def guard_of(self, name: str) -> Guard:
        """The guard at one rule's operating point."""
        return self.guard_at(self.best[name])

    def guard_at(self, setting: Setting) -> Guard:
        """The guard at any setting that answered all scenarios; its provenance says what it reached and whether it may."""
        figures, cost, sure = self.points[setting], self.costs.get(setting), self.sure.get(setting.rule.name)
        return setting.guard(
            self.probes,
            by="sweep", split="select", n=figures.n, settings=self.tried,
            trait=figures.trait, error=figures.error, coherence=figures.coherence,
            benign=None if cost is None else asdict(cost),
            aligned={"trait": self.aligned.trait, "coherence": self.aligned.coherence},
            malicious={"trait": self.malicious.trait, "coherence": self.malicious.coherence},
            constraint=str(self.limits), eligible=setting in self.best.values(),
            wins=sure.wins if sure is not None and self.best.get(setting.rule.name) == setting else None,
            beside=[guard.digest for guard in self.beside], not_looked=self.not_looked,
        )  # fmt: skip


def sweep(
    model: Backend,
    trait: Trait,
    probes: Fit,
    *,
    settings: Sequence[Setting] | None = None,
    scenarios: Sequence[Scenario] | None = None,
    scorer: Scorer | None = None,
    benign: Benign | None = None,
    beside: Sequence[Guard] = (),
    limits: Limits = Limits(),
    search: Search = Search(),
    sampling: Sampling = Sampling(),
    batch: int | None = None,
    store: Path | None = None,
    progress: Stage | None = None,
) -> Sweep:
    """Steer with every setting on the `select` scenarios, score, and choose each rule's operating point.

    Args:
        settings: the grid; by default the paper's rules and strengths on every layer.
        scenarios: by default the trait's `select` split.
        scorer: by default the one that the trait asks for.
        benign: prompts to which a setting that comes into question may do next to nothing, or it is refused.
        beside: guards of other traits that are on throughout, but for the aligned baseline; they act before the one
            that is swept.
        search: how to go over a large grid faster. It may miss a point that the whole grid would have found, and
            `Sweep.not_looked` says what was left out.
        batch: rows that are answered at a time.
        store: a journal; interrupted, the same call with the same journal goes on where it was.

    Raises:
        InputError: no scenarios, nothing to try, a trait that needs a judge, or a journal that cannot be used.
    """
    scenarios = trait.select if scenarios is None else scenarios
    settings = grid(probes) if settings is None else settings
    scorer = scorer or scorer_for(trait)
    if not scenarios or not settings:
        raise InputError(f"a sweep needs scenarios and settings, got {len(scenarios)} and {len(settings)}")
    with Journal(store) as journal:
        changed = note_inputs(journal, _inputs(model, trait, probes, scorer, benign, beside, sampling))
        rows = batch or (ENGINE_BATCH if model.name == "vllm" else BATCH)
        answers = Answers(model, sampling, journal, batch=rows, progress=progress)
        steering = Steering(answers, probes, scorer, tuple(beside))
        # 1. the baselines
        aligned, malicious = steering.baselines(scenarios)
        # 2. the grid, all of it or from coarse to fine
        costs = None if benign is None else BenignCosts(model, probes, benign, answers, journal, progress)
        points, screened, not_looked = _walk(steering, settings, scenarios, aligned.figures, limits, search, costs)
        # 3. the choice, and how sure it is
        figures = {setting: scored.figures for setting, scored in points.items()}
        chosen = choose(figures, aligned.figures, limits=limits, costs=costs)
        sure = sureness(points, aligned, chosen, limits=limits, seed=sampling.seed)
    return Sweep(
        probes=probes, aligned=aligned.figures, malicious=malicious.figures, points=figures, screened=screened,
        best=chosen.best, refused=chosen.refused, barred=chosen.barred, costs=chosen.costs, limits=limits, sure=sure,
        beside=tuple(beside), not_looked=not_looked, changed=changed, reused=answers.reused,
    )  # fmt: skip


def _inputs(
    model: Backend, trait: Trait, probes: Fit, scorer: Scorer, benign: Benign | None, beside: Sequence[Guard], sampling: Sampling
) -> dict[str, Any]:
    """What a sweep's result depends on, by the name under which a change is told."""
    identity = asdict(model.identity)
    del identity["name"]
    directions = {str(layer): [probe.v.tobytes().hex(), *_numbers(probe)] for layer, probe in probes.items()}
    return {
        "the model": [model.name, identity], "the trait": trait.digest, "the probes": directions,
        "the sampling": asdict(sampling), "the scorer": dict(scorer.identity),
        "the guards beside": [guard.digest for guard in beside],
        "the benign prompts": [] if benign is None else content_key([list(p) for p in benign.prompts]),
    }  # fmt: skip


def _numbers(probe: Any) -> list[float]:
    return [float(getattr(probe, key)) for key in ("m", "mu_pos", "sigma_pos", "mu_neg", "sigma_neg", "delta_mu")]


class Steering:
    """Answers and scores of many settings at once."""

    def __init__(self, answers: Answers, probes: Fit, scorer: Scorer, beside: tuple[Guard, ...]) -> None:
        self._answers, self._probes, self._scorer, self._beside = answers, probes, scorer, beside

    def baselines(self, scenarios: Sequence[Scenario]) -> tuple[Scored, Scored]:
        """Aligned, with no guard at all, and malicious, under the guards beside."""
        rows = [Row(prompts_of(s)[0]) for s in scenarios] + [Row(prompts_of(s)[1], self._beside) for s in scenarios]
        aligned, malicious = self._scored(rows, scenarios, 2, "baselines answered")
        return aligned, malicious

    def of(self, settings: Sequence[Setting], scenarios: Sequence[Scenario], what: str) -> dict[Setting, Scored]:
        """What each setting's answers to the scenarios measured."""
        guards = [(*self._beside, setting.guard(self._probes)) for setting in settings]
        prompts = [prompts_of(scenario)[1] for scenario in scenarios]
        rows = [Row(prompt, own) for own in guards for prompt in prompts]
        return dict(zip(settings, self._scored(rows, scenarios, len(settings), what), strict=True))

    def _scored(self, rows: Sequence[Row], scenarios: Sequence[Scenario], arms: int, what: str) -> Iterable[Scored]:
        """Rows of one arm after the other, answered together, scored together, and taken apart again."""
        answers = self._answers.of(rows, what)
        scores = self._scorer.scores(list(scenarios) * arms, [answer.text for answer in answers])
        n = len(scenarios)
        return [Scored.of(scores[i : i + n], answers[i : i + n]) for i in range(0, len(rows), n)]


# ---------------------------------------------------------------------------------------------- going over the grid


def _walk(
    steering: Steering, settings: Sequence[Setting], scenarios: Sequence[Scenario], aligned: Figures, limits: Limits,
    search: Search, costs: BenignCosts | None,
) -> tuple[dict[Setting, Scored], dict[Setting, Figures], str]:  # fmt: skip
    """The settings that answered all scenarios, those that answered some, and what was left out in words."""
    screens = search.screen is not None and search.screen < len(scenarios)
    asked = scenarios[: search.screen] if screens else scenarios
    ordered = strongest_last(settings)
    # 1. every n-th layer, then those around the best
    coarse = _coarse(ordered, search.stride)
    found = steering.of(coarse, asked, "settings steered")
    around = _around({s: f.figures for s, f in found.items()}, ordered, aligned, limits, search.stride)
    if around:
        found |= steering.of(around, asked, "settings around the best steered")
    left = len(ordered) - len(found)
    notes = [f"{left} of {len(ordered)} settings, on layers between those that were tried, were not tried"] if left else []
    if not screens:
        return found, {}, "; ".join(notes)
    # 2. the best of a look at few scenarios answer them all; ties go to what would move benign prompts least
    figures = {setting: scored.figures for setting, scored in found.items()}
    if costs is not None:
        moved = costs.fire_rates(list(figures))
        figures = {setting: replace(f, shift=moved[setting][1]) for setting, f in figures.items()}
    last = finalists(figures, aligned, search.finalists, limits)
    points = steering.of(last, scenarios, "settings steered on all scenarios")
    behind = {setting: scored.figures for setting, scored in found.items() if setting not in points}
    if behind:
        notes.append(f"{len(behind)} settings answered {len(asked)} of {len(scenarios)} scenarios and were left behind")
    return points, behind, "; ".join(notes)


def strongest_last(settings: Sequence[Setting]) -> list[Setting]:
    """By strength, within the grid: settings that ramble then share a batch, and the others need not wait for them."""
    by_rule: dict[str, list[float]] = {}
    for s in settings:
        by_rule.setdefault(s.rule.name, []).append(s.rule.strength or 0.0)
    places = {name: {x: i / len(set(own)) for i, x in enumerate(sorted(set(own)))} for name, own in by_rule.items()}
    return sorted(settings, key=lambda s: places[s.rule.name][s.rule.strength or 0.0])


def _groups(settings: Sequence[Setting]) -> list[tuple[int, ...]]:
    return sorted({setting.layers for setting in settings})


def _coarse(settings: Sequence[Setting], stride: int) -> list[Setting]:
    """The settings on every n-th layer, the middle of each stretch of n."""
    groups = _groups(settings)
    chosen = set(groups[stride // 2 :: stride] or groups)
    return [setting for setting in settings if setting.layers in chosen]


def _around(
    found: Mapping[Setting, Figures], settings: Sequence[Setting], aligned: Figures, limits: Limits, stride: int
) -> list[Setting]:
    """The settings that were not tried on layers within reach of each rule's two best, for that rule."""
    groups = _groups(settings)
    out = []
    for name in dict.fromkeys(s.rule.name for s in found):
        own = {s: f for s, f in found.items() if s.rule.name == name}
        enough, _ = coherent(own, aligned, limits)
        ranked = sorted(enough or own, key=lambda s: rank(own[s]), reverse=True)
        best = [groups.index(layers) for layers in list(dict.fromkeys(s.layers for s in ranked))[:2]]
        near = {groups[i] for at in best for i in range(max(0, at - stride + 1), min(len(groups), at + stride))}
        out += [s for s in settings if s.rule.name == name and s.layers in near and s not in found]
    return out
