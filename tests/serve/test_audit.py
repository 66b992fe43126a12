"""The audit log: whole lines, rotated, and an error where one is lost."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from steerguard.errors import InputError
from steerguard.serve.audit import Audit, AuditFailed


def test_files_are_rotated_and_no_line_is_lost_or_torn(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "log", max_bytes=2000, kept=50)

    def write(who: int) -> None:
        for i in range(50):
            audit.write("request", who=who, i=i, text="é\u2028\n" * 3)

    threads = [threading.Thread(target=write, args=(who,)) for who in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    audit.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) > 5
    assert all(file.stat().st_size <= 2000 and file.stat().st_mode & 0o077 == 0 for file in files)
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert sorted((line["who"], line["i"]) for line in lines) == [(who, i) for who in range(4) for i in range(50)]
    newest = [json.loads(line)["time"] for line in (tmp_path / "log").read_text().splitlines()]
    assert newest[0] >= json.loads((tmp_path / "log.1").read_text().splitlines()[-1])["time"]


def test_only_so_many_files_are_kept(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "log", max_bytes=100, kept=2)
    for i in range(20):
        audit.write("request", i=i, filling="x" * 60)
    audit.close()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["log", "log.1", "log.2"]
    assert json.loads((tmp_path / "log.2").read_text())["i"] == 17


def test_a_log_goes_on_where_it_was(tmp_path: Path) -> None:
    for i in range(2):
        audit = Audit(tmp_path / "log")
        audit.write("start", i=i)
        audit.close()
    assert [json.loads(line)["i"] for line in (tmp_path / "log").read_text().splitlines()] == [0, 1]


def test_what_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        Audit(tmp_path / "nowhere" / "log")
    full = Audit(Path("/dev/full"))
    with pytest.raises(AuditFailed, match="No space left"):
        full.write("request")
    full.close()
    closed = Audit(tmp_path / "log")
    closed.close()
    with pytest.raises(AuditFailed, match="closed"):
        closed.write("request")
    Audit(None).write("request")  # no log was asked for
