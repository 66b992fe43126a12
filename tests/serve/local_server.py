"""What the tests of the server share: a tiny model with guards that can be heard, and a server in a thread."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn

from steerguard.backends.base import Answer, Sampling
from steerguard.backends.hf import TransformersModel, wrap
from steerguard.guard import Guard, Positions
from steerguard.rules import Rule, StMP, StTP, SwFC, rule
from steerguard.serve.app import create
from steerguard.serve.policy_file import PolicyFile, read
from steerguard.serve.service import Service
from steerguard.serve.start import Limits, Place, local
from tiny import guard as make_guard
from tiny import llama_folder, probe

NAME = "tiny"
PROMPT = "tell me the truth"
PROMPTS = (PROMPT, "what is the answer to the long question of the day, and of the week?", "a")
STEPS = 12


def tiny_model(folder: Path) -> TransformersModel:
    """A random Llama, loaded from memory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = llama_folder(folder)
    return wrap(AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path), name=NAME)


def guard_of(model: TransformersModel, name: str, rule: Rule, layer: int, positions: Positions = "all", seed: int = 0) -> Guard:
    """A guard whose boundary stands amid the prompts' own projections, in a gap, so that about half the tokens move."""
    rho_of = np.concatenate([model.residuals(prompt)[layer] for prompt in PROMPTS])
    one = probe(layer, model.identity.width, rho=rho_of, seed=seed)
    middle = np.sort(one.project(rho_of))[len(rho_of) // 3 : -(len(rho_of) // 3)]
    widest = int(np.diff(middle).argmax())
    one = replace(one, m=float(middle[widest : widest + 2].mean()))
    return make_guard(model.identity, rule, (one,), positions=positions, name=name)


def guards_of(model: TransformersModel) -> dict[str, Guard]:
    """Three rules; each changes what is said."""
    made = (
        guard_of(model, "still", StTP(20), 1, seed=1),
        guard_of(model, "mirror", StMP(3), 2, seed=2),
        guard_of(model, "push", SwFC(3), 2, "response", seed=3),
    )
    return {one.name: one for one in made}


@dataclass(frozen=True)
class Reference:
    """What the library answers under what a request asks for."""

    model: TransformersModel
    guards: Mapping[str, Guard]

    def guard(self, asked: str | Mapping[str, Any]) -> Guard:
        said = {"name": asked} if isinstance(asked, str) else dict(asked)
        own = self.guards[said["name"]]
        strength, positions = said.get("strength", own.rule.strength), said.get("positions", own.positions)
        return replace(own, rule=rule(own.rule.name, strength), positions=positions)

    def answer(self, prompt: Any, guards: Sequence[Any], *, steps: int = STEPS, **drawing: Any) -> Answer:
        sampling = Sampling(max_new_tokens=steps, **({"temperature": 0.0} | drawing))
        return self.model.generate(prompt, guards=tuple(map(self.guard, guards)) or None, sampling=sampling)[0]


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    service: Service
    folder: Path

    def post(self, path: str, body: Any = None, *, content: str | bytes | None = None, **more: Any) -> httpx.Response:
        headers = {"content-type": "application/json", **more.pop("headers", {})}
        content = json.dumps(body) if content is None else content
        return httpx.post(self.url + path, content=content, headers=headers, timeout=120, **more)

    def get(self, path: str, **more: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **more)

    def write(self, policy: Mapping[str, Any]) -> None:
        """Write another policy; it is in force after a reload."""
        (self.folder / "policy.yaml").write_text(json.dumps(policy), encoding="utf-8")

    def audit(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "audit.jsonl").read_text().splitlines()]

    def metric(self, line: str) -> float:
        """The value of a series, by its name and labels as Prometheus writes them; 0 if it is not there yet."""
        found = [one for one in self.get("/metrics").text.splitlines() if one.startswith(line + " ")]
        return float(found[0].rpartition(" ")[2]) if found else 0.0


def policy_of(guards: Mapping[str, Guard], folder: Path, **of_guards: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Guard files in a folder, and the `guards` of a policy with them."""
    for one in guards.values():
        one.save(folder / f"{one.name}.guard", overwrite=True)
    return [{"file": f"{name}.guard", **of_guards.get(name, {})} for name in guards]


@contextmanager
def serving(
    model: TransformersModel | Callable[[], TransformersModel], policy: Mapping[str, Any], folder: Path, *,
    ready: bool | None = True, limits: Limits = Limits(max_tokens=64, rows=8, waiting=64), audit_text: bool = False,
) -> Iterator[Server]:  # fmt: skip
    """A server of that model under that policy, over HTTP; that must be ready, need not be, or (None) is not started yet."""
    load = model if callable(model) else lambda: model
    path = folder / "policy.yaml"
    path.write_text(json.dumps(policy), encoding="utf-8")

    def source() -> PolicyFile:
        return read(path)

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        service = local(load, source, NAME, Place("127.0.0.1", port, audit=folder / "audit.jsonl", audit_text=audit_text), limits)
        running = uvicorn.Server(uvicorn.Config(create(service), log_level="error", lifespan="off"))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        try:
            until = time.monotonic() + 30
            while not running.started:
                assert time.monotonic() < until, "the server did not start"
                time.sleep(0.01)
            if ready is not None:
                service.start()
            assert not ready or service.shut is None, service.shut
            yield Server(f"http://127.0.0.1:{port}", service, folder)
        finally:
            running.should_exit = True
            thread.join(30)
            service.close()
