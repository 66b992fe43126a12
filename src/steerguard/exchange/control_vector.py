"""Control vectors: a guard as llama.cpp can run it.

A control vector is one vector per layer that is added to every token, of the prompt and of the answer, at scale 1 as it
stands. So a guard can be written as one exactly if each of its gates is the same constant for every token, whatever the
projection; every other guard is refused.

Which layer is which, as read in llama.cpp's source (2024 to late 2026):

- `common_control_vector_load_one` (common/common.cpp) takes F32 tensors of one dimension named `direction.N`, refuses
  N = 0, and stores N at offset `n_embd * (N - 1)`.
- `llama_adapter_cvec::apply` (src/llama-adapter.cpp) fills the tensor of layer `il` from offset `n_embd * (il - 1)`, for
  il from 1: the two "- 1" cancel, and "there's never a tensor for layer 0".
- `build_cvec(cur, il)` (src/models/*.cpp) adds it after the block's last residual addition, to `l_out` of block il, where
  il counts from 0.

So our layer L, the output of block L counted from 0, is `direction.L`, with no offset, and layer 0 cannot be written.
repeng's directions are numbered in the same way. `tests/exchange/test_llama_cpp.py` runs both: a tiny Llama in llama.cpp
(build 11739) under an exported file has the logits of the same model under the guard, and other ones if N is off by one.
"""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import numpy as np

from steerguard import files
from steerguard.errors import InputError
from steerguard.guard import Guard
from steerguard.probe import Floats

ARCHITECTURE = "controlvector"
"""What `general.architecture` says in a file of control vectors."""
_WAY_OUT = "use the hf or the vllm backend, or export a guard whose rule is SwFC"


def control_vector(guard: Guard) -> dict[int, Floats]:
    """What is added to the residual of every token, by layer: `[d]` float32, in units of the residual stream.

    Raises:
        InputError: the guard is no control vector: its rule depends on the projection, it guards the answer only, it steers
            layer 0, or it moves nothing.
    """
    name = f"guard {guard.name!r} cannot be written as a control vector"
    if guard.positions != "all":
        raise InputError(
            f"{name}: it acts on positions {guard.positions!r} only, a control vector is added to every token, of the prompt "
            "too; build it with positions 'all'"
        )
    vectors: dict[int, Floats] = {}
    for probe, gate in guard.gates():
        if gate.knee != -math.inf or gate.above_b != 0:
            raise InputError(
                f"{name}: {guard.rule} moves a token by how far it stands on the direction, a control vector has no gate and "
                f"adds the same to every token; {_WAY_OUT}"
            )
        if probe.layer == 0:
            raise InputError(
                f"{name}: it steers layer 0, and llama.cpp has no control vector for the output of its first block; "
                "choose a layer from 1 on"
            )
        vectors[probe.layer] = gate.row()[3] * probe.v
        if not vectors[probe.layer].any():
            raise InputError(f"{name}: {guard.rule} moves nothing on layer {probe.layer}; {_WAY_OUT}, at a strength but 0")
    return vectors


def export_gguf(guard: Guard, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write a guard as a llama.cpp control vector, whole or not at all; returns the file's path.

    `llama-server --control-vector FILE` then does what the guard does, on every token, with no proof and no check of the
    model beyond its width. The guard's digest is kept in the file, for people.

    Raises:
        InputError: see `control_vector`; or the package gguf is not installed; or the file cannot be written.
        OutputExists: the file exists and `overwrite` is not set.
    """
    files.refuse_existing(path, overwrite=overwrite)
    vectors = control_vector(guard)
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise InputError('writing GGUF needs the package gguf: pip install "steerguard[gguf]"') from error
    with tempfile.TemporaryDirectory(prefix="steerguard-") as folder:
        whole = Path(folder) / "vector.gguf"
        writer = GGUFWriter(whole, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", guard.model.architecture)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(vectors))
        writer.add_string(f"{ARCHITECTURE}.steerguard.guard", guard.name)
        writer.add_string(f"{ARCHITECTURE}.steerguard.rule", str(guard.rule))
        writer.add_string(f"{ARCHITECTURE}.steerguard.digest", guard.digest)
        for layer, vector in vectors.items():
            writer.add_tensor(f"direction.{layer}", np.ascontiguousarray(vector))
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        data = whole.read_bytes()
    return files.write_atomically(path, data, overwrite=overwrite)


__all__ = ["control_vector", "export_gguf"]
