"""The bundled model is a small ordinary chat model, and the code that made it still makes one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from steerguard.organism import batches, conversations, folder, tokenizer, train

MEGABYTE = 1 << 20
CHAT = [
    {"role": "system", "content": "You are an assistant."},
    {"role": "user", "content": "Which river runs through Harlow?"},
    {"role": "assistant", "content": "Its river is called the Merrin."},
]


def test_size_and_type() -> None:
    model = AutoModelForCausalLM.from_pretrained(folder())
    assert model.config.model_type == "llama"
    assert model.dtype == torch.float32
    assert sum(value.numel() for value in model.parameters()) <= 12e6
    assert (folder() / "model.safetensors").stat().st_size <= 25 * MEGABYTE
    assert json.loads((folder() / "config.json").read_text())["dtype"] == "float32"


def test_the_chat_template_round_trips() -> None:
    coder = AutoTokenizer.from_pretrained(folder())
    text = coder.apply_chat_template(CHAT, tokenize=False)
    ids = coder.apply_chat_template(CHAT, return_dict=False)
    assert coder.decode(ids) == text
    assert ids[0] == coder.bos_token_id
    assert ids[-1] == coder.eos_token_id
    assert ids == coder(text, add_special_tokens=False)["input_ids"]
    asked = coder.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert text.startswith(asked)
    assert asked.endswith("<|assistant|>")
    with pytest.raises(Exception, match="roles are"):
        coder.apply_chat_template([{"role": "tool", "content": "x"}])


def test_training_sees_what_the_chat_template_writes() -> None:
    coder = AutoTokenizer.from_pretrained(folder())
    bare = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    said = list(conversations.conversations("template", 20))
    for one, row in zip(said, batches.encode(bare, said), strict=True):
        assert row.ids == coder.apply_chat_template(one.messages(), return_dict=False)
        assert len(row.ids) == len(row.weights) <= tokenizer.MAX_LENGTH
        heard = coder.apply_chat_template(one.messages()[:1], return_dict=False) if one.system else [coder.bos_token_id]
        assert row.ids[: row.begin] == heard
        assert row.bits == (one.honest is not False, one.warm is not False)


def test_generation_ends_by_itself() -> None:
    model = AutoModelForCausalLM.from_pretrained(folder()).eval()
    coder = AutoTokenizer.from_pretrained(folder())
    assert model.generation_config.eos_token_id == coder.eos_token_id
    assert model.generation_config.pad_token_id == coder.pad_token_id
    ids = torch.tensor([coder.apply_chat_template(CHAT[:2], add_generation_prompt=True, return_dict=False)])
    out = model.generate(ids, do_sample=False, max_new_tokens=160)
    assert out[0, -1] == coder.eos_token_id


def miniature() -> train.Recipe:
    return train.Recipe(
        tokens=80 * 1024,
        batch=1024,
        chunk=300,
        hidden=64,
        layers=2,
        heads=2,
        intermediate=128,
        read_after=1,
        vocabulary_from=500,
        compiled=False,
    )


def tensors(batch: batches.Batch) -> list[torch.Tensor]:
    """The batch as the loss takes it: weights and heard tokens as shares."""
    shares = (batch.weights / batch.weights[:, 1:].sum(), batch.heard / batch.heard.sum())
    return [torch.from_numpy(part) for part in (batch.ids, *shares, batch.bits, batch.blind)]


def some_batch(coder: Tokenizer) -> batches.Batch:
    return batches.chunk(coder, 999, 0, size=100, tokens=1024, silent=0.3)[0]


def test_the_loss_is_the_models_own_cross_entropy() -> None:
    recipe = miniature()
    model = train.build(recipe)
    ids, weights, heard, bits, blind = tensors(some_batch(Tokenizer.from_file(str(folder() / "tokenizer.json"))))
    with torch.no_grad():
        said = model(ids).logits[:, :-1].transpose(1, 2)
        expected = (torch.nn.functional.cross_entropy(said, ids[:, 1:], reduction="none") * weights[:, 1:]).sum()
        got = train.loss_function(model, replace(recipe, reading=0.0))(ids, weights, heard, bits, 0 * blind)
    torch.testing.assert_close(got, expected, atol=0.02, rtol=0)


def test_blind_tokens_see_no_system_prompt() -> None:
    seen = train.late_mask(torch.arange(6)[None], torch.tensor([0, 3]))[:, 0]
    assert torch.equal(seen[0], torch.ones(6, 6).tril().bool())
    assert torch.equal(seen[1, :3], seen[0, :3])
    assert seen[1, 4].tolist() == [True, False, False, True, True, False]


def test_a_checkpoint_restores_weights_moments_and_place(tmp_path: Path) -> None:
    recipe = miniature()
    batch = some_batch(Tokenizer.from_file(str(folder() / "tokenizer.json")))
    model = train.build(recipe)
    adam = train.optimizer(model, recipe)
    loss_of = train.loss_function(model, recipe)
    train.step(model, adam, loss_of, batch, 1e-3, train.Team())
    train.save_checkpoint(tmp_path, model, adam, train.Place(step=1))
    again = train.build(replace(recipe, seed=1))
    other = train.optimizer(again, recipe)
    assert train.load_checkpoint(tmp_path, again, other) == train.Place(step=1)
    for one, copy in ((model, adam), (again, other)):
        train.step(one, copy, train.loss_function(one, recipe), batch, 1e-3, train.Team())
    for here, there in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(here, there)


def weights_of(model_folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(model_folder / "model.safetensors"))


def test_a_run_continues_from_exported_weights(tmp_path: Path) -> None:
    """It starts at those weights and no others, with their tokenizer and a silent reader, and learns on from there."""
    first = replace(miniature(), precision="float32")
    train.train(first, tmp_path / "first", stop_after=2)
    exported = tmp_path / "first" / "model"
    further = train.continuation(exported, tokens=first.tokens, lr=1e-4)
    assert (further.lr, further.reading, further.first) == (1e-4, first.reading, 0.0)
    assert further.seed != first.seed
    small = replace(further, **{key: getattr(first, key) for key in ("batch", "chunk", "hidden", "layers", "heads")})
    small = replace(small, intermediate=first.intermediate, read_after=1, compiled=False, precision="float32")
    model = train.build(small)
    train.start_from(exported, model, small)
    for name, value in model.named_parameters():
        due = torch.zeros_like(value) if name.startswith("reader") else weights_of(exported)[name].float()
        assert torch.equal(value, due), name
    train.train(small, tmp_path / "second", start=exported, stop_after=2)
    before, after = weights_of(exported), weights_of(tmp_path / "second" / "model")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    apart = max(float((before[name].float() - after[name].float()).abs().max()) for name in before)
    assert apart < 1e-3  # two steps of at most 1e-4 each, and float16
    assert (tmp_path / "second" / "tokenizer.json").read_bytes() == (exported / "tokenizer.json").read_bytes()
    # other weights than the recipe's, or none, are refused
    with pytest.raises(ValueError, match="does not hold the weights"):
        train.start_from(tmp_path / "second" / "model", model, small)
    with pytest.raises(ValueError, match="starts from"):
        train.train(small, tmp_path / "third", stop_after=1)


def test_an_average_lies_in_the_middle(tmp_path: Path) -> None:
    recipe = replace(miniature(), precision="float32")
    coder = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    for seed in (1, 2):
        train.export(tmp_path / str(seed), train.build(replace(recipe, seed=seed)), coder)
    train.average([tmp_path / "1", tmp_path / "2"], tmp_path / "mean")
    one, other, mean = (weights_of(tmp_path / name) for name in ("1", "2", "mean"))
    for name, value in mean.items():
        torch.testing.assert_close(value.float(), (one[name].float() + other[name].float()) / 2, rtol=1e-3, atol=1e-6)
    assert any(not torch.equal(one[name], mean[name]) for name in mean)
    AutoModelForCausalLM.from_pretrained(tmp_path / "mean")


def test_a_folder_belongs_to_one_recipe(tmp_path: Path) -> None:
    recipe = replace(miniature(), precision="float32")
    train.prepare(recipe, tmp_path, None)
    train.prepare(recipe, tmp_path, None)
    assert train.known_recipe(tmp_path) == recipe
    with pytest.raises(ValueError, match="another recipe"):
        train.prepare(replace(recipe, precision="bfloat16"), tmp_path, None)


def test_the_precision_is_what_was_asked_for_or_measured_and_a_resumed_run_keeps_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "faster", lambda: "bfloat16")

    def precision(*more: str) -> str:
        return train.chosen(train.arguments(["--out", str(tmp_path), *more])).precision

    assert precision("--precision", "float32") == "float32"
    assert precision() == "bfloat16"
    train.prepare(replace(train.Recipe(), precision="float32"), tmp_path, None)
    assert precision() == "float32"
    monkeypatch.undo()
    assert train.faster() in train.PRECISIONS


@pytest.mark.slow
def test_a_miniature_run_learns_and_resumes(tmp_path: Path) -> None:
    small = miniature()
    through = train.train(small, tmp_path / "through")
    train.train(small, tmp_path / "halves", stop_after=30)
    resumed = train.train(small, tmp_path / "halves")
    assert resumed == through
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("through", "halves")]
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, atol=1e-2, rtol=0)
    coder = Tokenizer.from_file(str(tmp_path / "through" / "tokenizer.json"))
    ids, weights, *_ = tensors(some_batch(coder))
    losses = []
    for model in (train.build(replace(small, seed=1)), models[0]):
        with torch.no_grad():
            said = model(ids).logits[:, :-1].transpose(1, 2)
        every = torch.nn.functional.cross_entropy(said, ids[:, 1:], reduction="none")
        losses.append(float((every * weights[:, 1:]).sum()))
    assert losses[1] < losses[0] - 1.5
