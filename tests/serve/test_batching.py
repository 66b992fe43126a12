"""The engine alone: what shares a call of the model, what must not, and what becomes of those who leave or come late."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
from local_server import PROMPT, PROMPTS, Reference

from steerguard.backends.base import Answer, Sampling
from steerguard.errors import NotSteering
from steerguard.prompts import as_conversation, render
from steerguard.serve.engine import Busy, Closed, Engine, Job
from steerguard.serve.protocol import Drawing

GREEDY = Drawing(temperature=0.0, top_p=1.0, seed=None, max_tokens=8, stop=())


class Counted:
    """The model, and how many rows each call of it had; a call waits until it may begin."""

    def __init__(self, reference: Reference) -> None:
        self._model = reference.model
        self.calls: list[int] = []
        self.may = threading.Event()
        self.may.set()
        self.raises: Exception | None = None

    def generate_tokens(self, prompts: Sequence[tuple[int, ...]], **more: Any) -> list[Answer]:
        self.calls.append(len(prompts))
        assert self.may.wait(60)
        if self.raises is not None:
            raise self.raises
        return self._model.generate_tokens(prompts, **more)


@pytest.fixture
def model(reference: Reference) -> Counted:
    return Counted(reference)


def job(reference: Reference, prompt: str = PROMPT, *, guards: Sequence[str] = (), drawing: Drawing = GREEDY, n: int = 1) -> Job:
    ids = render(reference.model.tokenizer, as_conversation(prompt)).ids
    return Job(ids, n, drawing, tuple(map(reference.guard, guards)))


def run(model: Counted, jobs: Sequence[Job], *, rows: int = 8) -> list[list[Answer]]:
    """All of these jobs, which wait while a first one runs."""
    engine = Engine(model, rows=rows, waiting=64)
    try:
        model.may.clear()
        first = Job(jobs[0].ids, 1, GREEDY, ())
        engine.submit(first)
        while not model.calls:
            pass
        for one in jobs:
            engine.submit(one)
        model.may.set()
        return [one.answers.result(60) for one in jobs]
    finally:
        engine.close()


def test_what_waits_together_is_answered_together(reference: Reference, model: Counted) -> None:
    ways = [(prompt, guards) for prompt in PROMPTS for guards in ((), ("still",), ("push", "mirror"))]
    got = run(model, [job(reference, prompt, guards=guards) for prompt, guards in ways], rows=16)
    assert model.calls == [1, len(ways)]
    assert [answers[0].text for answers in got] == [reference.answer(p, g, steps=8).text for p, g in ways]


def test_other_drawings_and_too_many_rows_wait_for_the_next_call(reference: Reference, model: Counted) -> None:
    short = Drawing(0.0, 1.0, None, 3, ())
    jobs = [job(reference), job(reference, drawing=short), job(reference, n=3), job(reference, drawing=short), job(reference)]
    got = run(model, jobs, rows=4)
    assert model.calls == [1, 4, 2, 1]  # the last would make five
    assert [len(answers) for answers in got] == [1, 1, 3, 1, 1]
    assert [len(answers[0].ids) for answers in got] == [8, 3, 8, 3, 8]


def test_equal_requests_with_a_seed_do_not_share_their_luck(reference: Reference, model: Counted) -> None:
    """In one call they would be told apart by their number, and the second would not be what it is alone."""
    drawing = Drawing(1.5, 1.0, 7, 8, ())
    due = reference.answer(PROMPT, [], steps=8, temperature=1.5, top_p=1.0, seed=7).text
    jobs = [job(reference, drawing=drawing), job(reference, drawing=drawing), job(reference, drawing=drawing, guards=["push"])]
    got = run(model, jobs)
    assert model.calls == [1, 2, 1]
    assert [answers[0].text for answers in got[:2]] == [due, due]
    # the negation: two rows of one call do differ
    ids = jobs[0].ids
    both = reference.model.generate_tokens([ids, ids], guards=[None, None], sampling=Sampling(1.5, 1.0, 7, 8))
    assert [both[0].text == due, both[1].text == due] == [True, False]


def test_who_has_left_before_is_not_asked_for(reference: Reference, model: Counted) -> None:
    engine = Engine(model, rows=8, waiting=8)
    model.may.clear()
    engine.submit(job(reference))
    while not model.calls:
        pass
    left, stays = job(reference), job(reference, "a")
    engine.submit(left)
    engine.submit(stays)
    left.gone.set()
    model.may.set()
    assert len(stays.answers.result(60)) == 1
    assert left.answers.cancelled()
    assert model.calls == [1, 1]
    engine.close()


def test_who_leaves_ends_his_row_alone(reference: Reference, model: Counted) -> None:
    engine = Engine(model, rows=8, waiting=8)
    long = Drawing(0.0, 1.0, None, 60, ())
    leaves, stays = job(reference, drawing=long), job(reference, PROMPTS[1], drawing=long)
    heard: list[str] = []

    def hear(_: int, text: str) -> None:
        heard.append(text)
        leaves.gone.set()

    leaves.on_text = hear
    engine.submit(leaves)
    engine.submit(stays)
    assert len(leaves.answers.result(60)[0].ids) < 5
    assert stays.answers.result(60)[0].ids == reference.answer(PROMPTS[1], [], steps=60).ids
    engine.close()


def test_an_error_is_told_to_all_of_its_call_and_the_next_call_runs(reference: Reference, model: Counted) -> None:
    engine = Engine(model, rows=8, waiting=8)
    for error in (NotSteering("a gate missed a token"), RuntimeError("out of order")):
        model.raises = error
        jobs = [job(reference), job(reference, "a")]
        for one in jobs:
            engine.submit(one)
        assert [one.answers.exception(60) for one in jobs] == [error, error]
    model.raises = None
    last = job(reference)
    engine.submit(last)
    assert last.answers.result(60)[0].text == reference.answer(PROMPT, [], steps=8).text
    engine.close()


def test_a_full_queue_and_a_closed_engine_refuse(reference: Reference, model: Counted) -> None:
    engine = Engine(model, rows=1, waiting=2)
    model.may.clear()
    running = job(reference)
    engine.submit(running)
    while not model.calls:
        pass
    waiting = [job(reference), job(reference)]
    for one in waiting:
        engine.submit(one)
    assert engine.depth == 2
    with pytest.raises(Busy, match="try again in 2 s"):
        engine.submit(job(reference))
    closing = threading.Thread(target=engine.close)
    closing.start()
    for one in waiting:
        assert isinstance(one.answers.exception(60), Closed)
    with pytest.raises(Closed):
        engine.submit(job(reference))
    model.may.set()
    assert len(running.answers.result(60)) == 1
    closing.join(60)
    assert not closing.is_alive()
