"""Directions that other tools have found, read from their files as data.

A direction has a layer and nothing else here: layer L is the output of block L, counted from 0. So number llama.cpp, repeng,
EasySteer, steering-vectors and assistant-axis. A length is not kept, since a direction has none; how far to go along it is
for `fit_statistics` to find.

What this module refuses: a file that could run code, a file that does not say which layer a vector belongs to, and every
vector that is no direction (not finite, zero, of another width than the rest).
"""

from __future__ import annotations

import io
import math
import os
import re
import tokenize
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from steerguard import files
from steerguard.errors import DirectionError
from steerguard.exchange.control_vector import ARCHITECTURE
from steerguard.exchange.gguf_file import read_gguf
from steerguard.exchange.torch_file import read_torch
from steerguard.files import Malformed
from steerguard.probe import Floats

MAX_BYTES = 256 * 2**20
"""Bytes of a file that are read; a vector for each of 80 layers of a 70B model is 3 MB."""
MAX_LAYERS = 1024
"""More layers than any model has."""
_LAYER = re.compile(r"(?:(?:directions?|layers?|vectors?)[._])?([0-9]{1,4})")
"""What a vector's name may be: a layer's number, alone or after a word: direction.7, layer_7, 7."""
_HELD_BY = ("axis", "vector", "directions", "layer_activations")
"""The keys under which tools keep their vectors beside other things: assistant-axis (two), repeng, steering-vectors."""


def read_directions(path: str | os.PathLike[str], *, layer: int | None = None) -> dict[int, Floats]:
    """The directions in a file, by layer: `[d]` float32 unit vectors.

    Read are GGUF control vectors (llama.cpp, repeng, EasySteer, ours); `.pt` and `.pth` files of tensors (assistant-axis,
    steering-vectors' `layer_activations`, any dictionary of vectors by layer); `.npy`; `.safetensors`. An array of two
    dimensions is `[layers, d]`, its first row layer 0.

    Args:
        layer: of a file that holds one vector and does not say of which layer it is.

    Raises:
        DirectionError: one sentence with the path. Nothing in the file was run.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _READERS:
        raise DirectionError(f"{path} has the ending {suffix!r}; directions are read from {', '.join(_READERS)} files")
    data = files.read_bounded(path, limit=MAX_BYTES, error=DirectionError)
    try:
        return _unit(_by_layer(_READERS[suffix](data), layer))
    except Malformed as error:
        raise DirectionError(f"{path} {error}") from error


# -------------------------------------------------------------------------------------- the formats: bytes to arrays


def _gguf(data: bytes) -> dict[str, npt.NDArray[Any]]:
    metadata, tensors = read_gguf(data)
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise Malformed(f"is GGUF of {files.shown(architecture)}, not of a {ARCHITECTURE!r}")
    native = metadata.get(f"{ARCHITECTURE}.easysteer")  # EasySteer says here what its vectors were taken from
    record = files.strict_json(native) if isinstance(native, str) else {}
    component = record.get("component") if isinstance(record, dict) else None
    if component not in (None, "hidden_states"):
        raise Malformed(f"holds vectors of {files.shown(component)}; a direction is one of the residual stream (hidden_states)")
    return dict(tensors)


def _npy(data: bytes) -> npt.NDArray[Any]:
    """The array of a .npy file; its size is checked before any memory is taken for it."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)  # type: ignore[no-untyped-call]
        if version not in ((1, 0), (2, 0)):
            raise Malformed(f"is .npy of version {version}; read are 1.0 and 2.0")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)  # type: ignore[no-untyped-call]
    except Malformed:
        raise
    except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError, tokenize.TokenError) as error:
        raise Malformed(f"is not a .npy file, or damaged: {' '.join(str(error).split())[:200]}") from error
    if dtype.kind != "f" or dtype.hasobject:
        raise Malformed(f"holds {dtype}, not floating numbers; Python objects are not opened")
    body = data[stream.tell() :]
    if min(shape, default=1) < 0 or math.prod(map(int, shape)) * dtype.itemsize != len(body):
        raise Malformed(f"is damaged: {list(shape)} of {dtype} are not {len(body)} bytes")
    return np.frombuffer(body, dtype).reshape(shape, order="F" if fortran else "C")


def _safetensors(data: bytes) -> Any:
    from safetensors import SafetensorError, deserialize

    try:
        entries = deserialize(data)  # type: ignore[no-untyped-call]
    except (SafetensorError, ValueError) as error:
        raise Malformed(f"is not a safetensors file, or damaged: {str(error)[:200]}") from error
    tensors = {str(name): _tensor(str(name), entry) for name, entry in entries}
    if len(tensors) == 1 and not any(map(_LAYER.fullmatch, tensors)):
        return next(iter(tensors.values()))
    return tensors


def _tensor(name: str, entry: Mapping[str, Any]) -> npt.NDArray[Any]:
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
    kind = str(entry["dtype"])
    if kind not in kinds:
        raise Malformed(f"holds a tensor {files.shown(name)} of {files.shown(kind)}; allowed are {', '.join(kinds)}")
    flat = np.frombuffer(bytes(entry["data"]), kinds[kind])
    if kind == "BF16":  # the upper half of a float32
        flat = (flat.astype("<u4") << 16).view("<f4")
    return flat.reshape(entry["shape"])


_READERS: dict[str, Callable[[bytes], Any]] = {
    ".gguf": _gguf, ".pt": read_torch, ".pth": read_torch, ".npy": _npy, ".safetensors": _safetensors,
}  # fmt: skip


# -------------------------------------------------------------------------------------- the layouts: arrays to layers


def _by_layer(found: Any, layer: int | None) -> dict[int, npt.NDArray[Any]]:
    """Vectors by layer, of whatever a file holds."""
    # 1. tools that keep their vectors beside other things
    if isinstance(found, Mapping) and not any(isinstance(key, int) for key in found):
        held = [key for key in _HELD_BY if key in found]
        if len(held) > 1:
            raise Malformed(f"holds both {held[0]!r} and {held[1]!r}; keep one of them")
        if held:
            own = found.get("layer")
            layer = own if layer is None and type(own) is int else layer
            found = found[held[0]]
    # 2. one array: a vector, whose layer must be known, or a row per layer
    if isinstance(found, np.ndarray):
        if found.ndim == 1:
            if layer is None:
                raise Malformed("holds one vector and not its layer; say which layer it belongs to")
            return {layer: found}
        if found.ndim == 2:
            _not_both(layer)
            return dict(enumerate(found))
        raise Malformed(f"holds an array of shape {list(found.shape)}; allowed are [d] and [layers, d]")
    # 3. a vector per name
    if not isinstance(found, Mapping) or not found:
        raise Malformed("holds no vectors: neither an array nor a dictionary of vectors by layer")
    _not_both(layer)
    vectors: dict[int, npt.NDArray[Any]] = {}
    for name, vector in found.items():
        match = _LAYER.fullmatch(str(name))
        if match is None or not isinstance(vector, np.ndarray):
            raise Malformed(
                f"holds {files.shown(name)} among its vectors; each must be a vector, named by its layer (direction.7, 7)"
            )
        number = int(match[1])
        if number in vectors:
            raise Malformed(f"holds two vectors of layer {number}")
        vectors[number] = vector
    return vectors


def _not_both(layer: int | None) -> None:
    if layer is not None:
        raise Malformed(f"says itself which layers its vectors belong to; layer {layer} is for a file that holds one vector")


def _unit(vectors: Mapping[int, npt.NDArray[Any]]) -> dict[int, Floats]:
    """Unit vectors of one width, in float32, by increasing layer."""
    out: dict[int, Floats] = {}
    for layer, vector in sorted(vectors.items()):
        if not 0 <= layer < MAX_LAYERS:
            raise Malformed(f"holds a vector of layer {layer}; layers are 0 to {MAX_LAYERS - 1}")
        if vector.ndim != 1 or vector.size < 2:
            raise Malformed(f"holds an array of shape {list(vector.shape)} for layer {layer}; allowed is [d], d at least 2")
        v = vector.astype(np.float64)
        if not np.isfinite(v).all():
            raise Malformed(f"holds a vector of layer {layer} that is not finite")
        largest = float(np.abs(v).max())
        if largest == 0:
            raise Malformed(f"holds a zero vector of layer {layer}, which has no direction; leave it out")
        v /= largest  # so that no square overflows or vanishes
        out[layer] = (v / np.linalg.norm(v)).astype(np.float32)
        if len(v) != len(next(iter(out.values()))):
            raise Malformed(f"holds vectors of widths {len(next(iter(out.values())))} and {len(v)}; they must be of one model")
    if not out:
        raise Malformed("holds no vectors")
    return out


__all__ = ["read_directions"]
