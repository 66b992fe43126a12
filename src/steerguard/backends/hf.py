"""The transformers backend: any causal language model that transformers can load, guarded by forward hooks.

    model = load("Qwen/Qwen3-32B")                  # a hub name or a local folder
    model = wrap(module, tokenizer)                 # or a model that is in memory already

Answers come from transformers' own `generate`, so every architecture, cache and quantisation that it serves is served
here. What acts on the residual is in `hf_hooks`, what proves it in `hf_proof`, what draws and ends in `drawing`.

Refused rather than done wrongly: encoder-decoders; models whose blocks do not return one residual stream; models in
training mode; `torch.compile` around the whole model (hooks are not part of its compiled code: load with
`compile=True`, which compiles each block inside its hook); direct calls of `model.module` under a guard on `response`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar, get_args

import torch

from steerguard.backends.base import Answer, Floats, Guards, Sampling, checked, chosen_layers, numbers_of, one_by_one
from steerguard.backends.drawing import pieces, row_keys
from steerguard.backends.fingerprint import fingerprint_memory, model_identity
from steerguard.backends.hf_generate import Engine, Row, batches, bounded_positions, can_shrink, generate_batch
from steerguard.backends.hf_hooks import Steering, plan, without_compiled_calls
from steerguard.backends.hf_load import checkpoint_fingerprint, end_tokens, load_pretrained, memory_errors, pad_token
from steerguard.backends.hf_proof import prove
from steerguard.backends.hf_read import mean_residuals, read_forward, token_residuals
from steerguard.errors import ContrastError, InputError, ModelError, PromptError, Unsupported
from steerguard.guard import Guard
from steerguard.layers import find_blocks, text_config
from steerguard.prompts import Prompt, Reply, as_conversation, render

__all__ = ["TransformersModel", "load", "wrap"]

T = TypeVar("T")
CacheKind = Literal["dynamic", "static"]
BATCH_TOKENS = 16_384
"""Tokens of one batch with padding and, in generation, with the room for the answers."""
SHAPES = 16
"""How many shapes of a batch each block may be compiled for before torch runs it uncompiled."""


def load(
    name_or_folder: str,
    *,
    dtype: str = "auto",
    device_map: Any = None,
    quantization: Literal["4bit", "8bit"] | None = None,
    cache: CacheKind = "dynamic",
    compile: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> TransformersModel:
    """Load a causal language model by hub name or local folder; a multimodal one is used for text only.

    Args:
        dtype: auto (as saved), bfloat16, float16 or float32.
        device_map: as transformers takes it; None is `auto` where there is a GPU, else the CPU.
        quantization: through bitsandbytes.
        cache: keys and values grow (`dynamic`) or are laid out beforehand (`static`).
        compile: compile each decoder block with torch.compile. The hooks stay outside the compiled code.
        batch_tokens: how many tokens, padding included, one batch may hold; lower it if memory runs out.
        trust_remote_code: run the code that comes with the checkpoint.

    Raises:
        ModelError: it cannot be loaded, or its residual stream cannot be found; the message has the next step.
    """
    name = str(name_or_folder)
    module, tokenizer = load_pretrained(
        name, dtype=dtype, device_map=device_map, quantization=quantization,
        trust_remote_code=trust_remote_code, revision=revision,
    )  # fmt: skip
    weights = checkpoint_fingerprint(name, revision=revision)
    return TransformersModel(
        module, tokenizer, name=name, weights=weights, cache=cache, compile=compile, batch_tokens=batch_tokens
    )


def wrap(
    module: Any, tokenizer: Any, *, name: str | None = None, cache: CacheKind = "dynamic", compile: bool = False,
    batch_tokens: int = BATCH_TOKENS,
) -> TransformersModel:  # fmt: skip
    """A model and tokenizer that are in memory already. The model is put in eval mode; see `load` for the rest."""
    if not isinstance(module, torch.nn.Module) or not hasattr(module, "generate") or hasattr(module, "_orig_mod"):
        raise ModelError(
            f"wrap takes a transformers model with a language modelling head, not compiled, got {type(module).__name__}; "
            "pass the model itself, with compile=True if you want its blocks compiled"
        )
    return TransformersModel(
        module.eval(), tokenizer, name=name or getattr(module, "name_or_path", "") or type(module).__name__, weights=None,
        cache=cache, compile=compile, batch_tokens=batch_tokens,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Entry:
    """What one `guarded` block entered."""

    guards: tuple[Guard, ...]


class TransformersModel:
    """A loaded model. See `base.Backend` for what its methods mean; `load` and `wrap` make one.

    Calls from several threads are served one after another. A guard that is entered guards the model for all threads.
    """

    name = "hf"

    def __init__(
        self, module: Any, tokenizer: Any, *, name: str, weights: dict[str, str] | None, cache: CacheKind, compile: bool,
        batch_tokens: int,
    ) -> None:  # fmt: skip
        if cache not in get_args(CacheKind):
            raise InputError(f"there is no cache {cache!r}; there are {', '.join(get_args(CacheKind))}")
        if compile and cache != "static":
            raise InputError('compile=True needs cache="static": a cache that grows is compiled anew for every token')
        if batch_tokens < 1:
            raise InputError(f"batch_tokens must be at least 1, got {batch_tokens}")
        self.module, self.tokenizer = module, tokenizer
        self.blocks = find_blocks(module)
        self.identity = model_identity(
            name, architecture=(getattr(module.config, "architectures", None) or [type(module).__name__])[0],
            width=self.blocks.width, depth=self.blocks.depth, tokenizer=tokenizer,
            weights=fingerprint_memory(module) if weights is None else weights,
        )  # fmt: skip
        self.batch_tokens = batch_tokens
        ends = end_tokens(module, tokenizer)
        self._engine = Engine(
            module, tokenizer, self.blocks, ends, pad_token(tokenizer, ends), static_cache=cache == "static",
            bounded=bounded_positions(module), shrinks=cache == "dynamic" and can_shrink(module),
        )  # fmt: skip
        self._entries: tuple[_Entry, ...] = ()
        self._standing = ExitStack()
        self._proved: set[tuple[str, ...]] = set()
        self._lock = threading.RLock()
        self._compiled = compile
        if compile:
            for block in self.blocks.modules:
                block.forward = torch.compile(block.forward)

    def __repr__(self) -> str:
        parameter = next(self.module.parameters())
        return f"TransformersModel({self.identity.name}, {str(parameter.dtype).removeprefix('torch.')}; {self.blocks!r})"

    @property
    def vocabulary(self) -> int:
        """How many tokens the model can read: 0 to `vocabulary - 1`."""
        return int(self.module.get_input_embeddings().weight.shape[0])

    # ------------------------------------------------------------------------------------------ answering

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        guards: Guards | Sequence[Guards] = None,
        sampling: Sampling = Sampling(),
        trace: bool = False,
        on_token: Callable[[int, str], None] | None = None,
    ) -> list[Answer]:
        """Answer each prompt; see `Backend.generate`.

        A list of guards has one entry per prompt; one guard, or a tuple of guards in order, guards every prompt. A trace
        has `len(prompt_ids) + len(ids) - 1` tokens: the last token drawn never goes through the model.

        Raises:
            PromptError: no chat template, or a prompt that does not fit into the model's context.
            NotSteering: a gate did not act as it should; no text is returned.
        """
        asked, of_prompts = one_by_one(prompts, guards)
        rendered = [render(self.tokenizer, as_conversation(prompt)).ids for prompt in asked]
        return self.generate_tokens(rendered, guards=of_prompts, sampling=sampling, trace=trace, on_token=on_token)

    def generate_tokens(
        self,
        prompts: Sequence[tuple[int, ...]],
        *,
        guards: Sequence[Guards],
        sampling: Sampling = Sampling(),
        trace: bool = False,
        on_token: Callable[[int, str], None] | None = None,
        unwanted: Callable[[int], bool] | None = None,
    ) -> list[Answer]:
        """Go on after each prompt, given as tokens: `generate` below the chat template. An answer begins where its prompt ends.

        Args:
            guards: one entry per prompt.
            unwanted: asked with (row) after every step; a row that nobody waits for any more ends there. Only with `on_token`.

        Raises:
            PromptError: a prompt without tokens, or one that does not fit into the model's context.
            NotSteering: a gate did not act as it should; no text is returned.
        """
        limits = [self.room(len(ids), sampling.max_new_tokens) for ids in prompts]
        with self._calling():
            of_rows = [self._all(row) for row in guards]
            keys = row_keys(sampling, prompts, numbers_of(prompts, of_rows))
            answers: dict[int, Answer] = {}
            sizes = [len(ids) + limit for ids, limit in zip(prompts, limits, strict=True)]
            full = [limit < sampling.max_new_tokens and self._engine.bounded for limit in limits]
            apart = [len(ids) if at_end else 0 for ids, at_end in zip(prompts, full, strict=True)]
            for batch in batches(sizes, self.batch_tokens, apart):
                rows = [
                    Row(prompts[i], of_rows[i], keys[i], limits[i], _of_row(on_token, i), _of_row(unwanted, i)) for i in batch
                ]
                with memory_errors("generating", self.batch_tokens):
                    answers.update(zip(batch, generate_batch(self._engine, rows, sampling, trace=trace), strict=True))
        return [answers[i] for i in range(len(prompts))]

    def room(self, prompt_tokens: int, wanted: int) -> int:
        """How many tokens may be generated after so many, at most `wanted`. Raises PromptError if there is no room for one."""
        context = getattr(text_config(self.module), "max_position_embeddings", None)
        if wanted < 1:
            raise InputError(f"max_new_tokens must be at least 1, got {wanted}")
        if prompt_tokens < 1:
            raise PromptError("a prompt needs at least one token, got none")
        if not isinstance(context, int) or context < 1:
            return wanted
        if prompt_tokens >= context:
            raise PromptError(
                f"a conversation of {prompt_tokens} tokens leaves no room for an answer in {self.identity.name}'s context of "
                f"{context}; shorten it"
            )
        return min(wanted, context - prompt_tokens)

    # ------------------------------------------------------------------------------------------ reading

    def capture(
        self, conversations: Sequence[tuple[Prompt, Reply]], *, layers: Sequence[int] | None = None, guards: Guards = None
    ) -> Floats:
        """Answer-averaged residuals `[answers, layers, d]`; see `Backend.capture`.

        Raises:
            ContrastError: an answer without tokens; the message says which.
            InputError: a layer that is not there.
        """
        chosen = chosen_layers(layers, self.identity)
        rendered = [render(self.tokenizer, as_conversation(prompt), answer) for prompt, answer in conversations]
        empty = [i for i, read in enumerate(rendered) if read.answer_start == len(read.ids)]
        if empty:
            raise ContrastError(f"the answers of conversations {empty} are empty; leave them out or generate them again")
        with self._calling(), memory_errors("reading answers", self.batch_tokens):
            return mean_residuals(self.module, self.blocks, rendered, chosen, self._all(guards), self.batch_tokens)

    def residuals(self, prompt: Prompt, answer: Reply | None = None, *, guards: Guards = None) -> Floats:
        """Residuals `[layers, tokens, d]` of one conversation, as the next block reads them; see `Backend.residuals`."""
        read = render(self.tokenizer, as_conversation(prompt), answer)
        with self._calling():
            own = [self._all(guards)]
            found = token_residuals(self.module, self.blocks, torch.tensor([read.ids]), [read.answer_start], own)
        return found[:, 0].numpy()

    def logits(self, prompt: Prompt, answer: Reply | None = None, *, guards: Guards = None) -> Floats:
        """Logits `[tokens, vocabulary]` of one conversation; see `Backend.logits`."""
        read = render(self.tokenizer, as_conversation(prompt), answer)
        with self._calling():
            own, ids = [self._all(guards)], torch.tensor([read.ids])
            output = read_forward(self.module, self.blocks, ids, [read.answer_start], own, head=True)
        logits: Floats = output.logits[0].float().cpu().numpy()
        return logits

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each token adds; see `Backend.pieces`. A character of several tokens comes with its last."""
        return pieces(self.tokenizer, ids)

    # ------------------------------------------------------------------------------------------ guarding

    def guarded(self, *guards: Guard) -> AbstractContextManager[TransformersModel]:
        """Guard every generation and forward inside the block; see `Backend.guarded`. May be nested, in order.

        Direct calls of `model.module` are guarded too if all entered guards act on `all` positions, beam search and
        assisted decoding included; under a guard on `response` they are refused (Unsupported).

        Raises:
            GuardMismatch: a guard that was made for another model.
            NotSteering: the proof failed; nothing stays installed.
        """
        return self._guarding(guards)

    @contextmanager
    def _guarding(self, guards: tuple[Guard, ...]) -> Iterator[TransformersModel]:
        with self._lock:
            with self._calling():
                self._all(guards)
            entry = _Entry(guards)
            before = self._entries
            try:
                self._enter((*before, entry))
            except BaseException:
                self._enter(before)
                raise
        try:
            yield self
        finally:
            with self._lock:  # whatever was entered meanwhile stays
                self._enter(tuple(other for other in self._entries if other is not entry))

    @property
    def _entered(self) -> tuple[Guard, ...]:
        return tuple(guard for entry in self._entries for guard in entry.guards)

    def _enter(self, entries: tuple[_Entry, ...]) -> None:
        self._standing.close()
        self._entries = entries
        self._stand()

    def _stand(self) -> None:
        """Install the entered guards for direct calls of the module."""
        with ExitStack() as stack:
            if self._entered:
                stack.enter_context(without_compiled_calls(self.module))
                stack.enter_context(Steering(self.blocks, plan([self._entered]), None))
            self._standing = stack.pop_all()

    @contextmanager
    def _calling(self) -> Iterator[None]:
        """One call at a time; inside, the hooks that stand for direct calls are put aside, the call installs its own."""
        with self._lock:
            self._check_ready()
            self._standing.close()
            try:
                with self._compiling():
                    yield
            finally:
                self._stand()

    def _compiling(self) -> AbstractContextManager[Any]:
        """Inside, each block may be compiled for a few shapes; torch counts all blocks as one function and would give up."""
        if not self._compiled:
            return nullcontext()
        limit = SHAPES * self.blocks.depth
        raised: AbstractContextManager[Any] = torch._dynamo.config.patch(recompile_limit=limit, accumulated_recompile_limit=limit)
        return raised

    def _check_ready(self) -> None:
        if self.module.training:
            raise Unsupported("the model is in training mode, so its answers are random; call model.module.eval()")
        compiled = [m for m in (self.module, self.blocks.decoder, *self.blocks.modules) if m._compiled_call_impl is not None]
        if compiled:
            raise Unsupported(
                f"{type(compiled[0]).__name__} was compiled as a whole, and compiled code does not see hooks; load it again "
                "with compile=True, which compiles each block inside its hook"
            )

    def _all(self, guards: Guards) -> tuple[Guard, ...]:
        """The guards of one row, checked and proved: those entered, then those of the call."""
        every = self._entered + checked(guards, self.identity)
        digests = tuple(guard.digest for guard in every)
        if every and digests not in self._proved:
            prove(self.module, self.blocks, every)
            self._proved.add(digests)
        return every


def _of_row(function: Callable[..., T] | None, row: int) -> Callable[..., T] | None:
    """A function of a row and more, for that row."""
    return None if function is None else partial(function, row)
