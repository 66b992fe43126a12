"""Builders of tiny model folders: random weights, real configuration classes, a byte-level chat tokenizer.

The folders are what `save_pretrained` writes, so that every backend loads them like any other model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from steerguard.guard import Guard, ModelIdentity, Positions
from steerguard.probe import Evidence, Probe
from steerguard.rules import Rule

CHAT_TEMPLATE = (
    "{{ '<s>' }}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")
WORDS = ("the ", "a ", "you ", "is ", "and ", "what ", "answer ", "tell ", "me ", "truth ", "day ", "week ")
EVIDENCE = Evidence(
    auroc=0.99,
    auroc_low=0.95,
    auroc_high=1.0,
    cohens_d=3.0,
    split_half=0.9,
    cosine_mean_difference=0.9,
    n_pos=50,
    n_neg=50,
)


def tokenizer() -> Any:
    """A byte-level tokenizer with a few whole words, special tokens for roles and a chat template; left padding."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    merges: list[tuple[str, str]] = []
    for word in WORDS:  # a byte-pair merge of every prefix of every word
        letters = word.replace(" ", "Ġ")
        for end in range(2, len(letters) + 1):
            if letters[:end] not in vocabulary:
                vocabulary[letters[:end]] = len(vocabulary)
                merges.append((letters[: end - 1], letters[end - 1]))
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left",
        extra_special_tokens=list(SPECIAL[3:]), clean_up_tokenization_spaces=False,
    )  # fmt: skip
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def llama_folder(folder: Path, *, seed: int = 0, dtype: str = "float32", **changes: Any) -> Path:
    """A random Llama with grouped-query attention: 4 blocks of width 48, 4 heads over 2 key-value heads.

    Args:
        dtype: of the saved weights: float32, float16 or bfloat16.
        changes: of LlamaConfig, such as `tie_word_embeddings=True`.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens = tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": len(tokens), "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
        "bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id, "pad_token_id": tokens.pad_token_id,
    }  # fmt: skip
    config = LlamaConfig(**(settings | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for name, p in model.named_parameters():
            # Larger than the usual initialisation: blocks that matter, and logits that are far from ties.
            torch.nn.init.normal_(p, std=0.2 if "weight" in name else 0.05)
            if name.endswith("norm.weight"):
                p.data.add_(1.0)
    model.generation_config.do_sample = False
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def direction(width: int, seed: int) -> np.ndarray:
    """A random unit vector `[width]`, float32."""
    v = np.random.default_rng(seed).normal(size=width)
    return (v / np.linalg.norm(v)).astype(np.float32)


def probe(layer: int, width: int, *, rho: np.ndarray | None = None, seed: int = 0, apart: float = 1.0) -> Probe:
    """A probe along a random direction, whose boundary is 0 or the median of the residuals `rho` `[tokens, width]`
    projected on it, and whose classes stand `apart` standard deviations to each side."""
    v = direction(width, 1000 * seed + layer)
    on_v = rho @ v if rho is not None else np.array([-1.0, 1.0])
    m, sigma = float(np.median(on_v)), float(on_v.std()) or 1.0
    return Probe(
        layer=layer,
        v=v,
        m=m,
        mu_pos=m + apart * sigma,
        sigma_pos=apart * sigma / 8,
        mu_neg=m - apart * sigma,
        sigma_neg=apart * sigma / 8,
        evidence=EVIDENCE,
    )


def guard(
    model: ModelIdentity, rule: Rule, probes: tuple[Probe, ...], *, positions: Positions = "all", name: str = "tiny"
) -> Guard:
    """A guard of that model."""
    return Guard(name=name, probes=probes, rule=rule, model=model, positions=positions)
