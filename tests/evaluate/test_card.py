"""Cards: verdicts by hand, files that are refused, the page's walls, and the gate."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))

from elements import Tree, squeezed
from made_card import BAD, GOOD, SUBJECT, UNSURE, card

from steerguard.errors import InputError, OutputExists, ResultError
from steerguard.evaluate import card_file, card_page
from steerguard.evaluate.card import Card
from steerguard.evaluate.card_markdown import markdown
from steerguard.evaluate.gate import failures, read_demands
from steerguard.evaluate.results import Paired, as_json
from steerguard.evaluate.section import Limit, Verdict
from steerguard.evaluate.sections import figure_names
from steerguard.evaluate.wording import number
from steerguard.metrics import Interval

HOSTILE = "</td></table></style><script>alert(1)</script><img src=http://127.0.0.1:9/x onerror=alert(1)>{{7*7}}|`*"


# ------------------------------------------------------------------------------------------------ verdicts


@pytest.mark.parametrize(
    ("sense", "low", "high", "n", "verdict"),
    [
        ("at most", 0.02, 0.05, 50, "within"), ("at most", 0.02, 0.1, 50, "within"), ("at most", 0.05, 0.12, 50, "undecided"),
        ("at most", 0.11, 0.2, 50, "over"), ("at most", 0.11, 0.2, 7, "undecided"), ("at most", None, None, 1, "undecided"),
        ("at least", 0.2, 0.3, 50, "within"), ("at least", 0.05, 0.3, 50, "undecided"), ("at least", 0.0, 0.09, 50, "over"),
        ("not below", 0.0, 0.09, 50, "over"), ("not below", 0.05, 0.3, 50, "within"), ("not below", 0.2, 0.3, 50, "within"),
    ],
)  # fmt: skip
def test_a_limit_against_an_interval(sense: Any, low: float | None, high: float | None, n: int, verdict: Verdict) -> None:
    mean = 0.1 if low is None or high is None else (low + high) / 2
    assert Limit(sense, 0.1, "ours").verdict(Interval(mean, low, high, n)) == verdict
    assert Limit(sense, 0.1, "ours").verdict(None) == "missing"


def test_a_change_is_held_where_a_change_is_limited() -> None:
    lost = {"trait.when_aligned": Paired(Interval(96, 93, 98, 96), Interval(80, 76, 84, 96), Interval(-16, -20, -12, 96))}
    row = card(lost).row("trait.when_aligned")
    assert row is not None and row.verdict == "over" and row.held is not None and row.held.mean == -16


def test_the_worst_stands_on_top() -> None:
    good, unsure, bad = card(), card(UNSURE), card(BAD)
    assert (good.light, unsure.light, bad.light) == ("green", "amber", "red")
    assert good.verdict == "All 6 limits that were measured are kept. 1 figure was not measured."
    assert unsure.verdict.startswith("No limit is exceeded, but 1 is not decided: KL of the next token")
    assert bad.verdict.startswith("Do not deploy as it is: KL of the next token")
    assert "the limit is at most 0.1 nats per token" in bad.verdict
    both = card({**BAD, "trait.recovered": Interval(3, -2, 8, 96)})
    assert both.verdict.startswith("Do not deploy as it is: share of the gap brought back is 3") and "and 1 more" in both.verdict


def test_nothing_measured_is_not_green() -> None:
    found = card({"trait.recovered": None})
    assert found.light == "grey" and found.verdict.startswith("Nothing can be said for this guard")
    assert replace(card(), sections=()).light == "grey"


def test_figures_have_the_digits_that_mean_something() -> None:
    values = (0.0, 0.0421, 0.21, 1.0, 3.14159, 12.345, 99.96, 1234.6, -0.05, None)
    assert [number(value) for value in values] == [
        "0.0", "0.0421", "0.210", "1.00", "3.14", "12.3", "100.0", "1,235", "−0.0500", "not measured",
    ]  # fmt: skip
    assert number(2.0, signed=True) == "+2.00"


# ------------------------------------------------------------------------------------------------ files


def test_a_card_comes_back_as_it_was(tmp_path: Path) -> None:
    made = card(UNSURE)
    path = card_file.write(made, tmp_path / "card.json")
    assert card_file.read(path) == made
    with pytest.raises(OutputExists):
        card_file.write(made, path)


def broken(change: Any) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(json.dumps({"schema": 1, **as_json(card())}))
    change(record)
    return record


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda r: r.update(schema=2), "reads 1"), (lambda r: r.pop("schema"), "no card"),
        (lambda r: r.update(more=1), "unknown key 'more'"), (lambda r: r["subject"].pop("digest"), "digest"),
        (lambda r: r["sections"].append(r["sections"][0]), "twice"),
        (lambda r: r["sections"][0]["rows"].append(r["sections"][0]["rows"][0]), "a figure twice"),
        (lambda r: r["sections"][0]["rows"][1]["value"].update(low=99.0), "ends before it begins"),
        (lambda r: r["sections"][0]["rows"][1]["value"].update(low=None), "no interval"),
        (lambda r: r["sections"][0]["rows"][1]["value"].update(n=-1), "no interval"),
        (lambda r: r["sections"][0]["rows"][0]["figure"].update(part="virtue"), "'part'"),
        (lambda r: r["sections"][0]["rows"][2]["figure"]["limit"].update(sense="about"), "'sense'"),
        (lambda r: r["sections"][0]["rows"][0].update(value=3.0), "must be"),
    ],
)  # fmt: skip
def test_what_is_no_card_is_refused(change: Any, why: str, tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text(json.dumps(broken(change)))
    with pytest.raises(ResultError, match=why):
        card_file.read(tmp_path / "card.json")


# ------------------------------------------------------------------------------------------------ the page


def poisoned(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: poisoned(one, name) for name, one in value.items()}
    if isinstance(value, list):
        return [poisoned(one, key) for one in value]
    fixed = ("sense", "of", "better", "part", "name", "size")
    return value + HOSTILE if isinstance(value, str) and key not in fixed else value


def test_hostile_text_stays_text() -> None:
    harmless = Tree(card_page.page(card(BAD)))
    hostile_card = card_file.card_of(poisoned(json.loads(json.dumps({"schema": 1, **as_json(card(BAD))}))))
    hostile = Tree(card_page.page(hostile_card))
    assert [tag for tag in hostile.tags if tag != "small"] == [tag for tag in harmless.tags if tag != "small"]
    assert not {"script", "img", "iframe", "object", "form"} & set(hostile.tags)
    for one in hostile.root.all():
        assert not [name for name in one.attributes if name.startswith("on") or name == "src"]
    for part in ("verdict", "costs", "missing", "details", "record"):
        assert HOSTILE.replace("</td>", "") in hostile.root.section(part).text.replace("</td>", ""), part
    text = markdown(hostile_card)
    assert "<script>" not in text.replace("\\<script\\>", "") and all(line.count(" | ") == 6 for line in rows_of(text))


def rows_of(text: str) -> list[str]:
    return [line.replace("\\|", "") for line in text.splitlines() if line.startswith("| ") and not line.startswith("| |")]


def test_the_page_says_what_the_card_says() -> None:
    root = Tree(card_page.page(card(BAD))).root
    assert root.all("p", "banner")[0].text == card(BAD).verdict and root.all("p", "banner")[0].classes == {"banner", "red"}
    costs = root.section("costs")
    first = costs.all("tr", "red")[0]
    assert costs.all("tr")[1] is first and "limit exceeded" in first.text and "0.210" in squeezed(first.text)
    assert {"red", "green", "grey"} == {next(iter(row.classes)) for row in costs.all("tr")[1:]}
    missing = squeezed(root.section("missing").text)
    assert "grade by the judge" in missing and "not run: needs a judge" in missing
    assert all("n\N{NO-BREAK SPACE}" in row.all("td")[0].text for row in costs.all("tr")[1:])  # every figure has its n
    assert len(root.section("pictures").all("svg")) == 2
    assert card_page.page(card(BAD)) == card_page.page(card(BAD))


def test_the_page_asks_for_nothing() -> None:
    root = Tree(card_page.page(card(BAD))).root
    policy = [one.attributes["content"] for one in root.all("meta") if "http-equiv" in one.attributes]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"]
    for one in root.all():
        for name, value in one.attributes.items():
            if name in ("href", "src", "action"):
                assert value is not None and (value.startswith("#") or value == "data:,")
    css = root.all("style")[0].text
    assert "url(" not in css and "@import" not in css


def test_three_files_or_none(tmp_path: Path) -> None:
    paths = card_page.write(card(), tmp_path / "out")
    assert [path.name for path in paths] == ["card.html", "card.json", "card.md"]
    (tmp_path / "out" / "card.html").unlink()
    with pytest.raises(OutputExists):
        card_page.write(card(), tmp_path / "out")
    assert not (tmp_path / "out" / "card.html").exists()
    assert "**Do not deploy as it is" in markdown(card(BAD)) and "**limit exceeded**" in markdown(card(BAD))


# ------------------------------------------------------------------------------------------------ the gate


def gate(tmp_path: Path, text: str, found: Card | None = None) -> list[str]:
    (tmp_path / "limits.yaml").write_text(text)
    return failures(found or card(), read_demands(tmp_path / "limits.yaml", figure_names()))


def test_the_gate_lists_what_is_not_kept(tmp_path: Path) -> None:
    assert gate(tmp_path, "benign.kl: {at_most: 0.05}\ntrait.recovered: {at_least: 60, sure: true}\n") == []
    failed = gate(tmp_path, "benign.kl: {at_most: 0.005}\ntrait.recovered: {at_least: 90, sure: true}\n")
    assert failed == [
        "benign.kl is 0.0100 [0.0050, 0.0200], and must be at most 0.005",
        "trait.recovered is 93.0 [88.0, 98.0], and must be at least 90 for sure",
    ]
    assert gate(tmp_path, "trait.recovered: {at_least: 90}\n") == []
    assert gate(tmp_path, "trait.score: {at_most: 20, of: unguarded}\n") == []
    assert len(gate(tmp_path, "trait.score: {at_most: 20, of: change}\n")) == 1


def test_what_was_not_measured_fails(tmp_path: Path) -> None:
    assert gate(tmp_path, "mt_bench.grade: measured\n") == [
        "mt_bench.grade was not measured: not run: needs a judge (--judge MODEL@URL)"
    ]
    assert gate(tmp_path, "turns.within: {at_most: 100}\n") == ["turns.within was not measured: its section was not run"]
    assert len(gate(tmp_path, "trait.recovered: {at_least: 0}\n", card({"trait.recovered": None}))) == 1


def test_words_hold_a_figure_to_its_own_limit(tmp_path: Path) -> None:
    for values, kept, not_exceeded in ((GOOD, 0, 0), (UNSURE, 1, 0), (BAD, 1, 1)):
        assert len(gate(tmp_path, "benign.kl: kept\n", card(dict(values)))) == kept
        assert len(gate(tmp_path, "benign.kl: not exceeded\n", card(dict(values)))) == not_exceeded
    assert "no limit of its own" in gate(tmp_path, "benign.shift: kept\n")[0]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("benign.kll: {at_most: 1}", "there are benign.fire_rate, benign.kl"), ("benign.kl: {most: 1}", "unknown key 'most'"),
        ("benign.kl: {of: change}", "needs at_most or at_least"), ("benign.kl: good", "one of measured"),
        ("benign.kl: {at_most: .nan}", "finite"), ("benign.kl: {at_most: 1, of: both}", "'of'"),
        ("- a", "must map"), ("", "must map"),
        ("benign.kl: {at_most: 1}\nbenign.kl: {at_most: 2}", "twice"), ("{", "no YAML"),
        ("benign.kl: {at_most: true}", "a number"),
    ],
)  # fmt: skip
def test_a_file_of_limits_that_cannot_be_is_refused(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        gate(tmp_path, text)


def test_the_subject_is_on_every_rendering() -> None:
    for text in (card_page.page(card()), markdown(card())):
        assert SUBJECT.guard in text and "StTP(12)" in text and SUBJECT.model in text
