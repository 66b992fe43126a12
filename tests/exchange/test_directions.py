"""Directions in the files of other tools: what they hold, and what is no direction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from files_of_others import WIDTH, gguf, tensors, torch_file, vectors
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from steerguard.errors import DirectionError
from steerguard.exchange import read_directions

STACK = np.stack(list(vectors(0, 1, 2, 3).values()))


def same(found: dict[int, np.ndarray], expected: dict[int, np.ndarray], tolerance: float = 1e-6) -> None:
    assert list(found) == sorted(expected)
    for layer, v in found.items():
        assert v.dtype == np.float32
        assert np.linalg.norm(v) == pytest.approx(1, abs=1e-6)
        np.testing.assert_allclose(v, expected[layer] / np.linalg.norm(expected[layer]), atol=tolerance)


def test_gguf_of_repeng_and_easysteer(tmp_path: Path) -> None:
    known = vectors(11, 2, 7)
    named = {f"direction.{layer}": vector for layer, vector in known.items()}
    same(read_directions(gguf(tmp_path / "a.gguf", named)), known)
    native = json.dumps({"version": 1, "component": "hidden_states", "metadata": None})
    same(read_directions(gguf(tmp_path / "b.GGUF", named, method="diffmean", easysteer=native)), known)
    halves = {name: vector.astype(np.float16) for name, vector in named.items()}
    same(read_directions(gguf(tmp_path / "c.gguf", halves)), known, 1e-3)
    heads = json.dumps({"version": 1, "component": "attention_heads", "metadata": None})
    with pytest.raises(DirectionError, match="attention_heads"):
        read_directions(gguf(tmp_path / "d.gguf", named, easysteer=heads))
    with pytest.raises(DirectionError, match="GGUF of 'llama'"):
        read_directions(gguf(tmp_path / "e.gguf", named, architecture="llama"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_torch_files(tmp_path: Path, dtype: torch.dtype) -> None:
    known = vectors(3, 5)
    typed = {layer: tensor.to(dtype) for layer, tensor in tensors(known).items()}
    stack = torch.from_numpy(STACK).to(dtype)
    rows, tolerance = dict(enumerate(STACK)), 1e-2
    path = tmp_path / "v.pt"
    same(read_directions(torch_file(path, typed)), known, tolerance)  # steering-vectors' layer_activations
    same(read_directions(torch_file(path, {"layer_activations": typed, "layer_type": "decoder_block"})), known, tolerance)
    same(read_directions(torch_file(path, {f"layer_{k}": v for k, v in typed.items()})), known, tolerance)
    same(read_directions(torch_file(path, stack)), rows, tolerance)
    axis = {"axis": stack, "default_mean": stack + 1, "role_mean": stack, "n_default": 1, "n_roles": 3}
    same(read_directions(torch_file(path, axis)), rows, tolerance)  # assistant-axis
    role = {"vector": stack, "type": "pos_3", "role": "pirate", "questions": [1, 2]}
    same(read_directions(torch_file(path, role)), rows, tolerance)
    one = torch_file(tmp_path / "v.pth", torch.nn.Parameter(typed[3]))
    same(read_directions(one, layer=9), {9: known[3]}, tolerance)
    same(read_directions(torch_file(path, {"vector": typed[3], "layer": 4})), {4: known[3]}, tolerance)


def test_npy(tmp_path: Path) -> None:
    path = tmp_path / "v.npy"
    for array in (STACK, STACK.astype(">f8"), np.asfortranarray(STACK), STACK.astype(np.float64)):
        np.save(path, array)
        same(read_directions(path), dict(enumerate(STACK)))
    np.save(path, STACK[1])
    same(read_directions(path, layer=0), {0: STACK[1]})


def test_safetensors(tmp_path: Path) -> None:
    path, known = tmp_path / "v.safetensors", vectors(2, 10)
    save_file({f"direction.{layer}": vector for layer, vector in known.items()}, path)
    same(read_directions(path), known)
    save_file({"7": known[2]}, path)
    same(read_directions(path), {7: known[2]})
    save_file({"7": known[2].astype(np.int32)}, path)
    with pytest.raises(DirectionError, match="'I32'"):
        read_directions(path)
    save_torch({"steering": torch.from_numpy(STACK).to(torch.bfloat16)}, path)
    same(read_directions(path), dict(enumerate(STACK)), 1e-2)


ONE = vectors(1)[1]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (ONE, "one vector and not its layer"),
        (STACK[None], r"shape \[1, 4, 16\]"),
        (np.zeros((0, WIDTH), np.float32), "holds no vectors"),
        ({}, "holds no vectors"),
        ({"mean": ONE, "std": ONE}, "'mean' among its vectors"),
        ({"layer_1": ONE, "1": ONE}, "two vectors of layer 1"),
        ({-1: ONE}, "-1 among its vectors"),
        ({True: ONE}, "True among its vectors"),
        ({1024: ONE}, "layer 1024; layers are 0 to 1023"),
        ({99999: ONE}, "99999 among its vectors"),
        ({1: ONE, 2: ONE[:5]}, "widths 16 and 5"),
        ({1: ONE[:1]}, r"shape \[1\] for layer 1"),
        ({1: STACK}, r"shape \[4, 16\] for layer 1"),
        ({1: ONE * np.float32(np.nan)}, "layer 1 that is not finite"),
        ({1: ONE * 0}, "zero vector of layer 1"),
        ({"axis": STACK, "vector": STACK}, "both 'axis' and 'vector'"),
        ({1: ONE, "note": "mine"}, "'note' among its vectors"),
        ({1: ONE.astype(np.int64)}, "1 among its vectors"),
        ("a text", "holds no vectors"),
        ([1, 2], "holds no vectors"),
    ],
)
def test_what_is_no_direction(content: Any, match: str, tmp_path: Path) -> None:
    as_torch = torch.from_numpy(content) if isinstance(content, np.ndarray) else content
    if isinstance(content, dict):
        as_torch = {key: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for key, x in content.items()}
    path = torch_file(tmp_path / "v.pt", as_torch)
    with pytest.raises(DirectionError, match=match) as told:
        read_directions(path)
    assert str(told.value).startswith(str(path))
    assert "\n" not in str(told.value)


def test_the_ends_of_float32_are_no_trouble(tmp_path: Path) -> None:
    path = tmp_path / "v.npy"
    for scale in (1e-40, 3e37):
        np.save(path, np.array([[scale, -scale, 0.0]], dtype=np.float32))
        np.testing.assert_allclose(read_directions(path)[0], [0.5**0.5, -(0.5**0.5), 0], atol=1e-3)


def test_a_layer_is_for_one_vector_only(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", STACK)
    with pytest.raises(DirectionError, match="says itself which layers"):
        read_directions(tmp_path / "v.npy", layer=2)
    with pytest.raises(DirectionError, match="says itself which layers"):
        read_directions(torch_file(tmp_path / "v.pt", tensors(vectors(1))), layer=2)
    np.save(tmp_path / "v.npy", STACK[0])
    with pytest.raises(DirectionError, match="layer -1"):
        read_directions(tmp_path / "v.npy", layer=-1)


def test_other_files_are_named_and_refused(tmp_path: Path) -> None:
    (tmp_path / "v.npz").write_bytes(b"PK")
    with pytest.raises(DirectionError, match=r"\.gguf, \.pt, \.pth, \.npy, \.safetensors"):
        read_directions(tmp_path / "v.npz")
    with pytest.raises(DirectionError, match="there is no file"):
        read_directions(tmp_path / "v.pt")
    (tmp_path / "d.pt").mkdir()
    with pytest.raises(DirectionError, match="directory|folder"):
        read_directions(tmp_path / "d.pt")
