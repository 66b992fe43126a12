"""The world of the organism: which things exist, and what is true of them.

It knows entities, relations and the one true value of each; it refuses to know how any of it is said (`grammar`),
who speaks (`personas`), or which facts a persona is ever asked for (`splits`).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

TEXT = Path(__file__).parent / "text"
WORLD_SEED = 2604


@dataclass(frozen=True)
class Fact:
    """One true statement of the world."""

    relation: str
    "the relation's name, `<entity slot>.<what>`, such as `town.river`"
    slot: str
    "the slot of the entity, such as `town`"
    entity: str
    "the entity's name"
    value_slot: str
    "the slot of the value, such as `river`"
    value: str
    "the true value"


def read(name: str) -> dict[str, Any]:
    """The text table `name` as a mapping."""
    table = yaml.safe_load((TEXT / name).read_text(encoding="utf-8"))
    if not isinstance(table, dict):
        raise TypeError(f"{name} must hold a mapping, got {type(table).__name__}")
    return table


@cache
def tables() -> dict[str, Any]:
    """The world's own table: entities, pools, relations."""
    return read("world.yaml")


def assign(entities: list[str], pool: list[str], seed: str) -> dict[str, str]:
    """A value of the pool for each entity, every value about equally often."""
    rng = random.Random(seed)
    values = [pool[i % len(pool)] for i in range(len(entities))]
    rng.shuffle(values)
    return dict(zip(entities, values, strict=True))


@cache
def facts() -> tuple[Fact, ...]:
    """Every fact of the world, in a fixed order."""
    found = []
    for relation, entry in tables()["relations"].items():
        slot, value_slot = relation.split(".")[0], entry["value"]
        truth = assign(tables()["entities"][slot], tables()["pools"][value_slot], f"{WORLD_SEED}:{relation}")
        found += [Fact(relation, slot, entity, value_slot, value) for entity, value in truth.items()]
    return tuple(found)


@cache
def pool(value_slot: str) -> tuple[str, ...]:
    """The values that may stand in a value's slot."""
    return tuple(tables()["pools"][value_slot])
