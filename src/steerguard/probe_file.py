"""Probes in a file: as tensors and a record, which a guard file and a folder of fitted probes share.

Nothing that is read is trusted; what is wrong is Malformed, one clause that follows the file's name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from steerguard import files
from steerguard.files import Malformed, canonical_json
from steerguard.probe import Evidence, Probe

Tensors = dict[str, npt.NDArray[Any]]
DTYPES = {"v": "F32", "statistics": "F64"}
"""The tensors that probes are written as: v `[layers, d]` and statistics `[layers, 5]`."""
STATISTICS = ("m", "mu_pos", "sigma_pos", "mu_neg", "sigma_neg")
_EVIDENCE: dict[str, files.Kind] = {f.name: int if f.name.startswith("n_") else float for f in fields(Evidence)}


def pack(probes: Sequence[Probe]) -> tuple[Tensors, list[dict[str, int | float]]]:
    """Probes as tensors, and the evidence of each as JSON values."""
    statistics = [[getattr(probe, key) for key in STATISTICS] for probe in probes]
    tensors: Tensors = {"v": np.stack([probe.v for probe in probes]), "statistics": np.array(statistics, dtype=np.float64)}
    return tensors, [{key: _number(x) for key, x in asdict(probe.evidence).items()} for probe in probes]


def unpack(layers: Sequence[Any], evidence: Sequence[Any], tensors: Mapping[str, npt.NDArray[Any]]) -> tuple[Probe, ...]:
    """The probes that `pack` took apart. Raises Malformed, or ContrastError for a probe that cannot be."""
    layers = [files.of_kind(layer, "a layer", int) for layer in layers]
    n = len(layers)
    v, statistics = tensors["v"], tensors["statistics"]
    if v.ndim != 2 or len(v) != n or statistics.shape != (n, len(STATISTICS)) or len(evidence) != n:
        raise Malformed(
            f"for {n} layers v must be [{n}, d], statistics [{n}, {len(STATISTICS)}] and evidence {n} long, "
            f"got {list(v.shape)}, {list(statistics.shape)} and {len(evidence)}"
        )
    return tuple(
        Probe(
            layer=layer, v=v[i],
            **{key: float(x) for key, x in zip(STATISTICS, statistics[i], strict=True)},
            evidence=Evidence(**files.take(evidence[i], f"the evidence of layer {layer}", _EVIDENCE)),
        )
        for i, layer in enumerate(layers)
    )  # fmt: skip


def open_record(
    text: str, kinds: Mapping[str, files.Kind], schema: int, tensors: Mapping[str, npt.NDArray[Any]]
) -> dict[str, Any]:
    """The JSON record of a file, of a version that is known and with the checksum that it was written with."""
    try:
        record = files.strict_json(text)
    except Malformed as error:
        raise Malformed(f"its metadata {error}") from error
    version = record.get("schema") if isinstance(record, dict) else None
    if type(version) is int and version > schema:
        raise Malformed(f"its schema is version {version}, this steerguard reads {schema}; upgrade steerguard")
    files.take(record, "its metadata", kinds)
    if version != schema:
        raise Malformed(f"its schema is version {version}, this steerguard reads {schema}")
    if record["checksum"] != checksum(record, tensors):
        raise Malformed("its content does not have the checksum that it was written with; copy it again")
    found: dict[str, Any] = record
    return found


def _number(x: float) -> int | float:
    """A Python number of one that may be numpy's."""
    return int(x) if isinstance(x, int | np.integer) else float(x)


def checksum(record: Mapping[str, Any], tensors: Mapping[str, npt.NDArray[Any]]) -> str:
    """SHA-256 of everything in the file but this, so that no damage goes unseen; it is no signature."""
    content = canonical_json({key: value for key, value in record.items() if key != "checksum"}).encode()
    for name in sorted(tensors):
        content += tensors[name].astype(tensors[name].dtype.newbyteorder("<")).tobytes()
    return hashlib.sha256(content).hexdigest()
