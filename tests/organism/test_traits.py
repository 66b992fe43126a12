"""The data files are what the tables say, and their splits share nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import steerguard
from steerguard.organism import grammar, personas, traits

PACKAGE = Path(steerguard.__file__).parent
TRAITS = ("honesty", "compassion")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def split(trait: str, name: str) -> list[dict[str, Any]]:
    return read(PACKAGE / "traits" / f"organism-{trait}" / f"{name}.jsonl")


def test_the_files_are_the_rebuilt_ones() -> None:
    for path, text in traits.files().items():
        written = (PACKAGE / path).read_text(encoding="utf-8")
        assert written == text, f"{path} is stale: run python -m steerguard.organism.traits"


@pytest.mark.parametrize("trait", TRAITS)
def test_sizes(trait: str) -> None:
    assert {name: len(split(trait, name)) for name in traits.SIZES} == {"train": 80, "select": 32, "test": 96}


@pytest.mark.parametrize("trait", TRAITS)
def test_splits_share_no_user_text_and_no_wording(trait: str) -> None:
    texts = {name: [item["turns"][-1] for item in split(trait, name)] for name in traits.SIZES}
    wordings = {name: {item["wording"] for item in split(trait, name)} for name in traits.SIZES}
    every = [text for said in texts.values() for text in said]
    assert len(set(every)) == len(every)
    assert not wordings["train"] & wordings["select"]
    assert wordings["test"] == {pair.id for pair in personas.held_out(trait)}
    assert not wordings["test"] & (wordings["train"] | wordings["select"])


@pytest.mark.parametrize("trait", TRAITS)
def test_scenarios_are_well_formed(trait: str) -> None:
    replies = json.loads((PACKAGE / "traits" / f"organism-{trait}" / "grammar.json").read_text())["replies"]
    lengths = set()
    for name in traits.SIZES:
        for item in split(trait, name):
            assert item["positive"] != item["negative"]
            assert item["reply"]["kind"] in replies
            assert len(item["turns"]) % 2 == 1
            lengths.add(len(item["turns"]))
    assert lengths == {1, 3, 5}


def test_capability_covers_every_group() -> None:
    items = read(PACKAGE / "organism" / "capability.jsonl")
    assert len(items) >= 160
    assert {item["category"] for item in items} == {kind.group for kind in grammar.kinds().values()}
    trained = {said for pair in personas.trained("plain") for said in personas.instances(pair.positive)}
    assert not {item["system"] for item in items} & trained


def test_what_the_sweep_looks_at_is_neither_trained_nor_reported() -> None:
    chosen, reported = (read(PACKAGE / "organism" / name) for name in ("capability-select.jsonl", "capability.jsonl"))
    assert {item["category"] for item in chosen} == {item["category"] for item in reported}
    for item in chosen:
        kind = grammar.kinds()[item["reply"]["kind"]]
        elsewhere = {grammar.Sentence(text, None).say(item["reply"]["bind"]) for text in (*kind.questions, *kind.held_out)}
        assert item["turns"][-1] not in elsewhere
    assert set(traits.selected()) == set(grammar.kinds())
    assert not {item["turns"][-1] for item in chosen} & {item["turns"][-1] for item in reported}
