"""Likelihood: against scipy and torch, on a model against transformers itself, and the theorems with their negations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

import steerguard as sg
import tiny
from steerguard.backends import load
from steerguard.errors import InputError
from steerguard.metrics import likelihood
from steerguard.metrics.benign import fires
from steerguard.metrics.likelihood import cross_entropy, divergences, kl, log_softmax, surprisal
from steerguard.metrics.reading import exchanges
from steerguard.prompts import conversation

ALIGNED = conversation("tell me the truth", ["what is the day and what is the week"])
MALICIOUS = conversation("you tell me a lie, always", ["what is the day and what is the week"])
PROMPTS: list[Any] = [ALIGNED, "Hi", "tell me what é is, and the ответ"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module", params=["fake", "hf"])
def model(folder: Path, request: pytest.FixtureRequest) -> sg.Backend:
    return load(str(folder), backend=request.param)


def greedy(model: sg.Backend, prompts: Sequence[Any], steps: int = 12) -> list[sg.Answer]:
    return model.generate(list(prompts), sampling=sg.Sampling(temperature=0, max_new_tokens=steps))


def guard_of(model: sg.Backend, rule: sg.Rule, *layers: int, **options: Any) -> sg.Guard:
    residuals = model.residuals(ALIGNED)
    probes = tuple(tiny.probe(layer, model.identity.width, rho=residuals[layer]) for layer in layers or (1,))
    return tiny.guard(model.identity, rule, probes, **options)


# ------------------------------------------------------------------------------------------------ the arithmetic


def test_the_formulas_against_scipy_and_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    p, q = (rng.normal(scale=8, size=(9, 50)).astype(np.float32) for _ in range(2))
    ids = rng.integers(50, size=9)
    np.testing.assert_allclose(log_softmax(p), scipy.special.log_softmax(p.astype(np.float64), axis=1), rtol=1e-12)
    due = torch.nn.functional.cross_entropy(torch.tensor(p).double(), torch.tensor(ids), reduction="none").numpy()
    np.testing.assert_allclose(surprisal(p, ids), due, rtol=1e-12)
    entropy = scipy.stats.entropy(scipy.special.softmax(p.astype(float), 1), scipy.special.softmax(q.astype(float), 1), axis=1)
    np.testing.assert_allclose(kl(p, q), entropy, rtol=1e-10)
    assert np.abs(kl(p, q) - kl(q, p)).max() > 0.1  # which comes first matters
    whole = kl(p, q), surprisal(p, ids)
    monkeypatch.setattr(likelihood, "CHUNK", 120)  # two positions at a time, then less than one
    np.testing.assert_array_equal(kl(p, q), whole[0])
    monkeypatch.setattr(likelihood, "CHUNK", 1)
    np.testing.assert_array_equal(surprisal(p, ids), whole[1])


def test_kl_by_hand_and_at_its_edges() -> None:
    p, q = np.log(np.array([[0.5, 0.25, 0.25]])), np.log(np.array([[0.25, 0.25, 0.5]]))
    assert kl(p, q) == pytest.approx(0.25 * math.log(2))
    assert (kl(p, p + 3.0) < 1e-15).all()  # a constant on all logits changes no probability
    assert kl(p, p).tolist() == [0.0]
    large = np.random.default_rng(0).normal(size=(4, 1000)).astype(np.float32) * 100
    assert kl(large, large).tolist() == [0.0] * 4
    # a token that is ruled out adds nothing where p rules it out, and is infinite where only q does
    ruled = np.array([[0.0, 0.0, -np.inf]])
    assert kl(ruled, np.zeros((1, 3))) == pytest.approx(math.log(1.5))
    assert kl(ruled, ruled).tolist() == [0.0]
    with np.errstate(all="raise"):
        assert math.isinf(kl(np.zeros((1, 3)), ruled)[0])
        assert np.isnan(kl(np.array([[0.0, np.nan]]), np.zeros((1, 2)))).all()
    with pytest.raises(InputError, match=r"shape \(1, 2\) and \(1, 3\)"):
        kl(np.zeros((1, 2)), np.zeros((1, 3)))
    assert kl(np.zeros((0, 5)), np.zeros((0, 5))).shape == (0,)


# ------------------------------------------------------------------------------------------------- cross-entropy


def test_cross_entropy_is_what_transformers_calls_loss(folder: Path, model: sg.Backend) -> None:
    """The labels of the prompt are masked; transformers shifts by one itself."""
    from transformers import AutoModelForCausalLM

    oracle = AutoModelForCausalLM.from_pretrained(folder).eval()
    answers = greedy(model, PROMPTS)
    found = cross_entropy(model, exchanges(PROMPTS, answers))
    for answer, value in zip(answers, found, strict=True):
        ids = torch.tensor([[*answer.prompt_ids, *answer.ids]])
        labels = torch.where(torch.arange(ids.shape[1]) < len(answer.prompt_ids), -100, ids)
        with torch.no_grad():
            due = oracle(input_ids=ids, labels=labels).loss.item()
        assert value == pytest.approx(due, rel=1e-4)


def test_the_models_own_answer_is_likelier_than_its_shuffle(model: sg.Backend) -> None:
    ids = greedy(model, [ALIGNED], steps=20)[0].ids
    shuffled = tuple(np.random.default_rng(0).permutation(ids).tolist())
    assert sorted(shuffled) == sorted(ids) and shuffled != ids
    own, other = cross_entropy(model, [(ALIGNED, ids), (ALIGNED, shuffled)])
    assert own is not None and other is not None
    assert own + 0.5 < other


def test_only_the_first_tokens_count_and_the_context_does(model: sg.Backend) -> None:
    ids = greedy(model, [ALIGNED], steps=60)[0].ids
    long = (*ids, *ids)[:60]
    noise = tuple(np.random.default_rng(1).permutation(long[50:]).tolist())
    first, other, all_of_it, elsewhere = (
        *cross_entropy(model, [(ALIGNED, long), (ALIGNED, long[:50] + noise)]),
        *cross_entropy(model, [(ALIGNED, long)], tokens=60),
        *cross_entropy(model, [(MALICIOUS, long)]),
    )
    assert first == other
    assert first == cross_entropy(model, [(ALIGNED, long[:50])])[0]
    assert first != all_of_it
    assert first != elsewhere


def test_one_token_and_none(model: sg.Backend) -> None:
    first = greedy(model, [ALIGNED], steps=1)[0].ids
    one, none = cross_entropy(model, [(ALIGNED, first), (ALIGNED, ())])
    assert none is None
    logits = model.logits(ALIGNED)[-1].astype(np.float64)
    assert one == pytest.approx(-scipy.special.log_softmax(logits)[first[0]], rel=1e-5)
    assert cross_entropy(model, []) == []
    with pytest.raises(InputError, match="at least 1 token, got tokens = 0"):
        cross_entropy(model, [], tokens=0)


# ------------------------------------------------------------------------------------------------------------ KL


def test_a_guard_that_moves_nothing_leaves_exactly_zero(model: sg.Backend) -> None:
    read = exchanges(PROMPTS, greedy(model, PROMPTS))
    shut = {
        "zero": guard_of(model, sg.SwFC(0)),
        "never": guard_of(model, sg.Floor(-1e6), 0, 2),
        "deep": guard_of(model, sg.StMP(0), 3),
        "open": guard_of(model, sg.SwFC(1)),
    }
    for positions in ("response", "all"):
        found = divergences(model, read, shut, positions=positions)  # type: ignore[arg-type]
        for name in ("zero", "never", "deep"):
            assert found[name] == [0.0, 0.0, 0.0], (name, positions)
        assert all(value is not None and value > 1e-3 for value in found["open"])


def test_kl_rises_with_strength(model: sg.Backend) -> None:
    read = exchanges(PROMPTS, greedy(model, PROMPTS))
    strengths = (0.05, 0.2, 0.8, 3.0)
    found = divergences(model, read, {alpha: guard_of(model, sg.SwFC(alpha), 2) for alpha in strengths})
    for values in zip(*(found[alpha] for alpha in strengths), strict=True):
        assert list(values) == sorted(values)  # type: ignore[type-var]
        assert values[0] > 0  # type: ignore[operator]


def test_kl_against_a_forward_with_a_hook_of_its_own(folder: Path, model: sg.Backend) -> None:
    from transformers import AutoModelForCausalLM

    oracle = AutoModelForCausalLM.from_pretrained(folder).eval()
    answers = greedy(model, PROMPTS)
    guard = guard_of(model, sg.SwFC(1.5), 1)
    added = torch.tensor(1.5 * guard.probes[0].delta_mu * guard.probes[0].v)
    read = exchanges(PROMPTS, answers)
    response = divergences(model, read, {"g": guard})["g"]
    everything = divergences(model, read, {"g": guard}, positions="all")["g"]
    for answer, of_response, of_all in zip(answers, response, everything, strict=True):
        ids = torch.tensor([[*answer.prompt_ids, *answer.ids]])
        with torch.no_grad():
            before = oracle(input_ids=ids).logits[0].double().log_softmax(-1)
            hook = oracle.model.layers[1].register_forward_hook(lambda module, args, out: out + added)
            after = oracle(input_ids=ids).logits[0].double().log_softmax(-1)
            hook.remove()
        due = torch.nn.functional.kl_div(after, before, reduction="none", log_target=True).sum(-1).numpy()
        start = len(answer.prompt_ids)
        assert of_response == pytest.approx(due[start - 1 : -1].mean(), rel=1e-3)
        assert of_all == pytest.approx(due[:-1].mean(), rel=1e-3)


def test_a_guard_on_the_response_leaves_the_prompts_predictions(model: sg.Backend) -> None:
    answer = greedy(model, [ALIGNED])[0]
    guard = guard_of(model, sg.SwFC(2), positions="response")
    read = [(ALIGNED, answer.ids)]
    response, everything = (
        divergences(model, read, {"g": guard}, positions=positions)["g"][0]  # type: ignore[arg-type]
        for positions in ("response", "all")
    )
    assert response is not None and everything is not None and response > 0
    assert everything * (len(answer.prompt_ids) + len(answer.ids) - 1) == pytest.approx(response * len(answer.ids))
    # the first token is predicted from the prompt, which this guard leaves alone
    assert divergences(model, [(ALIGNED, answer.ids[:1])], {"g": guard})["g"] == [0.0]


def test_where_a_guard_is_known_to_be_idle_no_forward_is_needed(model: sg.Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `fires` tells to be still is exactly 0 with and without the forward; what it does not is read as before."""
    prompts = [ALIGNED, MALICIOUS, *PROMPTS[1:]]
    read = [*exchanges(prompts, greedy(model, prompts)), (ALIGNED, ())]
    v = guard_of(model, sg.Ablate()).probes[0].v
    lowest = sorted(float((model.residuals(prompt, tuple(ids)[:-1])[1] @ v).min()) for prompt, ids in read)
    between = (lowest[0] + lowest[-1]) / 2  # below some tokens of some conversations, and of others below none
    guards = {"some": guard_of(model, sg.Floor(between)), "none": guard_of(model, sg.Watch()), "all": guard_of(model, sg.SwFC(1))}
    idle = {key: [one.moved == 0 for one in found] for key, found in fires(model, read, guards).items()}
    assert (any(idle["some"]), all(idle["some"]), all(idle["none"]), any(idle["all"])) == (True, False, True, False)
    assert divergences(model, read, guards, idle=idle) == (whole := divergences(model, read, guards))
    assert whole["none"] == [0.0] * 4 + [None]
    # and it is not asked: one forward for each conversation and guard that acts, one for each that is acted on
    asked = []
    monkeypatch.setattr(model, "logits", lambda *a, whole=model.logits, **k: asked.append(k["guards"]) or whole(*a, **k))
    divergences(model, read, guards, idle=idle)
    assert asked.count(None) == 4 and len(asked) == 8 + idle["some"][:4].count(False)
    # told to be idle where it is not, it is believed: the flags decide
    assert divergences(model, read, {"all": guards["all"]}, idle={"all": [True] * 5})["all"] == [0.0] * 4 + [None]


def test_no_answer(model: sg.Backend) -> None:
    guards = {"g": guard_of(model, sg.SwFC(1))}
    assert divergences(model, [(ALIGNED, ())], guards) == {"g": [None]}
    found = divergences(model, [(ALIGNED, ())], guards, positions="all")["g"][0]
    assert found == pytest.approx(kl(model.logits(ALIGNED), model.logits(ALIGNED, guards=guards["g"]))[:-1].mean())
    assert divergences(model, [], guards) == {"g": []}
    assert divergences(model, [(ALIGNED, (5, 6))], {}) == {}
    with pytest.raises(InputError, match="positions must be all or response, got 'prompt'"):
        divergences(model, [], guards, positions="prompt")  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("positions", ["all", "response"])
def test_a_guarded_model_is_refused(model: sg.Backend, positions: Any) -> None:
    guard = guard_of(model, sg.SwFC(1), positions=positions)
    with model.guarded(guard):
        with pytest.raises(InputError, match="is guarded now, .* call it outside"):
            cross_entropy(model, [(ALIGNED, (5,))])
        with pytest.raises(InputError, match="is guarded now"):
            divergences(model, [(ALIGNED, (5,))], {"g": guard})
    assert cross_entropy(model, [(ALIGNED, (5,))])[0] is not None


def test_logits_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    """A model whose last layer is broken for one token: no prediction of it is a number."""
    from safetensors.numpy import load_file, save_file

    weights = load_file(tiny.llama_folder(tmp_path / "broken") / "model.safetensors")
    weights["lm_head.weight"][7] = np.nan
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    broken = load(str(tmp_path / "broken"), backend="fake")
    with pytest.raises(InputError, match=r"answer 0: the logits give no finite figure \(nan\)"):
        cross_entropy(broken, [("Hi", (5,))])
    with pytest.raises(InputError, match="conversation 0 under guard 'tiny'"):
        divergences(broken, [("Hi", (5,))], {"g": guard_of(broken, sg.SwFC(1))})
