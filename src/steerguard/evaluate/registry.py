"""What Inspect finds of ours through its entry point: the provider `steerguard/...` and the tasks."""

from __future__ import annotations

from steerguard.evaluate.provider import GuardedAPI

__all__ = ["GuardedAPI"]
