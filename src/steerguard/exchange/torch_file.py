"""Files of `torch.save`, opened without running anything that they hold.

They are pickles in a zip. Two walls stand before the content: the pickle is first read as a list of instructions, none of
them carried out, and refused if it names anything but what plain tensors are made of; then `torch.load` opens it with
`weights_only=True`, which calls nothing else either. A file that could unpack to more bytes than it has is refused before both.

This module knows tensors in plain containers, and refuses to know what they mean.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
from typing import Any

import numpy as np

from steerguard import files
from steerguard.files import Malformed

_PARTS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"} | {
    f"torch {kind}Storage"
    for kind in ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
}  # fmt: skip
"""What the pickle of plain tensors in dictionaries names, and nothing else."""
_OTHER_NAMING = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"}
"""Instructions that name or build something in a way that `torch.save` has no use for."""
_MAX_DEPTH = 3
_FAILURES = (
    pickle.UnpicklingError, RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, OverflowError,
    AssertionError, MemoryError, struct.error,
)  # fmt: skip
"""How `torch.load` ends on a damaged file."""


def read_torch(data: bytes) -> Any:
    """What a file of `torch.save` holds: float32 arrays for floating tensors, in dictionaries, with numbers and texts.

    Raises:
        Malformed: "is ..." or "holds ...": no archive of torch, damaged, or one that holds more than tensors.
    """
    _check_pickle(_pickle_of(data))
    import torch  # heavy: loaded when such a file is read, not on import

    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except _FAILURES as error:
        raise Malformed(f"is damaged, or holds more than tensors: {' '.join(str(error).split())[:200]}") from error
    return _Plain(len(data)).of(content, _MAX_DEPTH)


def _pickle_of(data: bytes) -> bytes:
    """The pickle in the archive, which must unpack to no more than it is."""
    if not data.startswith(b"PK\x03\x04"):
        raise Malformed(
            "is not an archive of torch.save; its format before torch 1.6, a pickle alone, is not opened: save it again"
        )
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not stored or sum(entry.file_size for entry in entries) > len(data):
                raise Malformed("is a compressed archive; torch.save writes none, and what it unpacks to has no bound")
            pickles = [name for name in names if name.endswith(".pkl")]
            if len(set(names)) < len(names) or len(pickles) != 1 or not pickles[0].endswith("data.pkl"):
                raise Malformed(f"is not an archive of torch.save: it holds the pickles {files.shown(pickles)}")
            return archive.read(pickles[0])
    except Malformed:
        raise
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError, struct.error, OSError) as error:
        raise Malformed(f"is a damaged archive: {error}; copy it again") from error


def _check_pickle(code: bytes) -> None:
    """Refuse a pickle that names anything but the parts of tensors. Nothing of it is carried out."""
    try:
        for instruction, argument, _ in pickletools.genops(code):
            named = str(argument) if instruction.name == "GLOBAL" else ""
            if instruction.name in _OTHER_NAMING or (named and named not in _PARTS):
                what = files.shown(named.replace(" ", ".") or instruction.name)
                raise Malformed(
                    f"holds {what}, which is code and not a tensor: nothing of it was run; save a tensor or a dictionary of "
                    "tensors by layer, or export GGUF, instead of an object"
                )
    except Malformed:
        raise
    except (ValueError, IndexError, OverflowError, struct.error) as error:
        raise Malformed(f"has a damaged pickle: {str(error)[:200]}") from error


class _Plain:
    """What a loaded file holds, as plain values; all its arrays together are no larger than the file could make them."""

    def __init__(self, n_bytes: int) -> None:
        self._left, self._bytes = n_bytes // 2, n_bytes  # numbers, of two bytes at least

    def of(self, value: Any, depth: int) -> Any:
        """Arrays for tensors; texts, numbers and dictionaries as they are; None for all else."""
        import torch

        if isinstance(value, torch.Tensor):
            if not value.is_floating_point():
                return None
            self._left -= value.numel()
            if self._left < 0:  # views that repeat a few bytes can be of any size
                raise Malformed(f"holds tensors of more numbers than {self._bytes} bytes can be")
            return value.detach().to(torch.float32).numpy().astype(np.float32)
        if isinstance(value, dict) and depth:
            return {key: self.of(one, depth - 1) for key, one in value.items()}
        return value if isinstance(value, str | int | float) else None


__all__ = ["read_torch"]
