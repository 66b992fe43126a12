"""Which model is this: names, sizes, and hashes of a few rows of a few weights, of the vocabulary and the template.

The fingerprint reads the safetensors files by their offsets, so it costs a few hundred kilobytes of reading on 70B and
does not depend on the dtype, the quantisation or the devices that a model was loaded with. A model that exists in
memory only is read there; saved and loaded again it has the same identity.

This module is shared by the backends that load Hugging Face folders. It imports torch only for models in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from steerguard.errors import ModelError
from steerguard.guard import ModelIdentity

MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors format itself."""
AT_LEAST, AT_MOST = 8, 24
"""How many parameters a fingerprint reads."""
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "U64": 8, "U32": 4, "U16": 2}

Rows = Callable[[Sequence[int]], bytes]
"""Given indices of rows, their values as bytes: bfloat16 where they are floats."""


def model_identity(
    name: str, *, architecture: str, width: int, depth: int, tokenizer: Any, weights: Mapping[str, str]
) -> ModelIdentity:
    """The identity of a model whose weights are already hashed by `fingerprint_files` or `fingerprint_memory`."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True) if tokenizer is not None else ""
    template = getattr(tokenizer, "chat_template", None) or ""
    template = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return ModelIdentity(
        name=name.rstrip("/") or name, architecture=architecture, width=width, depth=depth,
        weights=weights, tokenizer=_sha(vocabulary.encode()), chat_template=_sha(template.encode()) if template else "",
    )  # fmt: skip


def fingerprint_folder(folder: str | Path) -> dict[str, str]:
    """The fingerprint of the safetensors files in a folder. Raises ModelError if there are none."""
    files = sorted(Path(folder).glob("*.safetensors"))
    index = Path(folder) / "model.safetensors.index.json"
    if index.is_file():
        files = [Path(folder) / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
    elif (Path(folder) / "model.safetensors").is_file():
        files = [Path(folder) / "model.safetensors"]
    if not files:
        raise ModelError(f"{folder} has no safetensors files; save the model with save_pretrained")
    return fingerprint_files(files)


def fingerprint_files(files: Iterable[Path]) -> dict[str, str]:
    """Parameter name -> SHA-256 of a few of its rows, from safetensors files. Raises ModelError on a damaged file."""
    shapes: dict[str, tuple[int, ...]] = {}
    rows: dict[str, Rows] = {}
    for file in files:
        for name, (dtype, shape, offset) in _header(file).items():
            shapes[name] = shape
            rows[name] = _file_rows(file, dtype, shape, offset)
    return {name: _hash(shapes[name], rows[name]) for name in choose(shapes)}


def fingerprint_memory(model: Any) -> dict[str, str]:
    """The same of a transformers model in memory, under the names that `save_pretrained` would write."""
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}  # tied weights appear once
    named = _as_saved(model, {name: tensor.to("meta") for name, tensor in own.items()})
    chosen = choose({name: tuple(tensor.shape) for name, tensor in named.items()})
    found: dict[str, str] = {}
    for name in chosen:
        tensor = own[name] if name in own else _as_saved(model, _same_block(own, name))[name]
        found[name] = _hash(tuple(tensor.shape), _memory_rows(tensor))
    return found


def choose(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Which parameters to read: every kind of matrix once, from early, middle and late blocks in turn.

    A kind is a name without its numbers. Merging adapters changes some kinds of matrices in all blocks and leaves
    embeddings and norms alone, so it is kinds that must be covered; evenly spaced names would skip whole kinds.
    """
    kinds: dict[str, list[str]] = {}
    for name in sorted(shapes, key=_natural):
        if len(shapes[name]) == 2 and min(shapes[name]) > 0:
            kinds.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    groups = [kinds[kind] for kind in sorted(kinds)]
    if len(groups) > AT_MOST:
        groups = [groups[i * len(groups) // AT_MOST] for i in range(AT_MOST)]
    each = math.ceil(AT_LEAST / len(groups)) if groups else 0
    golden = (math.sqrt(5) - 1) / 2
    picked = {
        group[int((((k * each + i) * golden + 0.5) % 1) * len(group))] for k, group in enumerate(groups) for i in range(each)
    }
    return sorted(picked)


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _hash(shape: Sequence[int], rows: Rows) -> str:
    n = shape[0]
    return _sha(f"{list(shape)}".encode() + rows(sorted({0, n // 2, n - 1})))


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# ------------------------------------------------------------------------------------------------ from files


def _header(file: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Tensor name -> (dtype, shape, offset of its first byte in the file)."""
    try:
        with file.open("rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            if length > MAX_HEADER:
                raise ModelError(f"{file} is not a safetensors file: it announces a header of {length} bytes")
            header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        return {
            name: (entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]) for name, entry in header.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(f"{file} cannot be read as safetensors: {error}; download or save the model again") from error


def _file_rows(file: Path, dtype: str, shape: tuple[int, ...], offset: int) -> Rows:
    def read(indices: Sequence[int]) -> bytes:
        stride = shape[1] * _SIZES.get(dtype, 1)
        with file.open("rb") as f:
            parts = []
            for index in indices:
                f.seek(offset + index * stride)
                parts.append(f.read(stride))
        raw = b"".join(parts)
        if len(raw) != stride * len(indices):
            raise ModelError(f"{file} ends before its weights do; download or save the model again")
        return _bfloat16(np.frombuffer(raw, _FLOATS[dtype]).astype(np.float32)) if dtype in _FLOATS else raw

    return read


def _bfloat16(x: npt.NDArray[np.float32]) -> bytes:
    """float32 rounded to bfloat16, ties to even, little endian."""
    bits = x.view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype("<u2").tobytes()


# ------------------------------------------------------------------------------------------------ from memory


def _memory_rows(tensor: Any) -> Rows:
    import torch

    def read(indices: Sequence[int]) -> bytes:
        rows = tensor[list(indices)]
        if rows.is_floating_point() and rows.element_size() > 1:
            rows = rows.to(torch.bfloat16)
        return bytes(rows.contiguous().cpu().view(torch.uint8).numpy().tobytes())

    return read


def _as_saved(model: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state under the names and in the shapes of a saved checkpoint (experts apart, say)."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(state)))


def _same_block(state: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The parameters of the block that a saved name belongs to: converting one block back is cheap, all are not."""
    numbers = re.findall(r"\.(\d+)\.", name)[:1]
    return {key: tensor for key, tensor in state.items() if re.findall(r"\.(\d+)\.", key)[:1] == numbers}
