"""Verdicts on disk: JSON lines that are only ever appended to, found again by the content of what was asked.

What it promises: a line that was written stays; what a crash cut off at the end is dropped and the next line starts
afresh; damage anywhere else is an error; several processes may append to one file. Only verdicts are kept: what an
endpoint failed to give is asked again the next time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from steerguard import files
from steerguard.errors import JudgeError
from steerguard.files import Malformed, canonical_json
from steerguard.judging.config import JudgeConfig
from steerguard.judging.prompts import Kind, Question
from steerguard.judging.verdict import NoVerdict, Verdict, read_verdict

try:
    import fcntl
except ImportError:  # Windows: one process to a file there
    fcntl = None  # type: ignore[assignment]

MAX_BYTES = 2**30
_CHUNK = 2**16
_BEGINS = b'{"check":"'


@dataclass(frozen=True)
class Entry:
    """One verdict as it is kept."""

    key: str
    "SHA-256 of everything that decides it: the judge's model and settings, what it was asked, the number of the draw"
    model: str
    kind: str
    value: float | str
    reason: str
    tokens_in: int
    tokens_out: int

    @property
    def verdict(self) -> Verdict:
        return Verdict(self.value, self.reason)


_KINDS: dict[str, files.Kind] = {
    "key": str, "model": str, "kind": str, "value": (float, str), "reason": str, "tokens_in": int, "tokens_out": int,
    "check": str,
}  # fmt: skip


def key_of(judge: JudgeConfig, question: Question, draw: int) -> str:
    """What a verdict is found by; neither where the judge runs nor how patient we are with it is in it."""
    return hashlib.sha256(canonical_json([judge.settings, question.digest, draw]).encode()).hexdigest()


class Cache:
    """The verdicts of a file, or of this object's life if there is none.

    Raises:
        JudgeError: a file that cannot be read or written, or is damaged elsewhere than at its end.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._kept: dict[str, Entry] = {}
        if self.path is not None:
            with self._locked(self.path) as descriptor:
                self._read(self.path, descriptor)

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: str) -> bool:
        return key in self._kept

    def get(self, key: str) -> Entry | None:
        return self._kept.get(key)

    def typical_tokens(self, judge: JudgeConfig, kind: str) -> float:
        """Tokens that a verdict of this judge took on average; what the judge says of itself if too few are known."""
        known = [e.tokens_out for e in self._kept.values() if e.model == judge.model and e.kind == kind and e.tokens_out]
        return sum(known) / len(known) if len(known) >= 8 else judge.typical_tokens

    def add(self, entry: Entry) -> None:
        """Keep a verdict; it is on disk when this returns."""
        self._kept.setdefault(entry.key, entry)
        if self.path is not None:
            with self._locked(self.path) as descriptor:
                _mend(descriptor)
                _append(descriptor, self.path, _line(entry))

    # ------------------------------------------------------------------------------------------------------------

    @contextmanager
    def _locked(self, path: Path) -> Iterator[int]:
        """The file, open for reading and appending, and nobody else's as long as this lasts."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise JudgeError(f"the cache {str(path)!r} cannot be opened: {reason}; choose another place") from error
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)  # gives the lock back

    def _read(self, path: Path, descriptor: int) -> None:
        """Every line of the file; a last one that cannot be read is cut off, if the file is a cache at all."""
        size = os.fstat(descriptor).st_size
        if size > MAX_BYTES:
            raise JudgeError(f"the cache {path} is larger than {MAX_BYTES / 2**30:g} GiB; begin another")
        data = _pread(descriptor, size, 0)
        lines = data.removesuffix(b"\n").split(b"\n") if data else []
        for number, line in enumerate(lines, 1):
            try:
                entry = _entry(line)
                if number == len(lines) and not data.endswith(b"\n"):
                    raise Malformed("it was not written to its end")
            except Malformed as error:
                # somebody else's file, named by mistake, is not cut
                ours = number > 1 or line.startswith(_BEGINS) or _BEGINS.startswith(line)
                if number == len(lines) and ours:
                    os.ftruncate(descriptor, size - len(line) - data.endswith(b"\n"))
                    return
                raise JudgeError(
                    f"{path}:{number} is no verdict of a cache: {error}; take the line out, or begin another cache"
                ) from error
            self._kept.setdefault(entry.key, entry)


def _line(entry: Entry) -> bytes:
    record: dict[str, Any] = asdict(entry)
    return (canonical_json(record | {"check": _check(record)}) + "\n").encode()


def _entry(line: bytes) -> Entry:
    found = files.take(files.strict_json(line), "the line", _KINDS)
    if found.pop("check") != _check(found):
        raise Malformed("its check does not fit what it says")
    entry = Entry(**found)
    try:
        if entry.kind not in get_args(Kind):
            raise NoVerdict(f"there are no verdicts of kind {files.shown(entry.kind)}")
        read_verdict(entry.kind, canonical_json({"score": entry.value, "winner": entry.value}))  # type: ignore[arg-type]
    except NoVerdict as error:
        raise Malformed(str(error)) from error
    return replace(entry, value=entry.value if isinstance(entry.value, str) else float(entry.value))


def _check(record: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(record).encode()).hexdigest()[:16]


def _mend(descriptor: int) -> None:
    """Cut off what stands after the last line break: a line that whoever wrote it did not finish."""
    end = os.fstat(descriptor).st_size
    keep = end
    while keep > 0:
        start = max(0, keep - _CHUNK)
        found = _pread(descriptor, keep - start, start).rfind(b"\n")
        if found >= 0:
            keep = start + found + 1
            break
        keep = start
    if keep < end:
        os.ftruncate(descriptor, keep)


def _pread(descriptor: int, size: int, at: int) -> bytes:
    os.lseek(descriptor, at, os.SEEK_SET)
    parts = []
    while size > 0 and (part := os.read(descriptor, min(size, 2**24))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _append(descriptor: int, path: Path, line: bytes) -> None:
    """The whole line or nothing of it."""
    before = os.fstat(descriptor).st_size
    try:
        while line:
            line = line[os.write(descriptor, line) :]
        os.fsync(descriptor)
    except OSError as error:
        os.ftruncate(descriptor, before)
        raise JudgeError(f"the cache {path} cannot be written: {error.strerror}; what it holds is kept") from error
