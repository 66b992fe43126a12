"""Tiny random models of many real configuration classes: 4 blocks, width 32 or 48, one byte-level chat tokenizer.

A new architecture is one line in `ARCHITECTURES`. Where transformers itself does not keep a property without us (its
own cached text differs from its uncached, say), the line says which and why, and that one comparison is left out.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from tiny import tokenizer as tiny_tokenizer

BASE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
MOE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4, "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, **MOE,
}  # fmt: skip
LOCAL = {"sliding_window": 8, "head_dim": 8}
MAMBA = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2,
    "mamba_chunk_size": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """One configuration class at a tiny size."""

    name: str
    config: str
    "configuration class of transformers"
    settings: Mapping[str, Any]
    model: str = "AutoModelForCausalLM"
    text: bool = True
    "the settings are the text decoder's; otherwise a whole multimodal configuration"
    broken: Mapping[str, str] = field(default_factory=dict)
    "property that transformers does not keep without us -> why"

    def __str__(self) -> str:
        return self.name


def tiny_vision(kind: str) -> dict[str, Any]:
    if kind == "siglip":
        return {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        }
    return {
        "depth": 4, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
        "num_position_embeddings": 16,
    }  # fmt: skip


ARCHITECTURES = (
    Architecture("llama", "LlamaConfig", BASE),
    Architecture("qwen2", "Qwen2Config", BASE),
    Architecture("qwen3", "Qwen3Config", {**BASE, "head_dim": 8}),
    Architecture("qwen3-moe", "Qwen3MoeConfig", {**BASE, **MOE, "head_dim": 8, "num_experts": 4}),
    Architecture("qwen3-next", "Qwen3NextConfig", {
        **BASE, **MOE, **LINEAR, "num_experts": 4, "shared_expert_intermediate_size": 16,
    }),
    Architecture("qwen3.5-text", "Qwen3_5TextConfig", {**BASE, **LINEAR}),
    Architecture("qwen3.5", "Qwen3_5Config", {
        "text_config": {**BASE, **LINEAR}, "vision_config": tiny_vision("qwen"), "image_token_id": 290,
        "video_token_id": 291, "vision_start_token_id": 292, "vision_end_token_id": 293,
    }, model="Qwen3_5ForConditionalGeneration", text=False),
    Architecture("qwen3.5-moe", "Qwen3_5MoeTextConfig", {
        **BASE, **MOE, **LINEAR, "num_experts": 4, "shared_expert_intermediate_size": 16,
    }),
    Architecture("gemma2", "Gemma2Config", {**BASE, **LOCAL}),
    Architecture("gemma3-text", "Gemma3TextConfig", {
        **BASE, **LOCAL, "layer_types": ["sliding_attention", "full_attention"] * 2,
    }),
    Architecture("gemma3", "Gemma3Config", {
        "text_config": {**BASE, **LOCAL, "layer_types": ["sliding_attention", "full_attention"] * 2},
        "vision_config": tiny_vision("siglip"), "mm_tokens_per_image": 1, "image_token_index": 290,
        "boi_token_index": 291, "eoi_token_index": 292,
    }, model="Gemma3ForConditionalGeneration", text=False),
    Architecture("mistral", "MistralConfig", {**BASE, **LOCAL}),
    Architecture("phi3", "Phi3Config", {**BASE, "pad_token_id": 0}),
    Architecture("gpt-oss", "GptOssConfig", {
        **BASE, **LOCAL, "num_local_experts": 4, "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }),
    Architecture("gpt2", "GPT2Config", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 512}),
    Architecture("gpt-neox", "GPTNeoXConfig", {k: v for k, v in BASE.items() if k != "num_key_value_heads"}),
    Architecture("olmo2", "Olmo2Config", BASE),
    Architecture("deepseek-v2", "DeepseekV2Config", {**BASE, **LATENT, "n_group": 1, "topk_group": 1}),
    Architecture("deepseek-v3", "DeepseekV3Config", {**BASE, **LATENT, "n_group": 1, "topk_group": 1}),
    Architecture("bamba", "BambaConfig", {**BASE, **MAMBA, "attn_layer_indices": [1, 3]}),
    Architecture("jamba", "JambaConfig", {
        **BASE, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2,
        "mamba_dt_rank": 4, "use_mamba_kernels": False,
    }),
    Architecture("falcon-h1", "FalconH1Config", {**BASE, **MAMBA, "mamba_d_ssm": 64}),
    Architecture("granite-hybrid", "GraniteMoeHybridConfig", {
        **BASE, **MAMBA, "num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 16,
        "layer_types": ["mamba", "attention"] * 2, "position_embedding_type": "rope",
    }),
)  # fmt: skip


@functools.cache
def tokenizer() -> Any:
    return tiny_tokenizer()


def build(architecture: Architecture, seed: int = 0) -> Any:
    """A random model of that architecture, float32, in eval mode; its weights large enough to matter."""
    tokens = tokenizer()
    ids = {
        "pad_token_id": tokens.pad_token_id,
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
    }
    vocabulary = {"vocab_size": len(tokens), **ids}
    settings = dict(architecture.settings)
    if architecture.text:
        settings = {**vocabulary, **settings}
    else:
        settings = {**ids, **settings, "text_config": {**vocabulary, **settings["text_config"]}}
    config = getattr(transformers, architecture.config)(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind = getattr(transformers, architecture.model)
        model = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:  # the usual initialisation is so small that blocks hardly matter
                torch.nn.init.normal_(parameter, std=0.15 if "embed" not in name and "wte" not in name else 0.5)
    model.generation_config.eos_token_id = tokens.eos_token_id
    model.generation_config.pad_token_id = tokens.pad_token_id
    return model.eval()
