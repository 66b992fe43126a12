"""Collecting answers, embedding them, and what a fit's folder holds; on the numpy backend and a tiny random model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import steerguard as sg
import tiny
from steerguard.backends import load
from steerguard.errors import ContrastError, FitFileError, InputError, OutputExists, WeakProbe
from steerguard.fitting import CONTRAST, PROBES, Contrast, Fit, Pair, collect, embed, fit, prompts_of
from steerguard.traits import PoleText, Scenario, Trait

SHORT = sg.Sampling(max_new_tokens=5, temperature=1.0)


def scenarios(split: str, n: int) -> tuple[Scenario, ...]:
    return tuple(
        Scenario(f"{split}-{i}", "all", f"{split} {i}: tell the truth.", f"{split} {i}: tell a lie.", (f"{split}, what is {i}?",))
        for i in range(n)
    )


TRAIT = Trait(
    name="tiny", title="Tiny", positive=PoleText("a", "b"), negative=PoleText("c", "d"), rubric="r", scorer="judge",
    train=scenarios("train", 10), select=scenarios("select", 2), test=scenarios("test", 2),
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> sg.Backend:
    return load(tiny.llama_folder(tmp_path_factory.mktemp("models") / "tiny"), backend="fake")


@pytest.fixture(scope="module")
def contrast(model: sg.Backend) -> Contrast:
    return collect(model, TRAIT, sampling=SHORT)


class Interrupting:
    """A model that is interrupted after some calls of `generate`; everything else is the model's."""

    def __init__(self, model: sg.Backend, calls: int) -> None:
        self._model, self.calls, self.asked = model, calls, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, prompts: Sequence[Any], **options: Any) -> list[sg.Answer]:
        if self.calls == 0:
            raise KeyboardInterrupt
        self.calls -= 1
        self.asked += len(prompts)
        return self._model.generate(prompts, **options)


def test_answers_are_the_models_own_under_both_poles(model: sg.Backend, contrast: Contrast) -> None:
    assert [pair.scenario.id for pair in contrast.pairs] == [s.id for s in TRAIT.train]
    for pair in contrast.pairs[:3]:
        for prompt, answer in zip(prompts_of(pair.scenario), (pair.positive, pair.negative), strict=True):
            assert model.generate(prompt, sampling=SHORT)[0].text == answer
            assert prompt[0]["role"] == "system"


def test_an_interrupted_collection_goes_on_where_it_was(model: sg.Backend, contrast: Contrast, tmp_path: Path) -> None:
    store = tmp_path / "sub" / CONTRAST
    for calls in (2, 1):
        broken: Any = Interrupting(model, calls)
        with pytest.raises(KeyboardInterrupt):
            collect(broken, TRAIT, sampling=SHORT, store=store, batch=3)
        with store.open("a", encoding="utf-8") as file:
            file.write('{"check":"0123456789abcdef","record":{"id": "train-9", "posi')  # the line that was being written
    whole: Any = Interrupting(model, 10)
    assert collect(whole, TRAIT, sampling=SHORT, store=store, batch=3).digest == contrast.digest
    assert whole.asked == 2  # nine of ten scenarios were there
    again: Any = Interrupting(model, 0)
    assert collect(again, TRAIT, sampling=SHORT, store=store).digest == contrast.digest


def test_answers_of_something_else_are_never_taken(model: sg.Backend, tmp_path: Path) -> None:
    store = tmp_path / CONTRAST
    collect(model, TRAIT, sampling=SHORT, store=store)
    for trait, sampling in ((replace(TRAIT, rubric="other"), SHORT), (TRAIT, replace(SHORT, seed=7))):
        with pytest.raises(OutputExists, match="another trait, model or sampling"):
            collect(model, trait, sampling=sampling, store=store)
    store.write_text("what is this\n", encoding="utf-8")
    with pytest.raises(InputError, match="journal"):
        collect(model, TRAIT, sampling=SHORT, store=store)


def test_embeddings_are_the_mean_residuals_of_each_answer(model: sg.Backend, contrast: Contrast) -> None:
    pos, neg = embed(model, contrast, batch=3)
    assert pos.shape == neg.shape == (10, model.identity.depth, model.identity.width)
    pair = contrast.pairs[4]
    for own, answer, rows in zip(prompts_of(pair.scenario), (pair.positive, pair.negative), (pos, neg), strict=True):
        start = model.residuals(own).shape[1]
        mean = model.residuals(own, answer)[:, start:].mean(1)
        np.testing.assert_allclose(rows[4], mean, atol=1e-4)
    neutral, _ = embed(model, contrast, context="neutral")
    start = model.residuals(pair.scenario.turns[0]).shape[1]
    mean = model.residuals(pair.scenario.turns[0], pair.positive)[:, start:].mean(1)
    np.testing.assert_allclose(neutral[4], mean, atol=1e-4)
    assert not np.allclose(neutral[4], pos[4], atol=1e-3)
    with pytest.raises(ContrastError, match="no context 'both'"):
        embed(model, contrast, context="both")  # type: ignore[arg-type]


def test_empty_answers_are_left_out_and_counted(model: sg.Backend, contrast: Contrast) -> None:
    holed = Contrast((*contrast.pairs[:9], replace(contrast.pairs[9], negative="  ")))
    assert len(embed(model, holed)[0]) == 9
    probes = fit(model, TRAIT, contrast=holed, allow_weak=True)
    assert probes.provenance["contrast"]["dropped"] == 1
    empty = Contrast(tuple(replace(pair, positive="") for pair in contrast.pairs))
    with pytest.raises(ContrastError, match="all 10 pairs have an empty answer"):
        fit(model, TRAIT, contrast=empty)
    few = Contrast(contrast.pairs[:5])
    with pytest.raises(ContrastError, match="at least 8"):
        fit(model, TRAIT, contrast=few)


def test_a_random_model_has_no_trait(model: sg.Backend) -> None:
    """Answers drawn by the dice, re-read without their system prompts, say nothing of the pole."""
    rng = np.random.default_rng(0)
    words = ["day", "week", "the", "you", "is", "answer", "truth", "a"]
    said = [" ".join(rng.choice(words, 6)) for _ in range(20)]
    dice = Contrast(tuple(Pair(s, said[2 * i], said[2 * i + 1]) for i, s in enumerate(TRAIT.train)))
    with pytest.raises(WeakProbe, match="no layer tells the two poles apart"):
        fit(model, TRAIT, contrast=dice, context="neutral")


@pytest.fixture(scope="module")
def probes(model: sg.Backend, contrast: Contrast) -> Fit:
    return fit(model, TRAIT, contrast=contrast, allow_weak=True)


def test_a_folder_holds_what_was_fitted(probes: Fit, tmp_path: Path) -> None:
    probes.save(tmp_path)
    back = Fit.load(tmp_path)
    assert list(back) == list(probes)
    assert back.model == probes.model
    assert back.provenance == json.loads(json.dumps(dict(probes.provenance)))
    for layer, probe in back.items():
        np.testing.assert_array_equal(probe.v, probes[layer].v)
        assert (probe.m, probe.evidence) == (probes[layer].m, probes[layer].evidence)
    with pytest.raises(OutputExists):
        probes.save(tmp_path)
    a, b = (fitted.guard(sg.SwFC(1), [2, 0], allow_weak=True) for fitted in (probes, back))
    assert a.digest == b.digest
    assert a.layers == (0, 2)
    assert a.provenance["chosen"] == {"by": "hand"}
    assert a.provenance["trait"] == {"name": "tiny", "sha256": TRAIT.digest, "scorer": "judge"}


def test_a_damaged_folder_is_one_sentence(probes: Fit, tmp_path: Path) -> None:
    with pytest.raises(FitFileError, match="steerguard fit MODEL"):
        Fit.load(tmp_path)
    sound = probes.save(tmp_path).read_bytes()
    for data in (b"", sound[:100], sound[:-10], sound.replace(b"logistic", b"logistik"), b"\x80\x05pickle"):
        (tmp_path / PROBES).write_bytes(data)
        with pytest.raises(FitFileError, match=PROBES):
            Fit.load(tmp_path)
    guard_path = probes.guard(sg.SwFC(1), 0, allow_weak=True).save(tmp_path / "g.guard")
    (tmp_path / PROBES).write_bytes(guard_path.read_bytes())
    with pytest.raises(FitFileError, match=PROBES):
        Fit.load(tmp_path)


def test_the_record_is_json(probes: Fit) -> None:
    assert json.loads(json.dumps(dict(probes.provenance)))["versions"]["steerguard"] == sg.__version__
