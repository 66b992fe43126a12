"""Loading: what comes out, who it says it is, and one sentence for whatever cannot be loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import BY_NAME, PROMPTS, STEPS, guard_of, ids_of, tiny_model
from transformers import AutoTokenizer

from architectures import ARCHITECTURES, Architecture, build, tokenizer
from steerguard.backends import backends
from steerguard.backends import load as load_any
from steerguard.backends.fingerprint import choose, fingerprint_folder
from steerguard.backends.hf import load, wrap
from steerguard.errors import InputError, ModelError, PromptError


def saved(folder: Path, name: str = "llama", **settings: Any) -> Path:
    build(BY_NAME[name]).save_pretrained(folder, **settings)
    tokenizer().save_pretrained(folder)
    return folder


def test_the_registry_names_its_backends(tmp_path: Path) -> None:
    assert {"hf", "fake"} <= set(backends())
    with pytest.raises(ModelError, match=r"no backend 'onnx'; there are hf, vllm, fake"):
        load_any("x", backend="onnx")
    with pytest.raises(InputError, match="the hf backend has no option dytpe; it has dtype, device_map"):
        load_any("x", dytpe="bfloat16")
    model = load_any(saved(tmp_path), dtype="float32")
    assert (model.name, model.identity.name) == ("hf", str(tmp_path))


# ------------------------------------------------------------------------------------------------ identity


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_a_model_saved_and_loaded_is_the_same_model(architecture: Architecture, tmp_path: Path) -> None:
    module = build(architecture)
    module.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    # read back, because transformers gives some architectures a tokenizer class that adds tokens of its own
    in_memory = wrap(module, AutoTokenizer.from_pretrained(tmp_path), name="here")
    loaded = load(str(tmp_path))
    assert loaded.identity.differences(in_memory.identity) == {}
    assert len(loaded.identity.weights) >= 8
    guard = guard_of(in_memory, [1, 2])
    assert ids_of(loaded.generate(PROMPTS, guards=guard, sampling=STEPS)) == ids_of(
        in_memory.generate(PROMPTS, guards=guard, sampling=STEPS)
    )


def test_dtype_and_shards_do_not_change_the_identity(tmp_path: Path) -> None:
    whole = load(str(saved(tmp_path / "whole"))).identity
    sharded = load(str(saved(tmp_path / "sharded", max_shard_size="20KB")))
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    for other in (sharded.identity, load(str(tmp_path / "whole"), dtype="bfloat16").identity):
        assert other.differences(whole) == {}
    assert fingerprint_folder(tmp_path / "sharded") == fingerprint_folder(tmp_path / "whole") == whole.weights


def test_other_weights_vocabulary_or_template_are_another_model(tmp_path: Path) -> None:
    one = tiny_model().identity
    assert set(wrap(build(BY_NAME["llama"], seed=1), tokenizer()).identity.differences(one)) == {"weights"}
    other = tokenizer().__class__.from_pretrained(saved(tmp_path))
    other.chat_template += " "
    assert set(wrap(build(BY_NAME["llama"]), other).identity.differences(one)) == {"chat_template"}
    other.add_tokens(["<new>"])
    assert set(wrap(build(BY_NAME["llama"]), other).identity.differences(one)) == {"chat_template", "tokenizer"}


@pytest.mark.parametrize("kind", ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
def test_merging_an_adapter_into_one_kind_of_matrix_is_another_model(kind: str) -> None:
    model = build(BY_NAME["llama"])
    before = wrap(model, tokenizer()).identity
    for name, parameter in model.named_parameters():
        if kind in name:
            parameter.data += 0.05 * torch.randn(parameter.shape[0], 1) @ torch.randn(1, parameter.shape[1])
    assert set(wrap(model, tokenizer()).identity.differences(before)) == {"weights"}


@pytest.mark.parametrize("depth", [4, 28, 32, 64, 80])
def test_every_kind_of_matrix_is_read_and_every_third_of_the_depth(depth: int) -> None:
    kinds = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    shapes: dict[str, Any] = {f"model.layers.{i}.{kind}.weight": (8, 8) for i in range(depth) for kind in kinds}
    chosen = choose({**shapes, "model.embed_tokens.weight": (9, 8), "model.norm.weight": (8,)})
    assert len(chosen) >= 8
    assert {kind for kind in kinds for name in chosen if kind in name} == set(kinds)
    thirds = {3 * int(name.split(".")[2]) // depth for name in chosen if "layers" in name}
    assert thirds == {0, 1, 2}


# ------------------------------------------------------------------------------------------------- refusals


def test_a_folder_that_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load(str(tmp_path))
    with pytest.raises(ModelError, match="there is no folder"):
        load(str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="is a file; give the folder"):
        load(str(tmp_path / "file"))


def test_an_unknown_name_without_a_network() -> None:
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set and it is not in the cache") as caught:
        load("no-such-organisation/no-such-model")
    assert "\n" not in str(caught.value)


def test_damaged_folders(tmp_path: Path) -> None:
    broken = saved(tmp_path / "json")
    (broken / "config.json").write_text("{")
    with pytest.raises(ModelError, match="the configuration of .* cannot be loaded"):
        load(str(broken))
    truncated = saved(tmp_path / "weights")
    content = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="the weights of .* cannot be loaded"):
        load(str(truncated))
    empty = saved(tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="the weights of .* cannot be loaded"):
        load(str(empty))
    wordless = saved(tmp_path / "wordless")
    for file in wordless.glob("token*"):
        file.unlink()
    with pytest.raises(ModelError, match="the tokenizer of .* cannot be loaded"):
        load(str(wordless))
    unknown = saved(tmp_path / "unknown")
    config = json.loads((unknown / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps({**config, "model_type": "llama9"}))
    with pytest.raises(ModelError, match="installed transformers does not know it"):
        load(str(unknown))


def test_a_model_of_another_kind(tmp_path: Path) -> None:
    import transformers

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.ViTModel(transformers.ViTConfig(**size)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is a ViT; steerguard guards decoder-only language models"):
        load(str(tmp_path))


def test_a_checkpoint_with_weights_missing(tmp_path: Path) -> None:
    model = build(BY_NAME["llama"])
    weights = {name: tensor for name, tensor in model.state_dict().items() if "layers.2.mlp.up_proj" not in name}
    saved(tmp_path)
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ModelError, match=r"lacks 1 of the model's weights \(model\.layers\.2\.mlp\.up_proj\.weight\)"):
        load(str(tmp_path))


def test_options_that_do_not_exist(tmp_path: Path) -> None:
    folder = str(saved(tmp_path))
    with pytest.raises(ModelError, match="no dtype 'int7'"):
        load(folder, dtype="int7")
    with pytest.raises(ModelError, match="no dtype 'int8'"):
        load(folder, dtype="int8")
    with pytest.raises(ModelError, match="no quantization '3bit'; there are 4bit, 8bit"):
        load(folder, quantization="3bit")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="batch_tokens must be at least 1"):
        load(folder, batch_tokens=0)


def test_quantisation_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a))
    with pytest.raises(ModelError, match=r'needs bitsandbytes: pip install "steerguard\[quantization\]"'):
        load(str(saved(tmp_path)), quantization="4bit")


def test_out_of_memory_says_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()

    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model.module, "generate", full)
    with pytest.raises(ModelError, match="out of memory while generating; load the model with batch_tokens=8192 or less"):
        model.generate(PROMPTS, sampling=STEPS)


def test_a_model_without_a_chat_template_loads_and_does_not_answer(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / "chat_template.jinja").unlink()
    model = load(str(folder))
    assert model.identity.chat_template == ""
    with pytest.raises(PromptError, match="no chat template"):
        model.generate(PROMPTS, sampling=STEPS)


def test_a_tokenizer_without_padding_pads_with_the_end(tmp_path: Path) -> None:
    words = tokenizer().__class__.from_pretrained(saved(tmp_path))
    words.pad_token = None
    model = wrap(build(BY_NAME["llama"]), words)
    assert ids_of(model.generate(PROMPTS, sampling=STEPS)) == ids_of(tiny_model().generate(PROMPTS, sampling=STEPS))
