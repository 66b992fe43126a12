"""Journals: what is whole is kept, what was cut off is dropped, what is damaged is refused."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from steerguard.errors import InputError
from steerguard.journal import Journal, content_key

RECORDS = [{"key": "a", "text": "one\ntwo \u2028 three"}, {"key": "b", "numbers": [1, 0.1, None]}, {"key": "c", "text": ""}]


def written(path: Path) -> Path:
    with Journal(path) as journal:
        for record in RECORDS:
            journal.add(record)
    return path


def read(path: Path) -> list[object]:
    with Journal(path) as journal:
        return list(journal.records)


def test_what_was_added_is_read_back(tmp_path: Path) -> None:
    path = written(tmp_path / "new" / "journal.jsonl")
    assert read(path) == RECORDS
    with Journal(path) as journal:
        journal.add({"key": "d"})
    assert read(path) == [*RECORDS, {"key": "d"}]
    with Journal(None) as nowhere:
        nowhere.add({"key": "e"})
        assert nowhere.records == [{"key": "e"}]


def test_a_file_cut_off_anywhere_loses_only_its_last_line(tmp_path: Path) -> None:
    path = written(tmp_path / "journal.jsonl")
    data = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        whole = sum(end <= size for end in ends)
        assert read(path) == RECORDS[:whole]
        with Journal(path) as journal:
            journal.add({"key": "z"})
        assert read(path) == [*RECORDS[:whole], {"key": "z"}]


@pytest.mark.parametrize("at", [0, 5, 20, 60])
def test_damage_before_the_end_is_refused(tmp_path: Path, at: int) -> None:
    path = written(tmp_path / "journal.jsonl")
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"journal\.jsonl:\d is damaged or no journal's"):
        Journal(path)
    assert path.read_bytes() == data  # nothing is thrown away unasked


@pytest.mark.parametrize("content", [b"what is this\n", b"what is this", b"{}\n", b'{"check":1}\n', b"\n", b"\xff\n"])
def test_another_file_is_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"journal"):
        Journal(path)
    assert path.read_bytes() == content


def test_one_process_writes(tmp_path: Path) -> None:
    path = written(tmp_path / "journal.jsonl")
    with Journal(path):
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool, pytest.raises(InputError, match="being written by another process"):
            pool.apply(read, (path,))
    assert read(path) == RECORDS


def test_a_full_disk_loses_the_record_in_flight_only(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    code = f"""
import resource, signal
from pathlib import Path
from steerguard.errors import InputError
from steerguard.journal import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
journal = Journal(Path({str(path)!r}))
journal.add({{"key": "kept"}})
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
try:
    journal.add({{"key": "x" * 500}})
except InputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "what was finished before is kept" in done.stdout
    assert "goes on from there" in done.stdout
    assert read(path) == [{"key": "kept"}]


def test_killed_while_writing_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    code = f"""
from pathlib import Path
from steerguard.journal import Journal
journal = Journal(Path({str(path)!r}))
for i in range(10**9):
    journal.add({{"i": i, "text": "x" * 5000}})
"""
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", code])
        size = path.stat().st_size if path.exists() else 0
        while not path.exists() or path.stat().st_size <= size + 20_000:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        records = [record["i"] for record in read(path)]  # type: ignore[index]
        run = records[max(i for i, n in enumerate(records) if n == 0) :]
        assert run == list(range(len(run)))


def test_a_key_is_its_content() -> None:
    assert content_key({"a": 1, "b": "ü"}, [2]) == content_key({"b": "ü", "a": 1}, [2])
    assert len({content_key("a"), content_key("b"), content_key(["a"]), content_key("a", "")}) == 4
