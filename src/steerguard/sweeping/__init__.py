"""Sweeping: steer with every layer, rule and strength, score the answers, choose an operating point, and report on it.

    points      settings, and what they measured
    answers     many rows with guards of their own, in batches, kept in a journal
    benign      what settings cost where there is nothing to do
    choice      the operating point, and how sure it is
    run         the sweep itself
    testing     the report on the `test` split, read once
"""

from __future__ import annotations

from steerguard.sweeping.benign import Benign
from steerguard.sweeping.choice import Choice, Cost, Limits, Sureness, choose
from steerguard.sweeping.points import PAPER_RULES, Figures, Scored, Setting, gap_recovered, grid
from steerguard.sweeping.run import JOURNAL, Search, Sweep, sweep
from steerguard.sweeping.testing import TEST_JOURNAL, Arm, compare

__all__ = [
    "Arm", "Benign", "Choice", "choose", "compare", "Cost", "Figures", "gap_recovered", "grid", "JOURNAL", "Limits",
    "PAPER_RULES", "Scored", "Search", "Setting", "Sureness", "Sweep", "sweep", "TEST_JOURNAL",
]  # fmt: skip
