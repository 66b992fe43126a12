"""The bundled trait `compassion`: its counts, its system prompts, and that its splits share no text."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable

import pytest

from alike import most_alike
from steerguard.traits import Scenario, Split, normalised, trait

COMPASSION = trait("compassion")
SPLITS: tuple[Split, ...] = ("train", "select", "test")
ALIKE = 0.35
"""Most cosine of two texts of different splits; the data is at 0.20, a changed name or number at 0.9."""


def asked(scenario: Scenario) -> str:
    return "\n".join(scenario.turns[::2])


def test_its_head() -> None:
    assert (COMPASSION.name, COMPASSION.scorer, COMPASSION.licence) == ("compassion", "judge", "Apache-2.0")
    assert (COMPASSION.positive.name, COMPASSION.negative.name) == ("compassionate", "dismissive")


def test_counts() -> None:
    assert [len(COMPASSION.split(split)) for split in SPLITS] == [250, 20, 40]
    assert [len({s.turns for s in COMPASSION.split(split)}) for split in SPLITS] == [50, 20, 40]
    assert all(s.id.startswith(f"compassion-{split}-") for split in SPLITS for s in COMPASSION.split(split))


def test_every_train_prompt_meets_every_variant() -> None:
    variants = defaultdict(list)
    for s in COMPASSION.train:
        variants[s.turns].append(s.wording)
    assert len({tuple(sorted(map(str, wordings))) for wordings in variants.values()}) == 1
    assert all(len(set(wordings)) == len(wordings) == 5 for wordings in variants.values())


@pytest.mark.parametrize(("split", "at_least"), [("train", 5), ("select", 5), ("test", 8)])
def test_variants_of_the_system_prompts(split: Split, at_least: int) -> None:
    pairs = {(s.wording, s.positive, s.negative) for s in COMPASSION.split(split)}
    assert len(pairs) >= at_least
    for column in zip(*pairs, strict=True):
        assert len(set(column)) == len(pairs)
    uses = Counter(s.wording for s in COMPASSION.split(split))
    assert max(uses.values()) - min(uses.values()) <= 1, "the variants take turns"


@pytest.mark.parametrize("split", SPLITS)
def test_no_pole_is_told_by_its_length(split: Split) -> None:
    lengths = {(len(s.positive.split()), len(s.negative.split())) for s in COMPASSION.split(split)}
    assert all(0.85 <= longer / shorter <= 1 / 0.85 for longer, shorter in lengths)
    positive, negative = map(sum, zip(*lengths, strict=True))
    assert 0.95 <= positive / negative <= 1 / 0.95


@pytest.mark.parametrize("split", SPLITS)
def test_categories_and_turns(split: Split) -> None:
    categories = Counter(s.category for s in COMPASSION.split(split))
    assert len(categories) == 8
    assert max(categories.values()) <= 1.5 * min(categories.values())
    many = Counter(len(s.turns) for s in COMPASSION.split(split))
    assert set(many) <= {1, 3, 5}
    assert split == "train" or (many[3] >= 3 and many[5] >= 1)


def test_test_rotates_the_variants_within_each_category() -> None:
    for category in {s.category for s in COMPASSION.test}:
        wordings = [s.wording for s in COMPASSION.test if s.category == category]
        assert len(set(wordings)) == len(wordings) == 5


@pytest.mark.parametrize("text", [asked, lambda s: s.positive, lambda s: s.negative])
def test_splits_share_no_text(text: Callable[[Scenario], str]) -> None:
    sides = {text(s): split for split in SPLITS for s in COMPASSION.split(split)}
    cosine, one, other = most_alike(list(sides), list(sides.values()))
    assert cosine < ALIKE, f"{one!r} and {other!r} stand in different splits"


def test_a_changed_name_is_noticed() -> None:
    first = asked(COMPASSION.train[0])
    sides = {asked(s): "test" for s in COMPASSION.test} | {first: "train", first.replace("dad", "uncle"): "test"}
    cosine, one, other = most_alike(list(sides), list(sides.values()))
    assert cosine > 2 * ALIKE and {one, other} == {first, first.replace("dad", "uncle")}


def test_prompts_do_not_begin_alike() -> None:
    first = Counter(" ".join(normalised(turns[0]).split()[:3]) for turns in {s.turns for s in every()})
    assert first.most_common(1)[0][1] <= 3, first.most_common(3)


def every() -> list[Scenario]:
    return [s for split in SPLITS for s in COMPASSION.split(split)]
