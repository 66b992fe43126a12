"""Fitting: from a model and a trait to one probe per layer.

Three steps, each usable alone: `collect` the model's own answers under both poles of every train scenario (a
`Contrast`, kept in an append-only file so that an interrupted run goes on where it was), `embed` them as the mean
residual over each answer's tokens at every layer, and fit a probe per layer. `fit` does all three; `fit_statistics` does
them for directions that another tool has found.

Source: arXiv 2604.08169, section 3: pairs are on-policy; one embedding per answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np

from steerguard import files, probe_file
from steerguard.backends.base import Backend, Floats, Sampling
from steerguard.errors import ContrastError, DirectionError, FitFileError, InputError, OutputExists
from steerguard.files import Malformed, canonical_json
from steerguard.guard import Guard, Positions
from steerguard.identity import ModelIdentity, read_identity
from steerguard.journal import Journal
from steerguard.probe import Direction, Probes, fit_probes, ranges
from steerguard.prompts import Message, conversation
from steerguard.rules import Rule
from steerguard.traits import Scenario, Split, Trait

CONTRAST, PROBES = "contrast.jsonl", "probes.safetensors"
"""The files of a fit's folder: the answers as they came, and the probes."""
SCHEMA = 1
"""Version of the probes' file."""
MAX_BYTES = 2**30

Context = Literal["own", "neutral"]
"""When an answer is read again: under the system prompt that it was given under, or under none."""


class Stage(Protocol):
    """Progress of long work: told what is being done, how much of it is done, of how much; tokens per second if any come."""

    def __call__(self, what: str, done: int, total: int, rate: float = 0.0, /) -> None: ...


@dataclass(frozen=True)
class Pair:
    """The model's own answers to one scenario under both poles."""

    scenario: Scenario
    positive: str
    negative: str

    @property
    def usable(self) -> bool:
        return bool(self.positive.strip()) and bool(self.negative.strip())


@dataclass(frozen=True)
class Contrast:
    """The model's own answers to the train scenarios under both poles."""

    pairs: tuple[Pair, ...]

    @property
    def digest(self) -> str:
        "SHA-256 of the scenarios' ids and the answers"
        rows = [[p.scenario.id, p.positive, p.negative] for p in self.pairs]
        return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()

    def usable(self) -> tuple[Pair, ...]:
        """The pairs in which both answers say something. Raises ContrastError if there are none."""
        usable = tuple(pair for pair in self.pairs if pair.usable)
        if not usable:
            raise ContrastError(
                f"all {len(self.pairs)} pairs have an empty answer; ask the model one of the scenarios by hand: "
                "is its chat template right, does it end its turn at once?"
            )
        return usable


@dataclass(frozen=True, repr=False)
class Fit(Probes):
    """One probe per layer, the model that they belong to, and how they came to be."""

    model: ModelIdentity = field(kw_only=True)
    provenance: Mapping[str, Any] = field(kw_only=True)
    "JSON values: trait, contrast, sampling, seeds, library versions"

    def guard(self, rule: Rule, layer: int | Sequence[int], *, positions: Positions = "all", name: str | None = None,
              chosen: Mapping[str, Any] | None = None, allow_weak: bool = False) -> Guard:  # fmt: skip
        """A guard with this rule on one layer or on several.

        Args:
            chosen: how the operating point was found, kept in the guard's provenance.
        """
        layers = sorted({layer} if isinstance(layer, int) else set(layer))
        return Guard(
            name=name or str(self.provenance["trait"]["name"]),
            probes=tuple(self[i] for i in layers),
            rule=rule,
            model=self.model,
            positions=positions,
            provenance={**self.provenance, "chosen": dict(chosen) if chosen else {"by": "hand"}},
            allow_weak=allow_weak,
        )

    def save(self, folder: Path, *, overwrite: bool = False) -> Path:
        """Write the probes to `folder/probes.safetensors`, whole or not at all; returns the file's path.

        Raises:
            OutputExists: the file exists and `overwrite` is not set.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tensors, evidence = probe_file.pack(list(self.values()))
        record: dict[str, Any] = {
            "schema": SCHEMA, "layers": list(self), "evidence": evidence, "model": asdict(self.model),
            "provenance": dict(self.provenance),
        }  # fmt: skip
        record["checksum"] = probe_file.checksum(record, tensors)
        data = files.tensors_to_bytes(tensors, key=_KEY, text=canonical_json(record))
        return files.write_atomically(folder / PROBES, data, overwrite=overwrite)

    @classmethod
    def load(cls, folder: Path) -> Fit:
        """Read what `save` wrote. Raises FitFileError, one sentence with the path, for anything else."""
        path = folder / PROBES
        if not path.exists():
            step = f"`steerguard fit MODEL --trait NAME -o {folder}` makes them"
            raise FitFileError(f"there are no fitted probes in {folder}; {step}")
        tensors, text = files.read_tensors(path, key=_KEY, dtypes=probe_file.DTYPES, limit=MAX_BYTES, error=FitFileError)
        try:
            record = probe_file.open_record(text, _RECORD, SCHEMA, tensors)
            probes = probe_file.unpack(record["layers"], record["evidence"], tensors)
            by_layer = {probe.layer: probe for probe in probes}
            return cls(by_layer, model=read_identity(record["model"]), provenance=record["provenance"])
        except (Malformed, InputError) as error:
            raise FitFileError(f"{path} holds no probes that can be used: {error}") from error


_KEY = "steerguard-probes"
_RECORD: dict[str, files.Kind] = {
    "schema": int, "layers": list, "evidence": list, "model": dict, "provenance": dict, "checksum": str,
}  # fmt: skip


def prompts_of(scenario: Scenario) -> tuple[list[Message], list[Message]]:
    """The scenario as two conversations: under the positive and under the negative system prompt."""
    return conversation(scenario.positive, scenario.turns), conversation(scenario.negative, scenario.turns)


# ------------------------------------------------------------------------------------------------ 1. collect


def collect(
    model: Backend,
    trait: Trait,
    *,
    split: Split = "train",
    sampling: Sampling = Sampling(),
    store: Path | None = None,
    batch: int = 16,
    progress: Stage | None = None,
) -> Contrast:
    """The model's own answers to every scenario of a split, by default `train`, under both poles.

    Args:
        store: a JSON-lines file that answers are appended to, batch by batch, and read back from.

    Raises:
        OutputExists: `store` was written for another trait, split, model or sampling.
    """
    key = {"trait": trait.digest, "weights": dict(model.identity.weights), "sampling": asdict(sampling)}
    if split != "train":
        key["split"] = split
    scenarios = trait.split(split)
    with closing(_Store(store, key)) as answers:
        todo = [scenario for scenario in scenarios if scenario.id not in answers.kept]
        for start in range(0, len(todo), batch):
            _report(progress, "answers under both poles", len(scenarios) - len(todo) + start, len(scenarios))
            part = todo[start : start + batch]
            prompts = [prompt for scenario in part for prompt in prompts_of(scenario)]
            texts = [answer.text for answer in model.generate(prompts, sampling=sampling)]
            answers.add({s.id: (texts[2 * i], texts[2 * i + 1]) for i, s in enumerate(part)})
        _report(progress, "answers under both poles", len(scenarios), len(scenarios))
        return Contrast(tuple(Pair(s, *answers.kept[s.id]) for s in scenarios))


class _Store:
    """Answers by scenario, in a journal whose first record says what they are answers to."""

    def __init__(self, path: Path | None, key: Mapping[str, Any]) -> None:
        self._journal = Journal(path)
        if not self._journal.records:
            self._journal.add({"contrast": key})
        head, *rows = self._journal.records
        if head != {"contrast": json.loads(canonical_json(key))}:
            self._journal.close()
            raise OutputExists(f"{path} holds answers of another trait, model or sampling; choose another folder or remove it")
        self.kept = {row["id"]: (row["positive"], row["negative"]) for row in rows}

    def add(self, answers: Mapping[str, tuple[str, str]]) -> None:
        for key, (positive, negative) in answers.items():
            self._journal.add({"id": key, "positive": positive, "negative": negative})
        self.kept.update(answers)

    def close(self) -> None:
        self._journal.close()


# ------------------------------------------------------------------------------------------------ 2. embed


def embed(
    model: Backend, contrast: Contrast, *, context: Context = "own", layers: Sequence[int] | None = None, batch: int = 32,
    progress: Stage | None = None,
) -> tuple[Floats, Floats]:  # fmt: skip
    """Answer-averaged residuals of the usable pairs: `[n, layers, d]` float32 for each pole.

    Args:
        layers: those that are read; every layer if None.
        context: `own` reads an answer under the system prompt it was given under; `neutral` under none, so that a
            probe cannot read the system prompt itself.
    """
    if context not in get_args(Context):
        raise ContrastError(f"there is no context {context!r}; there are {', '.join(get_args(Context))}")
    usable = contrast.usable()
    exchanges = []
    for pair in usable:
        own = prompts_of(pair.scenario)
        neutral = conversation(None, pair.scenario.turns)
        exchanges += [(own[0] if context == "own" else neutral, pair.positive)]
        exchanges += [(own[1] if context == "own" else neutral, pair.negative)]
    parts = []
    for start in range(0, len(exchanges), 2 * batch):
        _report(progress, "residuals of answers", start // 2, len(usable))
        parts.append(model.capture(exchanges[start : start + 2 * batch], layers=layers))
    _report(progress, "residuals of answers", len(usable), len(usable))
    rows = np.concatenate(parts)
    return rows[0::2], rows[1::2]


# ------------------------------------------------------------------------------------------------ 3. fit


def fit(
    model: Backend,
    trait: Trait,
    *,
    direction: Direction = "logistic",
    context: Context = "own",
    sampling: Sampling = Sampling(),
    contrast: Contrast | None = None,
    store: Path | None = None,
    allow_weak: bool = False,
    progress: Stage | None = None,
) -> Fit:
    """One probe per layer, from the model's own answers to the trait's train scenarios.

    Args:
        contrast: answers that were collected before; collected now if None.
        store: see `collect`.
        allow_weak: return probes even if none of them reads held-out answers.

    Raises:
        ContrastError: too few pairs, or activations that are not finite.
        WeakProbe: no layer tells the poles apart on held-out answers.
    """
    contrast = contrast or collect(model, trait, sampling=sampling, store=store, progress=progress)
    pos, neg = embed(model, contrast, context=context, progress=progress)
    probes = _probes(
        pos, neg, contrast, range(pos.shape[1]), direction, seed=sampling.seed, allow_weak=allow_weak, progress=progress
    )
    how = {"direction": direction, "context": context, "sampling": asdict(sampling)}
    return Fit(probes.by_layer, model=model.identity, provenance=_provenance(trait, contrast, how))


def fit_statistics(
    model: Backend,
    trait: Trait,
    directions: Mapping[int, Floats],
    *,
    source: str = "unnamed",
    context: Context = "own",
    sampling: Sampling = Sampling(),
    contrast: Contrast | None = None,
    store: Path | None = None,
    allow_weak: bool = False,
    progress: Stage | None = None,
) -> Fit:
    """One probe per given direction: its boundary, statistics and evidence, from the model's own answers as in `fit`.

    The direction stays as it is, but one that points to the negative pole is turned round; the provenance lists the layers
    where that was done. m is the boundary of a logistic regression (C = 1.0) on the projections alone. The evidence is
    cross-validated as in `fit`: sign and boundary come from the other folds, so that noise has an AUROC of a half and not
    of whichever side suits it. Whether the direction was found on other answers than these is yours to know: one that was
    found on these scenarios reads them too well.

    Args:
        directions: by layer, `[d]` float32 unit vectors; layer L is the output of block L, 0 the first. What
            `steerguard.exchange.read_directions` gives.
        source: where they come from, for the provenance.

    Raises:
        DirectionError: there are none, or a layer or a width that the model does not have.
        ContrastError: too few pairs, activations that are not finite, or a direction that is no unit vector.
        WeakProbe: no layer tells the poles apart on held-out answers.
    """
    layers = _layers_of(directions, model.identity)
    contrast = contrast or collect(model, trait, sampling=sampling, store=store, progress=progress)
    pos, neg = embed(model, contrast, context=context, progress=progress)
    probes = _probes(
        pos[:, layers], neg[:, layers], contrast, layers, directions,
        seed=sampling.seed, allow_weak=allow_weak, progress=progress,
    )  # fmt: skip
    digest = hashlib.sha256()
    for layer in layers:
        digest.update(f"{layer}:".encode() + np.asarray(directions[layer], dtype="<f4").tobytes())
    turned = [layer for layer in layers if float(probes[layer].v @ directions[layer]) < 0]
    how = {
        "direction": "given", "directions": {"source": source, "sha256": digest.hexdigest(), "turned_round": turned},
        "context": context, "sampling": asdict(sampling),
    }  # fmt: skip
    return Fit(probes.by_layer, model=model.identity, provenance=_provenance(trait, contrast, how))


def _layers_of(directions: Mapping[int, Floats], model: ModelIdentity) -> list[int]:
    """The layers of directions that this model can have."""
    layers = sorted(directions)
    if not layers:
        raise DirectionError("there are no directions to fit statistics on; give one per layer")
    if layers[0] < 0 or layers[-1] >= model.depth:
        raise DirectionError(
            f"the directions are for layers {ranges(layers)}, {model.name} has layers 0-{model.depth - 1}; a file with one row "
            "more than the model has blocks counts the embeddings as its first: leave that row out"
        )
    wrong = {layer: len(directions[layer]) for layer in layers if len(directions[layer]) != model.width}
    if wrong:
        layer, width = next(iter(wrong.items()))
        raise DirectionError(f"the direction of layer {layer} has width {width}, the residuals of {model.name} {model.width}")
    return layers


def _probes(
    pos: Floats, neg: Floats, contrast: Contrast, layers: Sequence[int], direction: Direction | Mapping[int, Floats], *,
    seed: int, allow_weak: bool, progress: Stage | None,
) -> Probes:  # fmt: skip
    return fit_probes(
        pos, neg,
        layers=layers,
        scenarios=["\n".join(pair.scenario.turns) for pair in contrast.usable()],  # variants of one prompt: one side of a fold
        direction=direction, seed=seed, allow_weak=allow_weak,
        progress=None if progress is None else lambda done, total: progress("probes", done, total),
    )  # fmt: skip


def _provenance(trait: Trait, contrast: Contrast, how: Mapping[str, Any]) -> dict[str, Any]:
    usable = len(contrast.usable())
    return {
        "trait": {"name": trait.name, "sha256": trait.digest, "scorer": trait.scorer},
        "contrast": {"sha256": contrast.digest, "pairs": usable, "dropped": len(contrast.pairs) - usable},
        "fit": dict(how),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of the libraries that a fit depends on."""
    return {name: metadata.version(name) for name in ("steerguard", "numpy", "scikit-learn", "torch", "transformers")}


def _report(progress: Stage | None, what: str, done: int, total: int) -> None:
    if progress is not None:
        progress(what, done, total)


__all__ = ["CONTRAST", "PROBES", "Context", "Contrast", "Fit", "Pair", "Stage", "collect", "embed", "fit", "fit_statistics"]
