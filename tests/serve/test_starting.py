"""`steerguard serve` as a person types it: a process on a port, SIGHUP, Ctrl-C; what is refused; vLLM's command line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from local_server import PROMPT, STEPS, Reference

import steerguard as sg
from steerguard.backends.vllm.catalogue import Catalogue, Settings
from steerguard.cli import main
from steerguard.errors import InputError, Unsupported
from steerguard.serve import vllm
from steerguard.serve.policy import Policy, build
from steerguard.serve.policy_file import of_guards, read


@contextmanager
def command(
    *words: str | Path, log: Path, port: int, ends: int = signal.SIGINT, status: int = 0
) -> Iterator[subprocess.Popen[bytes]]:
    """`steerguard serve` in a process, ready to answer."""
    env = {**os.environ, "PYTHONPATH": str(Path(sg.__file__).parent.parent), "ADMIN_KEY": "the key of the operator"}
    line = [sys.executable, "-m", "steerguard.cli", "serve", *map(str, words), "--port", str(port)]
    with log.open("wb") as out:
        running = subprocess.Popen(line, stdout=out, stderr=subprocess.STDOUT, env=env)
        try:
            until = time.monotonic() + 300
            while not is_ready(port):
                assert running.poll() is None, log.read_text()
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.2)
            yield running
        finally:
            running.send_signal(ends)
            assert running.wait(60) == status


def is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        found: int = free.getsockname()[1]
    return found


@pytest.fixture(scope="module")
def folder(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model on disk, and guards that were fitted to what is on disk."""
    import tiny

    root = tmp_path_factory.mktemp("command")
    tiny.llama_folder(root / "tiny")
    identity = sg.load(root / "tiny").identity
    for one in reference.guards.values():
        tiny.guard(identity, one.rule, one.probes, positions=one.positions, name=one.name).save(root / f"{one.name}.guard")
    return root


@pytest.mark.slow
def test_a_process_serves_reloads_and_ends(reference: Reference, folder: Path, tmp_path: Path, port: int) -> None:
    policy = tmp_path / "policy.yaml"

    def say(name: str, more: str = "") -> None:
        policy.write_text(f"guards:\n- {{file: {folder / name}.guard, required: true}}\n{more}")

    say("still")
    log = tmp_path / "log"
    with command("--policy", policy, "--audit", tmp_path / "audit", log=log, port=port) as running:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)

        def ask() -> str:
            messages: Any = [{"role": "user", "content": PROMPT}]
            got = client.chat.completions.create(model="tiny", messages=messages, max_tokens=STEPS, temperature=0)
            return got.choices[0].message.content or ""

        def wait_for(text: str) -> None:
            until = time.monotonic() + 60
            while text not in log.read_text():
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.1)

        assert ask() == reference.answer(PROMPT, ["still"]).text
        say("mirror")
        running.send_signal(signal.SIGHUP)
        wait_for("is in force")
        assert ask() == reference.answer(PROMPT, ["mirror"]).text
        say("still", "typo: 1\n")
        running.send_signal(signal.SIGHUP)
        wait_for("the policy before stays in force")
        assert ask() == reference.answer(PROMPT, ["mirror"]).text
        client.close()
    assert "good for a laptop" in log.read_text()
    assert log.read_text().endswith("steerguard: ended\n")
    assert "Traceback" not in log.read_text()
    events = [json.loads(line)["event"] for line in (tmp_path / "audit").read_text().splitlines()]
    assert events == ["policy", "request", "policy", "request", "policy_refused", "request", "stop"]


@pytest.mark.slow
def test_guards_on_the_command_line_are_required(reference: Reference, folder: Path, tmp_path: Path, port: int) -> None:
    audit, term = tmp_path / "audit", signal.SIGTERM
    with command(
        folder / "still.guard", "--name", "m", "--audit", audit, log=tmp_path / "log", port=port, ends=term, status=-term
    ):
        url = f"http://127.0.0.1:{port}"
        body = {"model": "m", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": STEPS, "temperature": 0}
        told = httpx.post(f"{url}/v1/chat/completions", json={**body, "steering": {"trace": True}}, timeout=60).json()
        assert told["choices"][0]["message"]["content"] == reference.answer(PROMPT, ["still"]).text
        assert len(told["steering"]["trace"]) == 1
        for more in ({"steering": {"guards": []}}, {"model": "m:unguarded"}):
            assert httpx.post(f"{url}/v1/chat/completions", json={**body, **more}, timeout=60).status_code == 400
    assert json.loads(audit.read_text().splitlines()[-1])["event"] == "stop"


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give guard files, or a policy"),
        (["still.guard", "--policy", "policy.yaml"], "one of the two"),
        (["nothing.guard"], "nothing.guard; check the path"),
        (["--policy", "nothing.yaml"], "there is no file nothing.yaml"),
        (["still.guard", "--backend", "fake"], "cannot be served; there are hf and vllm"),
        (["still.guard", "--", "--max-model-len", "8"], "are flags of vLLM"),
        (["still.guard", "--backend", "vllm", "--audit", "x"], "audit of this command do not reach vLLM"),
        (["still.guard", "--backend", "vllm", "--", "--additional-config", "{}"], "would take the place of the policy"),
        (["still.guard", "--audit", "no/where"], "the audit log no/where cannot be written"),
    ],
    ids=lambda value: str(value),
)
def test_what_cannot_be_started_is_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["steerguard", "serve", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert said in told
    assert told.count("\n") == 1


def test_help_says_what_it_is_good_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["steerguard", "serve", "--help"])
    with pytest.raises(SystemExit):
        main()
    told = " ".join(capsys.readouterr().out.split())
    assert "good for a laptop" in told
    assert "127.0.0.1" in told


# ----------------------------------------------------------------------------------------------------------- vLLM


def policy_of(folder: Path, text: str, tmp_path: Path) -> Policy:
    path = tmp_path / "policy.yaml"
    path.write_text(text.replace("@", str(folder)))
    return build(read(path), name="m", environ={"KEY": "a key of 20 letters."})


def test_vllm_is_started_with_the_same_policy(folder: Path, tmp_path: Path) -> None:
    policy = policy_of(
        folder,
        "guards:\n- {file: @/still.guard, required: true, strength: [20, 30]}\n"
        "- {file: @/push.guard, positions: [all], strength: [1, 4]}\n- {file: @/mirror.guard, mode: off}\ndefault: [still]\n",
        tmp_path,
    )
    line = vllm.argv("organism", policy, host="127.0.0.1", port=8123, flags=["--tensor-parallel-size", "2", "--api-key", "k"])
    assert line[:4] == [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
    assert line[4].endswith("organism/model")
    assert line[5:-2] == [
        "--served-model-name", "m", "--host", "127.0.0.1", "--port", "8123", "--tensor-parallel-size", "2", "--api-key", "k",
    ]  # fmt: skip
    assert line[-2] == "--additional-config"
    settings = Settings.read(json.loads(line[-1]))
    assert settings is not None
    catalogue = Catalogue(settings)
    assert list(catalogue) == ["still", "push"]
    assert catalogue.default == ["still"]
    for asked in ({"guards": []}, {"guards": ["push"]}, {"guards": [{"name": "still", "strength": 19}]}, {"guards": ["mirror"]}):
        with pytest.raises(InputError):
            catalogue.choose(asked)
    chosen = catalogue.choose({"guards": ["still", {"name": "push", "strength": 4, "positions": "all"}]})
    assert [act.name for act in chosen.acts] == ["still", "push"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("keys: [{id: a, env: KEY}]", "keys"),
        ("admin: {env: KEY}", "admin"),
        ("trace: true", "trace"),
        ("models: {x: {}}", "models"),
    ],
)
def test_what_the_plugin_cannot_do_is_refused(folder: Path, tmp_path: Path, text: str, named: str) -> None:
    policy = policy_of(folder, f"guards: [@/still.guard]\n{text}\n", tmp_path)
    with pytest.raises(Unsupported, match=named):
        vllm.settings(policy)
    shadow = policy_of(folder, "guards: [{file: @/still.guard, mode: shadow}]", tmp_path)
    with pytest.raises(Unsupported, match="shadow"):
        vllm.settings(shadow)


@pytest.mark.parametrize(
    "flag",
    ["--additional-config", "--additional_config", "--additional-config={}", "--additional-config.steerguard.guards=[]",
     "--additional", "--addit", "--ad", "--additional-config+"],
)  # fmt: skip
def test_no_flag_takes_the_place_of_the_policy(folder: Path, flag: str) -> None:
    policy = build(of_guards([folder / "still.guard"], trace=False), name="m")
    with pytest.raises(InputError, match="would take the place"):
        vllm.argv("x", policy, host="h", port=1, flags=[flag, "{}"])
    assert vllm.argv("x", policy, host="h", port=1, flags=["--api-key", "additional", "-tp", "2"])[-4:-2] == ["-tp", "2"]


def test_a_vllm_without_the_plugin_is_not_started() -> None:
    if not vllm.installed():
        with pytest.raises(InputError, match="vLLM is not installed here"):
            vllm.check_environment({})
        return
    with pytest.raises(InputError, match="would answer unguarded"):
        vllm.check_environment({"VLLM_PLUGINS": "other"})
