"""GGUF files, read without trust.

Only what a control vector needs: the texts of the metadata, and small float tensors. The reader of the package gguf is
not used, because it believes the counts that it finds: a file of a hundred bytes can make it loop for hours. Here every
step takes bytes that are there, so the work is bounded by the file's size.

Source: the GGUF specification, version 3 (ggml, docs/gguf.md).
"""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from steerguard import files
from steerguard.files import Malformed

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
"""Where tensors begin, unless the file says otherwise."""
MAX_DIMENSIONS = 4

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
"""Kind of a metadata value -> its code for `struct`."""
_TEXT, _ARRAY = 8, 9
_TENSORS: dict[int, np.dtype[np.floating[Any]]] = {0: np.dtype("<f4"), 1: np.dtype("<f2"), 28: np.dtype("<f8")}
"""Kind of a tensor -> its dtype; quantised kinds are no kinds of a direction."""


def read_gguf(data: bytes) -> tuple[dict[str, str | int], dict[str, npt.NDArray[np.floating[Any]]]]:
    """The texts and numbers of a GGUF file's metadata, and its tensors. Raises Malformed: "is ...", "holds ..."."""
    reader = _Reader(data)
    # 1. the head
    if reader.take(4) != MAGIC:
        raise Malformed("is not a GGUF file")
    version = reader.number("I")
    if version not in VERSIONS:
        raise Malformed(f"is GGUF of version {version}; read are {' and '.join(map(str, VERSIONS))}, little-endian")
    n_tensors, n_values = reader.number("Q"), reader.number("Q")
    # 2. the metadata; of arrays only the end is looked for
    metadata: dict[str, str | int] = {}
    for _ in range(n_values):
        key = reader.text()
        if key in metadata:
            raise Malformed(f"has the key {files.shown(key)} twice")
        value = reader.value(reader.number("I"))
        metadata[key] = value if isinstance(value, str | int) else str(value)
    # 3. what the tensors are, and then the tensors
    infos = [reader.tensor() for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise Malformed(f"has the alignment {files.shown(alignment)}")
    start = math.ceil(reader.at / alignment) * alignment
    tensors: dict[str, npt.NDArray[np.floating[Any]]] = {}
    left = len(data) - start
    for name, shape, dtype, offset in infos:
        if name in tensors:
            raise Malformed(f"has the tensor {files.shown(name)} twice")
        begin, size = start + offset, math.prod(shape) * dtype.itemsize
        left -= size
        if begin + size > len(data) or left < 0:  # or the same bytes stand for many tensors
            raise Malformed(f"is truncated or damaged: the tensor {files.shown(name)} takes more bytes than there are")
        tensors[name] = np.frombuffer(data, dtype, count=math.prod(shape), offset=begin).reshape(shape)
    return metadata, tensors


class _Reader:
    """A place in the bytes, which only moves on over bytes that are there."""

    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    def take(self, n: int) -> bytes:
        if n > len(self._data) - self.at:
            raise Malformed(f"is truncated or damaged: {n} bytes are announced at byte {self.at}, {len(self._data)} is its end")
        self.at += n
        return self._data[self.at - n : self.at]

    def number(self, code: str) -> int:
        return int(struct.unpack("<" + code, self.take(struct.calcsize(code)))[0])

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise Malformed(f"has a text that is not UTF-8 before byte {self.at}") from error

    def value(self, kind: int) -> str | int | float | None:
        """One value of the metadata; None for an array, which is passed over."""
        if kind == _TEXT:
            return self.text()
        if kind == _ARRAY:
            element, n = self.number("I"), self.number("Q")
            if element in _SCALARS:
                self.take(n * struct.calcsize(_SCALARS[element]))
            elif element == _TEXT:
                for _ in range(n):  # each takes eight bytes at least
                    self.text()
            else:
                raise Malformed(f"has an array of kind {element} in its metadata")
            return None
        if kind not in _SCALARS:
            raise Malformed(f"has a value of the unknown kind {kind} in its metadata")
        found: int | float = struct.unpack("<" + _SCALARS[kind], self.take(struct.calcsize(_SCALARS[kind])))[0]
        return found

    def tensor(self) -> tuple[str, tuple[int, ...], np.dtype[np.floating[Any]], int]:
        """Name, shape, dtype, and offset from where the tensors begin."""
        name = self.text()
        n = self.number("I")
        if n > MAX_DIMENSIONS:
            raise Malformed(f"has a tensor {files.shown(name)} of {n} dimensions; allowed are {MAX_DIMENSIONS}")
        shape = tuple(self.number("Q") for _ in range(n))[::-1]
        kind = self.number("I")
        if kind not in _TENSORS:
            raise Malformed(f"has a tensor {files.shown(name)} that is not F32, F16 or F64 (kind {kind})")
        return name, shape, _TENSORS[kind], self.number("Q")


__all__ = ["read_gguf"]
