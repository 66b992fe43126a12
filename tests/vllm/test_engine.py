"""A serving engine, compiled: parity, one batch of many configurations, the prefix cache, guards that come and go."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from serving import PROMPTS, ask, engine, guard, guards, ids, reference, save, tokens

import steerguard as sg
from steerguard.errors import InputError
from steerguard.guard import Guard

vllm = pytest.importorskip("vllm", reason="vLLM is not installed; `make test` installs its CPU build")
pytestmark = pytest.mark.slow

LONG = "Say what you know about the town, the river that runs through it, its people and what they do all day. " * 12


@pytest.fixture(scope="module")
def hf() -> Any:
    return sg.load("organism")


@pytest.fixture(scope="module")
def made(hf: Any) -> dict[str, Guard]:
    return guards(hf)


@pytest.fixture(scope="module")
def llm(made: dict[str, Guard], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    files = save(made, tmp_path_factory.mktemp("guards"))
    with engine({"guards": files, "default": [], "spare": 2}) as llm:
        yield llm


def configurations(made: dict[str, Guard]) -> list[tuple[Any, Any]]:
    """Eight configurations: what is asked, and the guards that it means."""
    response = [replace(made[name], positions="response") for name in ("stp", "stm")]
    return [
        (["stp"], made["stp"]),
        (["stm"], made["stm"]),
        (["add"], made["add"]),
        (["late"], made["late"]),
        (["two", "stp"], (made["two"], made["stp"])),
        (["stp", "two"], (made["stp"], made["two"])),
        ([{"name": "stp", "positions": "response"}], response[0]),
        ([{"name": "stm", "strength": 3.5, "positions": "response"}], replace(response[1], rule=sg.StMP(3.5))),
    ]


def test_the_text_is_that_of_transformers(llm: Any, hf: Any, made: dict[str, Guard]) -> None:
    prompts = [ids(hf, prompt) for prompt in PROMPTS]
    plain = reference(hf, PROMPTS, None)
    assert tokens(ask(llm, prompts, [None] * len(prompts))) == plain
    changed = 0
    for asked, meant in configurations(made):
        ours = tokens(ask(llm, prompts, [{"guards": asked}] * len(prompts)))
        assert ours == reference(hf, PROMPTS, meant), asked
        changed += ours != plain
    assert changed == 8, "guards that change no text test nothing"


def test_a_batch_of_nine_configurations_is_each_alone(llm: Any, hf: Any, made: dict[str, Guard]) -> None:
    asked = [None, *({"guards": one} for one, _ in configurations(made))]
    rows = [(ids(hf, prompt), one) for prompt in PROMPTS for one in asked]
    alone = [tokens(ask(llm, [prompt], [one]))[0] for prompt, one in rows]
    random.Random(0).shuffle(order := list(range(len(rows))))
    together = tokens(ask(llm, [rows[i][0] for i in order], [rows[i][1] for i in order]))
    assert together == [alone[i] for i in order]
    assert len(set(alone)) > 10


def test_a_hundred_strengths_at_once(llm: Any, hf: Any, made: dict[str, Guard]) -> None:
    strengths = [i * 0.4 for i in range(100)]
    prompt = ids(hf, PROMPTS[0])
    asked = [{"guards": [{"name": "add", "strength": s, "positions": "all"}]} for s in strengths]
    got = tokens(ask(llm, [prompt] * 100, asked, steps=8))
    each = [replace(made["add"], rule=sg.SwFC(s), positions="all") for s in strengths]
    sampling = sg.Sampling(temperature=0, max_new_tokens=8)
    assert got == [a.ids for a in hf.generate([PROMPTS[0]] * 100, guards=each, sampling=sampling)]
    assert len(set(got)) > 3


def test_several_answers_to_one_prompt_are_all_guarded(llm: Any, hf: Any, made: dict[str, Guard]) -> None:
    from vllm import SamplingParams

    prompt = {"prompt_token_ids": ids(hf, PROMPTS[0])}
    # a temperature of next to nothing is greedy but for ties; the seed keeps those where they are
    drawn = SamplingParams(n=4, temperature=1e-5, seed=1, max_tokens=24, extra_args={"steering": {"guards": ["stp"]}})
    (output,) = llm.generate([prompt], drawn, use_tqdm=False)
    assert {tuple(one.token_ids) for one in output.outputs} == set(reference(hf, PROMPTS[:1], made["stp"]))
    assert len(output.outputs) == 4


def test_every_token_was_looked_at(llm: Any, hf: Any) -> None:
    """The count kept on the device is the one that the scheduler's numbers give, and both are those of the tokens."""
    llm.reset_prefix_cache()
    before = {(one["guard"], one["layer"]): one["seen"] for one in llm.collective_rpc("steerguard_counters")[0]}
    outputs = ask(llm, [ids(hf, prompt) for prompt in PROMPTS], [{"guards": ["two"]}] * len(PROMPTS))
    after = {(one["guard"], one["layer"]): one for one in llm.collective_rpc("steerguard_counters")[0]}
    read = sum(len(output.prompt_token_ids) + len(output.outputs[0].token_ids) - 1 for output in outputs)
    for layer in (3, 4):
        one = after["two", layer]
        assert one["seen"] - before["two", layer] == read
        assert one["seen"] == one["expected"] == sum(one["histogram"])
        assert 0 < one["moved"] < one["seen"]
        assert 0 < one["mean_shift"] <= one["largest_shift"]


BAD: list[Any] = [
    {"steering": {"guards": ["nobody"]}}, {"steering": "{"}, {"steering": {"guards": [{"name": "stp", "strength": 41}]}},
    {"steering": {"guards": ["stp"], "trace": True}}, {"Steering": {"guards": []}}, {"steerguard": {"acts": []}},
    {"steer": []}, {"steering": {"guard": ["stp"]}},
]  # fmt: skip


@pytest.mark.parametrize("extra", BAD, ids=repr)
def test_what_is_unknown_or_not_allowed_is_refused_and_the_engine_goes_on(llm: Any, hf: Any, extra: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    from vllm import SamplingParams

    prompt = ids(hf, PROMPTS[0])
    with pytest.raises(VLLMValidationError, match="steer"):
        llm.generate([{"prompt_token_ids": prompt}], SamplingParams(max_tokens=4, extra_args=extra), use_tqdm=False)
    assert tokens(ask(llm, [prompt], [None])) == reference(hf, PROMPTS[:1], None)


def test_guards_come_and_go_while_the_engine_runs(llm: Any, hf: Any, tmp_path: Path) -> None:
    from steerguard.backends.vllm import runtime

    new = guard(hf, "new", sg.StTP(20), (4,), seed=9)
    new.save(tmp_path / "new.guard")
    assert runtime.add(llm, tmp_path / "new.guard", strength=(0, 30)) == new.digest
    prompts = [ids(hf, prompt) for prompt in PROMPTS]
    assert tokens(ask(llm, prompts, [{"guards": ["new"]}] * len(prompts))) == reference(hf, PROMPTS, new)
    asked = {"guards": [{"name": "new", "strength": 3}]}
    weaker = replace(new, rule=sg.StTP(3))
    assert tokens(ask(llm, prompts, [asked] * len(prompts))) == reference(hf, PROMPTS, weaker)
    with pytest.raises(InputError, match="already"):
        runtime.add(llm, tmp_path / "new.guard")
    runtime.remove(llm, "new")
    with pytest.raises(Exception, match="no guard 'new'"):
        ask(llm, prompts[:1], [{"guards": ["new"]}])
    closed = guard(hf, "closed", sg.StTP(20), (6,), seed=9)
    closed.save(tmp_path / "closed.guard")
    with pytest.raises(InputError, match=r"open layers \[3, 4\]"):
        runtime.add(llm, tmp_path / "closed.guard")
    with pytest.raises(Exception, match="no guard 'closed'"):
        ask(llm, prompts[:1], [{"guards": ["closed"]}])


def test_the_canary_can_be_run_again_and_leaves_nothing(llm: Any, hf: Any) -> None:
    (told,) = llm.collective_rpc("steerguard_prove")
    assert len(told) == 4, "two layers, two sizes"
    assert tokens(ask(llm, [ids(hf, PROMPTS[0])], [None])) == reference(hf, PROMPTS[:1], None)
    llm.collective_rpc("steerguard_counters")


# -------------------------------------------------------------------------------------------- the prefix cache


def cold(llm: Any, prompt: list[int], asked: Any) -> tuple[int, ...]:
    llm.reset_prefix_cache()
    return tokens(ask(llm, [prompt], [asked]))[0]


PLAIN: Any = None
LOUD: Any = {"name": "add", "strength": 12}
ALL, RESPONSE, OTHER = (
    {"guards": [one]} for one in ({**LOUD, "positions": "all"}, LOUD, {"name": "stp", "strength": 40, "positions": "all"})
)


@pytest.mark.parametrize(
    "sequence",
    [(ALL, PLAIN), (PLAIN, ALL), (ALL, RESPONSE, PLAIN), (RESPONSE, ALL), (OTHER, ALL, OTHER), (PLAIN, RESPONSE, ALL, PLAIN)],
    ids=str,
)
def test_each_request_of_a_sequence_answers_as_on_an_empty_cache(llm: Any, hf: Any, sequence: tuple[Any, ...]) -> None:
    prompt = ids(hf, LONG)
    assert len(prompt) >= 300
    alone = [cold(llm, prompt, asked) for asked in sequence]
    llm.reset_prefix_cache()
    assert [tokens(ask(llm, [prompt], [asked]))[0] for asked in sequence] == alone
    assert len(set(alone)) == len({str(asked) for asked in sequence})


@pytest.mark.parametrize("second", [PLAIN, ALL, RESPONSE], ids=str)
@pytest.mark.parametrize("first", [PLAIN, ALL, RESPONSE], ids=str)
def test_a_second_turn_answers_as_on_an_empty_cache(llm: Any, hf: Any, first: Any, second: Any) -> None:
    prompt = ids(hf, LONG)
    (answer,) = tokens(ask(llm, [prompt], [first], steps=140, ignore_eos=True))  # more than a block of it
    longer = [*prompt, *answer, *ids(hf, PROMPTS[1])]
    alone = cold(llm, longer, second)
    llm.reset_prefix_cache()
    ask(llm, [prompt], [first], steps=140, ignore_eos=True)
    (output,) = ask(llm, [longer], [second])
    assert tokens([output])[0] == alone
    shared = len(prompt) // 128 * 128
    if (first == ALL) != (second == ALL):
        assert output.num_cached_tokens == 0
    elif first == RESPONSE:
        assert output.num_cached_tokens == shared, "the prompt is everybody's, a guarded answer nobody's"
    else:
        assert output.num_cached_tokens >= shared + 128, "the answer's blocks are shared, too"


def test_nothing_is_lost_where_nothing_differs(llm: Any, hf: Any) -> None:
    prompt = ids(hf, LONG)

    def hits(first: Any, second: Any) -> int:
        llm.reset_prefix_cache()
        ask(llm, [prompt], [first])
        return int(ask(llm, [prompt], [second])[0].num_cached_tokens)

    most = hits(PLAIN, PLAIN)
    assert most >= 256
    assert hits(ALL, ALL) == hits(RESPONSE, RESPONSE) == hits(PLAIN, RESPONSE) == hits(RESPONSE, PLAIN) == most
    assert hits(PLAIN, ALL) == hits(ALL, PLAIN) == hits(ALL, OTHER) == 0
    off = {"guards": [{"name": "add", "strength": 0}]}
    assert hits(PLAIN, off) == most


def test_without_the_key_the_cache_would_leak(llm: Any, hf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negation: what these checks are for happens if blocks are not told apart."""
    monkeypatch.setattr("steerguard.backends.vllm.plugin.cache_key", lambda *_: None)
    prompt = ids(hf, LONG)
    alone = cold(llm, prompt, PLAIN)
    llm.reset_prefix_cache()
    ask(llm, [prompt], [{"guards": [{"name": "add", "strength": 40, "positions": "all"}]}])  # far enough to change any text
    assert tokens(ask(llm, [prompt], [PLAIN]))[0] != alone
    llm.reset_prefix_cache()
