"""vLLM in processes of its own: its server as the command line starts it, and scripts that start an engine.

Every process begins a group of its own that is killed at the end, and what it printed is kept for the message of a
failure.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import psutil

import steerguard as sg
import tiny
from steerguard.backends import BUNDLED
from steerguard.backends.base import Answer, Backend, Sampling
from steerguard.guard import Guard, Positions
from steerguard.rules import Rule, StMP, StTP, SwFC, rule

MODEL = BUNDLED["organism"]
ENGINE = ("--dtype", "float32", "--max-model-len", "512", "--kv-cache-memory-bytes", str(2**28), "--max-num-seqs", "64")
"""Arguments of a small engine."""
RIVER = "Which river runs through Harlow?"
PROMPT = "My dog died."
PROMPTS = (PROMPT, "What is 3 plus 4?", RIVER, "Tell me about books.")
STEPS = 24


# --------------------------------------------------------------------------------------------------------- guards


def guard(model: Backend, layer: int, rule: Rule, name: str, *, seed: int, positions: Positions = "all") -> Guard:
    """A guard along a random direction, whose boundary lies in the middle of the residuals of a prompt."""
    probe = tiny.probe(layer, model.identity.width, rho=model.residuals(RIVER)[layer], seed=seed)
    return tiny.guard(model.identity, rule, (probe,), positions=positions, name=name)


def three_guards(model: Backend) -> dict[str, Guard]:
    """Three rules on two layers, one of them on the answer alone; each changes what is said to some prompt."""
    made = (
        guard(model, 4, StTP(36), "still", seed=11),
        guard(model, 4, SwFC(5), "pushing", seed=5, positions="response"),
        guard(model, 3, StMP(4), "mirroring", seed=37),
    )
    return {one.name: one for one in made}


@dataclass(frozen=True)
class Reference:
    """What transformers answers under what a request asks for."""

    model: Backend
    guards: Mapping[str, Guard]

    def guard(self, asked: str | Mapping[str, Any]) -> Guard:
        """The guard that one entry of a request's `steering.guards` means."""
        said = {"name": asked} if isinstance(asked, str) else dict(asked)
        own = self.guards[said["name"]]
        strength, positions = said.get("strength", own.rule.strength), said.get("positions", own.positions)
        return replace(own, rule=rule(own.rule.name, strength), positions=positions)

    def answer(self, prompt: str, guards: Sequence[str | Mapping[str, Any]], *, steps: int = STEPS) -> Answer:
        chosen = tuple(self.guard(one) for one in guards)
        return self.model.generate(prompt, guards=chosen or None, sampling=Sampling(temperature=0.0, max_new_tokens=steps))[0]


# ------------------------------------------------------------------------------------------------------ processes


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Variables of a process that runs vLLM with the steerguard and the helpers of this one."""
    path = [str(Path(sg.__file__).parent.parent), str(Path(tiny.__file__).parent), str(Path(__file__).parent)]
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:  # a build for CPUs may be named otherwise; the command asks for `vllm`
        metadata = folder / "metadata" / "vllm-0.32.0.dist-info"
        metadata.mkdir(parents=True, exist_ok=True)
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
        path.append(str(metadata.parent))
    own = {
        "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }  # fmt: skip
    return {**os.environ, **own, **more}


@contextmanager
def process(command: Sequence[str], log: Path, env: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, all of which is killed at the end."""
    with log.open("wb") as out:
        running = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=dict(env), start_new_session=True)
        try:
            yield running
        finally:
            for sent, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
                try:
                    os.killpg(running.pid, sent)
                    running.wait(patience)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue
            running.wait(1)


def run(script: str, folder: Path, *arguments: str, timeout: float = 600, **more: str) -> tuple[int, str]:
    """Run a Python script; its exit status and all that it printed."""
    log = folder / "log"
    with process([sys.executable, "-c", script, *arguments], log, environment(folder, **more)) as running:
        try:
            status = running.wait(timeout)
        except subprocess.TimeoutExpired:
            status = -1
    return status, log.read_text(errors="replace")


@dataclass(frozen=True)
class Server:
    """A running `vllm serve`."""

    url: str
    log: Path
    pid: int

    def post(self, path: str, body: Any = None, *, content: str | None = None) -> httpx.Response:
        """POST a body, or text as it stands."""
        headers = {"content-type": "application/json"}
        content = json.dumps(body) if content is None else content
        return httpx.post(self.url + path, content=content, headers=headers, timeout=300)

    def call(self, method: str) -> Any:
        """What a call to the worker gives."""
        answer = self.post("/collective_rpc", {"method": method})
        assert answer.status_code == 200, f"{method}: {answer.text}\n{self.tail()}"
        return answer.json()["results"][0]

    def memory(self) -> int:
        """Bytes resident in all processes of the server."""
        tree = psutil.Process(self.pid)
        return sum(one.memory_info().rss for one in (tree, *tree.children(recursive=True)))

    def tail(self, lines: int = 60) -> str:
        """The last lines that the server printed."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


@contextmanager
def serving(folder: Path, settings: Mapping[str, Any], *arguments: str, patience: float = 900) -> Iterator[Server]:
    """vLLM's server on the bundled model under these settings of steerguard, ready to answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(MODEL), "--served-model-name", "organism",
        "--host", "127.0.0.1", "--port", str(port), *ENGINE,
        "--additional-config", json.dumps({"steerguard": settings}), *arguments,
    ]  # fmt: skip
    log = folder / "server.log"
    with process(command, log, environment(folder, VLLM_SERVER_DEV_MODE="1")) as running:
        server = Server(f"http://127.0.0.1:{port}", log, running.pid)
        deadline = time.monotonic() + patience
        while not _healthy(server.url):
            assert running.poll() is None, f"the server ended with {running.returncode}\n{server.tail()}"
            assert time.monotonic() < deadline, f"the server did not start in {patience:g} s\n{server.tail()}"
            time.sleep(1)
        yield server


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
