"""The fake: its forward pass against transformers', its folders, its decoding, and its faults."""

from __future__ import annotations

import ast
import inspect
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from steerguard.backends import fake_hook
from steerguard.backends.base import Sampling
from steerguard.backends.fake import Fault, load
from steerguard.backends.fake_decode import Draw, Writer, pieces
from steerguard.backends.fake_hook import to_bfloat16
from steerguard.backends.fake_llama import Cache, read_llama, read_safetensors
from steerguard.errors import ContrastError, InputError, ModelError, NotSteering, PromptError
from steerguard.rules import StTP, SwFC

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama_folder(tmp_path_factory.mktemp("fake") / "tiny")


def edited(folder: Path, into: Path, **changes: Any) -> Path:
    """A copy of a folder with other values in its configuration."""
    into.mkdir()
    for file in folder.iterdir():
        (into / file.name).write_bytes(file.read_bytes())
    config = json.loads((into / "config.json").read_text()) | changes
    (into / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return into


# -------------------------------------------------------------------------------------------- the forward pass


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "bfloat16", "tie_word_embeddings": True},
        {"dtype": "float16", "head_dim": 16},
        {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
        {"rope_parameters": LLAMA3, "num_key_value_heads": 1},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ],
    ids=["plain", "tied-bf16", "fp16-head-dim", "biases", "llama3-rope", "linear-rope"],
)
def test_the_forward_pass_is_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = tiny.llama_folder(tmp_path / "model", **changes)
    ids = tuple(np.random.default_rng(0).integers(6, 200, 90).tolist())
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = module(torch.tensor([ids]), output_hidden_states=True)
    kept: list[np.ndarray] = []
    logits = read_llama(folder).forward(ids, Cache(), lambda layer, h, start: kept.append(h) or h)
    np.testing.assert_allclose(logits, theirs.logits[0].numpy(), atol=2e-4)
    for mine, state in zip(kept, theirs.hidden_states[1:-1], strict=False):
        np.testing.assert_allclose(mine, state[0].numpy(), atol=2e-4)


def test_a_cache_changes_nothing_but_the_work(folder: Path) -> None:
    llama, ids = read_llama(folder), tuple(range(6, 40))
    whole = llama.forward(ids, Cache(), lambda layer, h, start: h)
    cache = Cache()
    parts = [llama.forward(part, cache, lambda layer, h, start: h) for part in (ids[:20], ids[20:21], ids[21:])]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-4)
    assert cache.length == len(ids)
    assert cache.prefix(5).keys[0].shape[1] == 5


def test_bfloat16_is_read_and_rounded_as_torch_does(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    x = torch.randn(200) * torch.logspace(-3, 3, 200)
    ours = to_bfloat16(x.numpy())
    np.testing.assert_array_equal(ours, x.bfloat16().float().numpy())
    save_file({"x": x.bfloat16(), "y": x.half(), "z": x.double()}, tmp_path / "x.safetensors")
    read = read_safetensors(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(read["x"], ours)
    np.testing.assert_array_equal(read["y"], x.half().float().numpy())
    np.testing.assert_array_equal(read["z"], x.numpy())


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None}, "unnamed"),
        ({"hidden_act": "gelu"}, "SiLU"),
        ({"quantization_config": {"bits": 4}}, "unquantised"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
        ({"num_hidden_layers": 5}, r"layers\.4"),
        ({"num_key_value_heads": 4}, "k_proj"),
    ],
)
def test_what_it_does_not_know_it_refuses(folder: Path, tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ModelError, match=why):
        load(edited(folder, tmp_path / "other", **changes))


def test_damaged_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = edited(folder, tmp_path / "copy")
    (copy / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not json at all")
    with pytest.raises(ModelError, match="safetensors"):
        load(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        load(copy)
    (copy / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="not a JSON object"):
        load(copy)
    with pytest.raises(ModelError, match="local Hugging Face folders only"):
        load("meta-llama/Llama-3.3-70B-Instruct")
    bare = edited(folder, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        load(bare)


def test_what_does_not_fit_the_context_is_refused(folder: Path, tmp_path: Path) -> None:
    short = load(edited(folder, tmp_path / "short", max_position_embeddings=24))
    (answer,) = short.generate("tell me", sampling=Sampling(temperature=0.0, max_new_tokens=100))
    assert len(answer.prompt_ids) + len(answer.ids) == 24
    assert answer.finished == "length"
    with pytest.raises(PromptError, match="no room"):
        short.generate("tell me the truth, and nothing but the whole of it")
    with pytest.raises(InputError, match="at least 1"):
        short.generate("a", sampling=Sampling(max_new_tokens=0))


def test_an_empty_answer_and_an_absent_layer_are_refused(folder: Path) -> None:
    model = load(folder)
    with pytest.raises(ContrastError, match=r"\[1\]"):
        model.capture([("a", "b"), ("a", "")])
    with pytest.raises(InputError, match="no layer"):
        model.capture([("a", "b")], layers=[0, 4])


# ---------------------------------------------------------------------------------------------------- decoding


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.06, 0.04], np.float32))
    draws = [Draw(Sampling(temperature=1.0, top_p=1.0, seed=seed), (1, 2), 0)(logits) for seed in range(4000)]
    shares = np.array([Counter(draws)[i] / 4000 for i in range(5)])
    np.testing.assert_allclose(shares, np.exp(logits), atol=0.03)
    nucleus = [Draw(Sampling(temperature=1.0, top_p=0.8, seed=seed), (1, 2), 0)(logits) for seed in range(500)]
    assert set(nucleus) == {0, 1, 2}
    steps = Draw(Sampling(temperature=1.0, top_p=1.0), (1, 2), 0)
    assert len({steps(logits) for _ in range(100)}) > 2, "each step has its own noise"


def test_what_is_streamed_is_never_taken_back() -> None:
    tokens = tiny.tokenizer()
    for text, stop in (("a é and the ünd", ()), ("stop he", ("stop here",)), ("abc stop here d", ("stop here",))):
        told: list[str] = []
        ids = tokens(text, add_special_tokens=False)["input_ids"]
        writer = Writer(tokens, Sampling(stop=stop), {tokens.eos_token_id}, len(ids), told.append)
        for token in ids:
            if not writer.done:
                writer.add(token)
        assert "".join(told) == writer.text == text.split("stop here")[0]
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in told)


def test_pieces_of_a_character_come_with_its_last_token() -> None:
    tokens = tiny.tokenizer()
    ids = tokens("a é</s>", add_special_tokens=False)["input_ids"]
    assert pieces(tokens, ids) == ["a ", "", "é", ""]


# ------------------------------------------------------------------------------------------------------ faults


def test_every_fault_is_documented() -> None:
    (body,) = [
        node.body
        for node in ast.parse(inspect.getsource(fake_hook)).body
        if isinstance(node, ast.ClassDef) and node.name == "Fault"
    ]
    named = [i for i, node in enumerate(body) if isinstance(node, ast.Assign)]
    assert len(named) == len(Fault)
    for i in named:
        assert isinstance(body[i + 1], ast.Expr), f"{ast.unparse(body[i])} has no text under it"


def test_a_fault_may_be_named_and_must_exist(folder: Path) -> None:
    assert load(folder, fault="half-shift").fault is Fault.HALF_SHIFT
    assert "half-shift" in repr(load(folder, fault=Fault.HALF_SHIFT))
    assert "fault" not in repr(load(folder))
    with pytest.raises(InputError, match="there is no fault 'none'; there are never-fires"):
        load(folder, fault="none")


def test_faults_do_what_they_say(folder: Path) -> None:
    """The negation of the theorem: half the shift is half the shift, and the wrong layer is the next one."""
    healthy = load(folder)
    base = healthy.residuals("tell me", "a day")
    guard = tiny.guard(healthy.identity, SwFC(2), (tiny.probe(1, 48, rho=base[1]),))
    v, due = guard.probes[0].v, 2 * guard.probes[0].delta_mu

    def moved(fault: Fault | None, layer: int) -> np.ndarray:
        return (load(folder, fault=fault).residuals("tell me", "a day", guards=guard)[layer] - base[layer]) @ v

    np.testing.assert_allclose(moved(None, 1), due, rtol=1e-4)
    np.testing.assert_allclose(moved(Fault.HALF_SHIFT, 1), due / 2, rtol=1e-4)
    np.testing.assert_array_equal(moved(Fault.THROWN_AWAY, 3), 0)
    np.testing.assert_array_equal(moved(Fault.WRONG_LAYER, 1), 0)
    np.testing.assert_allclose(moved(Fault.WRONG_LAYER, 2), due, rtol=1e-4)
    assert 0 < np.abs(moved(Fault.BFLOAT16, 1) - due).max() < 0.05 * due


def test_a_hook_that_does_not_fire_is_noticed_without_entering(folder: Path) -> None:
    model = load(folder, fault=Fault.NEVER_FIRES)
    guard = tiny.guard(model.identity, StTP(1), (tiny.probe(1, 48),))
    for call in (model.generate, model.residuals, model.logits):
        with pytest.raises(NotSteering, match="looked at 0 token-gate pairs"):
            call("tell me", guards=guard)
    with pytest.raises(NotSteering):
        model.capture([("tell me", "a day")], guards=guard)
