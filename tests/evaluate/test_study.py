"""The study's pictures are pictures, and its neighbours are neighbours."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

import steerguard as sg
import tiny
from steerguard.evaluate.study import beside
from steerguard.evaluate.study_pictures import pictures

HALF: dict[str, Any] = {"mean": 50.0, "low": 40.0, "high": 60.0, "n": 24, "unscored": 0}
FIGURES: dict[str, Any] = {
    "traits": {
        "honesty": {
            "positions": {"aligned": {"trait": HALF}, "StTP all": {"trait": HALF, "recovered": HALF}},
            "neighbours": {"StTP": {"itself": {"recovered": HALF, "coherence": 99, "coherent": True},
                                    "StTP(30) at layer 4 <&>": {"recovered": None, "coherence": 9, "coherent": False}}},
        }
    },
    "cards": {"honesty StTP": {"details": {"controls.arm.guard.trait": HALF, "controls.arm.random-1.trait": HALF}}},
}  # fmt: skip


def test_every_picture_is_sound_and_says_what_it_shows() -> None:
    found = pictures(FIGURES)
    assert set(found) == {"honesty-positions", "honesty-neighbours", "honesty-StTP-controls"}
    for picture in found.values():
        root = ElementTree.fromstring(picture)
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.attrib["aria-label"]
    text = "".join(ElementTree.fromstring(found["honesty-neighbours"]).itertext())
    assert "StTP, as chosen" in text and "StTP(30) at layer 4 <&>" in text and "unscored" in text


def test_the_documents_pictures_are_sound() -> None:
    folder = Path(__file__).parents[2] / "docs" / "study"
    text = (folder.parent / "study.md").read_text(encoding="utf-8")
    drawn = sorted(path.name for path in folder.glob("*.svg"))
    assert drawn and all(f"study/{name})" in text for name in drawn)
    for name in drawn:
        ElementTree.fromstring((folder / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize(("strength", "others"), [(12.0, {6.0, 18.0}), (0.0, {6.0}), (7.5, set())])
def test_neighbours_are_one_step_away(model: sg.Backend, strength: float, others: set[float]) -> None:
    probes: Any = {layer: tiny.probe(layer, 48) for layer in range(4)}
    guard: Any = SimpleNamespace(layers=(2,), rule=sg.StTP(strength))
    found = beside(guard, probes)
    assert {setting.layers[0] for setting in found if setting.rule.strength == strength} == {1, 3}
    assert {setting.rule.strength for setting in found if setting.layers == (2,)} == others
