"""The service: the policy in force, whether answers may leave, and what is told of each.

It opens when every guard that is served passed its checks on the model, and shuts when anything says that steering may not
act: a check, a generation, the audit log. Shut, it answers nobody. A reload takes the new policy whole or not at all;
requests in flight end under the policy that they began with.

This module knows policies, jobs and decisions. It knows no HTTP.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from steerguard.backends.base import Answer
from steerguard.backends.hf import TransformersModel
from steerguard.checking import check
from steerguard.errors import InputError, NotSteering, SteerguardError, SteeringError
from steerguard.guard import Guard
from steerguard.prompts import render
from steerguard.serve.audit import Audit, AuditFailed
from steerguard.serve.engine import Busy, Closed, Engine, Job
from steerguard.serve.measure import Measured, installed, measure, projections
from steerguard.serve.policy import Decision, Policy
from steerguard.serve.protocol import Refused, Request
from steerguard.serve.telemetry import Telemetry

log = logging.getLogger(__name__)
STARTING = "the model is being loaded and its guards are being checked"


@dataclass(frozen=True, eq=False)
class Settled:
    """A request's answers, with what the guards did to them."""

    answers: Sequence[Answer]
    measured: Sequence[Measured]
    steering: dict[str, Any]
    "as it stands in the answer"

    @property
    def usage(self) -> dict[str, int]:
        """OpenAI's count; the prompt counts once, whatever `n`."""
        prompt, answer = len(self.answers[0].prompt_ids), sum(len(one.ids) for one in self.answers)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


class Service:
    """One guarded model.

    Args:
        load: loads the model.
        policy: reads the policy for that model; called again for every reload.
        longest: tokens of an answer at most.
    """

    def __init__(
        self, load: Callable[[], TransformersModel], policy: Callable[[TransformersModel], Policy], *, audit: Audit,
        longest: int, rows: int, waiting: int,
    ) -> None:  # fmt: skip
        self._load, self._read = load, policy
        self._rows, self._waiting = rows, waiting
        self.audit, self.longest = audit, longest
        self._shut: str | None = STARTING
        self._model: TransformersModel | None = None
        self._engine: Engine | None = None
        self._policy: Policy | None = None
        self._failures = 0
        self._closed = False
        self._passed: set[str] = set()
        self._changing = threading.Lock()
        self.telemetry = Telemetry(
            ready=lambda: self._shut is None, waiting=lambda: 0 if self._engine is None else self._engine.depth
        )

    # ------------------------------------------------------------------------------------------------ open and shut

    @property
    def shut(self) -> str | None:
        """Why nothing is answered; None if it is."""
        return self._shut

    @property
    def policy(self) -> Policy:
        """The policy in force. Raises Refused as long as there is none."""
        if self._policy is None:
            raise Refused(503, "not_ready", f"not ready: {self._shut}")
        return self._policy

    def check_open(self) -> None:
        """Raise Refused unless answers may leave."""
        if self._shut is not None:
            raise Refused(503, "not_ready", f"not ready: {self._shut}")

    def fail(self, why: str) -> None:
        """Answer nobody from now on."""
        self._failures += 1
        if self._shut in (None, STARTING):
            self._shut = why
            try:
                self.audit.write("shut", why=why)
            except AuditFailed as error:
                self._shut = f"{why}; and {error}"

    def _open(self, failures: int) -> None:
        """Answer again, unless something failed since there had been so many failures."""
        if self._failures == failures:
            self._shut = None

    def start(self) -> None:
        """Load the model and the policy, check the guards, open. What goes wrong is why the service stays shut."""
        with self._changing:
            try:
                self._model = self._load()
                self._engine = Engine(self._model, rows=self._rows, waiting=self._waiting)
                self._take(self._read(self._model), "start")
            except SteerguardError as error:
                self.fail(str(error))

    def reload(self, who: str) -> Policy:
        """Read the policy again, check its guards, and put it in force.

        Raises:
            SteerguardError: why the policy before stays in force. NotSteering shuts the service, too.
        """
        with self._changing:
            try:
                if self._model is None:
                    raise InputError("the model is not loaded yet; wait for /ready")
                return self._take(self._read(self._model), who)
            except SteerguardError as error:
                self.telemetry.reloaded(False)
                if isinstance(error, SteeringError | AuditFailed):
                    self.fail(str(error))
                else:
                    self.audit.write("policy_refused", by=who, why=str(error))
                raise

    def recheck(self, who: str) -> None:
        """Check every guard again; opens a service that was shut. Raises NotSteering, which shuts it."""
        with self._changing:
            policy, failures = self.policy, self._failures
            self._passed.clear()
            try:
                self._check(policy.guards)
            except SteeringError as error:
                self.fail(str(error))
                raise
            self.audit.write("checked", by=who, policy=policy.digest)
            self._open(failures)

    def _take(self, policy: Policy, who: str) -> Policy:
        failures = self._failures
        if self._shut is not None:
            self._passed.clear()
        self._check(policy.guards)
        before = self._policy.digest if self._policy else None
        self.audit.write("policy", by=who, before=before, after=policy.digest, policy=policy.described())
        self._policy = policy
        self._open(failures)
        self.telemetry.in_force(policy)
        self.telemetry.reloaded(True)
        return policy

    def _check(self, guards: Sequence[Guard]) -> None:
        """Raise NotSteering unless every guard passes the checks of `steerguard check`; each is checked once."""
        for guard in guards:
            if guard.digest in self._passed:
                continue
            report = self.engine.between(lambda guard=guard: check(self.model, guard)).result()  # type: ignore[misc]
            self.telemetry.checked(report.passed)
            if not report.passed:
                failed = "; ".join(f"{one.check}: {one.detail}" for one in report.findings if not one.passed)
                raise NotSteering(f"guard {guard.name!r} failed its check: {failed or 'nothing was checked'}")
            self._passed.add(guard.digest)

    @property
    def model(self) -> TransformersModel:
        self.check_loaded()
        assert self._model is not None
        return self._model

    @property
    def engine(self) -> Engine:
        self.check_loaded()
        assert self._engine is not None
        return self._engine

    def check_loaded(self) -> None:
        if self._model is None or self._engine is None:
            raise Refused(503, "not_ready", f"not ready: {self._shut}")

    def close(self) -> None:
        """End after the batch in progress; does nothing the second time."""
        if self._closed:
            return
        self._closed = True
        if self._engine is not None:
            self._engine.close()
        try:
            self.audit.write("stop")
        except AuditFailed as error:
            log.error("%s", error)
        self.audit.close()

    # ------------------------------------------------------------------------------------------------------ answers

    def job(self, request: Request, decision: Decision) -> Job:
        """The job of a request. Raises Refused for a prompt that the model cannot take."""
        tokenizer = self.model.tokenizer
        try:
            if request.endpoint == "chat":
                ids = render(tokenizer, request.messages).ids
            elif isinstance(request.prompt, str):
                ids = tuple(tokenizer(request.prompt)["input_ids"])
            else:
                ids = request.prompt
            if ids and max(ids) >= (size := self.model.vocabulary):
                raise InputError(f"prompt has the token {max(ids)}; this model has 0 to {size - 1}")
            self.model.room(len(ids), request.drawing.max_tokens)
        except InputError as error:
            raise Refused(400, "invalid_prompt", str(error), param="prompt" if request.prompt else "messages") from error
        return Job(ids, request.n, request.drawing, installed(decision))

    def submit(self, job: Job) -> None:
        """Queue a job. Raises Refused."""
        self.check_open()
        try:
            self.engine.submit(job)
        except Busy as error:
            raise Refused(429, "busy", str(error), headers={"retry-after": str(error.seconds)}) from error
        except Closed as error:
            raise Refused(503, "shutting_down", str(error)) from error

    def settle(self, job: Job, decision: Decision, policy: Policy) -> Settled:
        """The answers of a job that is done. Raises Refused; whatever says that steering may not act shuts the service."""
        error = job.answers.exception(timeout=0)
        if error is not None and not isinstance(error, SteerguardError):
            log.error("the model failed", exc_info=error)
            raise Refused(500, "failed", f"the model failed ({type(error).__name__}); the server's log has more") from error
        try:
            answers = job.answers.result(timeout=0)
            measured = measure(decision, answers)
        except SteeringError as error:
            self.fail(str(error))
            raise Refused(503, "not_steering", f"no answer is sent, since a guard may not have acted: {error}") from error
        except Closed as error:
            raise Refused(503, "shutting_down", str(error)) from error
        except SteerguardError as error:
            raise Refused(500, "failed", str(error)) from error
        self.check_open()
        self.telemetry.measured(measured)
        return Settled(answers, measured, _steering(policy, decision, answers, measured))


def _steering(policy: Policy, decision: Decision, answers: Sequence[Answer], measured: Sequence[Measured]) -> dict[str, Any]:
    acting = [one for one in measured if one.act.mode == "enforce"]
    found: dict[str, Any] = {
        "policy": policy.digest,
        "guards": [one.as_dict() for one in measured],
        "tokens_seen": sum(one.total.seen for one in acting),
        "tokens_moved": sum(one.total.moved for one in acting),
        "largest_shift": max((one.largest for one in acting), default=0.0),
    }
    if decision.trace:
        found["trace"] = projections(decision, answers)
    return found
