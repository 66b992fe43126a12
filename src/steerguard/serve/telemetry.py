"""What Prometheus reads at `/metrics`, in base units, under `steerguard_`.

Labels are the operator's words or ours, never a client's: guards, phases, modes, outcomes and reasons. This module knows
measurements and prometheus-client.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

from steerguard.serve.measure import Measured
from steerguard.serve.policy import Policy

FRACTIONS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SEPARATIONS = (0.0, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0)
SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Telemetry:
    """The counters of one server, in a registry of their own."""

    def __init__(self, *, ready: Callable[[], bool], waiting: Callable[[], int]) -> None:
        self._registry = one = CollectorRegistry()
        by_guard = ("guard", "mode")
        self._seen = Counter(
            "steerguard_tokens_seen", "Token-gate pairs that a guard looked at", (*by_guard, "phase"), registry=one
        )
        self._moved = Counter(
            "steerguard_tokens_moved", "Token-gate pairs that a guard moved; in shadow, would have moved", (*by_guard, "phase"),
            registry=one,
        )  # fmt: skip
        self._fraction = Histogram(
            "steerguard_request_moved_ratio", "Share of a request's token-gate pairs that a guard moved", by_guard,
            buckets=FRACTIONS, registry=one,
        )  # fmt: skip
        self._largest = Histogram(
            "steerguard_request_largest_shift_separations", "Largest shift of a request, in class separations of its layer",
            by_guard, buckets=SEPARATIONS, registry=one,
        )  # fmt: skip
        self._requests = Counter(
            "steerguard_requests", "Requests by endpoint and outcome: answered, refused, failed, disconnected",
            ("endpoint", "outcome"), registry=one,
        )  # fmt: skip
        self._refusals = Counter("steerguard_refusals", "Requests that got an error, by its code", ("reason",), registry=one)
        self._tokens = Counter("steerguard_generated_tokens", "Tokens of answers", registry=one)
        self._seconds = Histogram(
            "steerguard_request_duration_seconds", "From a request's arrival to its end", buckets=SECONDS, registry=one
        )
        is_ready = Gauge("steerguard_ready", "1 if the guards passed their checks and nothing failed since", registry=one)
        is_ready.set_function(ready)
        Gauge("steerguard_waiting_requests", "Requests that wait for the model", registry=one).set_function(waiting)
        self._checks = Counter("steerguard_checks", "Checks of guards on the model", ("outcome",), registry=one)
        self._reloads = Counter("steerguard_policy_reloads", "Reloads of the policy", ("outcome",), registry=one)
        self._policy = Info("steerguard_policy", "The policy in force", registry=one)
        of_guard = ("guard", "digest", "mode", "required")
        self._guards = Gauge("steerguard_guard_info", "Guards that are served", of_guard, registry=one)

    def in_force(self, policy: Policy) -> None:
        """Show this policy as the one in force."""
        self._policy.info({"digest": policy.digest, "model": policy.name})
        self._guards.clear()
        for one, guard in zip(policy.file.guards, policy.guards, strict=True):
            self._guards.labels(guard.name, guard.digest, one.mode, str(one.required).lower()).set(1)

    def measured(self, found: Sequence[Measured]) -> None:
        """Count what the guards did to one request."""
        for one in found:
            labels = (one.act.name, one.act.mode)
            for phase, count in (("prompt", one.prompt), ("answer", one.answer)):
                self._seen.labels(*labels, phase).inc(count.seen)
                self._moved.labels(*labels, phase).inc(count.moved)
            if one.total.seen:
                self._fraction.labels(*labels).observe(one.total.moved / one.total.seen)
                self._largest.labels(*labels).observe(one.separations)

    def ended(self, endpoint: str, outcome: str, seconds: float, *, tokens: int = 0, reason: str | None = None) -> None:
        """Count one request that is over."""
        self._requests.labels(endpoint, outcome).inc()
        self._seconds.observe(seconds)
        self._tokens.inc(tokens)
        if reason is not None:
            self._refusals.labels(reason).inc()

    def checked(self, passed: bool) -> None:
        self._checks.labels("passed" if passed else "failed").inc()

    def reloaded(self, done: bool) -> None:
        self._reloads.labels("done" if done else "refused").inc()

    def text(self) -> bytes:
        """What `/metrics` says."""
        return bytes(generate_latest(self._registry))
