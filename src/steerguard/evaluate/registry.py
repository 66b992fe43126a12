"""What Inspect finds of ours through its entry point: the provider `steerguard/...` and the tasks."""

from __future__ import annotations

from steerguard.evaluate.provider import GuardedAPI
from steerguard.evaluate.tasks import alpaca_eval, mt_bench

__all__ = ["alpaca_eval", "GuardedAPI", "mt_bench"]
