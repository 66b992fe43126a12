"""Files: written whole or not at all, and read without trust.

What this module knows: how to write so that a crash leaves the old file or the new one, and how to read bytes, JSON and
safetensors that somebody else wrote. Every reader has a limit and says what is wrong in one sentence. It refuses to
know what the files mean: `guard` and `trait` do.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import secrets
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from steerguard.errors import InputError, OutputExists

MAX_HEADER = 16 * 2**20
"""Bytes of a safetensors header that are looked at; a guard's is a few kilobytes."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What a guard or a trait may be called: letters, digits, dots, dashes, underscores."""
BOM = b"\xef\xbb\xbf"
"""What some editors put before the first byte of a text."""
MAX_DIGITS = 20
"""Digits of an integer in JSON; longer ones are an attack or an accident."""


class Malformed(ValueError):
    """What a file holds is not what it must be. Readers raise it on as their own error, with the file's name."""

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key
        """The key at fault, where there is one: a reader may know its line."""


# ---------------------------------------------------------------------------------------------------- writing


def write_atomically(path: str | os.PathLike[str], data: bytes, *, overwrite: bool = False) -> Path:
    """Write `data` to `path` whole or not at all: a temporary file beside it, synced, then renamed.

    Raises:
        OutputExists: something stands at `path` and `overwrite` is not set, even if it appeared in the meantime.
        InputError: `path` cannot be written, or what stands there is not an ordinary file.
    """
    target = Path(path)
    refuse_existing(target, overwrite=overwrite)
    temporary = target.parent / f".steerguard-{secrets.token_hex(8)}.tmp"
    try:
        # 1. all bytes on disk, under a name that nobody reads; open() rather than mkstemp keeps the user's umask
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            # 2. the name; a link fails where a rename would overwrite what another process has just written
            if overwrite:
                os.replace(temporary, target)
            else:
                _link(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(target.parent)
    except FileExistsError as error:
        raise _exists(target) from error
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror}; choose another place") from error
    return target


def write_json(path: str | os.PathLike[str], value: object, *, overwrite: bool = False) -> Path:
    """Write a value as indented JSON, atomically. Raises as `write_atomically`; InputError for what is no JSON."""
    try:
        canonical_json(value)
    except Malformed as error:
        raise InputError(f"{path} was not written: its content {error}") from error
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return write_atomically(path, text.encode(), overwrite=overwrite)


def refuse_existing(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Before any long work, raise what `write_atomically` would raise for that path."""
    target = Path(path)
    try:
        mode = os.lstat(target).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        if not target.parent.is_dir():
            raise InputError(f"there is no folder {target.parent} to write {target.name} to; create it") from error
        return
    except (OSError, ValueError) as error:
        raise InputError(f"{str(target)!r} cannot be written: {_reason(error)}; choose another place") from error
    if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
        raise InputError(f"{target} is {_what(mode)}, not a file; give the name of a file to write")
    if not overwrite:
        raise _exists(target)


def _exists(target: Path) -> OutputExists:
    return OutputExists(f"{target} exists already; choose another name, or allow it to be overwritten")


def _link(temporary: Path, target: Path) -> None:
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(target):
            raise FileExistsError(target) from None
        os.replace(temporary, target)


def _sync_folder(folder: Path) -> None:
    """Make the new name itself durable, where the system can open folders."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---------------------------------------------------------------------------------------------------- reading


def read_bounded(path: str | os.PathLike[str], *, limit: int, error: type[InputError]) -> bytes:
    """All bytes of an ordinary file of at most `limit` bytes. Raises `error` for all else; never blocks on a pipe."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise error(f"{path} is {_what(status.st_mode)}, not a file")
            data = file.read(limit + 1) if status.st_size <= limit else None
    except FileNotFoundError as cause:
        raise error(f"there is no file {path}; check the path") from cause
    except (OSError, ValueError) as cause:
        raise error(f"{str(path)!r} cannot be read: {_reason(cause)}") from cause
    if data is None or len(data) > limit:
        raise error(f"{path} is larger than {limit / 2**20:g} MiB, the most that is read of such a file")
    return data


def numbered_lines(path: str | os.PathLike[str], *, limit: int, error: type[InputError]) -> Iterator[tuple[str, bytes]]:
    """Each line of a file with where it stands, `path:line`. Blank lines, CRLF and a byte-order mark may be."""
    data = read_bounded(path, limit=limit, error=error)
    for number, line in enumerate(data.removeprefix(BOM).split(b"\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line


def read_tensors(
    path: str | os.PathLike[str], *, key: str, dtypes: Mapping[str, str], limit: int, error: type[InputError]
) -> tuple[dict[str, npt.NDArray[Any]], str]:
    """The tensors of a safetensors file, and the text under `key` in its metadata.

    Args:
        key: the one metadata key that the file must have.
        dtypes: the tensors that the file must have, neither more nor fewer: name -> safetensors dtype, such as F32.
        limit: the most bytes that are read.
        error: what is raised, with the path and one sentence, for every other file.
    """
    data = read_bounded(path, limit=limit, error=error)
    try:
        text = _metadata(data, key, dtypes)
        return _tensors(data), text
    except Malformed as cause:
        raise error(f"{path} {cause}") from cause


def _metadata(data: bytes, key: str, dtypes: Mapping[str, str]) -> str:
    """Check a safetensors header against what it must hold, before the library sees it."""
    # 1. the header's length, which a hostile file sets as it likes
    if not data:
        raise Malformed("is empty; it was not written to its end")
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER:
        if data.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
            raise Malformed("looks like a pickle or a torch archive; steerguard reads safetensors and opens no pickles")
        raise Malformed(f"is not a safetensors file: its header would be {length} bytes, allowed are {MAX_HEADER}")
    if len(data) < 8 + length:
        raise Malformed("is truncated, or is not a safetensors file; copy it again")
    # 2. the header itself
    try:
        header = strict_json(data[8 : 8 + length])
    except Malformed as cause:
        raise Malformed(f"is damaged, or is not a safetensors file: its header {cause}") from cause
    entries = header if isinstance(header, dict) else {}
    metadata = entries.pop("__metadata__", None)
    text = metadata.get(key) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise Malformed(f"is a safetensors file without {key!r} in its metadata: another program wrote it")
    # 3. what it says that the tensors are
    found = {name: entry.get("dtype") if isinstance(entry, dict) else None for name, entry in entries.items()}
    if found != dict(dtypes):
        raise Malformed(f"must hold the tensors {shown(dict(dtypes))}, got {shown(found)}")
    return text


def _tensors(data: bytes) -> dict[str, npt.NDArray[Any]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors: dict[str, npt.NDArray[Any]] = load(data)
    except (SafetensorError, ValueError) as cause:
        raise Malformed(f"is damaged: {str(cause)[:200]}; copy it again") from cause
    return tensors


def tensors_to_bytes(tensors: Mapping[str, npt.NDArray[Any]], *, key: str, text: str) -> bytes:
    """A safetensors file that `read_tensors` reads. Raises Malformed if the text is longer than a header may be."""
    from safetensors.numpy import save

    if len(json.dumps(text)) > MAX_HEADER - 2**16:
        raise Malformed(f"would have metadata of more than {MAX_HEADER / 2**20:g} MiB")
    data: bytes = save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, metadata={key: text})
    return data


# ------------------------------------------------------------------------------------------------------- JSON


def strict_json(text: str | bytes) -> Any:
    """What a JSON text says, if it says it once.

    Refused, beyond what is not JSON: duplicate keys, NaN and infinities, numbers that overflow, integers of more than
    20 digits, text that is not Unicode, and nesting deeper than the interpreter can follow.

    Raises:
        Malformed: one clause that follows the name of what was read: "is not JSON: ...".
    """
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(
            decoded, object_pairs_hook=_once, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_integer
        )
        if "\\ud" in decoded.lower():  # an escaped half of a surrogate pair is valid JSON and no text
            canonical_json(value)
    except UnicodeDecodeError as cause:
        raise Malformed(f"is not UTF-8 text: {cause.reason}") from cause
    except json.JSONDecodeError as cause:
        line = f"line {cause.lineno}, " if "\n" in cause.doc.strip() else ""
        raise Malformed(f"is not JSON: {cause.msg} at {line}column {cause.colno}") from cause
    except RecursionError as cause:
        raise Malformed("is nested too deeply") from cause
    return value


def canonical_json(value: object) -> str:
    """The one JSON text of a value: keys sorted, no spaces, Unicode as it is. Raises Malformed for what has none."""
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
    except (TypeError, ValueError, RecursionError) as cause:
        raise Malformed(f"cannot be written as JSON: {cause}") from cause
    return text


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise Malformed(f"has the key {shown(twice)} twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise Malformed(f"holds {name}; numbers must be finite")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise Malformed(f"holds the number {shown(digits)}; numbers must be finite")
    return number


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise Malformed(f"holds an integer of {len(digits)} digits; allowed are {MAX_DIGITS}")
    return int(digits)


# -------------------------------------------------------------------------------------------- what a value must be

Kind = type | tuple[type, ...]
_NAMES = {str: "text", int: "an integer", float: "a number", bool: "true or false", dict: "an object", list: "a list"}
_NAMES[type(None)] = "null"


def take(
    value: object, what: str, required: Mapping[str, Kind], optional: Mapping[str, Kind] | None = None
) -> dict[str, Any]:
    """`value` as an object with exactly these keys of these kinds. `float` admits integers; only `bool` admits a bool.

    Raises:
        Malformed: naming `what`, the key, what was got and what is allowed.
    """
    if not isinstance(value, dict):
        raise Malformed(f"{what} must be an object, got {shown(value)}")
    kinds = {**required, **(optional or {})}
    for key in value:
        if key not in kinds:
            raise Malformed(f"{what} has an unknown key {shown(key)}; allowed are {', '.join(kinds)}", key)
    for key in required:
        if key not in value:
            raise Malformed(f"{what} lacks the key {key!r}; it needs {', '.join(required)}")
    return {key: of_kind(value[key], f"{key!r} of {what}", kinds[key], key) for key in value}


def of_kind(value: object, what: str, kind: Kind, key: str | None = None) -> Any:
    """`value` if it is of that kind; raises Malformed if not."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    admitted = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, admitted) or (isinstance(value, bool) and bool not in kinds):
        raise Malformed(f"{what} must be {' or '.join(_NAMES[k] for k in kinds)}, got {shown(value)}", key)
    return value


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60
_short.maxlevel = 3


def shown(value: object) -> str:
    """A value as it stands in a message: short, on one line, whatever it is."""
    return _short.repr(value)


def printable(text: str) -> str:
    """Text of a file that somebody else wrote, fit for a terminal: one line, control characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _what(mode: int) -> str:
    return "a folder" if stat.S_ISDIR(mode) else "a device, pipe or socket"
