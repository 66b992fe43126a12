"""Files as other tools write them, with vectors that the tests know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

WIDTH = 16


def vectors(*layers: int, seed: int = 0) -> dict[int, np.ndarray]:
    """Random vectors by layer, of lengths that differ."""
    rng = np.random.default_rng(seed)
    return {layer: (rng.normal(size=WIDTH) * (layer + 1) * 3).astype(np.float32) for layer in layers}


def gguf(path: Path, found: dict[str, np.ndarray], *, architecture: str = "controlvector", **texts: str) -> Path:
    """As repeng and EasySteer write it."""
    writer = GGUFWriter(path, architecture)
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(found))
    writer.add_float32("controlvector.explained", 0.5)
    writer.add_array("controlvector.words", ["a", "b"])
    writer.add_array("controlvector.numbers", [1, 2, 3])
    for key, text in texts.items():
        writer.add_string(f"controlvector.{key}", text)
    for name, vector in found.items():
        writer.add_tensor(name, vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def torch_file(path: Path, content: Any) -> Path:
    import torch

    torch.save(content, path)
    return path


def tensors(found: dict[int, np.ndarray]) -> dict[int, Any]:
    import torch

    return {layer: torch.from_numpy(vector) for layer, vector in found.items()}
