"""The tables: what a program reads back, and what no spreadsheet runs."""

from __future__ import annotations

import csv
from io import StringIO

import made
import pytest

from steerguard.report.tables import ANSWERS, POINTS, csv_answers, csv_points
from steerguard.sweeping.result_file import of


def rows(text: str) -> list[dict[str, str]]:
    assert text.endswith("\r\n")
    return list(csv.DictReader(StringIO(text, newline=""), strict=True))


def test_points() -> None:
    found = rows(csv_points(of(made.small())))
    assert tuple(found[0]) == POINTS and len(found) == 8
    guard = found[1]
    assert (guard["rule"], guard["strength"], guard["layers"], guard["positions"]) == ("StTP", "12", "2", "all")
    assert (guard["trait"], guard["error"], guard["coherence"]) == ("80", "2.5", "92")
    assert (guard["benign_kl"], guard["benign_fire_rate"], guard["benign_n"]) == ("0.02", "0.31", "50")
    assert [row["chosen"] for row in found] == ["", "best", "", "", "rule", "", "", "second"]
    assert (found[1]["wins"], found[4]["wins"]) == ("0.83", "")
    assert (found[2]["eligible"], found[2]["why"]) == ("no", "coherence below 85.5")


def test_what_is_missing_is_empty_and_not_zero() -> None:
    unscored = rows(csv_points(of(made.small())))[6]
    assert (unscored["trait"], unscored["error"], unscored["coherence"], unscored["unscored"]) == ("", "", "", "10")
    assert unscored["benign_kl"] == unscored["benign_n"] == ""


def test_answers() -> None:
    found = rows(csv_answers(of(made.small())))
    assert tuple(found[0]) == ANSWERS and len(found) == 9
    assert [row["arm"] for row in found[::3]] == ["aligned", "malicious", "StTP"]
    assert (found[7]["scenario"], found[7]["answer"], found[7]["trait"]) == ("s-worst", "It stands tall.", "30")
    assert found[7]["turns"] == "user: Hello.\n\nassistant: Hi.\n\nuser: And the bridge?"
    assert (found[7]["rule"], found[7]["strength"], found[7]["layers"]) == ("StTP", "12", "2")
    assert (found[0]["rule"], found[0]["strength"]) == ("", "")
    assert (found[8]["trait"], found[8]["coherence"], found[8]["note"]) == ("", "", "no verdict")
    assert rows(csv_answers(of(made.small() | {"test": None}))) == []


@pytest.mark.parametrize("formula", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", "\ufeff=1", "＝1"])
def test_no_text_is_a_formula(formula: str) -> None:
    record = made.small()
    record["test"]["arms"][2]["rows"][0] |= {"text": formula, "note": formula}
    record["test"]["scenarios"][0] |= {"id": formula, "system": formula}
    record["select"]["points"][2]["why"] = formula
    result = of(record)
    answer = rows(csv_answers(result))[6]
    assert answer["answer"] == answer["note"] == answer["scenario"] == answer["system"] == f"'{formula}"
    assert rows(csv_points(result))[2]["why"] == f"'{formula}"


def test_a_cell_holds_any_text() -> None:
    text = 'one, "two"\nthree\r\nfour; \0five'
    record = made.small()
    record["test"]["arms"][2]["rows"][0]["text"] = text
    assert rows(csv_answers(of(record)))[6]["answer"] == text.replace("\0", "␀")
