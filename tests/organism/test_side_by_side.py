"""Lines in processes of their own: what they give and say, and that none outlives the others' failure."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from steerguard.organism.side_by_side import tell, workers


def counted(n: int) -> tuple[int, int, int]:
    for i in range(n):
        tell("counting", i + 1, n)
    return n, os.getpid(), torch.get_num_threads()


def failing() -> None:
    raise ValueError("this line fails")


def endless(at: Path) -> None:
    """Says for a minute that it lives, and looks at nobody."""
    for _ in range(1200):
        at.write_text(str(time.time()))
        time.sleep(0.05)


def test_lines_give_their_results_and_tell_how_far_they_are() -> None:
    told: list[tuple[str, int, int, float]] = []
    with workers(2, lambda *word: told.append(word)) as pool:
        results = [line.result() for line in [pool.submit(counted, 3), pool.submit(counted, 2)]]
    assert [n for n, _, _ in results] == [3, 2]
    assert os.getpid() not in {process for _, process, _ in results}
    assert {threads for *_, threads in results} == {max(1, torch.get_num_threads() // 2)}
    assert sorted(told) == [("counting", 1, 2, 0.0), ("counting", 1, 3, 0.0), ("counting", 2, 2, 0.0),
                            ("counting", 2, 3, 0.0), ("counting", 3, 3, 0.0)]  # fmt: skip


def test_a_failure_ends_the_others_at_once(tmp_path: Path) -> None:
    at = tmp_path / "alive"
    with pytest.raises(ValueError, match="this line fails"), workers(2, None) as pool:
        pool.submit(endless, at)
        while not at.exists():
            time.sleep(0.01)
        failed = time.monotonic()
        pool.submit(failing).result()
    assert time.monotonic() - failed < 30
    last = at.read_text()
    time.sleep(0.3)
    assert at.read_text() == last
