"""Files: whole or not at all, and nothing read is trusted."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from steerguard import files
from steerguard.errors import GuardFileError, InputError, OutputExists
from steerguard.files import Malformed

# ---------------------------------------------------------------------------------------------------- writing


def test_writes_whole_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = files.write_atomically(tmp_path / "a", b"one")
    assert path.read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["a"]
    files.write_atomically(path, b"two", overwrite=True)
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a"]


def test_keeps_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = files.write_atomically(tmp_path / "a", b"one")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_refuses_to_overwrite(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(OutputExists, match="exists already"):
        files.write_atomically(tmp_path / "a", b"yours")
    assert (tmp_path / "a").read_text() == "mine"
    with pytest.raises(OutputExists):
        files.refuse_existing(tmp_path / "a")
    files.refuse_existing(tmp_path / "a", overwrite=True)
    files.refuse_existing(tmp_path / "b")


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_meanwhile_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """The check before and the write after are two moments; a run that ends first keeps its file."""
    target = tmp_path / "a"
    real_link = os.link

    def late(source: Path, to: Path) -> None:
        target.write_text("first")
        if not links:
            raise PermissionError("no links here")
        real_link(source, to)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(OutputExists):
        files.write_atomically(target, b"second")
    assert target.read_text() == "first"
    assert os.listdir(tmp_path) == ["a"]


def test_writes_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert files.write_atomically(tmp_path / "a", b"one").read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def fail(_: int) -> None:
        raise failure

    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((InputError, KeyboardInterrupt)):
        files.write_atomically(tmp_path / "a", b"new", overwrite=True)
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, what in ((tmp_path, "a folder"), (tmp_path / "pipe", "pipe")):
        with pytest.raises(InputError, match=what):
            files.write_atomically(path, b"", overwrite=True)
    with pytest.raises(InputError, match="there is no folder"):
        files.write_atomically(tmp_path / "no" / "a", b"")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="there is no folder"):
        files.write_atomically(tmp_path / "file" / "a", b"")
    for name in ("x" * 300, "a\0b"):
        with pytest.raises(InputError, match="cannot be written"):
            files.write_atomically(tmp_path / name, b"")


def test_a_dangling_link_is_not_overwritten_unasked(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputExists):
        files.write_atomically(tmp_path / "link", b"")
    assert not (tmp_path / "nowhere").exists()


def test_write_json(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None], "ü": True}
    text = files.write_json(tmp_path / "a.json", value).read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "ü" in text
    for bad in ({"a": float("nan")}, {"a": {1, 2}}):
        with pytest.raises(InputError, match="was not written"):
            files.write_json(tmp_path / "b.json", bad)
    assert not (tmp_path / "b.json").exists()


# ---------------------------------------------------------------------------------------------------- reading


def test_read_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert files.read_bounded(path, limit=5, error=GuardFileError) == b"12345"
    with pytest.raises(GuardFileError, match="larger than"):
        files.read_bounded(path, limit=4, error=GuardFileError)


def test_read_bounded_refuses_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, what in (("", "cannot be read|a folder"), ("no", "no file"), ("pipe", "pipe"), ("loop", "symbolic")):
        with pytest.raises(GuardFileError, match=what):
            files.read_bounded(tmp_path / name, limit=5, error=GuardFileError)
    with pytest.raises(GuardFileError, match="null byte"):
        files.read_bounded("a\0b", limit=5, error=GuardFileError)


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """root reads everything, so the system's refusal is played."""

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(GuardFileError, match="cannot be read: Permission denied"):
        files.read_bounded(tmp_path / "a", limit=5, error=GuardFileError)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON: .* at column 2"),
        ("{\n\n,}", "is not JSON: .* at line 3, column 1"),
        ('{"a": 1, "a": 2}', "has the key 'a' twice"),
        ('{"x": {"b": 1, "a": 1, "b": 2}}', "has the key 'b' twice"),
        ("[NaN]", "holds NaN"),
        ("[-Infinity]", "holds -Infinity"),
        ("[1e999]", "holds the number '1e999'"),
        ("[" + "1" * 5000 + "]", "integer of 5000 digits"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ('["\\ud800"]', "cannot be written as JSON"),
        (b"\xff\xfe[1]", "is not UTF-8 text"),
        ("\ufeff[]", "is not JSON"),
    ],
)
def test_strict_json_refuses(text: str | bytes, what: str) -> None:
    with pytest.raises(Malformed, match=what):
        files.strict_json(text)


def test_strict_json_reads_json() -> None:
    value = {"a": [1, -2.5, True, None, "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")], "b": {}}
    assert files.strict_json(json.dumps(value)) == value
    assert files.strict_json(json.dumps(value).encode()) == value
    assert files.strict_json(files.canonical_json(value)) == value


def test_canonical_json_is_one_text() -> None:
    for value in ({"b": 1, "a": (1, 2)}, {"a": [1, 2], "b": 1}):
        assert files.canonical_json(value) == '{"a":[1,2],"b":1}'
    circle: list[object] = []
    circle.append(circle)
    for bad in (float("inf"), {1, 2}, "\ud800", circle, {1: 1, "b": 2}):
        with pytest.raises(Malformed, match="cannot be written as JSON"):
            files.canonical_json(bad)


def test_take() -> None:
    required: dict[str, files.Kind] = {"a": int, "b": (float, type(None))}
    assert files.take({"a": 1, "b": 2}, "it", required) == {"a": 1, "b": 2}
    assert files.take({"a": 1, "b": None, "c": True}, "it", required, {"c": bool})["c"] is True
    for value, what, key in (
        ([], "it must be an object, got \\[\\]", None),
        ({"a": 1}, "it lacks the key 'b'; it needs a, b", None),
        ({"a": 1, "b": 1, "d": 1}, "it has an unknown key 'd'; allowed are a, b, c", "d"),
        ({"a": True, "b": 1}, "'a' of it must be an integer, got True", "a"),
        ({"a": 1.0, "b": 1}, "'a' of it must be an integer, got 1.0", "a"),
        ({"a": 1, "b": "x"}, "'b' of it must be a number or null, got 'x'", "b"),
        ({"a": 1, "b": 1, "c": 1}, "'c' of it must be true or false, got 1", "c"),
    ):
        with pytest.raises(Malformed, match=what) as caught:
            files.take(value, "it", required, {"c": bool})
        assert caught.value.key == key


def test_messages_stay_short_and_on_one_line() -> None:
    bomb: object = "x"
    for _ in range(60):  # an alias bomb: 2 ** 60 leaves if it were written out
        bomb = [bomb, bomb]
    for value in ("a\n" * 1000, bomb, {"k": b"\n" * 1000}):
        assert len(files.shown(value)) < 300
        assert "\n" not in files.shown(value)


def test_printable_disarms_a_terminal() -> None:
    assert files.printable("Zoë\x1b[2J\n\u202e\ud800") == "Zoë\\x1b[2J\\n\\u202e\\ud800"


def test_tensors_round_trip(tmp_path: Path) -> None:
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T, "b": np.zeros((0, 2))}
    path = tmp_path / "t"
    path.write_bytes(files.tensors_to_bytes(tensors, key="k", text='{"ü": 1}'))
    found, text = files.read_tensors(path, key="k", dtypes={"a": "F32", "b": "F64"}, limit=10_000, error=GuardFileError)
    assert text == '{"ü": 1}'
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor)
    for dtypes in ({"a": "F32"}, {"a": "F32", "b": "F32"}, {"a": "F32", "b": "F64", "c": "F32"}):
        with pytest.raises(GuardFileError, match="must hold the tensors"):
            files.read_tensors(path, key="k", dtypes=dtypes, limit=10_000, error=GuardFileError)


def test_a_header_that_could_not_be_read_is_not_written() -> None:
    with pytest.raises(Malformed, match="metadata of more than 16 MiB"):
        files.tensors_to_bytes({}, key="k", text="x" * files.MAX_HEADER)
