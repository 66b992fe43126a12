"""Settings that people write: said once, referring to nothing, and the line of what is wrong."""

from __future__ import annotations

import pytest

from steerguard.strict_yaml import NotYaml, read, read_with_lines


def test_values_and_where_their_keys_stand() -> None:
    value, lines = read_with_lines(b"\xef\xbb\xbfa: 1\nb:\n  c: [x, 2.5]\n")
    assert value == {"a": 1, "b": {"c": ["x", 2.5]}}
    assert lines == {("", "a"): 1, ("", "b"): 2, ("b", "c"): 3}
    assert read("") is None


def test_words_stay_words() -> None:
    assert read("[on, off, yes, No, true, False]") == ["on", "off", "yes", "No", True, False]


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("a: 1\na: 2\n", 2, "the key 'a' stands on line 1 already"),
        ("a: {b: 1, b: 2}\n", 1, "the key 'b' stands on line 1 already"),
        ("a: &x 1\nb: *x\n", 2, "anchors and aliases are not read"),
        ("1: 2\n", 1, "the key 1 is no text; put it in quotes"),
        ("a: [\n", 2, "this is not YAML"),
        ("a: 1\n---\nb: 2\n", 2, "this is not YAML: but found another document"),
        ("a: !!python/object/apply:os.system [ls]\n", 1, "this is not YAML: could not determine a constructor"),
        ("a: 2026-99-99\n", None, "this is not YAML: month must be in 1..12"),
        (b"\xff", None, "this is not UTF-8"),
        ("[" * 10_000, None, "nested too deeply"),
        ("a: \x00\n", None, "this is not YAML"),
    ],
)
def test_what_is_refused(text: str | bytes, line: int | None, what: str) -> None:
    with pytest.raises(NotYaml, match=what) as caught:
        read(text)
    assert caught.value.line == line
    assert caught.value.at("f.yaml").startswith("f.yaml: " if line is None else f"f.yaml:{line}: ")
