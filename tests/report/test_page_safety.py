"""The page's walls and its size: hostile text stays text, nothing is asked for, and files are written whole."""

from __future__ import annotations

import html
import json
import re
import time
from pathlib import Path
from typing import Any

import made
import pytest
from elements import Tree, about, tree

from steerguard.errors import InputError, OutputExists
from steerguard.report import answers
from steerguard.report.sweep_page import page, write_report
from steerguard.sweeping.result_file import of

# ----------------------------------------------------------------------------------------------------- hostile texts

HOSTILE = (
    "</i></title></svg></style><script>alert(1)</script><img src=https://evil.example/x onerror=alert(1)>"
    "\"'`{{7*7}}{%raw%}&lt;b&gt;"
)


def poisoned(value: object, text: str, key: str = "") -> Any:
    """A document with `text` after every text of it that may be anything."""
    if isinstance(value, dict):
        tail = text if key in ("metrics", "sampling", "versions") else ""
        return {name + tail: poisoned(v, text, name) for name, v in value.items()}
    if isinstance(value, list):
        return [poisoned(one, text, key) for one in value]
    return value + text if isinstance(value, str) else value


def rules_poisoned(record: dict[str, Any], text: str) -> dict[str, Any]:
    """The same, where names must agree with each other: rules keep theirs, and all of them have the text in it."""
    found = poisoned(record, text)
    for arm in found["test"]["arms"]:
        if arm["name"].startswith(("aligned", "malicious")):
            arm["name"] = arm["name"].removesuffix(text)
    for part in (found["select"]["chosen"], found["select"]["refused"], found["guards"]):
        for name in list(part):
            part[name + text] = part.pop(name)
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def test_hostile_text_stays_text() -> None:
    """The page of a hostile document has the elements of the harmless one's, and its texts as they are."""
    harmless, hostile = (Tree(page(of(rules_poisoned(made.small(), text)))) for text in (" harmless", HOSTILE))
    assert hostile.tags == harmless.tags
    assert not {"script", "img", "iframe", "object", "form"} & set(hostile.tags)
    for one in hostile.root.all():
        assert not [name for name in one.attributes if name.startswith("on") or name == "src"]
    for section in ("choice", "layers", "maps", "projections", "categories", "metrics", "answers", "record"):
        assert HOSTILE in hostile.root.section(section).text, section
    assert HOSTILE in hostile.root.all("title")[0].text
    assert any(HOSTILE in about(one) for one in hostile.root.section("pareto").all("path", "dot") if one.all("title"))


def test_control_characters_are_shown() -> None:
    record = made.small()
    record["test"]["arms"][0]["rows"][1]["text"] = "a\0b\x1b[31mc\r\nd"
    said = [one.text for one in tree(record).section("answers").all("div", "said")]
    assert "a␀b␛[31mc\nd" in said


def test_the_page_asks_for_nothing() -> None:
    """No address outside of text: not in an attribute, not in the style sheet."""
    root = Tree(page(of(rules_poisoned(made.small(), HOSTILE)))).root
    policy = [one.attributes["content"] for one in root.all("meta") if "http-equiv" in one.attributes]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"]
    for one in root.all():
        for name, value in one.attributes.items():
            if name in ("href", "src", "srcset", "action", "data", "poster", "background", "xlink:href"):
                assert value is not None and (value.startswith("#") or value == "data:,"), (one.tag, name, value)
            if name not in ("aria-label",):
                assert not re.search(r"https?://|url\(", value or ""), (one.tag, name, value)
    css = root.all("style")[0].text
    assert not re.search(r"url\(|@import|https?://", css)
    assert {one.tag for one in root.all("link")} == {"link"} and len(root.all("link")) == 1
    anchors = {one.attributes["href"] for one in root.all("a")}
    assert anchors <= {f"#{one.attributes['id']}" for one in root.all() if "id" in one.attributes}


# ----------------------------------------------------------------------------------------------------- files and size


def test_a_report_is_three_files(tmp_path: Path) -> None:
    result = of(made.small())
    paths = write_report(result, tmp_path / "honesty.html")
    assert [path.name for path in paths] == ["honesty.html", "honesty-points.csv", "honesty-answers.csv"]
    assert paths[0].read_text(encoding="utf-8") == page(result)
    assert paths[1].read_bytes().count(b"\r\n") == 9
    with pytest.raises(OutputExists):
        write_report(result, tmp_path / "honesty.html")
    write_report(result, tmp_path / "honesty.html", overwrite=True)
    with pytest.raises(InputError, match="there is no folder"):
        write_report(result, tmp_path / "none" / "honesty.html")


def test_nothing_is_written_if_one_of_the_three_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "honesty-answers.csv").write_text("mine")
    with pytest.raises(OutputExists, match="honesty-answers.csv"):
        write_report(of(made.small()), tmp_path / "honesty.html")
    assert [path.name for path in tmp_path.iterdir()] == ["honesty-answers.csv"]


def test_the_same_result_gives_the_same_page() -> None:
    assert page(of(made.small())) == page(of(made.small()))


@pytest.mark.slow
def test_a_large_sweep_stays_small_and_quick() -> None:
    """80 layers, 19 strengths, 2 positions; 112 scenarios, 5 arms, 250 tokens an answer."""
    result = of(made.large())
    assert len(result.select.points) == 80 * 19 * 2
    start = time.process_time()
    text = page(result)
    seconds = time.process_time() - start
    assert seconds < 10
    assert len(text.encode()) < 15 * 2**20
    assert text.count("<article") == 112 * 5
    assert html.unescape(text).count("ρ ") > answers.HOVER_TOKENS - 250
