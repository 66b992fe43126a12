"""Files made to do harm: nothing in them runs, no memory is taken for them, and each is refused in one sentence."""

from __future__ import annotations

import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from files_of_others import gguf, tensors, torch_file, vectors

import steerguard.exchange.directions as directions
from steerguard.errors import DirectionError
from steerguard.exchange import read_directions


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


def repacked(path: Path, change: bytes | None = None, **options: Any) -> Path:
    """The archive of a `.pt` with another pickle in it, or packed in another way."""
    with zipfile.ZipFile(path) as old:
        entries = {entry.filename: old.read(entry) for entry in old.infolist()}
    with zipfile.ZipFile(path, "w", **options) as new:
        for name, data in entries.items():
            new.writestr(name, change if change is not None and name.endswith("data.pkl") else data)
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_bomb_does_not_go_off(tmp_path: Path, protocol: int) -> None:
    crater = tmp_path / "crater"
    bomb = pickle.dumps({0: Bomb(crater)}, protocol=protocol)
    # the bomb is live: this is what a careless reader would have done
    pickle.loads(bomb)
    assert crater.exists()
    crater.unlink()
    bare = tmp_path / "bare.pt"
    bare.write_bytes(bomb)
    in_archive = repacked(torch_file(tmp_path / "archive.pt", tensors(vectors(1))), bomb)
    torch.save({0: Bomb(crater)}, tmp_path / "saved.pt", pickle_protocol=max(protocol, 2))
    for path in (bare, in_archive, tmp_path / "saved.pt"):
        with pytest.raises(DirectionError) as told:
            read_directions(path)
        assert not crater.exists()
        assert "\n" not in str(told.value)
    for path in (in_archive, tmp_path / "saved.pt"):
        with pytest.raises(DirectionError, match="nothing of it was run"):
            read_directions(path)


def test_the_first_wall_stands_without_the_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were `torch.load` to open anything at all, the bomb would still not be reached."""
    crater = tmp_path / "crater"
    torch.save({0: Bomb(crater)}, tmp_path / "v.pt")
    careless = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: careless(*a, **{**k, "weights_only": False}))
    with pytest.raises(DirectionError, match="exec"):
        read_directions(tmp_path / "v.pt")
    assert not crater.exists()
    torch.load(tmp_path / "v.pt")
    assert crater.exists()


def test_objects_of_other_tools_are_not_built(tmp_path: Path) -> None:
    with pytest.raises(DirectionError, match="Bomb|exec"):
        read_directions(torch_file(tmp_path / "v.pt", {"axis": Bomb(tmp_path / "crater")}))
    with pytest.raises(DirectionError, match="_reconstruct.*dictionary of tensors"):  # a dictionary of numpy arrays
        read_directions(torch_file(tmp_path / "v.pt", vectors(1)))
    with pytest.raises(DirectionError, match="bytearray"):
        read_directions(torch_file(tmp_path / "v.pt", {"axis": bytearray(10)}))


@pytest.mark.parametrize("code", [b"", b"\xff", b"\x80\x02X\xff\xff\xff\x7f", b"\x80\x02I12x\n.", b"\x80\x02}"])
def test_pickles_that_are_none(code: bytes, tmp_path: Path) -> None:
    path = repacked(torch_file(tmp_path / "v.pt", tensors(vectors(1))), code)
    with pytest.raises(DirectionError, match="damaged pickle"):
        read_directions(path)


def test_archives_that_unpack_to_more_than_they_are(tmp_path: Path) -> None:
    path = torch_file(tmp_path / "v.pt", {1: torch.zeros(4_000_000)})
    repacked(path, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    with pytest.raises(DirectionError, match="compressed archive"):
        read_directions(path)


def test_archives_with_two_pickles(tmp_path: Path) -> None:
    """Two readers of one archive may see two files."""
    path = tmp_path / "v.pt"
    for names in (("v/data.pkl", "w/data.pkl"), ("v/data.pkl", "v/other.pkl"), ("v/other.pkl",), ()):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("v/version", b"3")
            for name in names:
                archive.writestr(name, b"\x80\x02}.")
        with pytest.raises(DirectionError, match="holds the pickles"):
            read_directions(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("v/data.pkl", b"\x80\x02}.")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("v/data.pkl", b"\x80\x02}.")
    with pytest.raises(DirectionError, match="holds the pickles"):
        read_directions(path)


@pytest.mark.parametrize("many", [False, True])
def test_a_tensor_that_repeats_a_few_bytes_takes_no_memory(
    many: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directions, "MAX_BYTES", 2**20)  # as much is set aside to read a file
    one = torch.ones(1000)
    content = dict.fromkeys(range(1000), one) if many else {1: one[:1].expand(10**10)}
    path = torch_file(tmp_path / "v.pt", content)
    assert path.stat().st_size < 100_000
    tracemalloc.start()
    with pytest.raises(DirectionError, match="more numbers than"):
        read_directions(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20


def npy(header: str, body: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode("latin1") + body


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 4), }\n"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 4), }\n"),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n", pickle.dumps([1])),
        npy("{'descr': '<i8', 'fortran_order': False, 'shape': (1, 2), }\n", bytes(16)),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': __import__('os').getpid(), }\n"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2), \n", bytes(8)),
        npy("(" * 3000 + "\n"),
        npy("{[]: 1}\n"),
        npy("{'descr': 'nonsense', 'fortran_order': False, 'shape': (1, 2), }\n", bytes(8)),
        b"\x93NUMPY\x09\x00" + bytes(100),
    ],
)
def test_npy_files_that_lie(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "v.npy"
    path.write_bytes(data)
    with pytest.raises(DirectionError, match="v.npy"):
        read_directions(path)


def head(n_tensors: int, n_values: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_values)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


ARCHITECTURE = text("general.architecture") + struct.pack("<I", 8) + text("controlvector")


def tensor_info(name: str, n: int, kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack("<IQIQ", 1, n, kind, offset)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "truncated or damaged"),
        (b"GGML" + bytes(60), "not a GGUF file"),
        (head(0, 0, version=1), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian"),
        (head(2**63, 0), "truncated or damaged"),
        (head(0, 2**63), "truncated or damaged"),
        (head(0, 1) + struct.pack("<Q", 2**62), "truncated or damaged"),
        (head(0, 1) + text("k") + struct.pack("<IIQ", 9, 0, 2**60), "truncated or damaged"),
        (head(0, 1) + text("k") + struct.pack("<IIQ", 9, 8, 2**60), "truncated or damaged"),
        (head(0, 1) + text("k") + struct.pack("<IIQ", 9, 9, 1), "array of kind 9"),
        (head(0, 1) + text("k") + struct.pack("<I", 77), "unknown kind 77"),
        (head(0, 2) + ARCHITECTURE * 2, "twice"),
        (head(0, 1) + struct.pack("<Q", 2) + b"\xff\xff" + bytes(40), "not UTF-8"),
        (head(0, 1) + ARCHITECTURE, "holds no vectors"),
        (head(1, 1) + ARCHITECTURE + tensor_info("direction.1", 2**61), "more bytes than there are"),
        (head(1, 1) + ARCHITECTURE + tensor_info("direction.1", 2, offset=2**60) + bytes(64), "more bytes than there are"),
        (head(1, 1) + ARCHITECTURE + tensor_info("direction.1", 32, kind=8) + bytes(64), "not F32"),
        (head(1, 1) + ARCHITECTURE + text("x") + struct.pack("<I", 2**31), "dimensions"),
        (head(2, 1) + ARCHITECTURE + tensor_info("direction.1", 4) * 2 + bytes(64), "twice"),
        (head(1, 1) + ARCHITECTURE + tensor_info("direction.one", 4) + bytes(64), "'direction.one' among"),
        (
            head(1, 2) + ARCHITECTURE + text("general.alignment") + struct.pack("<II", 4, 0) + tensor_info("direction.1", 4),
            "alignment",
        ),
        (
            head(500, 1) + ARCHITECTURE + b"".join(tensor_info(f"direction.{i}", 1000) for i in range(500)) + bytes(4096),
            "more bytes than there are",
        ),
    ],
)
def test_gguf_files_that_lie(data: bytes, match: str, tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    path.write_bytes(data)
    with pytest.raises(DirectionError, match=match):
        read_directions(path)


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """A file with a few bytes changed, cut off, or doubled."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        changed[rng.integers(len(changed))] = rng.integers(256)
    kind = rng.integers(3)
    return bytes(changed[: rng.integers(1, len(changed))] if kind == 0 else changed + changed if kind == 1 else changed)


def outcome(path: Path) -> tuple[str, dict[int, np.ndarray]]:
    """Why a file is refused, or what is in it."""
    try:
        return "", read_directions(path)
    except DirectionError as error:
        return str(error), {}


@pytest.mark.parametrize("suffix", [".gguf", ".pt", ".npy", ".safetensors"])
def test_damaged_files_are_one_sentence_or_still_directions(suffix: str, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path, known = tmp_path / f"v{suffix}", vectors(1, 2)
    {
        ".gguf": lambda: gguf(path, {f"direction.{k}": v for k, v in known.items()}),
        ".pt": lambda: torch_file(path, tensors(known)),
        ".npy": lambda: np.save(path, np.stack(list(known.values()))),
        ".safetensors": lambda: save_file({str(k): v for k, v in known.items()}, path),
    }[suffix]()
    sound, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(300):
        path.write_bytes(damaged(sound, rng))
        told, found = outcome(path)
        assert "\n" not in told
        assert all(np.isfinite(v).all() and abs(np.linalg.norm(v) - 1) < 1e-5 for v in found.values())
        refused += bool(told)
    assert refused > 50


def test_more_than_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = torch_file(tmp_path / "v.pt", tensors(vectors(1)))
    assert read_directions(path)
    monkeypatch.setattr(directions, "MAX_BYTES", 100)
    with pytest.raises(DirectionError, match="larger than"):
        read_directions(path)


def test_torch_is_loaded_for_torch_files_only(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.ones((2, 4)))
    code = f"import sys; from steerguard.exchange import read_directions; read_directions({str(tmp_path / 'v.npy')!r})"
    code += "; print([m for m in ('torch', 'gguf') if m in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "[]\n"
