"""A Llama in numpy: a second, independent implementation of the forward pass, in float32.

It knows the arithmetic of `LlamaForCausalLM` (RMSNorm, rotary positions, grouped-query attention, SwiGLU, tied or
untied head) and how to read its Hugging Face folder. It knows nothing of guards: `forward` hands the residual that
each block returns to a callable, and the next block reads what comes back.

One call is one row. A batch is many calls, so that no row can depend on another.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from steerguard.errors import ModelError

Floats = npt.NDArray[np.float32]
OnBlock = Callable[[int, Floats, int], Floats]
"""Called with (layer, residual `[tokens, d]`, position of the first token); returns what the next block reads."""


@dataclass(frozen=True)
class Shape:
    """The numbers of a Llama configuration that its arithmetic needs."""

    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    "added to the mean square in RMSNorm"
    inverse_frequencies: tuple[float, ...]
    "[head_dim / 2] radians per position, after rope scaling"
    context: int
    "tokens that it was made for"
    tied: bool
    "the head is the embedding"


@dataclass
class Cache:
    """Keys and values of one row: per layer `[kv_heads, tokens, head_dim]` each, keys already rotated."""

    keys: dict[int, Floats] = field(default_factory=dict)
    values: dict[int, Floats] = field(default_factory=dict)
    length: int = 0
    "tokens held"

    def extend(self, layer: int, k: Floats, v: Floats) -> tuple[Floats, Floats]:
        if layer in self.keys:
            k = np.concatenate([self.keys[layer], k], axis=1)
            v = np.concatenate([self.values[layer], v], axis=1)
        self.keys[layer], self.values[layer] = k, v
        return k, v

    def prefix(self, length: int) -> Cache:
        """A copy of the first `length` tokens."""
        keys = {layer: k[:, :length] for layer, k in self.keys.items()}
        return Cache(keys, {layer: v[:, :length] for layer, v in self.values.items()}, length)


@dataclass(frozen=True, eq=False)
class Llama:
    """Weights and shape of one model."""

    shape: Shape
    weights: Mapping[str, Floats]
    "parameter name as in the folder -> float32"

    def forward(self, ids: tuple[int, ...], cache: Cache, on_block: OnBlock) -> Floats:
        """Logits `[tokens, vocabulary]` of `ids`, which follow the tokens that `cache` holds."""
        start = cache.length
        # 1. embed; the residual stream is x
        x = self.weights["model.embed_tokens.weight"][list(ids)]
        cos, sin = self._rotations(start, len(ids))
        for layer in range(self.shape.depth):
            # 2. each block adds its attention and its MLP to the stream
            at = f"model.layers.{layer}."
            x = x + self._attention(at, layer, self._norm(x, at + "input_layernorm"), cos, sin, cache)
            x = x + self._mlp(at, self._norm(x, at + "post_attention_layernorm"))
            # 3. what the next block reads
            x = on_block(layer, x, start)
        cache.length = start + len(ids)
        # 4. the head
        x = self._norm(x, "model.norm")
        return self._linear(x, "model.embed_tokens" if self.shape.tied else "lm_head")

    def _norm(self, x: Floats, name: str) -> Floats:
        mean_square = (x * x).sum(-1, keepdims=True) / np.float32(x.shape[-1])
        normed: Floats = x / np.sqrt(mean_square + np.float32(self.shape.eps))
        return normed * self.weights[name + ".weight"]

    def _linear(self, x: Floats, name: str) -> Floats:
        y: Floats = x @ self.weights[name + ".weight"].T
        return y + self.weights[name + ".bias"] if name + ".bias" in self.weights else y

    def _mlp(self, at: str, x: Floats) -> Floats:
        gate = self._linear(x, at + "mlp.gate_proj")
        silu = gate / (1 + np.exp(-np.clip(gate, -80, None)))
        return self._linear(silu * self._linear(x, at + "mlp.up_proj"), at + "mlp.down_proj")

    def _attention(self, at: str, layer: int, x: Floats, cos: Floats, sin: Floats, cache: Cache) -> Floats:
        s, n = self.shape, len(x)

        def split(name: str, heads: int) -> Floats:  # [tokens, heads * head_dim] -> [heads, tokens, head_dim]
            return self._linear(x, f"{at}self_attn.{name}").reshape(n, heads, s.head_dim).transpose(1, 0, 2)

        # 1. queries, keys, values; positions are turned into the first two
        q = _rotate(split("q_proj", s.heads), cos, sin)
        k, v = cache.extend(layer, _rotate(split("k_proj", s.kv_heads), cos, sin), split("v_proj", s.kv_heads))
        # 2. each key-value head serves a group of query heads
        q = q.reshape(s.kv_heads, s.heads // s.kv_heads, n, s.head_dim)
        scores = q @ k[:, None].swapaxes(-1, -2) / np.float32(math.sqrt(s.head_dim))
        # 3. a token sees itself and what came before
        total = k.shape[1]
        if n > 1:
            seen = np.arange(total)[None, :] <= np.arange(total - n, total)[:, None]
            scores = np.where(seen, scores, np.float32(-np.inf))
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores = scores / scores.sum(-1, keepdims=True)
        # 4. mix and merge the heads
        mixed = (scores @ v[:, None]).reshape(s.heads, n, s.head_dim).transpose(1, 0, 2).reshape(n, -1)
        return self._linear(mixed, at + "self_attn.o_proj")

    def _rotations(self, start: int, n: int) -> tuple[Floats, Floats]:
        angles = np.outer(np.arange(start, start + n), self.shape.inverse_frequencies).astype(np.float32)
        angles = np.concatenate([angles, angles], axis=-1)
        return np.cos(angles, dtype=np.float32), np.sin(angles, dtype=np.float32)


def _rotate(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """Rotate `[heads, tokens, head_dim]`; the pairs are (i, i + head_dim / 2)."""
    half = x.shape[-1] // 2
    turned = np.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    rotated = x * cos + turned * sin
    return rotated.astype(np.float32, copy=False)


# ------------------------------------------------------------------------------------------- reading a folder


def read_llama(folder: Path) -> Llama:
    """The model in a local Hugging Face folder. Raises ModelError for anything but a LlamaForCausalLM."""
    config = read_config(folder)
    shape = _shape(folder, config)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} has no model.safetensors; save the model with save_pretrained")
    weights: dict[str, Floats] = {}
    for file in files:
        weights |= read_safetensors(file)
    if shape.tied:
        weights.pop("lm_head.weight", None)
    model = Llama(shape, weights)
    _check_weights(folder, model)
    return model


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder. Raises ModelError if there is none that can be read."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the fake backend reads local Hugging Face folders only, and {str(folder)!r} is none: {error}. "
            "Give the path of a folder that holds config.json and model.safetensors"
        ) from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object")
    return config


def _shape(folder: Path, config: dict[str, Any]) -> Shape:
    architectures = config.get("architectures") or []
    if architectures[:1] != ["LlamaForCausalLM"]:
        got = architectures[0] if architectures else "unnamed"
        raise ModelError(f'the fake backend knows LlamaForCausalLM only, {folder} is {got}; use backend="hf"')
    if config.get("hidden_act", "silu") != "silu" or config.get("quantization_config"):
        raise ModelError(f'{folder}: the fake backend knows unquantised weights and SiLU only; use backend="hf"')
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or width // heads
    return Shape(
        width=width, depth=config["num_hidden_layers"], heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads, head_dim=head_dim,
        eps=config.get("rms_norm_eps", 1e-6), inverse_frequencies=_inverse_frequencies(folder, config, head_dim),
        context=config.get("max_position_embeddings") or sys.maxsize,
        tied=bool(config.get("tie_word_embeddings", False)),
    )  # fmt: skip


def _inverse_frequencies(folder: Path, config: dict[str, Any], head_dim: int) -> tuple[float, ...]:
    """Radians per position of each rotated pair; `default`, `linear` and `llama3` scaling."""
    rope = (config.get("rope_parameters") or {}) | (config.get("rope_scaling") or {})
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10_000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    plain = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    if kind == "default":
        return tuple(plain)
    if kind == "linear":
        return tuple(f / rope["factor"] for f in plain)
    if kind == "llama3":
        return tuple(_llama3(f, rope) for f in plain)
    raise ModelError(f'{folder}: the fake backend does not know rope type {kind!r}; use backend="hf"')


def _llama3(frequency: float, rope: dict[str, Any]) -> float:
    """Llama 3.1's scaling: long wavelengths are divided by `factor`, short ones kept, those between blended."""
    low, high, old = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    turns = old * frequency / (2 * math.pi)  # how often this pair turns within the old context
    blend: float = min(max((turns - low) / (high - low), 0.0), 1.0)
    slow: float = frequency / rope["factor"]
    return (1 - blend) * slow + blend * frequency


def _check_weights(folder: Path, model: Llama) -> None:
    s = model.shape
    expected: dict[str, tuple[int | None, ...]] = {
        "model.norm.weight": (s.width,),
        "model.embed_tokens.weight": (None, s.width),
    }
    for layer in range(s.depth):
        at = f"model.layers.{layer}."
        expected[at + "self_attn.q_proj.weight"] = (s.heads * s.head_dim, s.width)
        expected[at + "self_attn.k_proj.weight"] = (s.kv_heads * s.head_dim, s.width)
        expected[at + "self_attn.v_proj.weight"] = (s.kv_heads * s.head_dim, s.width)
        expected[at + "self_attn.o_proj.weight"] = (s.width, s.heads * s.head_dim)
        expected[at + "mlp.gate_proj.weight"] = expected[at + "mlp.up_proj.weight"] = (None, s.width)
        expected[at + "mlp.down_proj.weight"] = (s.width, None)
        expected[at + "input_layernorm.weight"] = expected[at + "post_attention_layernorm.weight"] = (s.width,)
    if not s.tied:
        expected["lm_head.weight"] = (None, s.width)
    for name, size in expected.items():
        got = model.weights[name].shape if name in model.weights else None
        if got is None or len(got) != len(size) or any(b not in (None, a) for a, b in zip(got, size, strict=True)):
            raise ModelError(f"{folder}: {name} has shape {got}, its config.json says {size}; the folder is damaged")


_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}


def read_safetensors(file: Path) -> dict[str, Floats]:
    """Every tensor of a safetensors file as float32; float32, float16, bfloat16 and float64 are read."""
    raw = file.read_bytes()
    try:
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size])
        header.pop("__metadata__", None)
        return {name: _tensor(raw, 8 + size, entry) for name, entry in header.items()}
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{file} is not a safetensors file that the fake backend can read: {error!r}") from error


def _tensor(raw: bytes, base: int, entry: dict[str, Any]) -> Floats:
    begin, end = entry["data_offsets"]
    flat = np.frombuffer(raw[base + begin : base + end], dtype=_DTYPES[entry["dtype"]])
    if entry["dtype"] == "BF16":  # the upper half of a float32
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    return flat.astype(np.float32).reshape(entry["shape"])
