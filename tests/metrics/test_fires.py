"""Where guards fire: what one unguarded forward says against what generation really moved, and against the rules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import steerguard as sg
import tiny
from steerguard.backends import load
from steerguard.errors import GuardMismatch, InputError
from steerguard.metrics import Measured
from steerguard.metrics.benign import Fired, fires, measure_benign
from steerguard.metrics.likelihood import divergences
from steerguard.metrics.reading import exchanges
from steerguard.prompts import conversation
from steerguard.rules import RULES, correct, rule

LONG = conversation("tell me the truth", ["what is the day and what is the week"])
PROMPTS: list[Any] = [LONG, "Hi", "tell me what é is, and the ответ 🙂"]
SHORT = sg.Sampling(max_new_tokens=10)
EVERY_RULE = [rule(name, cls.grid[len(cls.grid) // 2] if cls.grid else None) for name, cls in RULES.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module", params=["fake", "hf"])
def model(folder: Path, request: pytest.FixtureRequest) -> sg.Backend:
    return load(str(folder), backend=request.param)


def guard_of(model: sg.Backend, rule: sg.Rule, *layers: int, seed: int = 0, **options: Any) -> sg.Guard:
    """A guard whose boundary stands in the middle of what the first prompt holds, apart from any of its tokens."""
    residuals = model.residuals(LONG)
    probes = []
    for layer in layers or (1,):
        probe = tiny.probe(layer, model.identity.width, rho=residuals[layer], seed=seed)
        rho = np.sort(residuals[layer] @ probe.v)
        probes.append(replace(probe, m=float(rho[len(rho) // 2 : len(rho) // 2 + 2].mean())))
    return tiny.guard(model.identity, rule, tuple(probes), **options)


# ---------------------------------------------------------------------------------------------- what was really moved


@pytest.mark.parametrize("positions", ["all", "response"])
@pytest.mark.parametrize("layers", [(1,), (0, 2, 3)])
@pytest.mark.parametrize("rule", EVERY_RULE, ids=str)
def test_reading_finds_what_generation_moved(model: sg.Backend, rule: sg.Rule, layers: tuple[int, ...], positions: Any) -> None:
    """The guarded answers are read again without the guard, and every token that it moved is found."""
    guard = guard_of(model, rule, *layers, positions=positions)
    answers = model.generate(PROMPTS, guards=guard, sampling=SHORT, trace=True)
    found = fires(model, exchanges(PROMPTS, answers), {"g": guard})["g"]
    apart = {probe.layer: abs(probe.delta_mu) for probe in guard.probes}
    for answer, fired in zip(answers, found, strict=True):
        assert (fired.seen, fired.moved) == (answer.tokens_seen, answer.tokens_moved)
        shifts = sum(float(np.abs(trace.delta.astype(float)).sum()) / apart[trace.layer] for trace in answer.traces)
        assert fired.total_shift == pytest.approx(shifts, rel=1e-3, abs=1e-6)
    if rule.name in ("StTP", "StMP", "Floor", "Ceiling"):
        assert 0 < sum(f.moved for f in found) < sum(f.seen for f in found)  # a gate that is neither open nor shut


def test_guards_at_once_are_guards_one_by_one(model: sg.Backend) -> None:
    read = exchanges(PROMPTS, model.generate(PROMPTS, sampling=SHORT))
    guards = {
        (rule.name, layer, seed, positions): guard_of(model, rule, layer, seed=seed, positions=positions)
        for rule in (sg.StMP(2), sg.StTP(6)) for layer in (1, 2) for seed in (0, 1) for positions in ("all", "response")
    }  # fmt: skip
    guards["several", 0, 0, "all"] = guard_of(model, sg.StMP(2), 1, 2)
    found = fires(model, read, guards)
    assert found == {key: fires(model, read, {0: guard})[0] for key, guard in guards.items()}
    assert len({tuple(f.moved for f in fired) for fired in found.values()}) > 4  # they do differ


def test_a_layer_behind_a_guarded_one_is_read_under_the_guard(model: sg.Backend) -> None:
    """The second layer alone, and the second behind the first, see other projections."""
    both, second = guard_of(model, sg.Target(30), 1, 2), guard_of(model, sg.Target(30), 2)
    first = replace(both, probes=both.probes[:1])
    read = [(LONG, ())]
    found = fires(model, read, {"both": both, "first": first, "second": second})
    (together,), (one,), (two,) = found["both"], found["first"], found["second"]
    assert together.seen == one.seen + two.seen
    assert abs(together.total_shift - one.total_shift - two.total_shift) > 1


def test_figures_against_the_reference_of_the_kernel(model: sg.Backend) -> None:
    answer = model.generate(LONG, sampling=SHORT)[0]
    guard = guard_of(model, sg.StTP(6), 2)
    probe = guard.probes[0]
    found = fires(model, [(LONG, answer.ids)], {"g": guard})["g"][0]
    h = model.residuals(LONG, answer.ids)[2][:-1].astype(np.float64)
    after, rho, delta = correct(h, probe.v, guard.rule.compile(probe).row())
    assert found.fire_rate == (rho < probe.m).mean()
    assert found.shift == pytest.approx(np.abs(delta).mean() / abs(probe.delta_mu), rel=1e-4)
    assert found.norm_ratio == pytest.approx((np.linalg.norm(after, axis=1) / np.linalg.norm(h, axis=1)).mean(), rel=1e-4)
    assert found.norm_ratio != pytest.approx(1, abs=1e-3)


# ---------------------------------------------------------------------------------------------------- exact and empty


def test_a_guard_that_never_fires_scores_exactly_nothing(model: sg.Backend) -> None:
    read = exchanges(PROMPTS, model.generate(PROMPTS, sampling=SHORT))
    never = {"floor": guard_of(model, sg.Floor(-1e6)), "zero": guard_of(model, sg.SwFC(0), 0, 3)}
    for fired in fires(model, read, never).values():
        assert [(f.fire_rate, f.shift, f.norm_ratio) for f in fired] == [(0.0, 0.0, 1.0)] * 3
    always = fires(model, read, {"g": guard_of(model, sg.SwFC(-2))})["g"]
    assert [f.fire_rate for f in always] == [1.0] * 3
    assert [f.shift for f in always] == [pytest.approx(2.0)] * 3


def test_answers_of_one_token_and_none(model: sg.Backend) -> None:
    prompt = model.residuals(LONG).shape[1]
    guards = {p: guard_of(model, sg.SwFC(1), positions=p) for p in ("all", "response")}  # type: ignore[arg-type]
    found = fires(model, [(LONG, ()), (LONG, (5,)), (LONG, (5, 6))], guards)
    assert [f.seen for f in found["all"]] == [prompt, prompt, prompt + 1]
    assert [f.seen for f in found["response"]] == [0, 0, 1]
    nothing = found["response"][0]
    assert nothing.fire_rate is nothing.shift is nothing.norm_ratio is None
    assert fires(model, [], guards) == {"all": [], "response": []}
    assert Fired(4, 1, 2.0, 6.0).fire_rate == 0.25


def test_what_cannot_be_read_is_refused(model: sg.Backend, tmp_path: Path) -> None:
    guard = guard_of(model, sg.SwFC(1))
    with model.guarded(guard), pytest.raises(InputError, match="is guarded now"):
        fires(model, [(LONG, ())], {"g": guard})
    with pytest.raises(GuardMismatch):
        fires(model, [], {"g": replace(guard, model=replace(guard.model, architecture="Other"))})
    flat = replace(guard.probes[0], mu_pos=1.0, mu_neg=1.0)
    with pytest.raises(InputError, match="the class means of layer 1 are the same"):
        fires(model, [], {"g": replace(guard, probes=(flat,), rule=sg.Ablate())})


def test_residuals_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(tiny.llama_folder(tmp_path / "broken") / "model.safetensors")
    weights["model.embed_tokens.weight"][tiny.tokenizer()("z")["input_ids"]] = np.nan
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    broken = load(str(tmp_path / "broken"), backend="fake")
    guards = {"g": guard_of(broken, sg.SwFC(1))}
    assert fires(broken, [("Hi", ())], guards)["g"][0].fire_rate == 1.0
    with pytest.raises(InputError, match="the residuals of layer 1 are not finite"):
        fires(broken, [("z", ())], guards)


# ---------------------------------------------------------------------------------------------------- all at once


def test_measuring_benign_prompts(model: sg.Backend) -> None:
    rules = {"gentle": sg.SwFC(0.1), "strong": sg.SwFC(3), "never": sg.Floor(-1e6)}
    guards = {name: guard_of(model, rule) for name, rule in rules.items()}
    seen: list[tuple[str, int, int]] = []
    found = measure_benign(model, PROMPTS, guards, sampling=SHORT, progress=lambda *told: seen.append(told))
    answers = model.generate(PROMPTS, sampling=SHORT)
    read = exchanges(PROMPTS, answers)
    assert found.arms == ("gentle", "strong", "never")
    for name, guard in guards.items():
        assert list(found.of(name, "kl")) == divergences(model, read, {0: guard})[0]
        fired = fires(model, read, {0: guard})[0]
        for metric in ("fire_rate", "shift", "norm_ratio"):
            assert list(found.of(name, metric)) == [getattr(f, metric) for f in fired]
    assert found == measure_benign(model, PROMPTS, guards, answers=answers)
    assert found.of("never", "kl") == found.of("never", "shift") == (0.0, 0.0, 0.0)
    rise = found.difference("strong", "kl", to="gentle")
    assert rise is not None and rise.n == 3 and rise.low is not None and rise.low > 0
    assert {(done, total) for _, done, total in seen} == {(i, 3) for i in range(4)}
    assert len({what for what, _, _ in seen}) == 2


def test_only_the_metrics_that_were_asked_for(model: sg.Backend) -> None:
    guards = {"g": guard_of(model, sg.SwFC(1))}
    one = measure_benign(model, PROMPTS, guards, sampling=SHORT, metrics=["kl"], kl_positions="all")
    assert isinstance(one, Measured) and set(one.values["g"]) == {"kl"}
    assert set(measure_benign(model, PROMPTS, guards, sampling=SHORT, metrics=["shift"]).values["g"]) == {"shift"}
    with pytest.raises(InputError, match="no metric 'entropy'; there are fire_rate, shift, norm_ratio, kl"):
        measure_benign(model, PROMPTS, guards, metrics=["entropy"])  # type: ignore[list-item]
    with pytest.raises(InputError, match="got 3 prompts and 0 answers"):
        measure_benign(model, PROMPTS, guards, answers=[])
    with model.guarded(guards["g"]), pytest.raises(InputError, match="is guarded now"):
        measure_benign(model, PROMPTS, guards)
