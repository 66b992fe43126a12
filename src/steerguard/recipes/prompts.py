"""The benign prompts that a recipe names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from steerguard.errors import RecipeError
from steerguard.organism.capability import benign as organism_benign
from steerguard.prompts import conversation
from steerguard.recipes import Recipe
from steerguard.sweeping import Benign
from steerguard.traits.benign import benign as bundled_benign
from steerguard.traits.benign import read_benign

T = TypeVar("T")


def benign_of(recipe: Recipe) -> Benign | None:
    """The prompts that no guard should harm."""
    if recipe.benign == "none":
        return None
    if recipe.benign == "organism":
        found = organism_benign()
        if recipe.benign_prompts is not None and recipe.benign_prompts < len(found.prompts):
            raise RecipeError("benign: organism comes with all of its prompts; leave benign_prompts out")
        return found
    read = bundled_benign() if recipe.benign == "bundled" else read_benign(recipe.benign)
    return Benign(tuple(conversation(one.system, one.turns) for one in spread(read, recipe.benign_prompts)))


def spread(items: Sequence[T], n: int | None) -> Sequence[T]:
    """At most n of the items, evenly from beginning to end."""
    return items if n is None or n >= len(items) else [items[i * len(items) // n] for i in range(n)]
