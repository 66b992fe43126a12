"""Whatever is wrong with a guarded engine stops its start, with the reason; and no compiled graph outlives its guards."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm.engine.arg_utils", reason="needs vLLM")

import sabotages
from processes import ENGINE, MODEL, PROMPTS, Reference, environment, guard, process, three_guards

import steerguard as sg
from steerguard.guard import Guard
from steerguard.rules import StMP, SwFC

pytestmark = pytest.mark.slow

STEPS = 16
STOPPED = {
    "hook_removed": "NotSteering: layer 4: the op looked 0 times at 1 tokens, 2 were due; it does not stand in the path",
    "three_returned": "Unsupported: a decoder block returned 3 values, a pair (hidden, residual) was expected",
    "hidden_returned": "Unsupported: a decoder block returned Tensor, a pair (hidden, residual) was expected",
    "gates_zeroed": "NotSteering: layer 4, 1 tokens: tokens were left alone that a gate should have rewritten",
    "directions_zeroed": "NotSteering: layer 4, 1 tokens: a push of ",
    "slots_zeroed": "NotSteering: layer 4: the op looked 0 times at 1 tokens, 2 were due",
    "hidden_not_written": "NotSteering: layer 4, 1 tokens: the next block does not read the sum of what the op wrote",
    "residual_not_written": "NotSteering: layer 4, 1 tokens: the next block does not read the sum of what the op wrote",
    "half_moved": "NotSteering: layer 4, 1 tokens: a push of ",
    "all_moved": "NotSteering: layer 4, 1 tokens: a shut gate moved tokens",
    "one_token_missed": "NotSteering: layer 4: the op looked 14 times at 8 tokens, 16 were due",
}
"""What each tampering is answered with."""


def refusals(folder: Path, good: Guard) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Settings that no engine may start under, and what each is answered with."""
    sound = good.save(folder / "sound.guard")
    other = replace(good, model=replace(good.model, weights=dict.fromkeys(good.model.weights, "0" * 64)))
    other.save(folder / "other.guard")
    (folder / "torn.guard").write_bytes(sound.read_bytes()[:-100])
    changed = bytearray(sound.read_bytes())
    changed[-3] ^= 0x40
    (folder / "changed.guard").write_bytes(changed)
    (folder / "text.guard").write_text("not a guard")

    def under(**settings: Any) -> dict[str, Any]:
        return {"settings": {"guards": [str(sound)], **settings}}

    def file(name: str) -> dict[str, Any]:
        return under(guards=[str(folder / name)])

    drafts = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    said: dict[str, tuple[dict[str, Any], str]] = {
        "another model": (file("other.guard"), "GuardMismatch: "),
        "torn": (file("torn.guard"), "GuardFileError: "),
        "changed": (file("changed.guard"), "GuardFileError: "),
        "text": (file("text.guard"), "GuardFileError: "),
        "missing": (file("missing.guard"), "GuardFileError: "),
        "unknown key": (under(guard="x"), "InputError: additional_config['steerguard']: guard: "),
        "unknown key of a guard": (
            under(guards=[{"file": str(sound), "alpha": 3}]),
            "InputError: additional_config['steerguard']: guards.0.alpha: ",
        ),
        "unknown default": (under(default=["nobody"]), "InputError: default names 'nobody'; there are still"),
        "twice": (under(guards=[str(sound), str(sound)]), "InputError: there is a guard 'still' already"),
        "required and not default": (
            under(guards=[{"file": str(sound), "required": True}], default=[]),
            "InputError: this server requires guard 'still'",
        ),
        "no such layer": (under(layers=[99]), "InputError: steerguard: layers [4, 99]: the model has layers 0 to "),
        "nothing": ({"settings": {}}, "InputError: steerguard: no guard and no layer"),
        "not an object": ({"settings": "sound.guard"}, "InputError: additional_config['steerguard']: "),
        "drafts": (
            {**under(), "more": {"speculative_config": drafts}},
            "Unsupported: steerguard does not support speculative decoding on vLLM; start without it",
        ),
        "another extension": (
            {**under(), "more": {"worker_extension_cls": "some.Extension"}},
            "Unsupported: steerguard does not support another worker extension on vLLM",
        ),
    }  # fmt: skip
    return {name: case for name, (case, _) in said.items()}, {name: message for name, (_, message) in said.items()}


@pytest.fixture(scope="module")
def reference() -> Reference:
    model = sg.load("organism")
    return Reference(model, three_guards(model))


def played(folder: Path, what: str, arguments: dict[str, Any], **more: str) -> Any:
    """What a script of `sabotages` found."""
    (folder / "arguments.json").write_text(json.dumps({"model": str(MODEL), **arguments}))
    (folder / "out.json").unlink(missing_ok=True)
    env = environment(folder, VLLM_ENABLE_V1_MULTIPROCESSING="0", **more)
    log = folder / f"{what}.log"
    with process([sys.executable, sabotages.__file__, what, str(folder)], log, env) as running:
        status = running.wait(1500)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-60:])
    assert status == 0, tail
    return json.loads((folder / "out.json").read_text())


@pytest.fixture(scope="module")
def found(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, str]]:
    """What every start was answered with, and what the refused ones should be."""
    folder = tmp_path_factory.mktemp("sabotaged")
    cases, due = refusals(folder, reference.guards["still"])
    settings = {"guards": [str(folder / "sound.guard")]}
    return played(folder, "report", {"settings": settings, "refused": cases}), due


def test_an_engine_that_is_left_alone_starts(found: tuple[dict[str, Any], dict[str, str]]) -> None:
    """Before all the others and after them."""
    assert found[0]["left alone"] is None
    assert found[0]["left alone again"] is None


@pytest.mark.parametrize("tampering", STOPPED)
def test_an_engine_that_is_tampered_with_does_not_start(found: tuple[dict[str, Any], dict[str, str]], tampering: str) -> None:
    assert (found[0][tampering] or "it started").startswith(STOPPED[tampering]), found[0][tampering]


def test_every_tampering_is_judged() -> None:
    assert {tampering.__name__ for tampering in sabotages.TAMPERINGS} == set(STOPPED)


def test_what_cannot_be_served_does_not_start(found: tuple[dict[str, Any], dict[str, str]]) -> None:
    """With one sentence, before any weight is loaded."""
    wrong = {name: found[0][name] for name, due in found[1].items() if not (found[0][name] or "it started").startswith(due)}
    assert not wrong
    assert all("\n" not in found[0][name] for name in found[1])


def test_a_request_without_a_decision_is_not_answered(found: tuple[dict[str, Any], dict[str, str]]) -> None:
    assert (found[0]["undecided"] or "it answered").startswith("NotSteering: request ")
    assert "without a decision on its guards" in found[0]["undecided"]


def test_the_command_line_says_the_sentence(tmp_path: Path) -> None:
    """And ends, with a status that is not zero."""
    settings = json.dumps({"steerguard": {"guards": [str(tmp_path / "missing.guard")]}})
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(MODEL), *ENGINE, "--additional-config", settings]
    with process(command, tmp_path / "log", environment(tmp_path)) as running:
        assert running.wait(300) != 0
    assert "missing.guard" in (tmp_path / "log").read_text().strip().splitlines()[-1]


def test_no_compiled_graph_outlives_its_guards(reference: Reference, tmp_path: Path) -> None:
    """One cache of compiled graphs: without the plugin, with a guard, without guards, with another guard in the same file.

    Each engine says what transformers says. A graph of the one before it would leave a guard out, or put one in.
    """
    model, prompts = reference.model, PROMPTS[2:]
    path = tmp_path / "served.guard"
    layer3 = guard(model, 3, StMP(4), "served", seed=37)
    layer5 = guard(model, 5, SwFC(6), "served", seed=6)
    ids = [list(reference.answer(prompt, []).prompt_ids) for prompt in prompts]
    sampling = sg.Sampling(temperature=0.0, max_new_tokens=STEPS)

    def due(*guards: Guard) -> list[list[int]]:
        return [list(answer.ids) for answer in model.generate(prompts, guards=guards or None, sampling=sampling)]

    def start(guarded: bool, **more: str) -> Any:
        settings = {"guards": [str(path)]} if guarded else None
        choices: list[Any] = [["served"], [], None] if guarded else [None]
        asked = {"settings": settings, "prompts": ids, "choices": choices, "steps": STEPS}
        return played(tmp_path, "texts", asked, VLLM_CACHE_ROOT=str(tmp_path / "cache"), **more)

    plain, third, fifth = due(), due(layer3), due(layer5)
    assert plain != third != fifth != plain
    assert start(False, VLLM_PLUGINS="none") == [plain]
    compiled = set((tmp_path / "cache").rglob("*.py"))
    assert compiled, "nothing was compiled into the cache"
    layer3.save(path)
    assert start(True) == [third, plain, third]
    assert start(False) == [plain]
    layer5.save(path, overwrite=True)
    assert start(True) == [fifth, plain, fifth]
    assert start(False, VLLM_PLUGINS="none") == [plain]
