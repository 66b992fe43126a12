"""The reader: everything that is in the document comes out, and nothing else is let in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import made
import pytest

from steerguard.errors import InputError, ResultError
from steerguard.files import Malformed
from steerguard.sweeping.result_file import of, read

Change = Callable[[dict[str, Any]], Any]


def test_everything_comes_out() -> None:
    """A document, read and taken apart again, is the document."""
    record = made.small()
    back: dict[str, Any] = json.loads(json.dumps(asdict(of(record))))
    for arm in back["test"]["arms"]:
        for row in arm["rows"]:
            row["tokens"] = row["tokens"] and [[t["piece"], t["rho"], t["delta"]] for t in row["tokens"]]
    assert back == {key: value for key, value in record.items() if key != "schema"}


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(made.small()), encoding="utf-8")
    found = read(path)
    assert found.select.points[1].strength == 12
    assert found.coherence_bar == pytest.approx(85.5)
    assert found.test is not None and found.test.arm("StTP") is found.test.arms[2] and found.test.arm(None) is None


def test_there_may_be_no_test_and_no_choice() -> None:
    record = made.small() | {"test": None, "guards": {}}
    record["select"] |= {"chosen": {}, "best": None, "aligned": made.figures(None, None, unscored=10)}
    found = of(record)
    assert found.test is None and found.select.best is None
    assert found.coherence_bar is None  # an aligned baseline that was not scored is no bar of zero


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is not JSON"),
        ("[1]", "is no result of a sweep"),
        ("{}", "is no result of a sweep"),
        ('{"schema": 2}', "has the schema 2, this version reads 1; use the steerguard that wrote it"),
        ('{"schema": true}', "has the schema True"),
        ('{"schema": 1, "schema": 1}', "has the key 'schema' twice"),
        ('{"schema": 1, "trait": NaN}', "numbers must be finite"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ResultError, match="other.json ") as caught:
        read(path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="there is no file"):
        read(tmp_path / "none.json")
    assert issubclass(ResultError, InputError)


def points(record: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = record["select"]["points"]
    return found


def guarded(record: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = record["test"]["arms"][2]
    return found


BROKEN: list[tuple[Change, str]] = [
    (lambda r: r.update(extra=1), "the result has an unknown key 'extra'"),
    (lambda r: r.pop("guards"), "the result lacks the key 'guards'"),
    (lambda r: r["model"].update(width=0), "a width and a depth of at least 1"),
    (lambda r: r["trait"].update(positive=None), "'positive' of the trait must be an object, got None"),
    (lambda r: r["settings"].update(layers=["1"]), "an entry of 'layers' of the settings must be an integer, got '1'"),
    (lambda r: r["settings"].update(seed=True), "'seed' of the settings must be an integer, got True"),
    (lambda r: r["settings"]["constraints"].pop("kl"), "the constraints lacks the key 'kl'"),
    (lambda r: r["probes"][0].update(m="0"), "'m' of probe 0 must be a number, got '0'"),
    (lambda r: points(r)[0]["figures"].update(trait=101), "'trait' of the figures of point 0 must be from 0 to 100, got 101"),
    (lambda r: points(r)[0]["figures"].update(moved=-0.1), "'moved' of the figures of point 0 must be from 0 to 1, got -0.1"),
    (lambda r: points(r)[0]["figures"].update(unscored=11), "11 unscored of 10 answers"),
    (lambda r: points(r)[0].update(layers=[]), "point 0 has no layer"),
    (lambda r: points(r)[0].update(rule="aligned"), "which is the name of a baseline"),
    (lambda r: points(r)[1]["benign"].update(fire_rate=31), "'fire_rate' of 'benign' of point 1 must be from 0 to 1, got 31"),
    (lambda r: r["select"]["chosen"]["StTP"].update(point=8), "'point' of the choice of 'StTP' is 8, there are 8 points"),
    (lambda r: r["select"]["chosen"]["StTP"].update(point=-1), "is -1, there are 8 points"),
    (lambda r: r["select"]["chosen"]["StTP"].update(point=3), "the choice of 'StTP' is a point of 'SwFC'"),
    (lambda r: r["select"]["chosen"].update(CAA={"point": 0, "wins": None, "second": None}), "a chosen rule is 'CAA'"),
    (lambda r: r["select"].update(best="StMP"), "the best rule is 'StMP', there are 'StTP', 'SwFC'"),
    (lambda r: r["select"]["refused"].update(StMP=None), "the reason why 'StMP' was refused must be text"),
    (lambda r: r["guards"].update(CAA={"digest": "", "describe": ""}), "a guard's rule is 'CAA'"),
    (lambda r: guarded(r)["rows"].pop(), "the arm 'StTP' has 2 answers to 3 scenarios"),
    (lambda r: guarded(r).update(name="malicious"), "two arms of one name"),
    (lambda r: guarded(r).update(name="CAA"), "an arm's name is 'CAA'"),
    (lambda r: guarded(r)["trait"].update(low=80), "has an interval from 80 to 79.5"),
    (lambda r: guarded(r)["rows"][0]["tokens"].append(["x", 1]), "a token of answer 0 of the arm 'StTP' must be"),
    (lambda r: guarded(r)["rows"][0]["tokens"].append(["x", 1, True]), "a token of answer 0 of the arm 'StTP' must be"),
    (lambda r: guarded(r)["rows"][0].update(trait=True), "'trait' of answer 0 of the arm 'StTP' must be a number or null"),
    (lambda r: guarded(r)["projections"].update(edges=[0, 1, 1, 2, 3]), "must be at least two numbers that ascend"),
    (lambda r: guarded(r)["projections"].update(seen=[1]), "have 5 edges, 1 bins seen and 4 moved"),
    (lambda r: guarded(r)["projections"].update(moved=[2, 0, 0, 0]), "more tokens moved than seen"),
    (lambda r: r["test"]["scenarios"][0].update(turns=[None]), "an entry of 'turns' of scenario 0 must be text, got None"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), BROKEN, ids=[said for _, said in BROKEN])
def test_a_broken_document_is_refused_in_one_sentence(change: Change, said: str) -> None:
    # its own copy of everything, since the parts of the made one are shared
    record = json.loads(json.dumps(made.small()))
    change(record)
    with pytest.raises(Malformed, match="^is no sound result of a sweep: ") as caught:
        of(record)
    assert said in str(caught.value) and "\n" not in str(caught.value)
