"""Guards: what may be one, what its digest covers, the file and all that is refused of it, the hub."""

from __future__ import annotations

import copy
import json
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from steerguard import files, guard_card, probe_file
from steerguard.errors import GuardFileError, GuardMismatch, InputError, OutputExists, RuleError, WeakProbe
from steerguard.guard import SCHEMA, Guard
from steerguard.identity import ModelIdentity
from steerguard.probe import Evidence, Probe
from steerguard.rules import RULES, Floor, Rule, StMP, StTP, SwFC, rule

D = 12
EVIDENCE = Evidence(0.98, 0.93, 1.0, 3.1, 0.9, 0.95, 50, 48)
MODEL = ModelIdentity(
    name="Org/Model-1B", architecture="LlamaForCausalLM", width=D, depth=6,
    weights={"model.embed": "a" * 64, "model.layers.3.mlp": "b" * 64}, tokenizer="c" * 64, chat_template="d" * 64,
)  # fmt: skip


def probe(layer: int = 2, *, d: int = D, seed: int = 0, **changes: Any) -> Probe:
    v = np.random.default_rng([seed, layer]).normal(size=d)
    v = (v / np.linalg.norm(v)).astype(np.float32)
    values: dict[str, Any] = {"m": 0.125, "mu_pos": 1.1, "sigma_pos": 0.3, "mu_neg": -0.9, "sigma_neg": 0.2}
    return Probe(layer, v, **(values | {"evidence": EVIDENCE} | changes))


def guard(**changes: Any) -> Guard:
    values: dict[str, Any] = {"name": "honesty", "probes": (probe(2), probe(4)), "rule": StTP(12), "model": MODEL}
    return Guard(**(values | {"provenance": {"trait": {"sha256": "e" * 64}, "seed": 42}} | changes))


# ------------------------------------------------------------------------------------------------- what is a guard


def test_gates_are_the_rule_compiled_with_each_probe() -> None:
    g = guard()
    assert g.layers == (2, 4)
    assert [(p.layer, gate) for p, gate in g.gates()] == [(p.layer, StTP(12).compile(p)) for p in g.probes]


@pytest.mark.parametrize("name", ["honesty", "a", "0", "A.b-c_1", "x" * 64])
def test_names(name: str) -> None:
    assert guard(name=name).name == name


@pytest.mark.parametrize("name", ["", "x" * 65, "a b", "a/b", "..", ".a", "-a", "a\n", "é", "a\x1b[2J"])
def test_names_refused(name: str) -> None:
    with pytest.raises(InputError, match="a guard's name is"):
        guard(name=name)


@pytest.mark.parametrize(
    ("changes", "error", "what"),
    [
        ({"probes": ()}, InputError, "at least one probe"),
        ({"probes": (probe(2), probe(2))}, InputError, r"layers must increase .* got \[2, 2\]"),
        ({"probes": (probe(4), probe(2))}, InputError, "layers must increase"),
        ({"probes": (probe(6),)}, InputError, "below the model's depth 6"),
        ({"probes": (probe(2), probe(3, d=D + 1))}, InputError, "layer 3 has width 13, the model's residual stream 12"),
        ({"positions": "prompt"}, InputError, "positions must be all or response, got 'prompt'"),
        ({"positions": ["all"]}, InputError, "positions must be"),
        ({"probes": (probe(2, evidence=replace(EVIDENCE, auroc_low=0.4)),)}, WeakProbe, "layer 2 reads nothing"),
        ({"probes": (probe(2, evidence=replace(EVIDENCE, cohens_d=float("nan"))),)}, InputError, "is not finite"),
        ({"probes": (probe(2), probe(3, m=5.0))}, RuleError, "needs a boundary between the classes"),
        ({"rule": SwFC(1e300)}, RuleError, "range of float32"),
        ({"provenance": {"a": {1, 2}}}, InputError, "the provenance cannot be written as JSON"),
        ({"provenance": {"a": float("nan")}}, InputError, "the provenance cannot be written as JSON"),
        ({"provenance": {"a": 10**30}}, InputError, "the provenance holds an integer of 31 digits"),
    ],
)
def test_refused(changes: dict[str, Any], error: type[InputError], what: str) -> None:
    with pytest.raises(error, match=what):
        guard(**changes)


def test_a_weak_probe_may_be_allowed() -> None:
    weak = probe(2, evidence=replace(EVIDENCE, auroc_low=0.4))
    g = guard(probes=(weak,), allow_weak=True)
    assert "WEAK" in repr(g)
    assert "WEAK" in g.describe()
    assert "WEAK" not in repr(guard())


def test_an_unregistered_rule_is_refused() -> None:
    @dataclass(frozen=True)
    class Mine(Rule):
        summary = "nothing that a file could name"

        def compile(self, probe: Any) -> Any:
            return SwFC(1).compile(probe)

    with pytest.raises(RuleError, match="not a registered rule"):
        guard(rule=Mine())


def test_a_guard_holds_its_own_copy() -> None:
    provenance: dict[str, Any] = {"trait": {"name": "x"}}
    weights = {"a": "0" * 64}
    g = guard(provenance=provenance, model=replace(MODEL, weights=weights), probes=[probe(2)])
    digest = g.digest
    provenance["trait"]["name"] = "y"
    weights["a"] = "1" * 64
    assert g.provenance["trait"]["name"] == "x"
    assert replace(g).digest == digest
    assert isinstance(g.probes, tuple)


def test_identities() -> None:
    for changes in ({"width": 0}, {"depth": 0}):
        with pytest.raises(InputError, match="at least 1"):
            replace(MODEL, **changes)
    with pytest.raises(InputError, match="no fingerprint"):
        replace(MODEL, weights={})


# ------------------------------------------------------------------------------------------------------- the digest

FLIPPED = probe(2).v.copy()
FLIPPED[0] = -FLIPPED[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"probes": (probe(2), probe(5))},
        {"probes": (probe(2),)},
        {"probes": (replace(probe(2), v=FLIPPED), probe(4))},
        {"probes": (probe(2, sigma_pos=0.30001), probe(4))},
        {"rule": StTP(12.5)},
        {"rule": StMP(1)},
        {"positions": "response"},
        {"model": replace(MODEL, tokenizer="0" * 64)},
        {"model": replace(MODEL, weights={"model.embed": "a" * 64})},
    ],
)
def test_the_digest_covers_what_the_guard_does(changes: dict[str, Any]) -> None:
    assert guard(**changes).digest != guard().digest


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"provenance": {}},
        {"rule": StTP(12.0)},
        {"model": replace(MODEL, name="/somewhere/else")},
        {"probes": tuple(replace(p, evidence=replace(EVIDENCE, auroc=0.97)) for p in guard().probes)},
        {"allow_weak": True},
    ],
)
def test_the_digest_covers_nothing_else(changes: dict[str, Any]) -> None:
    assert guard(**changes).digest == guard().digest


def test_the_digest_is_the_same_on_every_machine() -> None:
    """Written down once: a guard whose digest moves is another guard to every server, cache and report."""
    v = np.zeros(D, dtype=np.float32)
    v[3] = 1
    assert guard(probes=(replace(probe(2), v=v),)).digest == DIGEST


DIGEST = "c338ec0fb9fe573a0e147fa825ffaf26b599a549d5071e413749004b022194bd"

# ------------------------------------------------------------------------------------------------------- the model


def test_its_own_model_is_accepted() -> None:
    guard().check_model(replace(MODEL, name="a copy of it"))


DIFFERENT = {
    "width": 13, "depth": 7, "architecture": "Qwen3ForCausalLM", "tokenizer": "0" * 64, "chat_template": "",
    "weights": {"model.embed": "a" * 64, "model.layers.3.mlp": "0" * 64},
}  # fmt: skip


@pytest.mark.parametrize("key", DIFFERENT)
def test_each_difference_is_refused_and_only_the_named_is_waived(key: str) -> None:
    other = replace(MODEL, name="Other", **{key: DIFFERENT[key]})
    with pytest.raises(GuardMismatch, match=f"'Org/Model-1B', not for 'Other': {key}") as caught:
        guard().check_model(other)
    assert caught.value.differs == (key,)
    others = [name for name in ModelIdentity.WAIVABLE if name != key]
    with pytest.raises(GuardMismatch):
        guard().check_model(other, allow_mismatch=others)
    if key in ModelIdentity.WAIVABLE:
        assert f"allow_mismatch=('{key}',)" in str(caught.value)
        guard().check_model(other, allow_mismatch=[key])
        guard().check_model(other, allow_mismatch=key)
    else:
        assert "cannot be waived" in str(caught.value)
        with pytest.raises(InputError, match=f"cannot waive {key}; allow_mismatch can waive architecture, weights"):
            guard().check_model(other, allow_mismatch=(key,))


def test_all_differences_are_named_at_once() -> None:
    with pytest.raises(GuardMismatch) as caught:
        guard().check_model(replace(MODEL, **DIFFERENT), allow_mismatch=("tokenizer",))
    assert set(caught.value.differs) == set(DIFFERENT) - {"tokenizer"}
    for text in ("12, got 13", "dddddddddddd..., got none", "bbbbbbbbbbbb..., got 000000000000..."):
        assert f"expected {text}" in str(caught.value)


def test_a_parameter_that_is_not_there_differs() -> None:
    for weights in ({"model.embed": "a" * 64}, {**MODEL.weights, "more": "0" * 64}):
        with pytest.raises(GuardMismatch, match="weights differ in 1 of"):
            guard().check_model(replace(MODEL, weights=weights))


def test_an_unknown_waiver_is_an_error_even_where_nothing_differs() -> None:
    with pytest.raises(InputError, match="cannot waive wieghts"):
        guard().check_model(MODEL, allow_mismatch=("wieghts",))


# -------------------------------------------------------------------------------------------------------- the file


def rules() -> list[Rule]:
    return [rule(name, *(cls.grid[1:2])) for name, cls in RULES.items()] + [Floor(0.5), StTP(0), SwFC(-2)]


@pytest.mark.parametrize("own", rules(), ids=str)
def test_every_rule_comes_back(own: Rule, tmp_path: Path) -> None:
    g = guard(rule=own, positions="response")
    found = Guard.load(g.save(tmp_path / "g"))
    assert (found.name, found.rule, found.model, found.positions) == (g.name, g.rule, g.model, g.positions)
    assert (found.provenance, found.allow_weak, found.digest) == (g.provenance, g.allow_weak, g.digest)
    assert [gate for _, gate in found.gates()] == [gate for _, gate in g.gates()]
    for a, b in zip(found.probes, g.probes, strict=True):
        np.testing.assert_array_equal(a.v, b.v)
        assert {k: x for k, x in vars(a).items() if k != "v"} == {k: x for k, x in vars(b).items() if k != "v"}
    assert found.describe() == g.describe()
    assert found.save(tmp_path / "again").read_bytes() == (tmp_path / "g").read_bytes()


def test_numbers_of_numpy_are_written_as_numbers(tmp_path: Path) -> None:
    evidence = replace(EVIDENCE, auroc=np.float64(0.98), n_pos=np.int64(50))
    odd = probe(2, evidence=evidence, m=np.float64(0.125))
    g = guard(probes=(replace(odd, layer=np.int64(2)),), model=replace(MODEL, width=np.int64(D)))
    assert Guard.load(g.save(tmp_path / "g")).digest == g.digest == guard(probes=(probe(2),)).digest


def test_a_weak_guard_comes_back_and_is_still_weak(tmp_path: Path) -> None:
    g = guard(probes=(probe(2, evidence=replace(EVIDENCE, auroc_low=0.4)),), allow_weak=True)
    assert Guard.load(g.save(tmp_path / "g")).allow_weak


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    path = guard().save(tmp_path / "g")
    with pytest.raises(OutputExists):
        guard(rule=SwFC(1)).save(path)
    assert Guard.load(path).rule == StTP(12)
    guard(rule=SwFC(1)).save(path, overwrite=True)
    assert Guard.load(path).rule == SwFC(1)


def test_provenance_that_no_header_could_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="shorten its provenance"):
        guard(provenance={"log": "x" * files.MAX_HEADER}).save(tmp_path / "g")
    assert not list(tmp_path.iterdir())


def refused(path: Path, data: bytes, what: str | None = None) -> None:
    """Loading these bytes gives one clear sentence with the path, and no error of a library."""
    path.write_bytes(data)
    with pytest.raises(GuardFileError, match=what) as caught:
        Guard.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.fixture
def sound(tmp_path: Path) -> bytes:
    return guard().save(tmp_path / "sound").read_bytes()


def test_cut_anywhere(tmp_path: Path, sound: bytes) -> None:
    header = 8 + int.from_bytes(sound[:8], "little")
    for end in [*range(header + 1), *range(header + 1, len(sound), 37), len(sound) - 1]:
        refused(tmp_path / "g", sound[:end], "is empty|is truncated|is damaged")
    refused(tmp_path / "g", b"", "is empty")
    refused(tmp_path / "g", sound[: header - 1], "is truncated")
    refused(tmp_path / "g", sound + b"\0", "is damaged")


def test_damaged_anywhere(tmp_path: Path, sound: bytes) -> None:
    """Whatever byte is changed, the guard is refused or what is read is what was written."""
    rng = np.random.default_rng(0)
    for at in [*range(200), *rng.integers(len(sound), size=600)]:
        data = bytearray(sound)
        data[at] ^= 1 << rng.integers(8)
        (tmp_path / "g").write_bytes(data)
        try:
            found = Guard.load(tmp_path / "g")
        except GuardFileError:
            continue
        assert found.save(tmp_path / "again", overwrite=True).read_bytes() == sound, at


def test_garbage(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for size in (0, 1, 7, 8, 9, 100, 5000):
        refused(tmp_path / "g", rng.bytes(size))
        refused(tmp_path / "g", size.to_bytes(8, "little") + rng.bytes(size))
        refused(tmp_path / "g", b"\0" * size)
    for length in (2**24 + 1, 2**40, 2**63, 2**64 - 1):
        refused(tmp_path / "g", length.to_bytes(8, "little") + b"{}", "its header would be")


def test_other_formats(tmp_path: Path) -> None:
    for protocol in range(2, 6):
        refused(tmp_path / "g", pickle.dumps({"v": list(range(100))}, protocol), "looks like a pickle")
    with zipfile.ZipFile(tmp_path / "z", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps([1]))
    refused(tmp_path / "g", (tmp_path / "z").read_bytes(), "looks like a pickle or a torch archive")
    refused(tmp_path / "g", b'{"name": "honesty"}' * 10, "is not a safetensors file")
    foreign = files.tensors_to_bytes({"weight": np.zeros(3, np.float32)}, key="format", text="pt")
    refused(tmp_path / "g", foreign, "another program wrote it")


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, what in (("", "folder|cannot be read"), ("no", "there is no file"), ("loop", "cannot be read")):
        with pytest.raises(GuardFileError, match=what):
            Guard.load(tmp_path / name)


def test_a_file_of_many_gigabytes_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "g", "wb") as file:
        file.truncate(2**32)  # sparse: it takes no room
    with pytest.raises(GuardFileError, match="larger than"):
        Guard.load(tmp_path / "g")


# ------------------------------------------------------------------------- files that somebody wrote with a purpose

Edit = Callable[[dict[str, Any], dict[str, Any]], Any]


def forged(sound: bytes, edit: Edit, *, checksum: bool = True) -> bytes:
    """A sound file with its record and tensors edited, and the checksum made to fit."""
    from safetensors.numpy import load

    tensors = {name: tensor.copy() for name, tensor in load(sound).items()}
    length = int.from_bytes(sound[:8], "little")
    record = json.loads(json.loads(sound[8 : 8 + length])["__metadata__"]["steerguard"])
    replaced = edit(record, tensors)
    if isinstance(replaced, str):
        return files.tensors_to_bytes(tensors, key="steerguard", text=replaced)
    if checksum:
        record["checksum"] = probe_file.checksum(record, tensors)
    return files.tensors_to_bytes(tensors, key="steerguard", text=json.dumps(record))


def put(*path: Any) -> Edit:
    """An edit of the record: put(key, ..., value)."""

    def edit(record: Any, _: Any) -> None:
        *way, last, value = path
        for step in way:
            record = record[step]
        record[last] = value

    return edit


def tensor(name: str, change: Callable[[Any], Any]) -> Edit:
    def edit(_: Any, tensors: Any) -> None:
        tensors[name] = change(tensors[name])

    return edit


def drop(key: str) -> Edit:
    return lambda record, _: record.pop(key) and None


def poke(at: Any, value: float) -> Callable[[Any], Any]:
    def change(x: Any) -> Any:
        x[at] = value
        return x

    return change


FORGED: dict[str, tuple[Edit, str]] = {
    "no JSON": (lambda *_: "{", "its metadata is not JSON"),
    "a list": (lambda *_: "[]", "its metadata must be an object"),
    "nested": (lambda *_: "[" * 100_000, "its metadata is nested too deeply"),
    "a key twice": (lambda *_: '{"schema": 1, "schema": 1}', "has the key 'schema' twice"),
    "NaN": (lambda *_: '{"schema": NaN}', "holds NaN"),
    "schema of tomorrow": (put("schema", SCHEMA + 1), "upgrade steerguard"),
    "schema 0": (put("schema", 0), "schema is version 0"),
    "schema true": (put("schema", True), "'schema' of its metadata must be an integer"),
    "schema text": (put("schema", "1"), "'schema' of its metadata must be an integer"),
    "unknown key": (put("hook", "os.system"), "unknown key 'hook'"),
    "missing key": (drop("rule"), "lacks the key 'rule'"),
    "name": (put("name", "../../etc/passwd"), "a guard's name is"),
    "name with escapes": (put("name", "\x1b[2J"), "a guard's name is"),
    "positions": (put("positions", "none"), "positions must be all or response"),
    "unknown rule": (put("rule", "name", "Exec"), "there is no rule 'Exec'"),
    "rule of another case": (put("rule", "name", "sttp"), "there is no rule 'sttp'"),
    "rule with more": (put("rule", "code", "1"), "unknown key 'code'"),
    "no strength": (put("rule", "strength", None), "StTP needs a strength"),
    "strength of none": (put("rule", "name", "Ablate"), "Ablate has no strength"),
    "strength text": (put("rule", "strength", "12"), "'strength' of its rule must be a number or null"),
    "strength bool": (put("rule", "strength", True), "'strength' of its rule must be a number or null"),
    "strength negative": (put("rule", "strength", -1), "must be at least 0"),
    "strength huge": (put("rule", "strength", 1e300), "range of float32"),
    "another strength": (put("rule", "strength", 13), "its gates are not what StTP\\(13\\) compiles to"),
    "layer twice": (put("layers", 1, 2), "layers must increase"),
    "layer out of range": (put("layers", 1, 6), "below the model's depth"),
    "layer negative": (put("layers", 0, -1), "must not be negative"),
    "layer text": (put("layers", 0, "2"), "a layer must be an integer"),
    "layer more": (put("layers", [2, 3, 4]), "for 3 layers v must be"),
    "no layers": (put("layers", []), "for 0 layers v must be"),
    "evidence less": (lambda record, _: record["evidence"].pop() and None, "evidence 2 long, got .* and 1"),
    "evidence text": (put("evidence", 0, "good"), "the evidence of layer 2 must be an object"),
    "evidence weak": (put("evidence", 0, "auroc_low", 0.1), "reads nothing held out"),
    "evidence count": (put("evidence", 0, "n_pos", 1.5), "must be an integer"),
    "model": (put("model", []), "'model' of its metadata must be an object"),
    "model width": (put("model", "width", D + 1), "has width 12, the model's residual stream 13"),
    "model depth": (put("model", "depth", 0), "at least 1"),
    "fingerprint": (put("model", "weights", "model.embed", 1), "the fingerprint of 'model.embed' must be text"),
    "no fingerprint": (put("model", "weights", {}), "has no fingerprint"),
    "another model": (put("model", "tokenizer", "0" * 64), "its digest is"),
    "another digest": (put("digest", "0" * 64), "its digest is"),
    "provenance": (put("provenance", "x"), "'provenance' of its metadata must be an object"),
    "v nan": (tensor("v", poke((0, 0), np.nan)), "v must be a finite vector"),
    "v not unit": (tensor("v", lambda v: v * 1.01), r"\|v\| is 1.01"),
    "v zero": (tensor("v", lambda v: v * 0), r"\|v\| is 0"),
    "v flipped": (tensor("v", lambda v: -v), "its digest is"),
    "v of float64": (tensor("v", lambda v: v.astype(np.float64)), "must hold the tensors"),
    "v flat": (tensor("v", np.ravel), "v must be"),
    "v missing": (lambda _, tensors: tensors.pop("v") is None, "must hold the tensors"),
    "one tensor more": (lambda _, tensors: tensors.update(w=tensors["v"]), "must hold the tensors"),
    "statistics nan": (tensor("statistics", poke((0, 0), np.nan)), "its statistics finite"),
    "statistics inf": (tensor("statistics", poke((0, 1), np.inf)), "its statistics finite"),
    "statistics of another shape": (tensor("statistics", lambda x: x.T), "statistics \\[2, 5\\]"),
    "sigma negative": (tensor("statistics", poke((0, 2), -1)), "must not be negative"),
    "gates": (tensor("gates", poke((0, 1), 99)), "its gates are not what StTP\\(12\\) compiles to"),
    "gates nan": (tensor("gates", poke((0, 1), np.nan)), "its gates are not what"),
    "gates of another shape": (tensor("gates", lambda x: x.reshape(6, 2)), "its gates are not what"),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged(case: str, tmp_path: Path, sound: bytes) -> None:
    edit, what = FORGED[case]
    refused(tmp_path / "g", forged(sound, edit), what)


def test_the_forger_can_leave_a_file_sound(tmp_path: Path, sound: bytes) -> None:
    """The negation: without an edit the forged file loads, so it is the edits that are refused."""
    (tmp_path / "g").write_bytes(forged(sound, lambda *_: None))
    assert Guard.load(tmp_path / "g").digest == guard().digest


def test_what_the_digest_does_not_cover_the_checksum_does(tmp_path: Path, sound: bytes) -> None:
    refused(tmp_path / "g", forged(sound, put("provenance", "seed", 7), checksum=False), "checksum")
    refused(tmp_path / "g", forged(sound, put("evidence", 0, "auroc", 1.0), checksum=False), "checksum")


def test_a_rule_that_changed_its_meaning_is_noticed(
    tmp_path: Path, sound: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StTP, "compile", lambda self, probe: StMP(1).compile(probe))
    refused(tmp_path / "g", sound, "its gates are not what StTP")


# ------------------------------------------------------------------------------------------------------ for people


def test_describe_says_what_matters() -> None:
    g = guard()
    text = g.describe()
    for part in (
        "honesty",
        "StTP(12)",
        "layers 2, 4, all positions",
        "Org/Model-1B",
        g.digest,
        "0.980 [0.9",
        "seed: 42",
    ):
        assert part in text
    assert str(g) in repr(g)
    assert "\n" not in repr(g)
    assert "AUROC 0.980 held out" in str(g)
    assert "(nothing recorded)" in guard(provenance={}).describe()


def test_text_of_a_stranger_is_disarmed() -> None:
    evil = replace(MODEL, name="\x1b[2J| <script>\n---\n", architecture="\x07x")
    g = guard(model=evil, provenance={"\x1b[0m": "\x1b[2J" + "x" * 999, "```": "\n---\n```"})
    for text in (g.describe(), str(g), g.card()):
        assert "\x1b" not in text
        assert "\x07" not in text
    assert "..." in g.describe()
    assert "<script>" not in re.sub(r"(?m)^( {4}|model = ).*$", "", g.card()).replace("\\<", "")


def test_the_card_has_front_matter_and_evidence() -> None:
    card = guard().card("me/honesty")
    _, front, body = card.split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts == {
        "library_name": "steerguard", "base_model": "Org/Model-1B",
        "tags": ["steerguard", "activation-steering", "ai-safety"],
    }  # fmt: skip
    assert 'from_hub("me/honesty")' in body
    assert "| 2 | 0.980 [0.930, 1.000] | 3.10 | 0.90 | 50 + 48 |" in body
    assert guard().digest in body
    assert "base_model" not in guard(model=replace(MODEL, name="/data/models/x")).card()


# --------------------------------------------------------------------------------------------------------- the hub


@dataclass
class Hub:
    """The part of the Hugging Face hub that guards use, in a folder."""

    root: Path
    down: bool = False
    log: list[str] = field(default_factory=list)

    def __call__(self, token: str | None = None) -> Hub:
        self.log.append(f"token {token}")
        return self

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> None:
        assert exist_ok
        if self.down:
            raise ConnectionError("no network\nand a long story")
        self.log.append(f"private {private}")
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)

    def create_commit(self, repo_id: str, operations: Any, *, commit_message: str, revision: str | None) -> Any:
        for operation in operations:
            with operation.as_file() as file:
                (self.root / repo_id / operation.path_in_repo).write_bytes(file.read())
        self.log.append(commit_message)
        return type("Commit", (), {"commit_url": f"https://hub/{repo_id}/commit/{revision or 'main'}"})

    def hf_hub_download(self, repo_id: str, filename: str, *, revision: str | None) -> str:
        if not (path := self.root / repo_id / filename).exists():
            raise FileNotFoundError(f"404: {repo_id} has no {filename}")
        return str(path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    import huggingface_hub

    fake = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    return fake


def test_up_and_down_again(hub: Hub) -> None:
    g = guard()
    assert g.push_to_hub("me/honesty", private=True, revision="v1", token="t") == "https://hub/me/honesty/commit/v1"
    assert hub.log == ["token t", "private True", str(g)]
    assert sorted(p.name for p in (hub.root / "me/honesty").iterdir()) == ["README.md", guard_card.HUB_FILE]
    assert (hub.root / "me/honesty/README.md").read_text(encoding="utf-8") == g.card("me/honesty")
    assert Guard.from_hub("me/honesty").digest == g.digest


def test_a_hub_that_refuses_gives_one_sentence(hub: Hub) -> None:
    with pytest.raises(InputError, match="no guard was found at 'me/none': 404"):
        Guard.from_hub("me/none")
    hub.down = True
    with pytest.raises(InputError, match="no guard was uploaded to 'me/x': no network; see") as caught:
        guard().push_to_hub("me/x")
    assert "\n" not in str(caught.value)


def test_what_comes_from_the_hub_is_checked(hub: Hub) -> None:
    guard().push_to_hub("me/honesty")
    (hub.root / "me/honesty" / guard_card.HUB_FILE).write_bytes(pickle.dumps([1] * 99))
    with pytest.raises(GuardFileError, match="pickle"):
        Guard.from_hub("me/honesty")


def test_guards_can_be_copied_and_pickled_within_a_process() -> None:
    for other in (copy.deepcopy(guard()), pickle.loads(pickle.dumps(guard()))):
        assert other.digest == guard().digest
