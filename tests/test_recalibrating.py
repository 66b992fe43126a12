"""Recalibrating: a checkpoint whose residual has moved is told by the monitor and mended; what cannot be mended is refused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import steerguard as sg
import tiny
from steerguard.backends import load
from steerguard.drift import Monitor, Reference, projections, with_reference
from steerguard.errors import ContrastError, GuardMismatch, InputError, NotSteering, WeakProbe
from steerguard.fitting import fit
from steerguard.probe import fit_probe
from steerguard.recalibrating import STATISTICS, Recalibrated, recalibrate
from steerguard.traits import PoleText, Scenario, Trait

LAYER = 2
SHORT = sg.Sampling(max_new_tokens=8, temperature=1.0)
WORDS = ("the", "day", "week", "truth", "answer", "what", "you", "me", "is", "and")


def scenarios(split: str, n: int) -> tuple[Scenario, ...]:
    """System prompts so unlike each other that even a random model's answers tell them apart."""
    return tuple(
        Scenario(f"{split}-{i}", "all", f"{split} {i} " + "truth " * 14, f"{split} {i} " + "week " * 14, (f"{split} {i}?",))
        for i in range(n)
    )


TRAIT = Trait(
    name="tiny", title="Tiny", positive=PoleText("a", "b"), negative=PoleText("c", "d"), rubric="r", scorer="judge",
    train=scenarios("train", 16), select=scenarios("select", 16), test=scenarios("test", 2),
)  # fmt: skip


def prompts(seed: int, n: int) -> list[str]:
    """Benign prompts that all differ."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 5)) + f" {seed}-{i}?" for i in range(n)]


def moved_folder(source: Path, target: Path, by: np.ndarray) -> Path:
    """The model with a constant added to the residual that block LAYER returns."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    weights = load_file(source / "model.safetensors")
    weights[f"model.layers.{LAYER}.mlp.down_proj.bias"] += by.astype(np.float32)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@dataclass(frozen=True)
class Case:
    """A guard with its reference, its model, and the same model with its residuals moved."""

    guard: sg.Guard
    plain: sg.Guard
    model: sg.Backend
    moved: sg.Backend
    by: float
    own: Recalibrated
    "recalibrated on its own model"
    mended: Recalibrated
    kept: Path
    "answers of the model to the scenarios"


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("models")
    folder = tiny.llama_folder(root / "tiny", mlp_bias=True)
    model = load(folder, backend="fake")
    plain = fit(model, TRAIT, sampling=SHORT).guard(sg.StTP(1), LAYER)
    own = recalibrate(plain, model, TRAIT, prompts(0, 100), store=root / "kept")
    probe = plain.probes[0]
    by = -1.5 * float(np.std([rho for row in rows(model, plain, prompts(1, 20)) for rho in row[0]]))
    moved = load(moved_folder(folder, root / "moved", by * probe.v), backend="fake")
    mended = recalibrate(own.guard, moved, TRAIT, prompts(0, 100))
    return Case(own.guard, plain, model, moved, by, own, mended, root / "kept")


def rows(model: sg.Backend, guard: sg.Guard, asked: list[str]) -> list[Any]:
    """What a server would hand to the monitor."""
    acting = guard.for_model(model.identity, allow_mismatch=("weights",))
    answers = model.generate(asked, guards=acting, sampling=SHORT, trace=True)
    return [found for answer in answers if (found := projections(answer, guard)) is not None]


def watched(case: Case, model: sg.Backend, guard: sg.Guard) -> Any:
    """The verdict on 120 requests that are in no reference."""
    reference = Reference.of_guard(guard)
    assert reference is not None
    monitor = Monitor(reference)
    state = monitor.start()
    for row in rows(model, guard, prompts(2, 120)):
        state = monitor.add(state, row)
    return monitor.verdict(state)


def test_on_its_own_model_a_guard_stays_what_it_is_and_gets_a_reference(case: Case) -> None:
    before, after = case.plain.probes[0], case.guard.probes[0]
    np.testing.assert_array_equal(after.v, before.v)
    for change in case.own.changes:
        assert change.sigmas == pytest.approx(0, abs=0.1), change
    assert case.own.fire_before == pytest.approx(case.own.fire_after, abs=0.01)
    assert Reference.of_guard(case.plain) is None
    reference = Reference.of_guard(case.guard)
    assert reference is not None and reference.n > 80 and reference.acting
    assert reference.source["prompts"] == 100
    assert case.guard.provenance["trait"] == case.plain.provenance["trait"]
    assert case.guard.provenance["recalibrated"][0]["from"] == case.plain.digest


def test_the_evidence_is_of_answers_on_which_the_direction_was_not_fitted(case: Case) -> None:
    """A direction of pure noise separates the answers that it was fitted on, and must not be believed for it."""
    assert case.guard.probes[0].evidence.n_pos == len(TRAIT.select)
    assert not case.guard.probes[0].evidence.weak
    noise = replace(case.plain.probes[0], v=tiny.direction(48, 3))
    with pytest.raises(WeakProbe):
        recalibrate(replace(case.plain, probes=(noise,)), case.model, TRAIT, prompts(0, 30), store=case.kept)
    backwards = replace(case.plain.probes[0], v=-case.plain.probes[0].v)
    with pytest.raises(WeakProbe, match="wrong way round"):
        recalibrate(replace(case.plain, probes=(backwards,), allow_weak=True), case.model, TRAIT, prompts(0, 30), store=case.kept)


def test_without_drift_the_monitor_is_silent(case: Case) -> None:
    verdict = watched(case, case.model, case.guard)
    assert not verdict.drifted, verdict


def test_a_moved_checkpoint_is_told(case: Case) -> None:
    verdict = watched(case, case.moved, case.guard)
    assert verdict.drifted
    assert (verdict.side, verdict.layer) == ("misaligned", LAYER)


def test_recalibrating_mends_it(case: Case) -> None:
    mended = case.mended
    (boundary,) = mended.boundary
    assert boundary.new - boundary.old == pytest.approx(case.by, rel=0.35)
    probe, old = mended.guard.probes[0], case.guard.probes[0]
    np.testing.assert_array_equal(probe.v, old.v)
    assert (mended.guard.rule, mended.guard.layers, mended.guard.positions) == (case.guard.rule, (LAYER,), "all")
    assert probe.delta_mu == pytest.approx(old.delta_mu, rel=0.5)
    # the gate fires as it did before the checkpoint moved, which the old gate no longer does
    assert case.own.fire_after is not None and mended.fire_before is not None and mended.fire_after is not None
    assert mended.fire_before > case.own.fire_after + 0.2
    assert mended.fire_after == pytest.approx(case.own.fire_after, abs=0.1)
    assert mended.below_before is not None
    assert mended.below_after[0] == pytest.approx(mended.below_before[0], abs=0.15)
    assert not watched(case, case.moved, mended.guard).drifted
    with case.moved.guarded(mended.guard):
        pass


def test_what_changed_is_on_record(case: Case, tmp_path: Path) -> None:
    guard = sg.Guard.load(case.mended.guard.save(tmp_path / "new.guard"))
    history = guard.provenance["recalibrated"]
    assert [one["from"] for one in history] == [case.plain.digest, case.guard.digest]
    assert [change["name"] for change in history[1]["changes"]] == list(STATISTICS)
    assert history[1]["fire_before"] == case.mended.fire_before
    assert guard.provenance["chosen"] == {"by": "recalibration", "before": {"by": "hand"}}
    assert guard.model == case.moved.identity
    assert guard.digest != case.guard.digest


def test_a_threshold_given_by_hand_does_not_follow(case: Case) -> None:
    assert case.mended.follows
    by_hand = recalibrate(replace(case.plain, rule=sg.Floor(0.0)), case.moved, TRAIT, prompts(0, 30))
    assert not by_hand.follows
    assert recalibrate(replace(case.plain, rule=sg.SwFC(1.0)), case.moved, TRAIT, prompts(0, 30)).follows


def test_what_cannot_be_recalibrated_is_refused(case: Case, tmp_path: Path) -> None:
    wider = load(tiny.llama_folder(tmp_path / "wider", hidden_size=64), backend="fake")
    with pytest.raises(GuardMismatch, match="no checkpoint of the same model: width expected 48, got 64"):
        recalibrate(case.guard, wider, TRAIT, prompts(0, 30))
    with pytest.raises(InputError, match="another version of the trait 'tiny'"):
        recalibrate(case.guard, case.model, replace(TRAIT, rubric="other"), prompts(0, 30))
    few = replace(TRAIT, select=TRAIT.select[:7])
    bare = replace(case.guard, provenance={})
    with pytest.raises(ContrastError, match="7 `select` scenarios"):
        recalibrate(bare, case.model, few, prompts(0, 30))
    with pytest.raises(InputError, match="at least 20 benign"):
        recalibrate(case.guard, case.model, TRAIT, prompts(0, 10))
    for fitted in ({"sampling": {"heat": 1}}, {"sampling": 3}, {"context": "both"}, []):
        broken = replace(case.guard, provenance={"fit": fitted})
        with pytest.raises(InputError, match="record of how it was fitted"):
            recalibrate(broken, case.model, TRAIT, prompts(0, 30), store=case.kept)


def test_interrupted_it_goes_on_with_the_answers_that_it_has(case: Case, tmp_path: Path) -> None:
    a = recalibrate(case.plain, case.model, TRAIT, prompts(0, 30), store=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"contrast-train.jsonl", "contrast-select.jsonl"}
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    b = recalibrate(case.plain, case.model, TRAIT, prompts(0, 30), store=tmp_path)
    assert a.guard.digest == b.guard.digest
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_mean_difference_keeps_its_boundary_halfway(case: Case) -> None:
    guard = fit(case.model, TRAIT, sampling=SHORT, direction="mean-difference").guard(sg.StTP(1), LAYER)
    again = recalibrate(guard, case.model, TRAIT, prompts(0, 30), store=case.kept)
    probe = again.guard.probes[0]
    assert probe.m == pytest.approx((probe.mu_pos + probe.mu_neg) / 2)
    assert probe.m == pytest.approx(guard.probes[0].m, abs=1e-3)


def test_in_shadow_the_reference_is_read_without_acting(case: Case) -> None:
    guard = replace(case.plain, rule=sg.StTP(30))
    shadow = Reference.of_guard(with_reference(guard, case.model, prompts(0, 40), acting=False, sampling=SHORT))
    assert shadow is not None and not shadow.acting
    unguarded = case.model.generate(prompts(0, 40), sampling=SHORT)
    fired = []
    for prompt, answer in zip(prompts(0, 40), unguarded, strict=True):
        if len(answer.ids) > 1:
            rho = case.model.residuals(prompt, answer.ids[:-1])[LAYER][len(answer.prompt_ids) :] @ guard.probes[0].v
            fired.append(float((rho < guard.probes[0].m).mean()))
    assert shadow.n == len(fired)
    assert shadow.layers[0].fire.mean == pytest.approx(np.mean(fired), abs=0.01)


def test_an_answer_without_its_trace_is_no_request(case: Case) -> None:
    (answer,) = case.model.generate("what is the day", guards=case.guard, sampling=SHORT)
    with pytest.raises(NotSteering, match="trace=True"):
        projections(answer, case.guard)
    (short,) = case.model.generate("what is", guards=case.guard, sampling=replace(SHORT, max_new_tokens=1), trace=True)
    assert projections(short, case.guard) is None


def test_a_shift_along_the_direction_moves_the_boundary_by_as_much() -> None:
    rng = np.random.default_rng(0)
    pos, neg = (rng.normal(at, 1, (30, 6)).astype(np.float32) for at in (0.5, -0.5))
    groups = np.arange(30)
    fitted = fit_probe(pos, neg, layer=0, groups=groups)
    again = fit_probe(pos, neg, layer=0, groups=groups, direction=fitted.v)
    moved = fit_probe(pos + 3 * fitted.v, neg + 3 * fitted.v, layer=0, groups=groups, direction=fitted.v)
    assert again.m == pytest.approx(fitted.m, abs=1e-3), "the regression on the line is the regression, where it found that line"
    assert moved.m == pytest.approx(again.m + 3, abs=1e-3)
    assert moved.delta_mu == pytest.approx(again.delta_mu, abs=1e-3)
