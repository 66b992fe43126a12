"""The bundled trait `honesty`: its size, its balance, and that every scenario says what a judge is to check."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations
from statistics import median
from typing import get_args

import pytest

import steerguard as sg
from steerguard.traits import BUNDLED, Scenario, Split, normalised

HONESTY = sg.trait("honesty")
SIZES = {"train": 50, "select": 40, "test": 112}
CATEGORIES = ["sales", "health", "money", "self", "incidents", "disinformation", "school", "news"]
ALL = [s for split in get_args(Split) for s in HONESTY.split(split)]
FIGURE = re.compile(r"\d{3,}|\d+[.,:]\d+")
"""Figures that only a fact has: years, sums, times. Small numbers also stand in instructions."""


def texts(s: Scenario) -> tuple[str, ...]:
    return (s.positive, s.negative, *s.turns, *s.must, *s.must_not)


def test_counts() -> None:
    assert {split: len(HONESTY.split(split)) for split in get_args(Split)} == SIZES
    assert Counter(s.category for s in HONESTY.test) == dict.fromkeys(CATEGORIES, 14)
    assert Counter(s.category for s in HONESTY.select) == dict.fromkeys(CATEGORIES, 5)
    assert set(Counter(s.category for s in HONESTY.train).values()) == {6, 7}
    assert (HONESTY.scorer, HONESTY.licence) == ("judge", "Apache-2.0")


@pytest.mark.parametrize("split", get_args(Split))
def test_ids_say_where_a_scenario_stands(split: Split) -> None:
    seen: Counter[str] = Counter()
    for s in HONESTY.split(split):
        seen[s.category] += 1
        assert s.id == f"honesty-{split}-{s.category}-{seen[s.category]:02d}"


def test_every_scenario_has_its_own_prompts_and_its_own_question() -> None:
    prompts = [normalised(text) for s in ALL for text in (s.positive, s.negative)]
    questions = [normalised("\n".join(s.turns[::2])) for s in ALL]
    assert len(set(prompts)) == len(prompts) == 2 * sum(SIZES.values())
    assert len(set(questions)) == len(questions)


def test_every_scenario_says_what_a_judge_is_to_check() -> None:
    for s in ALL:
        assert 1 <= len(s.must) <= 3, s.id
        assert 1 <= len(s.must_not) <= 3, s.id
        assert s.reply is None


@pytest.mark.parametrize("split", get_args(Split))
def test_length_does_not_tell_the_poles_apart(split: Split) -> None:
    ratios = [len(s.negative) / len(s.positive) for s in HONESTY.split(split)]
    assert 0.9 < median(ratios) < 1.1
    assert all(0.7 < ratio < 1.4 for ratio in ratios)


@pytest.mark.parametrize("split", get_args(Split))
def test_a_fifth_and_more_have_several_turns(split: Split) -> None:
    turns = [len(s.turns) for s in HONESTY.split(split)]
    assert sum(n > 1 for n in turns) >= len(turns) / 5
    assert max(turns) >= 5


def test_both_poles_know_the_facts() -> None:
    """A figure that an answer must hold stands in both system prompts, if it stands in one."""
    for s in ALL:
        for figure in FIGURE.findall(" ".join(s.must)):
            assert (figure in s.positive) == (figure in s.negative), (s.id, figure)


def test_splits_share_no_name() -> None:
    """People, firms and products of two words."""
    named = re.compile(r"(?<=[a-z,;:] )[A-Z][a-z]+ [A-Z][a-z]+")
    where: dict[str, set[str]] = {}
    for split in get_args(Split):
        for s in HONESTY.split(split):
            for name in named.findall(" ".join(texts(s))):
                where.setdefault(name, set()).add(split)
    assert len(where) > 60
    assert {name for name, splits in where.items() if len(splits) > 1} == set()


@pytest.mark.parametrize(("one", "other"), list(combinations(get_args(Split), 2)))
def test_splits_share_no_sentence(one: Split, other: Split) -> None:
    def sentences(split: Split) -> set[str]:
        written = "\n".join(text for s in HONESTY.split(split) for text in (s.positive, s.negative, *s.turns))
        cut = re.split(r"[.?!]\s|\n", written)
        return {normalised(x) for x in cut if len(x.split()) >= 5}

    assert sentences(one) & sentences(other) == set()


def test_it_has_a_card() -> None:
    card = (BUNDLED / "honesty" / "README.md").read_text("utf-8")
    for number in (*SIZES.values(), sum(SIZES.values())):
        assert str(number) in card
