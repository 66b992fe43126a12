"""`steerguard serve --backend vllm`: vLLM's own server in place of the command, under the same policy."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("vllm.engine.arg_utils", reason="needs vLLM")

from processes import ENGINE, MODEL, PROMPTS, STEPS, Reference, environment, process, three_guards

import steerguard as sg

pytestmark = pytest.mark.slow
PROMPT = PROMPTS[1]


def test_the_command_becomes_vllms_server_under_the_policy(tmp_path: Path) -> None:
    model = sg.load("organism")
    reference = Reference(model, three_guards(model))
    for guard in reference.guards.values():
        guard.save(tmp_path / f"{guard.name}.guard")
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "guards:\n- {file: still.guard, required: true}\n- {file: pushing.guard, strength: [1, 6]}\n"
        "- {file: mirroring.guard, mode: off}\ndefault: [still]\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "steerguard.cli", "serve", "--policy", str(policy), "--model", str(MODEL), "--name", "organism",
        "--backend", "vllm", "--port", str(port), "--", *ENGINE,
    ]  # fmt: skip
    url, log = f"http://127.0.0.1:{port}", tmp_path / "log"
    with process(command, log, environment(tmp_path)) as running:
        until = time.monotonic() + 900
        while not answers(url):
            assert running.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(1)
        # the same process: it has become vLLM's
        assert b"vllm" in Path(f"/proc/{running.pid}/cmdline").read_bytes() or not os.path.isdir("/proc")

        def ask(**more: Any) -> httpx.Response:
            messages = [{"role": "user", "content": PROMPT}]
            body = {"model": "organism", "messages": messages, "max_tokens": STEPS, "temperature": 0, **more}
            return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300)

        due = reference.answer(PROMPT, ["still"]).text
        assert due != reference.answer(PROMPT, []).text
        assert ask().json()["choices"][0]["message"]["content"] == due
        both = ["still", {"name": "pushing", "strength": 6}]
        got = ask(steering={"guards": both})
        assert got.json()["choices"][0]["message"]["content"] == reference.answer(PROMPT, both).text
        digests = [reference.guard(one).digest[:12] for one in both]
        assert got.headers["x-steering-guard"] == f"still@{digests[0]}, pushing@{digests[1]}"
        for more in ({}, {"stream": True}):
            assert ask(**more).headers["x-steering-guard"] == f"still@{digests[0]}"
        for guards in ([], ["pushing"], ["mirroring"], ["still", {"name": "pushing", "strength": 7}]):
            refused = ask(steering={"guards": guards})
            assert refused.status_code == 400
            assert "x-steering-guard" not in refused.headers
        assert "x-steering-guard" not in ask(temperature=-1).headers
        tokens = httpx.post(f"{url}/tokenize", json={"model": "organism", "prompt": PROMPT}, timeout=60)
        assert tokens.status_code == 200
        assert "x-steering-guard" not in tokens.headers


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
