"""Every check must be seen to fail once: each fault of the fake is caught by the contract, and by the proof.

A fault that is added to `Fault` is judged here by itself, and a check of the contract or of the proof that no fault
can break has to be named here with its reason.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import contract_effect  # noqa: F401 -- fills CONTRACT
import contract_generate  # noqa: F401
import pytest
from bench import CONTRACT, LONG, PROMPTS, Bench

from steerguard.backends.base import Sampling
from steerguard.backends.fake import Fault, load
from steerguard.backends.proof import CHECKS, prove
from steerguard.errors import NotSteering
from steerguard.rules import StTP, SwFC

ON_LEAVING = {Fault.NOT_UNDONE}
AT_THE_END_OF_A_CALL = {Fault.LATE}
"""Faults that no proof before the fact can see, and where they are seen instead."""


UNBREAKABLE = {
    "unguarded_residuals_and_logits_are_the_oracles": "no guard acts; a wrong forward pass is what it is for",
    "the_identity_is_the_oracles": "no guard acts",
    "a_list_of_guards_has_one_entry_per_prompt": "refused before a gate acts",
    "what_cannot_be_guarded_is_refused_and_leaves_nothing": "refused before a gate acts",
    "guarding_with_nothing_is_nothing": "no guard acts",
    "residuals_and_logits_have_one_row_per_token": "no guard acts",
    "equal_prompts_of_one_call_draw_differently": "no guard acts",
    "a_tiny_nucleus_is_greedy": "no guard acts",
    "a_stop_text_ends_the_row_and_is_left_out": "no guard acts",
    "what_is_streamed_is_the_text": "it compares texts, steered or not",
    "no_prompts_no_answers": "nothing is generated",
    "conversations_are_prompts": "no guard acts",
    "pieces_join_to_the_text": "no guard acts",
}
"""Checks that no fault of a hook can break, and why."""


@cache
def breaks(folder: Path, fault: Fault, check: str) -> bool:
    """Whether a fake with this fault fails this check of the contract, with no help from its own count of tokens."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("steerguard.backends.fake.audit", lambda *_: None)
            CONTRACT[check](Bench(load(folder, fault=fault), folder))
    except (AssertionError, NotSteering, pytest.fail.Exception):  # the last: pytest.raises that saw no error
        return True
    return False


@pytest.fixture
def folder(folders: dict[str, Path]) -> Path:
    return folders["tiny"]


@pytest.mark.parametrize("fault", Fault)
def test_every_fault_breaks_the_contract(folder: Path, fault: Fault) -> None:
    assert any(breaks(folder, fault, check) for check in CONTRACT if check not in UNBREAKABLE)


@pytest.mark.parametrize("check", CONTRACT)
def test_every_check_of_the_contract_is_broken_by_some_fault(folder: Path, check: str) -> None:
    """But for those that are excused; and an excuse that is not needed is taken back."""
    assert any(breaks(folder, fault, check) for fault in Fault) != (check in UNBREAKABLE)


@pytest.mark.parametrize("fault", Fault)
@pytest.mark.parametrize(("layers", "positions"), [((1,), "all"), ((3,), "response"), ((0, 2), "all")], ids=str)
def test_every_fault_is_caught_before_an_answer_can_be_trusted(
    folder: Path, fault: Fault, layers: tuple[int, ...], positions: str
) -> None:
    bench = Bench(load(folder, fault=fault), folder)
    guard = bench.guard(StTP(6), layers, positions=positions)
    answered = False
    if fault in ON_LEAVING:
        with pytest.raises(NotSteering, match="left something behind"), bench.model.guarded(guard):
            answered = True
        assert answered
    elif fault in AT_THE_END_OF_A_CALL:
        with bench.model.guarded(guard), pytest.raises(NotSteering, match="answer is withheld"):
            bench.model.generate(PROMPTS[0], sampling=Sampling(temperature=0.0, max_new_tokens=LONG))
    else:
        with pytest.raises(NotSteering), bench.model.guarded(guard):
            answered = True
        assert not answered
        healthy = load(folder)
        assert (bench.model.logits(PROMPTS[0]) == healthy.logits(PROMPTS[0])).all(), "something stayed installed"


@pytest.mark.parametrize("fault", sorted(set(Fault) - ON_LEAVING - AT_THE_END_OF_A_CALL))
def test_the_proof_needs_no_help_from_the_backends_own_count(folder: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend whose hooks count themselves wrongly is seen through all the same."""
    monkeypatch.setattr("steerguard.backends.fake.audit", lambda *_: None)
    bench = Bench(load(folder, fault=fault), folder)
    for layers in ((1,), (3,)):
        assert not all(finding.passed for finding in prove(bench.model, [bench.guard(SwFC(1), layers)]))


def test_every_check_of_the_proof_is_broken_by_some_fault(folder: Path) -> None:
    failed = set()
    for fault in Fault:
        bench = Bench(load(folder, fault=fault), folder)
        failed |= {finding.check for finding in prove(bench.model, [bench.guard(StTP(6), (1,))]) if not finding.passed}
    assert failed == set(CHECKS)
