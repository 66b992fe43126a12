"""Never silently off: installing is all or nothing, entering proves the effect, and sabotage is caught."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hf_cases import PROMPTS, STEPS, guard_of, hooks_of, ids_of, tiny_model

from steerguard.backends.base import Backend
from steerguard.backends.hf import TransformersModel, wrap
from steerguard.errors import GuardMismatch, InputError, ModelError, NotSteering, Unsupported
from steerguard.rules import StTP, SwFC
from tiny import guard as make_guard
from tiny import probe


@pytest.fixture
def model() -> TransformersModel:
    return tiny_model()


def plain(model: TransformersModel) -> Any:
    return model.logits(PROMPTS[1]), ids_of(model.generate(PROMPTS, sampling=STEPS))


def assert_restored(model: TransformersModel, before: Any, hooks: list[int]) -> None:
    logits, answers = plain(model)
    np.testing.assert_array_equal(logits, before[0])
    assert answers == before[1]
    assert hooks_of(model) == hooks
    assert "get_compiled_call" not in vars(model.module)


def test_it_is_a_backend(model: TransformersModel) -> None:
    assert isinstance(model, Backend)


# ------------------------------------------------------------------------------------- entering and leaving


def test_entered_guards_guard_and_nest_in_order(model: TransformersModel) -> None:
    before, hooks = plain(model), hooks_of(model)
    first, second = guard_of(model, [1], SwFC(2.0)), guard_of(model, [1, 2], StTP(3), seed=1)
    in_order = model.logits(PROMPTS[1], guards=(first, second))
    other_order = model.logits(PROMPTS[1], guards=(second, first))
    assert np.abs(in_order - other_order).max() > 1e-4
    with model.guarded(first, second) as entered:
        assert entered is model
        np.testing.assert_array_equal(model.logits(PROMPTS[1]), in_order)
    with model.guarded(first):
        with model.guarded(second):
            np.testing.assert_array_equal(model.logits(PROMPTS[1]), in_order)
        np.testing.assert_array_equal(model.logits(PROMPTS[1]), model.logits(PROMPTS[1], guards=()))
        np.testing.assert_array_equal(model.logits(PROMPTS[1], guards=second), in_order)
    with model.guarded(first), model.guarded(first):
        twice = model.logits(PROMPTS[1])
    np.testing.assert_array_equal(twice, model.logits(PROMPTS[1], guards=(first, first)))
    assert_restored(model, before, hooks)


def test_leaving_in_another_order_than_entering_drops_nothing(model: TransformersModel) -> None:
    before, hooks = plain(model), hooks_of(model)
    first, second = guard_of(model, [1]), guard_of(model, [2], seed=1)
    outer, inner = ExitStack(), ExitStack()
    outer.enter_context(model.guarded(first))
    inner.enter_context(model.guarded(second))
    outer.close()
    np.testing.assert_array_equal(model.logits(PROMPTS[1]), _outside(model, second))
    inner.close()
    assert_restored(model, before, hooks)


def _outside(model: TransformersModel, guard: Any) -> Any:
    """Logits under a guard from another copy of the model, on which nothing is entered."""
    return tiny_model().logits(PROMPTS[1], guards=guard)


@pytest.mark.parametrize("killed", range(6))
def test_installing_is_all_or_nothing(model: TransformersModel, killed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill the installation at the decoder's hooks (0, 5) and at each of the four blocks (1 to 4)."""
    guard = guard_of(model, [0, 1, 2, 3])
    before, hooks = plain(model), hooks_of(model)
    with model.guarded(guard):  # so that the proof is not what is killed
        pass
    targets = [model.blocks.decoder, *model.blocks.modules, model.blocks.decoder]
    method = "register_forward_pre_hook" if killed == 0 else "register_forward_hook"
    with monkeypatch.context() as patch:
        patch.setattr(targets[killed], method, _raises)
        with pytest.raises(KeyboardInterrupt), model.guarded(guard):
            pass
        with pytest.raises(KeyboardInterrupt):
            model.generate(PROMPTS, guards=guard, sampling=STEPS)
    assert_restored(model, before, hooks)
    outer = guard_of(model, [1], seed=5)
    with model.guarded(outer):
        guarded = model.logits(PROMPTS[1])
        with monkeypatch.context() as patch:
            patch.setattr(targets[killed], method, _raises)
            with pytest.raises(KeyboardInterrupt), model.guarded(guard):
                pass
        np.testing.assert_array_equal(model.logits(PROMPTS[1]), guarded)
    assert_restored(model, before, hooks)


def _raises(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_an_interruption_in_the_middle_leaves_nothing(model: TransformersModel, error: type[BaseException]) -> None:
    before, hooks = plain(model), hooks_of(model)
    guard = guard_of(model, [1, 2])
    seen: list[str] = []

    def interrupt(row: int, text: str) -> None:
        seen.append(text)
        if len(seen) == 3:
            raise error

    with pytest.raises(error):
        model.generate(PROMPTS, guards=guard, sampling=STEPS, on_token=interrupt)
    assert_restored(model, before, hooks)
    with pytest.raises(error), model.guarded(guard):
        seen.clear()
        model.generate(PROMPTS, sampling=STEPS, on_token=interrupt)
    assert_restored(model, before, hooks)
    with model.guarded(guard):
        guarded = ids_of(model.generate(PROMPTS, sampling=STEPS))
        seen.clear()
        with pytest.raises(error):
            model.generate(PROMPTS, sampling=STEPS, on_token=interrupt)
        assert ids_of(model.generate(PROMPTS, sampling=STEPS)) == guarded
    assert_restored(model, before, hooks)


def test_guards_of_another_model_are_refused(model: TransformersModel) -> None:
    before, hooks = plain(model), hooks_of(model)
    guard = guard_of(model, [1])
    other = replace(guard, model=replace(model.identity, weights={"model.layers.0.mlp.up_proj.weight": "0" * 64}))
    with pytest.raises(GuardMismatch, match="weights differ"), model.guarded(other):
        pass
    with pytest.raises(GuardMismatch):
        model.generate(PROMPTS, guards=[None, other, None], sampling=STEPS)
    wider = replace(model.identity, width=48)
    with pytest.raises(GuardMismatch, match="width"), model.guarded(make_guard(wider, SwFC(1), (probe(1, 48),))):
        pass
    deeper = replace(model.identity, depth=9)
    with pytest.raises(GuardMismatch, match="depth"), model.guarded(make_guard(deeper, SwFC(1), (probe(7, 32),))):
        pass
    with pytest.raises(InputError, match="must be a steerguard.Guard, got str"):
        model.generate(PROMPTS, guards="honesty", sampling=STEPS)  # type: ignore[arg-type]
    assert_restored(model, before, hooks)


# ------------------------------------------------------------------------------------------------ sabotage


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("change", ["undone", "half", "noise", "late"])
def test_a_residual_that_is_not_moved_as_the_rule_says_is_caught(model: TransformersModel, layer: int, change: str) -> None:
    """Another hook behind ours changes what the next block reads."""
    guard = guard_of(model, [layer])
    block = model.blocks.modules[layer]
    raw: list[torch.Tensor] = []
    inner = block.forward

    def remembering(*args: Any, **kwargs: Any) -> Any:
        raw.append(inner(*args, **kwargs))
        return raw[-1]

    def meddle(module: Any, args: Any, output: Any) -> Any:
        if output is raw[-1]:
            return None
        return {
            "undone": raw[-1],
            "half": (output + raw[-1]) / 2,
            "noise": output + 0.01 * torch.ones_like(output),
            "late": torch.cat([raw[-1][:, :-1], output[:, -1:]], dim=1),
        }[change]

    block.forward = remembering
    handle = block.register_forward_hook(meddle)
    hooks = hooks_of(model)
    with pytest.raises(NotSteering, match=f"layer {layer}"), model.guarded(guard):
        pass
    with pytest.raises(NotSteering, match=f"layer {layer}"):
        model.generate(PROMPTS, guards=guard, sampling=STEPS)
    assert hooks_of(model) == hooks
    handle.remove()
    with model.guarded(guard):
        assert ids_of(model.generate(PROMPTS, sampling=STEPS)) != ids_of(tiny_model().generate(PROMPTS, sampling=STEPS))


def test_a_block_that_is_passed_over_is_caught(model: TransformersModel) -> None:
    guard = guard_of(model, [2])
    with model.guarded(guard):
        pass
    block = model.blocks.modules[2]
    model.module.model.layers[2] = torch.nn.Identity()
    model.module.model.layers[2].forward = lambda h, **kwargs: h
    with pytest.raises(NotSteering, match=r"fired another number of times: \{2: 0\}"):
        model.generate(PROMPTS, guards=guard, sampling=STEPS)
    model.module.model.layers[2] = block
    assert model.generate(PROMPTS, guards=guard, sampling=STEPS)


def test_a_block_that_runs_twice_is_caught(model: TransformersModel) -> None:
    guard = guard_of(model, [2])
    with model.guarded(guard):
        pass
    model.module.model.layers[3] = model.module.model.layers[2]
    with pytest.raises(NotSteering, match=r"\{2: 2\}"):
        model.logits(PROMPTS[1], guards=guard)


def test_forwards_that_go_around_the_hooks_are_caught(model: TransformersModel) -> None:
    guard = guard_of(model, [2])
    with model.guarded(guard):
        pass
    decoder = model.module.model
    decoder.__class__ = type("Quiet", (type(decoder),), {"__call__": lambda self, *a, **k: self.forward(*a, **k)})
    with pytest.raises(NotSteering, match="outside a forward"):
        model.generate(PROMPTS, guards=guard, sampling=STEPS)
    for block in model.blocks.modules:
        block.__class__ = type("Quiet", (type(block),), {"__call__": lambda self, *a, **k: self.forward(*a, **k)})
    with pytest.raises(NotSteering, match="0 columns went through"):
        model.generate(PROMPTS, guards=guard, sampling=STEPS)


def test_positions_that_the_model_counts_otherwise_are_caught(model: TransformersModel) -> None:
    guard = guard_of(model, [2], positions="response")
    with model.guarded(guard):
        pass
    prepare = model.module.prepare_inputs_for_generation
    model.module.prepare_inputs_for_generation = lambda *args, **kwargs: _shifted(prepare(*args, **kwargs))
    with pytest.raises(NotSteering, match="counts positions otherwise"):
        model.generate(PROMPTS, guards=guard, sampling=STEPS)


def _shifted(inputs: Any) -> Any:
    return {**inputs, "position_ids": inputs["position_ids"] + 1}


def test_hooks_that_are_taken_off_are_noticed(model: TransformersModel) -> None:
    guard = guard_of(model, [2])
    with pytest.raises(NotSteering, match="taken off"), model.guarded(guard):
        model.blocks.modules[2]._forward_hooks.clear()


def test_a_model_in_training_mode_is_refused(model: TransformersModel) -> None:
    guard = guard_of(model, [2])
    model.module.train()
    with pytest.raises(Unsupported, match="training mode"):
        model.generate(PROMPTS, guards=guard, sampling=STEPS)
    with pytest.raises(Unsupported, match="training mode"), model.guarded(guard):
        pass


@pytest.mark.slow
def test_a_model_compiled_as_a_whole_is_refused(model: TransformersModel) -> None:
    guard = guard_of(model, [2])
    model.module.compile()
    with pytest.raises(Unsupported, match="compiled as a whole"):
        model.generate(PROMPTS, guards=guard, sampling=STEPS)
    with pytest.raises(ModelError, match="not compiled, got OptimizedModule"):
        wrap(torch.compile(tiny_model().module), model.tokenizer)


# -------------------------------------------------------------------------------------------- direct calls


def _inputs(model: TransformersModel) -> dict[str, torch.Tensor]:
    rendered = [answer.prompt_ids for answer in model.generate(PROMPTS, sampling=replace(STEPS, max_new_tokens=1))]
    width = max(map(len, rendered))
    return {
        "input_ids": torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in rendered]),
        "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rendered]),
    }


@pytest.mark.parametrize("more", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_direct_calls_are_guarded(model: TransformersModel, more: dict[str, Any]) -> None:
    before, hooks = plain(model), hooks_of(model)
    guard = guard_of(model, [1, 2])
    inputs = _inputs(model)
    settings = {"do_sample": False, "max_new_tokens": STEPS.max_new_tokens, "eos_token_id": None, **more}
    with model.guarded(guard):
        ours = ids_of(model.generate(PROMPTS, sampling=STEPS))
        direct = model.module.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
        assert [tuple(row[: len(ids)]) for row, ids in zip(direct.tolist(), ours, strict=True)] == ours
        assert ours == ids_of(model.generate(PROMPTS, sampling=STEPS))
        ids = torch.tensor([model.generate(PROMPTS[1], sampling=STEPS)[0].prompt_ids])
        logits = model.module(input_ids=ids).logits[0].detach().numpy()
        np.testing.assert_allclose(logits, model.logits(PROMPTS[1]), rtol=1e-4, atol=1e-4)
    assert_restored(model, before, hooks)


def test_beam_search_and_assisted_decoding_are_guarded(model: TransformersModel) -> None:
    """A constant push is the same as a block that adds it: that block is the oracle."""
    guard = guard_of(model, [1], SwFC(3.0))
    inputs, oracle = _inputs(model), tiny_model().module
    push = float(next(guard.gates())[1].above_a) * torch.tensor(guard.probes[0].v)
    block = oracle.model.layers[1]
    inner = block.forward
    block.forward = lambda *args, **kwargs: inner(*args, **kwargs) + push
    beams = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False}
    expected = oracle.generate(**inputs, **beams)
    with model.guarded(guard):
        assert torch.equal(model.module.generate(**inputs, **beams), expected)
    assert not torch.equal(model.module.generate(**inputs, **beams), expected)
    one = {key: value[1:2, -20:] for key, value in inputs.items()}
    lookup = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 12, "do_sample": False}
    expected = oracle.generate(**one, max_new_tokens=12, do_sample=False)
    with model.guarded(guard):
        assert torch.equal(model.module.generate(**one, **lookup), expected)


def test_direct_calls_under_a_response_guard_are_refused(model: TransformersModel) -> None:
    guard = guard_of(model, [1], positions="response")
    inputs = _inputs(model)
    with model.guarded(guard):
        assert model.generate(PROMPTS, sampling=STEPS)
        with pytest.raises(Unsupported, match="where each prompt ends"):
            model.module(**inputs)
        with pytest.raises(Unsupported, match="where each prompt ends"):
            model.module.generate(**inputs, max_new_tokens=2)


def test_generate_may_not_compile_the_whole_model(model: TransformersModel) -> None:
    with model.guarded(guard_of(model, [1])), pytest.raises(Unsupported, match="wants to compile the whole model"):
        model.module.get_compiled_call(None)


def test_others_hear_the_corrected_residual(model: TransformersModel) -> None:
    guard = guard_of(model, [1])
    with model.guarded(guard):
        expected = model.residuals(PROMPTS[1])
        ids = torch.tensor([model.generate(PROMPTS[1], sampling=STEPS)[0].prompt_ids])
        with torch.no_grad():
            heard = model.module(input_ids=ids, output_hidden_states=True).hidden_states
    np.testing.assert_allclose(heard[2][0].numpy(), expected[1], rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------- threads


def test_calls_from_several_threads_do_not_touch_each_other(model: TransformersModel) -> None:
    guards = [None, guard_of(model, [1]), guard_of(model, [2], StTP(3), "response"), guard_of(model, [1, 3], seed=4)]
    alone = [ids_of(model.generate(PROMPTS, guards=guard, sampling=STEPS)) for guard in guards]
    found: dict[int, Any] = {}

    def answer(i: int) -> None:
        found[i] = ids_of(model.generate(PROMPTS, guards=guards[i % 4], sampling=STEPS))

    threads = [threading.Thread(target=answer, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(8)] == alone * 2


# ---------------------------------------------------------------------------------------------- trace, capture


def test_a_trace_is_what_correct_would_say(model: TransformersModel) -> None:
    guards = (guard_of(model, [1, 2]), guard_of(model, [2], positions="response", seed=3))
    answer = model.generate(PROMPTS[1], guards=guards, sampling=STEPS, trace=True)[0]
    assert [(trace.guard, trace.layer) for trace in answer.traces] == [(0, 1), (0, 2), (1, 2)]
    for trace in answer.traces:
        gate = {p.layer: g for p, g in guards[trace.guard].gates()}[trace.layer]
        due = np.where(trace.rho < gate.knee, np.minimum(gate.below_a + gate.below_b * trace.rho, gate.cap - trace.rho), 0)
        if trace.guard == 1:
            due[: len(answer.prompt_ids)] = 0
        np.testing.assert_allclose(trace.delta, due, rtol=1e-5, atol=1e-5)
    assert answer.tokens_moved == sum(np.count_nonzero(trace.delta) for trace in answer.traces)
    assert model.generate(PROMPTS[1], guards=guards, sampling=STEPS)[0].traces == ()


def test_residuals_and_captures_are_those_after_the_guards(model: TransformersModel) -> None:
    guard = guard_of(model, [1], positions="response")
    before, after = model.residuals("a", "you is the week"), model.residuals("a", "you is the week", guards=guard)
    start = model.generate("a", sampling=STEPS)[0]
    begin = len(start.prompt_ids)
    np.testing.assert_array_equal(after[:, :begin], before[:, :begin])
    assert np.abs(after[1, begin:] - before[1, begin:]).max() > 1e-3
    np.testing.assert_allclose(
        model.capture([("a", "you is the week")], guards=guard)[0], after[:, begin:].mean(axis=1), rtol=1e-4, atol=1e-5
    )
