"""Answers: sampling, ends, streaming, batches, caches and dtypes, on one tiny Llama."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hf_cases import BY_NAME, PROMPTS, STEPS, guard_of, ids_of, tiny_model
from transformers.cache_utils import DynamicCache

from architectures import build, tokenizer
from steerguard.backends.base import GREEDY, Sampling
from steerguard.backends.drawing import Draw, Text, _few, gumbel, nucleus, row_keys
from steerguard.backends.hf import TransformersModel, load, wrap
from steerguard.backends.hf_generate import batches
from steerguard.errors import ContrastError, InputError, PromptError
from steerguard.rules import StTP, SwFC

SAMPLED = Sampling(temperature=0.9, top_p=0.95, seed=7, max_new_tokens=16)


@pytest.fixture(scope="module")
def model() -> TransformersModel:
    return tiny_model()


# ------------------------------------------------------------------------------------------------ sampling


def test_sampled_text_does_not_depend_on_the_batch(model: TransformersModel) -> None:
    prompts = [*PROMPTS, PROMPTS[0], "you and me", PROMPTS[0]]
    together = model.generate(prompts, sampling=SAMPLED)
    for prompt, answer in list(zip(prompts, together, strict=True))[:3]:
        assert model.generate(prompt, sampling=SAMPLED)[0].ids == answer.ids
    again = model.generate([PROMPTS[0]] * 3, sampling=SAMPLED)
    assert ids_of(again) == [together[i].ids for i in (0, 3, 5)]
    assert len(set(ids_of(again))) == 3  # equal prompts of one call are drawn apart


def test_sampled_text_does_not_depend_on_how_a_call_is_cut(model: TransformersModel) -> None:
    prompts = [*PROMPTS, *PROMPTS]
    whole = ids_of(model.generate(prompts, sampling=SAMPLED))
    cut = wrap(model.module, model.tokenizer, batch_tokens=1)
    assert ids_of(cut.generate(prompts, sampling=SAMPLED)) == whole


def test_the_seed_decides(model: TransformersModel) -> None:
    same = [model.generate(PROMPTS[0], sampling=SAMPLED)[0].ids for _ in range(2)]
    other = model.generate(PROMPTS[0], sampling=Sampling(temperature=0.9, top_p=0.95, seed=8, max_new_tokens=16))[0].ids
    assert same[0] == same[1] != other


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0]).repeat(20_000, 1)
    keys = row_keys(Sampling(), [[1]] * 20_000, range(20_000))
    draw = Draw(Sampling(temperature=0.5, top_p=1.0), keys, begin=0, steps=2)
    for step in range(2):
        drawn = draw(torch.zeros(len(logits), step), logits).argmax(-1)
        observed = np.bincount(drawn.numpy(), minlength=5) / len(logits)
        expected = torch.softmax(logits[0] / 0.5, -1).numpy()
        np.testing.assert_allclose(observed, expected, atol=4 * np.sqrt(0.25 / len(logits)))


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0, 20.0])
def test_looking_at_few_tokens_first_draws_the_same(spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaked rows are drawn from few tokens, flat ones from all; with ties at the edge as well."""
    scores = torch.randn(40, 500, generator=torch.Generator().manual_seed(1)) * spread
    scores[:5] = scores[:5].round()
    ids = torch.zeros(40, 1, dtype=torch.long)
    sampling = Sampling(temperature=0.6, top_p=0.9)
    draw = Draw(sampling, row_keys(sampling, [[i] for i in range(40)], [0] * 40), begin=1, steps=1)
    found = draw(ids, scores)
    assert (_few(torch.log_softmax(scores / 0.6, dim=-1), 0.9, draw._keys[:, 0]) is None) == (spread < 4)
    monkeypatch.setattr("steerguard.backends.drawing.FEW", 500)
    assert torch.equal(found, draw(ids, scores))


def test_noise_is_gumbel() -> None:
    noise = gumbel(torch.arange(50) * 7919, torch.arange(2000)).numpy()
    assert abs(noise.mean() - 0.5772) < 0.02
    assert abs(noise.var() - np.pi**2 / 6) < 0.05
    assert abs(np.corrcoef(noise[:, :-1].ravel(), noise[:, 1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]) < 0.01


@pytest.mark.parametrize(("top_p", "kept"), [(0.3, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.81, 3), (1.0, 4)])
def test_top_p_keeps_the_smallest_set_that_holds_it(top_p: float, kept: int) -> None:
    log_p = torch.tensor([[0.15, 0.5, 0.05, 0.3]], dtype=torch.float64).log()
    assert int(nucleus(log_p, top_p).isfinite().sum()) == kept


def test_the_models_own_settings_do_not_leak() -> None:
    plain, other = tiny_model(), tiny_model()
    own = other.module.generation_config
    own.repetition_penalty, own.top_k, own.min_new_tokens, own.do_sample = 5.0, 1, 9, True
    own.bad_words_ids = [[i] for i in range(60, 200)]
    for sampling in (STEPS, SAMPLED):
        assert ids_of(other.generate(PROMPTS, sampling=sampling)) == ids_of(plain.generate(PROMPTS, sampling=sampling))
    assert other.module.generation_config is own


# ---------------------------------------------------------------------------------------------------- ends


def test_the_end_token_ends_a_row(model: TransformersModel) -> None:
    free = model.generate(PROMPTS[1], sampling=STEPS)[0]
    assert (free.finished, len(free.ids)) == ("length", STEPS.max_new_tokens)
    ending = tiny_model()
    ending.module.generation_config.eos_token_id = [free.ids[4], 299]
    ending = wrap(ending.module, ending.tokenizer)
    for prompts in ([PROMPTS[1]], [*PROMPTS]):  # alone, and beside rows that go on
        answer = ending.generate(prompts, sampling=STEPS, guards=guard_of(ending, [1], SwFC(0.0)))[prompts.index(PROMPTS[1])]
        stop = free.ids.index(free.ids[4])
        assert (answer.finished, answer.ids) == ("stop", free.ids[: stop + 1])
        assert answer.tokens_seen == len(answer.prompt_ids) + len(answer.ids) - 1


def test_rows_that_have_ended_are_not_counted(model: TransformersModel) -> None:
    every = guard_of(model, [2], SwFC(1.0))
    free = model.generate(PROMPTS, sampling=STEPS, guards=every)
    ending = wrap(build(BY_NAME["llama"]), tokenizer())
    ending.module.generation_config.eos_token_id = [free[0].ids[2]]
    ending = wrap(ending.module, tokenizer())
    answers = ending.generate(PROMPTS, sampling=STEPS, guards=every, trace=True)
    assert answers[0].finished == "stop"
    for answer in answers:
        assert answer.tokens_moved == answer.tokens_seen == len(answer.prompt_ids) + len(answer.ids) - 1
        assert answer.traces[0].rho.shape == (answer.tokens_seen,)


def test_a_stop_text_ends_a_row_and_is_left_out(model: TransformersModel) -> None:
    longer = Sampling(temperature=0.0, max_new_tokens=24)
    free = model.generate(PROMPTS[1], sampling=longer)[0]
    middle = free.text[len(free.text) // 2 :][:3]
    stopping = Sampling(temperature=0.0, max_new_tokens=24, stop=("never in here", middle))
    for prompts in ([PROMPTS[1]], [*PROMPTS]):
        answer = model.generate(prompts, sampling=stopping)[prompts.index(PROMPTS[1])]
        assert answer.text == free.text[: free.text.index(middle)]
        assert answer.finished == "stop"
        assert answer.ids == free.ids[: len(answer.ids)]


def test_streaming_gives_the_text_in_whole_characters(model: TransformersModel) -> None:
    for sampling in (STEPS, SAMPLED, Sampling(temperature=0.0, max_new_tokens=24, stop=("e", "you"))):
        pieces: dict[int, list[str]] = {}
        answers = model.generate(PROMPTS, sampling=sampling, on_token=lambda row, text: pieces.setdefault(row, []).append(text))
        for row, answer in enumerate(answers):
            assert "".join(pieces.get(row, [])) == answer.text
        assert ids_of(answers) == ids_of(model.generate(PROMPTS, sampling=sampling))


def test_no_partial_character_and_no_beginning_of_a_stop_text_is_given() -> None:
    tokens = tokenizer()
    text = "snö är kallt. STO? STOP nu"
    streamed, stream = [], Text(tokens, ["STOP"])
    for token in tokens(text, add_special_tokens=False)["input_ids"]:
        done = stream.push(token)
        streamed.append(stream.take())
        if done:
            break
    assert "".join(streamed) == "snö är kallt. STO? "
    assert all("�" not in piece for piece in streamed)
    assert list(itertools.accumulate(streamed)).count("snö är kallt. ") >= 3  # S, T and O were held back


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_context_is_a_limit_of_each_row(name: str) -> None:
    architecture = BY_NAME[name]
    context = {"max_position_embeddings": 44} if name == "llama" else {"n_positions": 44}
    model = wrap(build(replace(architecture, settings={**architecture.settings, **context})), tokenizer())
    model.module.generation_config.eos_token_id = None
    long = Sampling(temperature=0.0, max_new_tokens=100)
    prompts = [*PROMPTS, "me", "you is the day"]
    answers = model.generate(prompts, sampling=long, guards=guard_of(model, [1]))
    assert max(len(answer.prompt_ids) + len(answer.ids) for answer in answers) == 44
    alone = [model.generate(prompt, sampling=long, guards=guard_of(model, [1]))[0] for prompt in prompts]
    assert ids_of(answers) == ids_of(alone)
    with pytest.raises(PromptError, match="leaves no room for an answer"):
        model.generate("the answer " * 30, sampling=long)


def test_pieces_join_to_the_text(model: TransformersModel) -> None:
    ids = model.tokenizer("the snö is kallt you", add_special_tokens=False)["input_ids"]
    assert len(model.pieces(ids)) == len(ids)
    assert "".join(model.pieces(ids)) == "the snö is kallt you"
    assert model.pieces([]) == []
    for answer in model.generate(PROMPTS, sampling=SAMPLED):
        assert "".join(model.pieces(answer.ids)) == answer.text


# ------------------------------------------------------------------------------------------------- batches


def test_batches_hold_their_budget_and_every_row_once() -> None:
    sizes = [5, 9, 1, 9, 3, 20, 2]
    cut = list(batches(sizes, 20))
    assert sorted(itertools.chain(*cut)) == list(range(7))
    assert all(len(batch) == 1 or len(batch) * max(sizes[i] for i in batch) <= 20 for batch in cut)
    assert cut[0] == [5]


def test_answers_come_in_the_callers_order(model: TransformersModel) -> None:
    small = wrap(model.module, model.tokenizer, batch_tokens=60)
    prompts = [PROMPTS[i % 3] + "!" * i for i in range(7)]
    answers = small.generate(prompts, sampling=STEPS)
    assert ids_of(answers) == [model.generate(prompt, sampling=STEPS)[0].ids for prompt in prompts]


def test_seventy_rows_with_eight_guards(model: TransformersModel) -> None:
    guards = [guard_of(model, [i % 4, *([3] if i % 4 < 2 else [])], StTP(2 + i), "all" if i % 3 else "response", seed=i)
              for i in range(8)]  # fmt: skip
    prompts = [f"tell me {'the ' * (i % 5)}answer {i}" for i in range(70)]
    own: list[Any] = [(None, *guards)[i % 9] for i in range(70)]
    short = Sampling(temperature=0.0, max_new_tokens=6)
    answers = model.generate(prompts, guards=own, sampling=short)
    for i in range(0, 70, 7):
        alone = model.generate(prompts[i], guards=own[i], sampling=short)[0]
        assert (answers[i].ids, answers[i].tokens_moved) == (alone.ids, alone.tokens_moved)
    unguarded = [i for i in range(70) if own[i] is None]
    plain = model.generate([prompts[i] for i in unguarded], sampling=short)
    assert ids_of([answers[i] for i in unguarded]) == ids_of(plain)
    assert all(answers[i].tokens_seen == 0 for i in unguarded)


def test_a_list_of_guards_has_one_entry_per_prompt(model: TransformersModel) -> None:
    guard = guard_of(model, [1])
    with pytest.raises(InputError, match="one entry per prompt: got 2 for 3 prompts"):
        model.generate(PROMPTS, guards=[guard, guard], sampling=STEPS)
    assert ids_of(model.generate(PROMPTS, guards=guard, sampling=STEPS)) == ids_of(
        model.generate(PROMPTS, guards=[guard] * 3, sampling=STEPS)
    )


def test_one_conversation_is_one_prompt(model: TransformersModel) -> None:
    chat: Any = [{"role": "system", "content": "you is the week"}, {"role": "user", "content": "a"}]
    assert len(model.generate(chat, sampling=STEPS)) == 1
    assert len(model.generate([chat, "a"], sampling=STEPS)) == 2


def test_captures_do_not_depend_on_the_batch(model: TransformersModel) -> None:
    pairs: list[Any] = [(prompt, "the answer is " + "you " * i) for i, prompt in enumerate(PROMPTS * 4)]
    small = wrap(model.module, model.tokenizer, batch_tokens=100)
    np.testing.assert_allclose(small.capture(pairs, layers=[3, 0]), model.capture(pairs)[:, [3, 0]], rtol=1e-4, atol=1e-5)


def test_an_empty_answer_is_named(model: TransformersModel) -> None:
    with pytest.raises(ContrastError, match=r"conversations \[1\] are empty"):
        model.capture([("a", "you"), ("a", "")])
    with pytest.raises(InputError, match=r"no layers \[4, 9\]"):
        model.capture([("a", "you")], layers=[0, 4, 9])


# ------------------------------------------------------------------------------------- caches, dtypes, devices


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3.5", "bamba", "gpt-oss"])
def test_a_static_cache_changes_nothing(name: str) -> None:
    dynamic = tiny_model(name)
    static = wrap(dynamic.module, dynamic.tokenizer, name=name, cache="static")
    guards = (guard_of(dynamic, [1]), guard_of(dynamic, [2], positions="response", seed=1))
    one, other = (m.generate(PROMPTS, guards=guards, sampling=STEPS) for m in (dynamic, static))
    assert ids_of(one) == ids_of(other)
    assert [a.tokens_moved for a in one] == [a.tokens_moved for a in other]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_compiled_is_eager(name: str) -> None:
    eager, compiled = tiny_model(name), tiny_model(name, cache="static", compile=True)
    guards = (guard_of(eager, [1]), guard_of(eager, [2], positions="response", seed=1))
    assert ids_of(compiled.generate(PROMPTS, sampling=STEPS)) == ids_of(eager.generate(PROMPTS, sampling=STEPS))
    one, other = (m.generate(PROMPTS, guards=guards, sampling=STEPS) for m in (eager, compiled))
    assert ids_of(one) == ids_of(other)
    assert [a.tokens_moved for a in one] == [a.tokens_moved for a in other]
    assert ids_of(one) != ids_of(eager.generate(PROMPTS, sampling=STEPS))


def test_compiling_needs_a_static_cache() -> None:
    with pytest.raises(InputError, match='needs cache="static"'):
        tiny_model(compile=True)
    with pytest.raises(InputError, match="no cache 'paged'"):
        tiny_model(cache="paged")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_guarded(dtype: torch.dtype) -> None:
    model = wrap(build(BY_NAME["llama"]).to(dtype), tokenizer())
    guard = guard_of(model, [1, 2])
    with model.guarded(guard):
        guarded = model.generate(PROMPTS[1], sampling=STEPS, trace=True)[0]
    assert guarded.tokens_moved > 0
    assert guarded.traces[0].rho.dtype == np.float32
    shut = guard_of(model, [0, 1, 2, 3], SwFC(0.0))
    assert ids_of(model.generate(PROMPTS, guards=shut, sampling=STEPS)) == ids_of(model.generate(PROMPTS, sampling=STEPS))


def test_a_device_map_is_guarded(tmp_path: Any) -> None:
    model = tiny_model()
    model.module.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    mapped = load(str(tmp_path), device_map="cpu", dtype="float32")
    guard = guard_of(model, [1, 2])
    assert mapped.identity.weights == model.identity.weights
    assert ids_of(mapped.generate(PROMPTS, guards=guard, sampling=STEPS)) == ids_of(
        model.generate(PROMPTS, guards=guard, sampling=STEPS)
    )


def test_greedy_is_the_argmax(model: TransformersModel) -> None:
    assert GREEDY.temperature == 0
    answer = model.generate(PROMPTS[0], sampling=STEPS)[0]
    assert answer.ids[0] == int(model.logits(PROMPTS[0])[-1].argmax())


# ------------------------------------------------------------------------------------------------ rows that have ended


@pytest.mark.parametrize("name", ["llama", "mistral"])  # keys of all positions, and of a sliding window
@pytest.mark.parametrize("sampling", [SAMPLED, replace(SAMPLED, stop=("e", "a")), replace(SAMPLED, top_p=1.0, temperature=2.0)])
def test_rows_that_have_ended_leave_the_batch_and_nothing_else_changes(
    name: str, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(name)
    guards = [None, guard_of(model, [0]), guard_of(model, [1], SwFC(3), "response")]
    prompts = [f"{i} of many{'.' * (i % 5)}" for i in range(24)]
    own: list[Any] = [guards[i % 3] for i in range(24)]
    engine = replace(model._engine, ends=tuple(range(0, model.module.config.get_text_config().vocab_size, 12)))
    sizes: list[int] = []
    select = DynamicCache.batch_select_indices

    def counted(cache: DynamicCache, left: torch.Tensor) -> None:
        sizes.append(len(left))
        select(cache, left)

    monkeypatch.setattr(DynamicCache, "batch_select_indices", counted)
    emitted: list[dict[int, str]] = []
    found = []
    for shrinks in (True, False):
        monkeypatch.setattr(model, "_engine", replace(engine, shrinks=shrinks))
        texts = dict.fromkeys(range(24), "")
        found.append(model.generate(
            prompts, guards=own, sampling=sampling, on_token=lambda i, text: texts.__setitem__(i, texts[i] + text)
        ))  # fmt: skip
        emitted.append(texts)
    assert engine.shrinks
    assert 24 > sizes[0] >= sizes[-1] > 0  # rows did leave
    for shrunk, whole in zip(*found, strict=True):
        assert (shrunk.ids, shrunk.text, shrunk.finished) == (whole.ids, whole.text, whole.finished)
        assert (shrunk.tokens_seen, shrunk.tokens_moved) == (whole.tokens_seen, whole.tokens_moved)
        assert shrunk.shift == pytest.approx(whole.shift, rel=1e-4)
    assert emitted[0] == emitted[1] == {i: answer.text for i, answer in enumerate(found[0])}


@pytest.mark.parametrize(("name", "shrinks"), [("llama", True), ("gemma3", True), ("bamba", False), ("qwen3-next", False)])
def test_only_plain_keys_and_values_can_lose_rows(name: str, shrinks: bool) -> None:
    assert tiny_model(name)._engine.shrinks is shrinks
