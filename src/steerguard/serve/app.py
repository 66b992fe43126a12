"""The HTTP of the local server: OpenAI's endpoints, and ours for operators.

    GET  /health                     the process lives
    GET  /ready                      200 if the guards passed their checks and nothing failed since, else 503 and why
    GET  /metrics                    for Prometheus
    GET  /v1/models                  every name that may be asked for
    POST /v1/chat/completions, /v1/completions
    GET  /v1/steering/policy         the policy in force
    POST /v1/steering/admin/reload, /v1/steering/admin/check     with the admin key, if the policy has one

Every request is decided by `policy.decide` before the model sees it. This module knows HTTP; what is answered is the
service's.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hmac import compare_digest
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from steerguard.backends.vllm.catalogue import HEADER, header
from steerguard.errors import SteerguardError
from steerguard.serve import protocol, stream
from steerguard.serve.audit import AuditFailed
from steerguard.serve.engine import Job
from steerguard.serve.policy import Decision, Policy, Refusal, decide
from steerguard.serve.policy_file import key_digest
from steerguard.serve.protocol import Endpoint, Refused, Writer
from steerguard.serve.service import Service, Settled

MAX_BODY = 2 * 2**20
"""Bytes of a request."""
CREATED = int(time.time())


def create(service: Service) -> FastAPI:
    """The application of a service."""

    @asynccontextmanager
    async def ending(_: FastAPI) -> AsyncIterator[None]:
        """After the last request, whatever signal it was: the engine ends, and the log says so."""
        yield
        await run_in_threadpool(service.close)

    app = FastAPI(title="steerguard", lifespan=ending, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    _errors(app)
    _operators(app, service)
    _answers(app, service)
    return app


def _errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        said = Refused(error.status_code, "no_such_route", f"{error.detail}: {request.method} {request.url.path}")
        return JSONResponse(said.body(), error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        said = Refused(500, "failed", f"the server failed ({type(error).__name__}); its log has more")
        return JSONResponse(said.body(), 500)


def _operators(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready")
    async def ready() -> Response:
        shut = service.shut
        said = {"ready": shut is None, "policy": None if shut else service.policy.digest, "why": shut}
        return JSONResponse(said, 200 if shut is None else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.telemetry.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/steering/policy")
    async def policy(request: Request) -> dict[str, Any]:
        found = service.policy
        _caller(request, found)
        return found.described()

    @app.post("/v1/steering/admin/reload")
    async def reload(request: Request) -> dict[str, Any]:
        _check_admin(request, service.policy)
        try:
            taken = await run_in_threadpool(service.reload, "admin")
        except SteerguardError as error:
            raise Refused(409, "policy_refused", f"the policy before stays in force: {error}") from error
        return {"policy": taken.digest}

    @app.post("/v1/steering/admin/check")
    async def check(request: Request) -> dict[str, Any]:
        _check_admin(request, service.policy)
        try:
            await run_in_threadpool(service.recheck, "admin")
        except SteerguardError as error:
            raise Refused(503, "not_steering", str(error)) from error
        return {"ready": True}


def _answers(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        policy = service.policy
        names = policy.open_to(_caller(request, policy))
        return {"object": "list", "data": [_model(name) for name in names]}

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        policy = service.policy
        if name not in policy.open_to(_caller(request, policy)):
            raise Refused(404, "model_not_found", "there is no such model; GET /v1/models lists what there is", param="model")
        return _model(name)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _Exchange(service, request, "chat").answer()

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _Exchange(service, request, "completions").answer()


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": CREATED, "owned_by": "steerguard"}


# -------------------------------------------------------------------------------------------------------- who asks


def _bearer(request: Request) -> str | None:
    """The key of a request. Raises Refused for one that says it twice."""
    given = request.headers.getlist("authorization")
    if len(given) > 1:
        raise Refused(401, "invalid_api_key", "the Authorization header stands there twice; give one")
    scheme, _, key = (given[0] if given else "").partition(" ")
    return key.strip() if scheme.casefold() == "bearer" and key.strip() else None


def _caller(request: Request, policy: Policy) -> str | None:
    """The id of the key of a request; None where the policy has no keys. Raises Refused."""
    if not policy.keys:
        return None
    found = policy.key_of(_bearer(request))
    if found is None:
        raise _unknown_key("this server needs an API key: Authorization: Bearer KEY")
    return found


def _check_admin(request: Request, policy: Policy) -> None:
    if policy.admin is None:
        raise Refused(404, "no_such_route", "Not Found: this server has no admin routes; its policy gives them no key")
    if not compare_digest(key_digest(_bearer(request) or ""), policy.admin):
        raise _unknown_key("the admin routes need the admin key")


def _unknown_key(message: str) -> Refused:
    return Refused(401, "invalid_api_key", message, headers={"www-authenticate": "Bearer"})


# ------------------------------------------------------------------------------------------------------ an exchange


class _Exchange:
    """One request and its answer, from arrival to the line in the audit log. What is known of it grows on the way."""

    def __init__(self, service: Service, http: Request, endpoint: Endpoint) -> None:
        self.service, self.http, self.endpoint = service, http, endpoint
        own = http.headers.get("x-request-id", "")
        self.request_id = own if protocol.ID.fullmatch(own) else secrets.token_hex(16)
        self.begun = time.monotonic()
        self.key: str | None = None
        self.policy: Policy | None = None
        self.said: protocol.Request | None = None
        self.alias: str | None = None
        "the model's name, where it is one of ours"

    async def answer(self) -> Response:
        try:
            # 1. whether anything is answered, and who asks
            self.service.check_open()
            self.policy = policy = self.service.policy
            self.key = _caller(self.http, policy)
            # 2. what is asked, and what is decided on it
            self.said = said = protocol.parse(self.endpoint, await _body(self.http), longest=self.service.longest)
            decision = decide(policy, said.body, self.key, said.model)
            if isinstance(decision, Refusal):
                raise Refused(decision.status, decision.reason, decision.message, param=decision.param)
            self.alias = said.model
            # 3. the answer
            work = _Work(self.service, policy, decision, self.service.job(said, decision), Writer.of(said, self.request_id))
            return await (self._stream(work) if said.stream else self._whole(work))
        except Refused as error:
            self._end("failed" if error.status >= 500 else "refused", error=error)
            return JSONResponse(error.body(), error.status, headers={**error.headers, "x-request-id": self.request_id})
        except BaseException as error:
            self._end("failed", error=Refused(500, "failed", type(error).__name__))
            raise

    async def _whole(self, work: _Work) -> Response:
        self.service.submit(work.job)
        if not await stream.finished(work.job, self.http.is_disconnected):
            self._end("disconnected")
            return Response(status_code=499)
        settled = work.settle()
        self._end("answered", settled)
        found = work.writer.whole([(one.text, one.finished) for one in settled.answers], settled.usage, settled.steering)
        return JSONResponse(found, headers=self._headers(work))

    async def _stream(self, work: _Work) -> Response:
        texts = stream.Texts(work.job)
        self.service.submit(work.job)
        return _Stream(work.job, self._events(work, texts), self._headers(work))

    def _headers(self, work: _Work) -> dict[str, str]:
        return {"x-request-id": self.request_id, HEADER: _header(work.decision)}

    async def _events(self, work: _Work, texts: stream.Texts) -> AsyncIterator[bytes]:
        """The events of a stream. What goes wrong on the way is its last event, and no [DONE] follows."""
        ended = False
        try:
            for choice in range(work.job.n if self.endpoint == "chat" else 0):
                yield stream.event(work.writer.piece(choice, None, first=True))
            async for choice, text in texts:
                self.service.check_open()
                yield stream.event(work.writer.piece(choice, text))
            settled = work.settle()
            self._end("answered", settled)
            ended = True
            for chunk in work.writer.ends([one.finished for one in settled.answers], settled.usage, settled.steering):
                yield stream.event(chunk)
            yield stream.DONE
        except Refused as error:
            ended = True
            self._end("failed", error=error)
            yield stream.event(error.body())
        finally:
            if not ended:
                self._end("disconnected")

    def _end(self, outcome: str, settled: Settled | None = None, *, error: Refused | None = None) -> None:
        """Write the request down and count it. Raises Refused for an answer that cannot be written down."""
        seconds = time.monotonic() - self.begun
        line: dict[str, Any] = {
            "request": self.request_id, "key": self.key, "endpoint": self.endpoint, "outcome": outcome, "model": self.alias,
            "policy": self.policy.digest if self.policy else None, "seconds": round(seconds, 3),
        }  # fmt: skip
        if error is not None:
            line |= {"reason": error.reason, "param": error.param}
            if error.status >= 500 or self.service.audit.text:  # what a client did wrong is told with words of his
                line |= {"why": error.message}
        if settled is not None:
            line |= {"guards": [one.as_dict() for one in settled.measured], "usage": settled.usage}
        if self.service.audit.text and self.said is not None:
            line |= {"prompt": self.said.prompt or list(self.said.messages)}
            line |= {"answers": [one.text for one in settled.answers]} if settled else {}
        try:
            self.service.audit.write("request", **line)
        except AuditFailed as lost:
            self.service.fail(str(lost))
            if settled is not None:
                raise Refused(503, "not_ready", str(lost)) from lost
        tokens = settled.usage["completion_tokens"] if settled else 0
        self.service.telemetry.ended(self.endpoint, outcome, seconds, tokens=tokens, reason=error.reason if error else None)


class _Stream(StreamingResponse):
    """A stream of events; however it ends, and even if it never began, nobody waits for its job afterwards."""

    def __init__(self, job: Job, events: AsyncIterator[bytes], headers: Mapping[str, str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.gone.set()


@dataclass(frozen=True, eq=False)
class _Work:
    """A request that was decided, and its job."""

    service: Service
    policy: Policy
    decision: Decision
    job: Job
    writer: Writer

    def settle(self) -> Settled:
        return self.service.settle(self.job, self.decision, self.policy)


def _header(decision: Decision) -> str:
    """What acts, as vLLM's server says it, too; a guard in shadow is told as such."""
    return header((act.name + ("" if act.mode == "enforce" else f" ({act.mode})"), act.digest) for act in decision.acts)


async def _body(request: Request) -> bytes:
    """The body of a request. Raises Refused for one that is encoded, of another type, or too long."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().casefold()
    if kind != "application/json":
        raise Refused(415, "unsupported_media_type", "the body must be application/json")
    if request.headers.get("content-encoding", "identity").casefold() != "identity":
        raise Refused(415, "unsupported_media_type", "a body with a content encoding is not read; send it as it is")
    found = bytearray()
    async for part in request.stream():
        found += part
        if len(found) > MAX_BODY:
            raise Refused(413, "too_large", f"the body has more than {MAX_BODY} bytes")
    return bytes(found)
