"""Finding the blocks, and refusing models whose residual stream is not what a guard would act on.

That every architecture of the table is found right is in `backends/test_hf_architectures.py`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from architectures import ARCHITECTURES, build
from steerguard.errors import ModelError
from steerguard.layers import find_blocks, probe_ids

LLAMA = next(a for a in ARCHITECTURES if a.name == "llama")
QWEN = next(a for a in ARCHITECTURES if a.name == "qwen3.5")


def test_it_says_what_it_found() -> None:
    blocks = find_blocks(build(LLAMA))
    assert repr(blocks) == (
        "Blocks(4 x LlamaDecoderLayer at model.layers, width 32, each returns a tensor; run by model, read at the end by "
        "model.norm)"
    )
    assert len(blocks) == 4
    assert blocks.consumer(0) is blocks.modules[1]
    assert blocks.consumer(3) is blocks.reader


def test_finding_leaves_no_hook() -> None:
    model = build(LLAMA)
    find_blocks(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_vision_tower_as_deep_as_the_text_decoder_is_not_taken_for_it() -> None:
    model = build(QWEN)
    assert len(model.model.visual.blocks) == model.config.text_config.num_hidden_layers
    assert find_blocks(model).path == "model.language_model.layers"


def test_probe_ids_leave_out_placeholders() -> None:
    model = build(QWEN)
    ids = set(probe_ids(model, 4, 16).flatten().tolist())
    assert len(ids) == 64
    assert not ids & {290, 291, 292, 293, 0, 1, 2}


def test_a_block_used_twice_is_refused() -> None:
    model = build(LLAMA)
    model.model.layers[2] = model.model.layers[1]
    with pytest.raises(ModelError, match=r"model\.layers.*the same module stands in several places"):
        find_blocks(model)


def test_blocks_that_are_skipped_are_refused() -> None:
    model = build(LLAMA)
    model.config.num_hidden_layers = 3  # the model runs the first three of its four
    with pytest.raises(ModelError, match="no list of 3 decoder blocks; there are model.layers \\(4\\)"):
        find_blocks(model)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda h: torch.stack([h, h]), r"returned \[2, 2, 8, 32\]"),
        (lambda h: h[..., :16].repeat(1, 1, 2), None),
        (lambda h: {"residual": h}, "returned no tensor"),
    ],
    ids=["several-streams", "still-a-residual", "no-tensor"],
)
def test_what_a_block_returns_must_be_the_residual(change: Any, told: str | None) -> None:
    model = build(LLAMA)
    for block in model.model.layers:
        inner = block.forward

        def forward(h: Any, *args: Any, inner: Any = inner, **kwargs: Any) -> Any:
            h = h["residual"] if isinstance(h, dict) else h
            return change(inner(h[0] if h.ndim == 4 else h, *args, **kwargs))

        block.forward = forward
    norm = model.model.norm.forward
    model.model.norm.forward = lambda h: norm(h["residual"] if isinstance(h, dict) else h[0] if h.ndim == 4 else h)
    if told is None:
        find_blocks(model)
    else:
        with pytest.raises(ModelError, match=told):
            find_blocks(model)


def test_something_added_between_the_blocks_is_refused() -> None:
    model = build(LLAMA)

    class Adding(nn.ModuleList):
        def __getitem__(self, index: Any) -> Any:
            return [_AddsBefore(block) if i == 2 else block for i, block in enumerate(self)][index]

    class _AddsBefore:
        def __init__(self, block: nn.Module) -> None:
            self.block = block

        def __call__(self, h: torch.Tensor, **kwargs: Any) -> Any:
            return self.block(h + 1, **kwargs)

    model.model.layers = Adding(list(model.model.layers))
    with pytest.raises(ModelError, match=r"modules \[2\] read something else"):
        find_blocks(model)


def test_nobody_reads_the_last_block() -> None:
    model = build(LLAMA)
    model.model.norm = _Doubling(model.model.norm)
    with pytest.raises(ModelError, match="nothing reads the last module's output"):
        find_blocks(model)


class _Doubling(nn.Module):
    """Changes the residual before the norm reads it, and is not called as a module itself."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def __call__(self, h: torch.Tensor) -> Any:
        return self.norm(h * 2)


def test_encoder_decoders_are_refused() -> None:
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, vocab_size=64)
    with pytest.raises(ModelError, match="encoder-decoder"):
        find_blocks(transformers.T5ForConditionalGeneration(config).eval())


def test_a_model_whose_tokens_see_what_follows_is_refused() -> None:
    size = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 64,
    }
    model = transformers.BertLMHeadModel(transformers.BertConfig(**size)).eval()
    with pytest.raises(ModelError, match="lets a token see those after it"):
        find_blocks(model)


def test_a_module_of_another_library_is_refused() -> None:
    with pytest.raises(ModelError, match="not a transformers model"):
        find_blocks(nn.Linear(2, 2))


def test_a_configuration_without_a_depth_is_refused() -> None:
    model = nn.Linear(2, 2)
    text = SimpleNamespace()
    model.config = SimpleNamespace(get_text_config=lambda decoder: text, is_encoder_decoder=False)  # type: ignore[assignment]
    with pytest.raises(ModelError, match="num_hidden_layers"):
        find_blocks(model)
