"""The audit log: who asked, under which policy, what acted, how much. One JSON object a line.

No prompt and no answer stands in it unless the operator asks for that. A line that cannot be written is an error, never
passed over. This module knows lines and files.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from steerguard.errors import InputError, SteerguardError

MAX_BYTES = 64 * 2**20
"""Bytes of one file, after which the next is begun."""
KEPT = 8
"""Older files that are kept: `audit.jsonl.1` is the youngest of them."""


class AuditFailed(SteerguardError):
    """A line of the audit log could not be written."""


class Audit:
    """Writes lines to a file, or nowhere if there is none. May be used from any thread.

    Args:
        path: None writes nothing.
        text: prompts and answers are written, too.
    """

    def __init__(self, path: Path | None, *, text: bool = False, max_bytes: int = MAX_BYTES, kept: int = KEPT) -> None:
        self.text = text
        self._path, self._max_bytes, self._kept = path, max_bytes, kept
        self._lock = threading.Lock()
        self._file: FileIO | None = None
        if path is not None:
            try:
                self._file = _open(path)
            except OSError as error:
                raise InputError(f"the audit log {path} cannot be written: {error.strerror}; choose another place") from error

    def write(self, event: str, **said: Any) -> None:
        """Write one line: the time in UTC, the event, and what is said of it. Raises AuditFailed."""
        if self._path is None:
            return
        with self._lock:
            try:
                self._append(_line(event, said))
            except (OSError, ValueError) as error:
                raise AuditFailed(f"the audit log {self._path} cannot be written: {error}; make room and start again") from error

    def _append(self, line: bytes) -> None:
        if self._path is None or self._file is None:
            raise ValueError("it was closed")
        if self._file.tell() and self._file.tell() + len(line) > self._max_bytes:
            self._rotate(self._path)
        if self._file.write(line) != len(line):
            raise OSError("only a part of a line could be written")

    def _rotate(self, path: Path) -> None:
        if self._file is not None:
            self._file.close()
        for i in range(self._kept, 0, -1):
            older = path if i == 1 else _numbered(path, i - 1)
            if older.exists():
                os.replace(older, _numbered(path, i))
        self._file = _open(path)

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()
            self._file = None


def _line(event: str, said: Mapping[str, Any]) -> bytes:
    now = time.time()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03d}Z"
    return json.dumps({"time": stamp, "event": event, **said}, ensure_ascii=True, allow_nan=False).encode() + b"\n"


def _numbered(path: Path, i: int) -> Path:
    return path.with_name(f"{path.name}.{i}")


def _open(path: Path) -> FileIO:
    """A file to append to, that only its owner can read; unbuffered, so that a line is written when `write` returns."""
    return FileIO(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab")
