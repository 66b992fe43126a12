"""Starting a server: the policy first, then ours with the model behind it, or vLLM's in our place.

Ours answers from the first moment: /health at once, /ready when the guards have passed their checks. A policy that cannot
be read ends the start; whatever is wrong with a guard or the model keeps the server shut, and /ready says why.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from steerguard.errors import InputError, SteerguardError
from steerguard.guard import Guard
from steerguard.serve import policy_file, vllm
from steerguard.serve.policy import Policy, build
from steerguard.serve.policy_file import PolicyFile

if TYPE_CHECKING:
    from steerguard.serve.service import Service

log = logging.getLogger("steerguard.serve")
LOOPBACK = ("127.0.0.1", "::1", "localhost")
LAPTOP = (
    "serving {name} with transformers on http://{host}:{port}/v1, one batch at a time: good for a laptop and for tests; "
    "for a crowd, use --backend vllm. Ctrl-C ends it"
)


@dataclass(frozen=True)
class Place:
    """Where a server listens, what it calls its model, where it writes."""

    host: str
    port: int
    name: str | None = None
    "what the model is called in requests; None: the last part of its own name"
    audit: Path | None = None
    audit_text: bool = False
    "prompts and answers go into the audit log, too"


@dataclass(frozen=True)
class Limits:
    """How much is served at once."""

    max_tokens: int
    "of one answer"
    rows: int
    "answers of one call of the model"
    waiting: int
    "requests that may wait; more get a 429"


def start(
    guards: Sequence[Path], policy: Path | None, model: str | None, backend: str, place: Place, limits: Limits, *,
    flags: Sequence[str] = (), **options: Any,
) -> None:  # fmt: skip
    """Serve until a signal ends it.

    Args:
        guards, policy: guard files that are all required, or a policy file; one of the two.
        model: hub name or folder; None: that of the first guard.
        flags: vLLM's own, for backend vllm.
        options: of the transformers backend, as `sg.load` takes them.

    Raises:
        InputError: the policy cannot be read, the extra is not installed, or the port or the audit log cannot be had.
    """
    read = _source(guards, policy, trace=backend == "hf")
    file = read()
    chosen = model or Guard.load(Path(file.guards[0].file)).model.name
    name = place.name or os.path.basename(chosen.rstrip("/"))
    if backend == "hf":
        if flags:
            raise InputError(f"{' '.join(flags)} are flags of vLLM; leave them out, or say --backend vllm")
        if not file.keys and place.host not in LOOPBACK:
            _tell(f"the policy has no keys: whoever reaches {place.host}:{place.port} may ask")
        listen(local(lambda: _load(chosen, **options), read, name, place, limits), name, place)
    elif backend == "vllm":
        become_vllm(chosen, build(file, name=name), place, flags, **options)
    else:
        raise InputError(f"the backend {backend!r} cannot be served; there are hf and vllm")


def become_vllm(model: str, policy: Policy, place: Place, flags: Sequence[str], **options: Any) -> NoReturn:
    """Start vLLM's server in place of this process.

    Raises:
        InputError: vLLM would not serve this policy, or an option is not its own.
    """
    ours = [key for key, value in options.items() if value not in (None, "auto")] + (["audit"] if place.audit else [])
    if ours:
        raise InputError(f"{', '.join(ours)} of this command do not reach vLLM; say it with vLLM's own flags after --")
    command = vllm.argv(model, policy, host=place.host, port=place.port, flags=flags)
    vllm.check_environment(os.environ)
    sys.stderr.flush()
    os.execv(command[0], command)


def _source(guards: Sequence[Path], policy: Path | None, *, trace: bool) -> Callable[[], PolicyFile]:
    """Reads the policy, now and again for every reload."""
    if (policy is None) == (not guards):
        raise InputError("give guard files, or a policy that names them with --policy; one of the two")
    return (lambda: policy_file.of_guards(guards, trace=trace)) if policy is None else (lambda: policy_file.read(policy))


def _load(name: str, **options: Any) -> Any:
    from steerguard.backends import load

    return load(name, backend="hf", **{key: value for key, value in options.items() if value not in (None, "auto")})


def local(load: Callable[[], Any], read: Callable[[], PolicyFile], name: str, place: Place, limits: Limits) -> Service:
    """The service of our own server, not started yet. Raises InputError without the extra."""
    try:
        from steerguard.serve.audit import Audit
        from steerguard.serve.service import Service
    except ImportError as error:
        raise _extra(error) from error

    def policy(model: Any) -> Policy:
        return build(read(), name=name, identity=model.identity)

    audit = Audit(place.audit, text=place.audit_text)
    return Service(load, policy, audit=audit, longest=limits.max_tokens, rows=limits.rows, waiting=limits.waiting)


def listen(service: Service, name: str, place: Place) -> None:
    """Answer HTTP until a signal ends it; SIGHUP reads the policy again."""
    try:
        import uvicorn

        from steerguard.serve.app import create
    except ImportError as error:
        raise _extra(error) from error
    server = uvicorn.Server(uvicorn.Config(create(service), host=place.host, port=place.port, log_level="warning"))
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=_reload, args=(service,), daemon=True).start())
    threading.Thread(target=_open, args=(service,), name="steerguard-start", daemon=True).start()
    _tell(LAPTOP.format(name=name, host=place.host, port=place.port))
    try:
        server.run()
    except KeyboardInterrupt:
        _tell("ended")
    finally:
        service.close()


def _open(service: Service) -> None:
    service.start()
    _tell("ready" if service.shut is None else f"not ready: {service.shut}")


def _reload(service: Service) -> None:
    try:
        policy = service.reload("SIGHUP")
    except SteerguardError as error:
        log.error("the policy before stays in force: %s", error)
    else:
        _tell(f"policy {policy.digest[:12]} is in force")


def _tell(sentence: str) -> None:
    sys.stderr.write(f"steerguard: {sentence}\n")
    sys.stderr.flush()


def _extra(error: ImportError) -> InputError:
    return InputError(f'serving needs fastapi, uvicorn and prometheus-client ({error}); pip install "steerguard[serve]"')
