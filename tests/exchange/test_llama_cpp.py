"""An exported guard in llama.cpp itself, against the guard on our own backend: the same logits, on the same layer.

It wants llama.cpp's library (`pip install llama-cpp-py-sync`), which is no dependency, and is skipped without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter

import steerguard as sg
import tiny
from steerguard.backends import load
from steerguard.exchange import export_gguf

pytest.importorskip("llama_cpp_py_sync", reason="llama.cpp's library is not installed: pip install llama-cpp-py-sync")
TOKENS = [1, 9, 40, 77, 120, 5, 200, 31]


def as_gguf(folder: Path, path: Path) -> Path:
    """The tiny Llama of `tests/tiny.py` as llama.cpp reads it: no vocabulary, rotary pairs side by side."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    writer.add_tensor("output.weight", weights["lm_head.weight"])
    for layer in range(config.num_hidden_layers):
        for theirs, name in names.items():
            w = weights[f"model.layers.{layer}.{theirs}.weight"]
            if name in heads:  # halves of a head become pairs
                w = w.reshape(heads[name], 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ascontiguousarray(w))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class LlamaCpp:
    """llama.cpp on one model."""

    def __init__(self, path: Path) -> None:
        from llama_cpp_py_sync._cffi_bindings import ffi, get_lib

        self.ffi, self.lib = ffi, get_lib()
        self._quiet = ffi.callback("ggml_log_callback", lambda *_: None)
        self.lib.llama_log_set(self._quiet, ffi.NULL)
        self.lib.llama_backend_init()
        settings = self.lib.llama_model_default_params()
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), settings)
        assert self.model != ffi.NULL

    def logits(self, vectors: dict[int, np.ndarray], width: int, n: int) -> np.ndarray:
        """`[tokens, n]` after the prompt, under control vectors by the number in their names.

        They are laid out as `common_control_vector_load` lays them out: number N begins at `width * (N - 1)`.
        """
        ffi, lib = self.ffi, self.lib
        settings = lib.llama_context_default_params()
        settings.n_ctx, settings.n_threads, settings.n_threads_batch = 64, 1, 1
        settings.type_k = settings.type_v = 0  # the cache in F32, as ours
        settings.flash_attn_type = 0
        context: Any = lib.llama_init_from_model(self.model, settings)
        if vectors:
            data = np.zeros((max(vectors), width), dtype=np.float32)
            for number, vector in vectors.items():
                data[number - 1] = vector
            buffer = ffi.from_buffer("float[]", data)
            depth = lib.llama_model_n_layer(self.model)
            assert lib.llama_set_adapter_cvec(context, buffer, data.size, width, 1, depth) == 0
        batch = lib.llama_batch_init(len(TOKENS), 0, 1)
        batch.n_tokens = len(TOKENS)
        for i, token in enumerate(TOKENS):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
        assert lib.llama_decode(context, batch) == 0
        logits = [lib.llama_get_logits_ith(context, i) for i in range(len(TOKENS))]
        rows = [np.frombuffer(ffi.buffer(row, 4 * n), np.float32).copy() for row in logits]
        lib.llama_batch_free(batch)
        lib.llama_free(context)
        return np.stack(rows)


def test_llama_cpp_does_what_the_guard_does(tmp_path: Path) -> None:
    folder = tiny.llama_folder(tmp_path / "model")
    ours = load(folder)
    theirs = LlamaCpp(as_gguf(folder, tmp_path / "model.gguf"))
    width, n = ours.identity.width, len(tiny.tokenizer())

    def own_logits() -> np.ndarray:
        with torch.no_grad():
            return ours.module(torch.tensor([TOKENS])).logits[0].float().numpy()  # type: ignore[attr-defined]

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.abs(a - b).max() / np.abs(b).max())

    plain = own_logits()
    assert distance(theirs.logits({}, width, n), plain) < 1e-4
    for layers in ((1,), (2,), (3,), (1, 3)):
        guard = tiny.guard(ours.identity, sg.SwFC(4), tuple(tiny.probe(layer, width) for layer in layers))
        path = export_gguf(guard, tmp_path / "v.gguf", overwrite=True)
        named = {int(t.name.partition(".")[2]): np.array(t.data) for t in GGUFReader(path).tensors}
        with ours.guarded(guard):
            expected = own_logits()
        assert distance(expected, plain) > 0.05  # the guard does something
        assert distance(theirs.logits(named, width, n), expected) < 1e-4
        # with the numbers shifted by one, as they could be misread, it is another model
        shifted = {number + 1: vector for number, vector in named.items()}
        assert distance(theirs.logits(shifted, width, n), expected) > 0.02
