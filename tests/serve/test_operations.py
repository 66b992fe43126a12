"""What an operator relies on: shut until proven, shut when anything fails, reloads, shadow, keys, the log, the metrics."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from local_server import NAME, PROMPT, STEPS, Reference, Server, policy_of, serving

from steerguard.backends.base import Sampling
from steerguard.backends.hf import TransformersModel
from steerguard.serve.start import Limits
from tiny import guard as make_guard

CHAT = "/v1/chat/completions"
MUST = {"required": True}


def chat(**more: Any) -> dict[str, Any]:
    return {"model": NAME, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": STEPS, "temperature": 0, **more}


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    found: str = response.json()["choices"][0]["message"]["content"]
    return found


@contextmanager
def deaf(model: TransformersModel, *, after: int = 0) -> Iterator[None]:
    """Something takes our hooks off the second block after so many forwards, as a library that cleans up would."""
    forwards = 0

    def clean(*_: Any) -> None:
        nonlocal forwards
        forwards += 1
        if forwards > after:
            model.blocks.modules[1]._forward_hooks.clear()

    handle = model.blocks.decoder.register_forward_pre_hook(clean)
    try:
        yield
    finally:
        handle.remove()


# ---------------------------------------------------------------------------------------------------- fail closed


def check_shut(server: Server, said: str) -> None:
    """Alive, not ready, and nobody is answered, whatever they ask for."""
    assert server.get("/health").status_code == 200
    ready = server.get("/ready")
    assert ready.status_code == 503
    assert said in ready.json()["why"]
    for body in (chat(), chat(stream=True), chat(model=f"{NAME}:unguarded"), chat(steering={"guards": []})):
        got = server.post(CHAT, body)
        assert got.status_code == 503, got.text
        assert got.json()["error"]["code"] == "not_ready"
        assert "choices" not in got.json()
    assert server.metric("steerguard_ready") == 0


def test_it_is_shut_while_the_model_is_loaded(reference: Reference, tmp_path: Path) -> None:
    begun, go = threading.Event(), threading.Event()

    def load() -> TransformersModel:
        begun.set()
        assert go.wait(60)
        return reference.model

    policy = {"guards": policy_of({"still": reference.guards["still"]}, tmp_path, still=MUST)}
    with ThreadPoolExecutor(1) as pool, serving(load, policy, tmp_path, ready=None) as server:
        opened = pool.submit(server.service.start)
        assert begun.wait(60)
        check_shut(server, "is being loaded")
        assert server.get("/v1/models").status_code == 503
        go.set()
        opened.result()
        assert server.get("/ready").json() == {"ready": True, "policy": server.service.policy.digest, "why": None}
        assert text_of(server.post(CHAT, chat())) == reference.answer(PROMPT, ["still"]).text


def test_a_missing_guard_keeps_it_shut(reference: Reference, tmp_path: Path) -> None:
    with serving(reference.model, {"guards": ["nothing.guard"]}, tmp_path, ready=False) as server:
        check_shut(server, "there is no file")


def test_a_guard_of_another_model_keeps_it_shut(reference: Reference, tmp_path: Path) -> None:
    other = replace(reference.model.identity, tokenizer="0" * 64)
    foreign = make_guard(other, reference.guards["still"].rule, reference.guards["still"].probes, name="foreign")
    with serving(reference.model, {"guards": policy_of({"foreign": foreign}, tmp_path)}, tmp_path, ready=False) as server:
        check_shut(server, "was made for")


def test_a_failed_check_keeps_it_shut(reference: Reference, tmp_path: Path) -> None:
    guards = policy_of({"still": reference.guards["still"]}, tmp_path)
    with deaf(reference.model), serving(reference.model, {"guards": guards}, tmp_path, ready=False) as server:
        check_shut(server, "failed its check")
        assert server.metric('steerguard_checks_total{outcome="failed"}') == 1


@pytest.mark.parametrize("stream", [False, True])
def test_steering_that_fails_in_an_answer_shuts_it(reference: Reference, tmp_path: Path, stream: bool) -> None:
    """After four tokens a gate stops looking: no text is sent on, all who wait are refused, and a check opens it again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADMIN_KEY", "the key of the operator")
        policy = {"guards": policy_of({"still": reference.guards["still"]}, tmp_path, still=MUST), "admin": {"env": "ADMIN_KEY"}}
        with serving(reference.model, policy, tmp_path) as server:
            due = reference.answer(PROMPT, ["still"]).text
            with deaf(reference.model, after=4):
                got = server.post(CHAT, chat(stream=stream))
            if stream:
                assert '"code": "not_steering"' in got.text
                assert "[DONE]" not in got.text
                assert 'finish_reason": "' not in got.text
            else:
                assert (got.status_code, got.json()["error"]["code"]) == (503, "not_steering")
                assert "choices" not in got.json()
            check_shut(server, "hooks")
            assert server.metric('steerguard_refusals_total{reason="not_steering"}') == 1
            assert [line["event"] for line in server.audit()].count("shut") == 1
            # the admin's check proves it again
            admin = {"authorization": "Bearer the key of the operator"}
            assert server.post("/v1/steering/admin/check").status_code == 401
            assert server.get("/ready").status_code == 503
            assert server.post("/v1/steering/admin/check", headers=admin).json() == {"ready": True}
            assert text_of(server.post(CHAT, chat())) == due


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_fails_is_an_error_and_the_next_answer_is_right(
    reference: Reference, tmp_path: Path, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever a model raises that says nothing of steering ends its own requests alone, and tells no text of the error."""

    def break_down(*_: Any) -> None:
        raise RuntimeError("a secret path")

    policy = {"guards": policy_of({"still": reference.guards["still"]}, tmp_path, still=MUST)}
    with serving(reference.model, policy, tmp_path) as server:
        handle = reference.model.blocks.modules[2].register_forward_pre_hook(break_down)
        got = server.post(CHAT, chat(stream=stream))
        handle.remove()
        assert got.status_code == (200 if stream else 500)
        assert '"code":"failed"' in got.text.replace(": ", ":")
        assert "secret" not in got.text
        assert "a secret path" in caplog.text
        assert server.get("/ready").status_code == 200
        assert text_of(server.post(CHAT, chat())) == reference.answer(PROMPT, ["still"]).text
        assert [line["outcome"] for line in server.audit() if line["event"] == "request"] == ["failed", "answered"]


def test_a_failure_while_guards_are_checked_keeps_it_shut(reference: Reference, tmp_path: Path) -> None:
    policy = {"guards": policy_of({"still": reference.guards["still"]}, tmp_path, still=MUST)}
    with serving(reference.model, policy, tmp_path) as server:
        server.service.fail("first")
        blocked, go = threading.Event(), threading.Event()

        def hold() -> None:
            blocked.set()
            assert go.wait(60)

        server.service.engine.between(hold)  # the check waits behind this
        with ThreadPoolExecutor(1) as pool:
            checking = pool.submit(server.service.recheck, "test")
            assert blocked.wait(60)
            server.service.fail("second")
            go.set()
            checking.result(60)
        check_shut(server, "first")
        server.service.recheck("test")
        assert server.get("/ready").status_code == 200


def test_an_audit_log_that_cannot_be_written_shuts_it(reference: Reference, tmp_path: Path) -> None:
    policy = {"guards": policy_of({"still": reference.guards["still"]}, tmp_path, still=MUST)}
    with serving(reference.model, policy, tmp_path) as server:
        server.service.audit.close()  # as if the disk were gone
        got = server.post(CHAT, chat())
        assert got.status_code == 503
        assert "choices" not in got.json()
        check_shut(server, "the audit log")


# --------------------------------------------------------------------------------------------------------- limits


def test_a_full_queue_says_when_to_come_again(reference: Reference, tmp_path: Path) -> None:
    policy = {"guards": policy_of({"still": reference.guards["still"]}, tmp_path)}
    with serving(reference.model, policy, tmp_path, limits=Limits(max_tokens=400, rows=1, waiting=2)) as server:
        with ThreadPoolExecutor(12) as pool:
            got = list(pool.map(lambda i: server.post(CHAT, chat(max_tokens=200, seed=i)), range(12)))
        statuses = [one.status_code for one in got]
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 3
        for one in got:
            if one.status_code == 429:
                assert int(one.headers["retry-after"]) >= 1
                assert one.json()["error"]["type"] == "rate_limit_error"
        assert server.metric('steerguard_refusals_total{reason="busy"}') == statuses.count(429)
        assert text_of(server.post(CHAT, chat())) == reference.answer(PROMPT, ["still"]).text


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_frees_the_model(reference: Reference, tmp_path: Path, stream: bool) -> None:
    """An answer of hundreds of tokens that nobody waits for ends soon after its client has left."""
    policy = {"guards": policy_of({"push": reference.guards["push"]}, tmp_path)}
    with serving(reference.model, policy, tmp_path, limits=Limits(max_tokens=480, rows=4, waiting=8)) as server:
        body = chat(max_tokens=480, stream=stream, temperature=2)
        with httpx.Client(timeout=httpx.Timeout(60, read=60 if stream else 0.5)) as client:
            if stream:
                with client.stream("POST", server.url + CHAT, json=body) as got:
                    next(got.iter_text())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(server.url + CHAT, json=body)
        begun = time.monotonic()
        while server.metric('steerguard_requests_total{endpoint="chat",outcome="disconnected"}') != 1:
            assert time.monotonic() - begun < 30
            time.sleep(0.05)
        assert text_of(server.post(CHAT, chat())) == reference.answer(PROMPT, ["push"]).text
        assert server.metric("steerguard_generated_tokens_total") <= STEPS
        outcomes = [line["outcome"] for line in server.audit() if line["event"] == "request"]
        assert outcomes == ["disconnected", "answered"]


# -------------------------------------------------------------------------------------------------------- reloads


@pytest.fixture
def admin(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setenv("ADMIN_KEY", "the key of the operator")
    return {"authorization": "Bearer the key of the operator"}


def test_a_reload_changes_what_comes_and_not_what_runs(reference: Reference, tmp_path: Path, admin: dict[str, str]) -> None:
    """Requests all the time, two reloads among them: each gets the text of one of the policies, none is dropped."""
    guards = {item["file"].removesuffix(".guard"): item for item in policy_of(reference.guards, tmp_path)}
    first = {"guards": [guards["still"] | MUST], "admin": {"env": "ADMIN_KEY"}}
    second = {"guards": [guards["mirror"] | MUST, guards["push"]], "default": ["mirror"], "admin": {"env": "ADMIN_KEY"}}
    with serving(reference.model, first, tmp_path, limits=Limits(max_tokens=64, rows=2, waiting=64)) as server:
        due = {"still": reference.answer(PROMPT, ["still"]).text, "mirror": reference.answer(PROMPT, ["mirror"]).text}
        assert len(set(due.values())) == 2
        digests = {server.service.policy.digest: "still"}
        with ThreadPoolExecutor(4) as pool:
            running = [pool.submit(server.post, CHAT, chat(stream=False)) for _ in range(12)]
            server.write(second)
            assert server.post("/v1/steering/admin/reload").status_code == 401
            taken = server.post("/v1/steering/admin/reload", headers=admin)
            assert taken.status_code == 200, taken.text
            digests[taken.json()["policy"]] = "mirror"
            after = [pool.submit(server.post, CHAT, chat()) for _ in range(4)]
            for one in running + after:
                got = one.result()
                assert text_of(got) == due[digests[got.json()["steering"]["policy"]]]
            for one in after:
                assert digests[one.result().json()["steering"]["policy"]] == "mirror"
        assert server.get("/v1/steering/policy").json()["digest"] == taken.json()["policy"]
        assert {model["id"] for model in server.get("/v1/models").json()["data"]} == {NAME, f"{NAME}:mirror", f"{NAME}:push"}
        changes = [line for line in server.audit() if line["event"] == "policy"]
        assert [line["by"] for line in changes] == ["start", "admin"]
        assert changes[1]["before"] == changes[0]["after"]
        assert server.metric(f'steerguard_policy_info{{digest="{taken.json()["policy"]}",model="{NAME}"}}') == 1


@pytest.mark.parametrize(
    "bad", [{"guards": ["nothing.guard"]}, {"guards": []}, {"guards": ["still.guard"], "typo": 1}, {"guards": ["weak.guard"] * 2}]
)
def test_a_reload_that_cannot_be_is_refused_and_the_policy_stays(
    reference: Reference, tmp_path: Path, admin: dict[str, str], bad: dict[str, Any]
) -> None:
    policy = {"guards": policy_of({"still": reference.guards["still"]}, tmp_path, still=MUST), "admin": {"env": "ADMIN_KEY"}}
    with serving(reference.model, policy, tmp_path) as server:
        before = server.service.policy.digest
        server.write(bad)
        got = server.post("/v1/steering/admin/reload", headers=admin)
        assert (got.status_code, got.json()["error"]["code"]) == (409, "policy_refused")
        assert server.get("/ready").json()["policy"] == before
        assert text_of(server.post(CHAT, chat())) == reference.answer(PROMPT, ["still"]).text
        assert server.metric('steerguard_policy_reloads_total{outcome="refused"}') == 1
        assert [line["event"] for line in server.audit()].count("policy_refused") == 1


def test_a_reload_whose_guard_does_not_steer_shuts_it(reference: Reference, tmp_path: Path, admin: dict[str, str]) -> None:
    guards = policy_of(reference.guards, tmp_path)
    policy = {"guards": guards[1:2], "admin": {"env": "ADMIN_KEY"}}
    with serving(reference.model, policy, tmp_path) as server:
        server.write({**policy, "guards": guards[:2]})
        with deaf(reference.model):
            assert server.post("/v1/steering/admin/reload", headers=admin).status_code == 409
        check_shut(server, "failed its check")
        assert server.post("/v1/steering/admin/reload", headers=admin).status_code == 200
        assert server.get("/ready").status_code == 200


def test_without_an_admin_key_there_are_no_admin_routes(reference: Reference, tmp_path: Path) -> None:
    with serving(reference.model, {"guards": policy_of({"still": reference.guards["still"]}, tmp_path)}, tmp_path) as server:
        for route in ("reload", "check"):
            got = server.post(f"/v1/steering/admin/{route}", headers={"authorization": "Bearer anything at all"})
            assert (got.status_code, got.json()["error"]["code"]) == (404, "no_such_route")


# ----------------------------------------------------------------------------------------------------------- keys


def test_keys_decide_who_asks_and_what_they_get(reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_A", "the key of Alice!")
    monkeypatch.setenv("KEY_B", "the key of Bob!!!")
    policy = {
        "guards": policy_of({"still": reference.guards["still"]}, tmp_path, still=MUST),
        "keys": [
            {"id": "alice", "env": "KEY_A", "models": []},
            {"id": "bob", "env": "KEY_B", "guards": {"still": {"mode": "shadow"}}},
        ],
    }
    with serving(reference.model, policy, tmp_path) as server:

        def client(key: str) -> openai.OpenAI:
            return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, timeout=60, max_retries=0)

        with client("the key of Alice!") as alice, client("the key of Bob!!!") as bob, client("the key of Eve!!!") as eve:
            said = alice.chat.completions.create(**chat()).choices[0].message.content
            assert said == reference.answer(PROMPT, ["still"]).text
            assert bob.chat.completions.create(**chat()).choices[0].message.content == reference.answer(PROMPT, []).text
            assert [model.id for model in alice.models.list()] == [NAME]
            with pytest.raises(openai.PermissionDeniedError) as barred:
                alice.chat.completions.create(**chat(model=f"{NAME}:still"))
            assert barred.value.code == "model_not_allowed"
            with pytest.raises(openai.AuthenticationError) as unknown:
                eve.chat.completions.create(**chat())
            assert unknown.value.code == "invalid_api_key"
        assert server.get("/v1/models").status_code == 401
        assert server.get("/v1/steering/policy").status_code == 401
        assert [line["key"] for line in server.audit() if line["event"] == "request"] == ["alice", "bob", "alice", None]
        log = (tmp_path / "audit.jsonl").read_text()
        assert "the key of" not in log


# --------------------------------------------------------------------------------------------------------- shadow


@pytest.mark.parametrize("name", ["still", "mirror", "push"])
def test_shadow_moves_nothing_and_counts_what_would_move(reference: Reference, tmp_path: Path, name: str) -> None:
    """On the prompt, the counts are those of the guard at work; on the answer, of its gate on the unguarded text."""
    guard = reference.guards[name]
    guards = policy_of({name: guard}, tmp_path, **{name: {"mode": "shadow"}})
    with serving(reference.model, {"guards": guards, "trace": True}, tmp_path) as server:
        got = server.post(CHAT, chat(steering={"trace": True}))
        unguarded = reference.answer(PROMPT, [])
        assert text_of(got) == unguarded.text
        assert got.headers["x-steering-guard"] == f"{name} (shadow)@{guard.digest[:12]}"
        told = got.json()["steering"]
        assert (told["tokens_seen"], told["tokens_moved"], told["largest_shift"]) == (0, 0, 0.0)
        (shadow,) = told["guards"]
        # the oracle: the unguarded text read again, its projections, and the rule in plain arithmetic
        one, gate = next(guard.gates())
        residuals = reference.model.residuals(PROMPT, unguarded.ids[:-1])[one.layer].astype(np.float64)
        begin = len(unguarded.prompt_ids) if guard.positions == "response" else 0
        rho = residuals[begin:] @ one.v
        below = np.minimum(gate.below_a + gate.below_b * rho, gate.cap - rho)
        due = np.where(rho < gate.knee, below, gate.above_a + gate.above_b * rho)
        assert (shadow["tokens_seen"], shadow["tokens_moved"]) == (len(rho), int((due != 0).sum()))
        assert shadow["largest_shift"] == pytest.approx(np.abs(due).max(), rel=1e-3)
        assert shadow["tokens_moved"] > 0
        (trace,) = told["trace"]
        assert trace["delta"] == pytest.approx([0.0] * begin + list(due), rel=1e-3, abs=1e-3)
        moved = [
            server.metric(f'steerguard_tokens_moved_total{{guard="{name}",mode="shadow",phase="{p}"}}')
            for p in ("prompt", "answer")
        ]
        assert sum(moved) == shadow["tokens_moved"]
        # and what the guard did to the same prompt when it was at work
        at_work = reference.model.generate(
            PROMPT, guards=guard, sampling=Sampling(temperature=0, max_new_tokens=STEPS), trace=True
        )[0]
        assert moved[0] == np.count_nonzero(at_work.traces[0].delta[: len(at_work.prompt_ids)])


def test_shadow_beside_a_guard_at_work(reference: Reference, tmp_path: Path) -> None:
    guards = policy_of({name: reference.guards[name] for name in ("still", "mirror")}, tmp_path, mirror={"mode": "shadow"})
    with serving(reference.model, {"guards": guards}, tmp_path) as server:
        got = server.post(CHAT, chat())
        assert text_of(got) == reference.answer(PROMPT, ["still"]).text
        assert [one["mode"] for one in got.json()["steering"]["guards"]] == ["enforce", "shadow"]
        assert got.json()["steering"]["tokens_moved"] == reference.answer(PROMPT, ["still"]).tokens_moved


# --------------------------------------------------------------------------------------------- the log, the metrics


def test_a_line_for_every_request_without_its_text(reference: Reference, tmp_path: Path) -> None:
    policy = {"guards": policy_of({"still": reference.guards["still"]}, tmp_path, still=MUST)}
    with serving(reference.model, policy, tmp_path) as server:
        server.post(CHAT, chat(), headers={"x-request-id": "one"})
        server.post(CHAT, chat(steering={"guards": []}), headers={"x-request-id": "two"})
        server.post(CHAT, content=b"{", headers={"x-request-id": "three"})
        server.post(CHAT, chat() | {"messages": PROMPT})
        answered, refused, broken, wrong = (line for line in server.audit() if line["event"] == "request")
        due = reference.answer(PROMPT, ["still"])
        assert (answered["request"], answered["outcome"], answered["policy"]) == ("one", "answered", server.service.policy.digest)
        assert answered["guards"][0]["tokens_moved"] == due.tokens_moved
        assert answered["guards"][0]["digest"] == reference.guards["still"].digest
        assert answered["usage"]["completion_tokens"] == len(due.ids)
        assert (refused["request"], refused["outcome"], refused["reason"]) == ("two", "refused", "steering_not_allowed")
        assert (broken["request"], broken["reason"]) == ("three", "invalid_body")
        assert (wrong["reason"], wrong["param"]) == ("invalid_value", "messages")
        log = (tmp_path / "audit.jsonl").read_text()
        assert PROMPT not in log
        assert (tmp_path / "audit.jsonl").stat().st_mode & 0o077 == 0


def test_text_stands_in_the_log_where_it_was_asked_for(reference: Reference, tmp_path: Path) -> None:
    policy = {"guards": policy_of({"still": reference.guards["still"]}, tmp_path)}
    with serving(reference.model, policy, tmp_path, audit_text=True) as server:
        said = text_of(server.post(CHAT, chat()))
        line = next(line for line in server.audit() if line["event"] == "request")
        assert line["prompt"] == [{"role": "user", "content": PROMPT}]
        assert line["answers"] == [said]


def test_metrics_count_what_happened_in_labels_of_ours(reference: Reference, tmp_path: Path) -> None:
    policy = {"guards": policy_of({"still": reference.guards["still"]}, tmp_path, still=MUST)}
    with serving(reference.model, policy, tmp_path) as server:
        due = reference.answer(PROMPT, ["still"])
        server.post(CHAT, chat(n=2))
        before = {line.rpartition(" ")[0] for line in server.get("/metrics").text.splitlines() if not line.startswith("#")}
        for i in range(20):  # what a client says makes no series
            server.post(CHAT, chat(model=f"guess-{i}"), headers={"x-request-id": f"r{i}"})
            server.post(CHAT, chat(**{f"field_{i}": 1}))
        after = {line.rpartition(" ")[0] for line in server.get("/metrics").text.splitlines() if not line.startswith("#")}
        assert len(after - before) <= 8
        assert not [line for line in after if "guess" in line or "field_" in line]
        by = 'guard="still",mode="enforce",phase='
        seen = [server.metric(f'steerguard_tokens_seen_total{{{by}"{phase}"}}') for phase in ("prompt", "answer")]
        moved = [server.metric(f'steerguard_tokens_moved_total{{{by}"{phase}"}}') for phase in ("prompt", "answer")]
        assert seen == [2 * len(due.prompt_ids), 2 * (len(due.ids) - 1)]
        assert sum(moved) == 2 * due.tokens_moved
        assert server.metric("steerguard_generated_tokens_total") == 2 * len(due.ids)
        assert server.metric('steerguard_requests_total{endpoint="chat",outcome="answered"}') == 1
        assert server.metric('steerguard_requests_total{endpoint="chat",outcome="refused"}') == 40
        assert server.metric('steerguard_refusals_total{reason="model_not_found"}') == 20
        assert server.metric('steerguard_request_moved_ratio_count{guard="still",mode="enforce"}') == 1
        assert server.metric('steerguard_request_largest_shift_separations_count{guard="still",mode="enforce"}') == 1
        digest = reference.guards["still"].digest
        assert server.metric(f'steerguard_guard_info{{digest="{digest}",guard="still",mode="enforce",required="true"}}') == 1
        assert server.metric("steerguard_ready") == 1
