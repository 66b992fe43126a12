"""Journals: append-only files of JSON lines, which long work writes as it goes and reads back when it goes on.

A line is whole or it does not count: it is written in one piece, with its own checksum, and synced to the disk before
`add` returns. So Ctrl-C, a crash or a full disk loses at most what was in flight. A line that was cut off at the end is
dropped; damage anywhere else is refused, since what stood there is not known. One process at a time writes.

This module knows lines. It knows no answers and no scores.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from steerguard.errors import InputError
from steerguard.files import Malformed, canonical_json, strict_json

if sys.platform != "win32":
    import fcntl

CHECK = 16
"""Hexadecimal digits of a line's checksum."""
BEGIN = b'{"check":"'
"""How every line begins."""


class Journal:
    """An open journal; `None` as its path keeps nothing on disk.

    Raises:
        InputError: another process writes it, it cannot be read or written, or it is damaged before its end.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.records: list[Mapping[str, Any]] = []
        "every record, oldest first"
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise InputError(f"{path} cannot be opened: {error.strerror}; choose another folder") from error
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        if sys.platform == "win32":
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{self.path} is being written by another process; wait for it, or stop it") from error

    def _read(self) -> None:
        """Take up every whole line, and cut off one that was not finished."""
        self._file.seek(0)
        data = self._file.readall()
        *lines, rest = data.split(b"\n")
        for number, line in enumerate(lines, 1):
            record = _parse(line)
            if record is None:
                raise InputError(
                    f"{self.path}:{number} is damaged or no journal's, and what stood there is not known; restore the file, or "
                    "remove it to begin anew"
                )
            self.records.append(record)
        if rest and rest[: len(BEGIN)] != BEGIN[: len(rest)]:
            raise InputError(f"{self.path} is not a journal; choose another folder, or remove it to begin anew")
        if rest:  # a line that was being written when the process ended
            self._file.truncate(len(data) - len(rest))

    def add(self, record: Mapping[str, Any]) -> None:
        """Append one record, on the disk when this returns. Raises InputError if there is no room for it."""
        if self.path is not None:
            text = canonical_json(dict(record))
            line = memoryview(BEGIN + f'{_checksum(text)}","record":{text}}}\n'.encode())
            end = self._file.seek(0, os.SEEK_END)
            try:
                while line:
                    line = line[self._file.write(line) :]
                os.fsync(self._file.fileno())
            except BaseException as error:
                self._cut(end)
                if not isinstance(error, OSError):
                    raise
                raise InputError(
                    f"{self.path} cannot be written: {error.strerror}; what was finished before is kept. Make room, then run "
                    "the same command again: it goes on from there"
                ) from error
        self.records.append(json.loads(canonical_json(dict(record))))

    def _cut(self, end: int) -> None:
        """Take half a line away again; one that stays is dropped by whoever reads the journal next."""
        with suppress(OSError):
            os.ftruncate(self._file.fileno(), end)

    def close(self) -> None:
        """Let others write it."""
        if self.path is not None:
            self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def content_key(*content: object) -> str:
    """A key that is the same for the same content and for no other: 64 hexadecimal digits of JSON values."""
    return hashlib.sha256(canonical_json(list(content)).encode()).hexdigest()


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:CHECK]


def _parse(line: bytes) -> Mapping[str, Any] | None:
    """The record of one line; None for a line that is not what `add` wrote."""
    try:
        found = strict_json(line)
        record = found["record"]
        sound = found["check"] == _checksum(canonical_json(record))
    except (Malformed, KeyError, TypeError):
        return None
    return record if sound and isinstance(record, dict) else None
