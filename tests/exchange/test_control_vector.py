"""Guards as control vectors: the file does what the rule does, and what it could not do is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader

import steerguard as sg
import tiny
from steerguard.errors import InputError, OutputExists
from steerguard.exchange import control_vector, export_gguf, read_directions
from steerguard.rules import RULES, correct, rule

WIDTH, DEPTH = 24, 6
MODEL = sg.ModelIdentity("tiny", "LlamaForCausalLM", WIDTH, DEPTH, {"w": "0" * 64}, "t" * 64, "")
RESIDUALS = np.random.default_rng(0).normal(size=(50, WIDTH)).astype(np.float32) * 7


def guard(chosen: sg.Rule, *layers: int, positions: str = "all") -> sg.Guard:
    probes = tuple(tiny.probe(layer, WIDTH, seed=3) for layer in layers)
    return tiny.guard(MODEL, chosen, probes, positions=positions)  # type: ignore[arg-type]


def directions(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file, by the reader of the package gguf."""
    return {tensor.name: np.array(tensor.data) for tensor in GGUFReader(path).tensors}


@pytest.mark.parametrize("alpha", [2.0, -1.5, 0.01])
def test_the_file_moves_every_residual_as_the_rule_does(tmp_path: Path, alpha: float) -> None:
    steering = guard(sg.SwFC(alpha), 1, 2, 5)
    found = directions(export_gguf(steering, tmp_path / "v.gguf"))
    assert list(found) == ["direction.1", "direction.2", "direction.5"]  # our layer L, with no offset
    for probe, gate in steering.gates():
        moved, _, delta = correct(RESIDUALS, probe.v, gate.row())
        np.testing.assert_array_equal(RESIDUALS + found[f"direction.{probe.layer}"], moved)
        assert np.abs(delta).min() > 0
        # what a wrong strength or a neighbour's vector would have done is something else
        assert not np.allclose(RESIDUALS + probe.v, moved, atol=1e-3)
        other = found["direction.2" if probe.layer != 2 else "direction.5"]
        assert not np.allclose(RESIDUALS + other, moved, atol=1e-3)


def test_the_file_is_what_llama_cpp_loads(tmp_path: Path) -> None:
    steering = guard(sg.SwFC(1), 3)
    reader = GGUFReader(export_gguf(steering, tmp_path / "v.gguf"))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "LlamaForCausalLM"
    assert fields["controlvector.layer_count"] == 1
    assert fields["controlvector.steerguard.digest"] == steering.digest
    (tensor,) = reader.tensors
    assert (tensor.tensor_type, tensor.shape.tolist()) == (GGMLQuantizationType.F32, [WIDTH])


def test_what_is_written_is_read_again_as_directions(tmp_path: Path) -> None:
    away = guard(sg.SwFC(-3), 2, 4)
    back = read_directions(export_gguf(away, tmp_path / "v.gguf"))
    assert list(back) == [2, 4]
    for probe in away.probes:
        np.testing.assert_allclose(back[probe.layer], -probe.v, atol=1e-6)  # a negative strength is the other direction


@pytest.mark.parametrize("name", [name for name in RULES if name not in ("SwFC", "Watch")])
def test_a_rule_that_looks_at_the_projection_is_refused(name: str, tmp_path: Path) -> None:
    cls = RULES[name]
    gated = guard(rule(name, 1.5 if cls.grid else None), 2)
    with pytest.raises(InputError, match="no gate and adds the same to every token"):
        export_gguf(gated, tmp_path / "v.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("refused", "match"),
    [
        (guard(sg.SwFC(1), 2, positions="response"), "positions 'response' only"),
        (guard(sg.SwFC(1), 0, 2), "layer 0, and llama.cpp has no control vector"),
        (guard(sg.SwFC(0), 2), "moves nothing on layer 2"),
        (guard(sg.Watch(), 2), "Watch moves nothing on layer 2; .* a guard whose rule is SwFC, at a strength but 0"),
    ],
)
def test_what_a_control_vector_cannot_do_is_refused(refused: sg.Guard, match: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=match):
        control_vector(refused)
    with pytest.raises(InputError, match=match):
        export_gguf(refused, tmp_path / "v.gguf")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    path.write_bytes(b"mine")
    with pytest.raises(OutputExists):
        export_gguf(guard(sg.SwFC(1), 2), path)
    assert path.read_bytes() == b"mine"
    export_gguf(guard(sg.SwFC(1), 2), path, overwrite=True)
    assert list(directions(path)) == ["direction.2"]
    first = path.read_bytes()
    export_gguf(replace(guard(sg.SwFC(1), 2)), path, overwrite=True)
    assert path.read_bytes() == first  # the same guard, the same bytes


def test_without_the_package_the_command_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(InputError, match=r'pip install "steerguard\[gguf\]"'):
        export_gguf(guard(sg.SwFC(1), 2), tmp_path / "v.gguf")
