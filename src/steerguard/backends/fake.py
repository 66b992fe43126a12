"""The fake: a deterministic numpy backend, public, that can be told to misbehave.

It loads the folder of any `LlamaForCausalLM` and answers as the real engines do, from an implementation of its own:
float32, row by row, no torch. It is for three things: as the oracle that the other backends are compared with, as a
light model in users' own tests, and, with a `Fault`, as the sabotage that every check must be seen to catch:

    from steerguard.backends.fake import Fault, load

    model = load(folder, fault=Fault.HALF_SHIFT)
    with pytest.raises(NotSteering):
        with model.guarded(guard): ...

Guards act through `steerguard.rules.correct`; what goes wrong on request goes wrong in `fake_hook`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from steerguard.backends.base import (
    Answer,
    Backend,
    Floats,
    Guards,
    Sampling,
    Trace,
    checked,
    chosen_layers,
    numbers_of,
    one_by_one,
)
from steerguard.backends.fake_decode import Draw, Writer, pieces
from steerguard.backends.fake_hook import Fault, FaultyHook, Hook, Slot, slots
from steerguard.backends.fake_llama import Cache, Llama, read_config, read_llama
from steerguard.backends.fingerprint import fingerprint_folder, model_identity
from steerguard.backends.proof import audit, proven
from steerguard.errors import ContrastError, InputError, ModelError, PromptError
from steerguard.guard import Guard, ModelIdentity
from steerguard.prompts import Prompt, Rendered, Reply, as_conversation, render

__all__ = ["Fake", "Fault", "load"]


def load(folder: str | Path, *, fault: Fault | str | None = None, cache: bool = True) -> Fake:
    """Load a local Hugging Face folder of a `LlamaForCausalLM` (float32, float16 or bfloat16; computed in float32).

    Args:
        fault: how to misbehave; None for not at all.
        cache: keep keys and values between decoded tokens; without, each token re-reads the whole sequence.

    Raises:
        ModelError: no such folder, another architecture, or weights that do not fit its configuration.
    """
    try:
        chosen = None if fault is None else Fault(fault)
    except ValueError:
        raise InputError(f"there is no fault {fault!r}; there are {', '.join(Fault)}") from None
    path = Path(folder)
    llama = read_llama(path)
    return Fake(path, llama, _tokenizer(path), fault=chosen, cache=cache)


class Fake:
    """A loaded model. See `base.Backend` for what its methods mean; `load` makes one."""

    name = "fake"

    def __init__(self, folder: Path, llama: Llama, tokenizer: Any, *, fault: Fault | None, cache: bool) -> None:
        self.identity: ModelIdentity = model_identity(
            str(folder), architecture="LlamaForCausalLM", width=llama.shape.width, depth=llama.shape.depth,
            tokenizer=tokenizer, weights=fingerprint_folder(folder),
        )  # fmt: skip
        self.tokenizer = tokenizer
        self.fault = fault
        self._llama, self._cache = llama, cache
        self._ends = _end_tokens(folder, tokenizer)
        self._entered: tuple[Guard, ...] = ()
        self._prompts: dict[tuple[int, ...], Cache] = {}  # Fault.SHARED_CACHE's

    def __repr__(self) -> str:
        fault = "" if self.fault is None else f", fault={self.fault}"
        return f"Fake({self.identity.name}, {self.identity.depth} blocks of width {self.identity.width}{fault})"

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        guards: Guards | Sequence[Guards] = None,
        sampling: Sampling = Sampling(),
        trace: bool = False,
        on_token: Callable[[int, str], None] | None = None,
    ) -> list[Answer]:
        """Answer each prompt; see `Backend.generate`. Raises NotSteering if a gate missed a token."""
        asked, rows = one_by_one(prompts, guards)
        rendered = [render(self.tokenizer, as_conversation(prompt)) for prompt in asked]
        of_rows = [self._all(row) for row in rows]
        hooks = self._hooks(of_rows, rendered)
        answers = []
        numbers = numbers_of([read.ids for read in rendered], rows)
        for row, (read, hook) in enumerate(zip(rendered, hooks, strict=True)):
            draw = Draw(sampling, read.ids, numbers[row])
            emit = None if on_token is None else lambda text, row=row: on_token(row, text)
            writer = Writer(self.tokenizer, sampling, self._ends, self._limit(read, sampling), emit)
            self._answer(read, hook, draw, writer)
            answers.append(_finish(read, hook, writer, trace))
        for answer, own in zip(answers, of_rows, strict=True):
            audit(own, len(answer.prompt_ids), len(answer.prompt_ids) + len(answer.ids) - 1, answer.tokens_seen)
        return answers

    def capture(
        self, conversations: Sequence[tuple[Prompt, Reply]], *, layers: Sequence[int] | None = None, guards: Guards = None
    ) -> Floats:
        """Answer-averaged residuals `[answers, layers, d]`; see `Backend.capture`."""
        chosen = chosen_layers(layers, self.identity)
        own = self._all(guards)
        rendered = [self._render(prompt, answer) for prompt, answer in conversations]
        empty = [i for i, read in enumerate(rendered) if read.answer_start == len(read.ids)]
        if empty:
            raise ContrastError(f"the answers of conversations {empty} are empty; leave them out")
        embeddings = np.zeros((len(rendered), len(chosen), self.identity.width), np.float32)
        for row, (read, hook) in enumerate(zip(rendered, self._hooks([own] * len(rendered), rendered), strict=True)):
            residuals = self._read(read, own, hook)[0]
            embeddings[row] = residuals[chosen, read.answer_start :].mean(axis=1, dtype=np.float64)
        return embeddings

    def residuals(self, prompt: Prompt, answer: Reply | None = None, *, guards: Guards = None) -> Floats:
        """Residuals `[layers, tokens, d]`, as the next block reads them; see `Backend.residuals`."""
        return self._one(prompt, answer, guards)[0]

    def logits(self, prompt: Prompt, answer: Reply | None = None, *, guards: Guards = None) -> Floats:
        """Logits `[tokens, vocabulary]`; see `Backend.logits`."""
        return self._one(prompt, answer, guards)[1]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each token adds; see `Backend.pieces`. A character of several tokens comes with its last."""
        return pieces(self.tokenizer, ids)

    def guarded(self, *guards: Guard) -> AbstractContextManager[Backend]:
        """Guard everything inside the block, proved on entry and undone on exit; see `Backend.guarded`."""
        self._all(guards)
        return proven(self, guards, self._installed(guards))

    # ------------------------------------------------------------------------------------------- guards

    @contextmanager
    def _installed(self, guards: Sequence[Guard]) -> Iterator[Backend]:
        before = self._entered
        self._entered = self._all(guards)
        try:
            yield self
        finally:
            if self.fault is not Fault.NOT_UNDONE:
                self._entered = before

    def _all(self, guards: Guards) -> tuple[Guard, ...]:
        """The guards of one row, checked: those entered, then those of the call."""
        return self._entered + checked(guards, self.identity)

    def _hooks(self, of_rows: Sequence[Sequence[Guard]], rendered: Sequence[Rendered]) -> list[Hook]:
        own = [slots(guards) for guards in of_rows]
        starts = [read.answer_start for read in rendered]
        if self.fault is None:
            return [Hook(*row) for row in zip(own, starts, strict=True)]
        before: list[tuple[Slot, ...]] = [(), *own]
        return [FaultyHook(own[row], starts[row], fault=self.fault, row=row, neighbours=before[row]) for row in range(len(own))]

    # ------------------------------------------------------------------------------------------- forwards

    def _render(self, prompt: Prompt, answer: Reply | None) -> Rendered:
        return render(self.tokenizer, as_conversation(prompt), answer)

    def _one(self, prompt: Prompt, answer: Reply | None, guards: Guards) -> tuple[Floats, Floats]:
        own, read = self._all(guards), self._render(prompt, answer)
        return self._read(read, own, self._hooks([own], [read])[0])

    def _read(self, read: Rendered, guards: Sequence[Guard], hook: Hook) -> tuple[Floats, Floats]:
        """Residuals `[layers, tokens, d]` and logits of one conversation in one forward."""
        kept: list[Floats] = []

        def on_block(layer: int, h: Floats, start: int) -> Floats:
            kept.append(hook(layer, h, start))
            return kept[-1]

        logits = self._llama.forward(read.ids, Cache(), on_block)
        audit(guards, read.answer_start, len(read.ids), hook.seen)
        return np.stack(kept), logits

    def _answer(self, read: Rendered, hook: Hook, draw: Draw, writer: Writer) -> None:
        """Decode one row until its writer is done."""
        # 1. the prompt
        cache = self._prefix(read.ids)
        logits = self._llama.forward(read.ids[cache.length :], cache, hook)
        if self.fault is Fault.SHARED_CACHE:
            self._prompts[read.ids] = cache.prefix(len(read.ids))
        writer.add(draw(logits[-1]))
        # 2. token by token; the last one is never read
        while not writer.done:
            if not self._cache:
                cache = Cache()
            unread = (*read.ids, *writer.ids)[cache.length :]
            writer.add(draw(self._llama.forward(unread, cache, hook)[-1]))

    def _limit(self, read: Rendered, sampling: Sampling) -> int:
        """How many tokens may be generated after this prompt."""
        if sampling.max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, got {sampling.max_new_tokens}")
        room = self._llama.shape.context - len(read.ids)
        if room < 1:
            raise PromptError(
                f"a conversation of {len(read.ids)} tokens leaves no room for an answer in a context of "
                f"{self._llama.shape.context}; shorten it"
            )
        return min(sampling.max_new_tokens, room)

    def _prefix(self, ids: tuple[int, ...]) -> Cache:
        """An empty cache; under SHARED_CACHE, all but the last token of the prompt as some earlier call left it."""
        return self._prompts[ids].prefix(len(ids) - 1) if ids in self._prompts else Cache()


def _finish(read: Rendered, hook: Hook, writer: Writer, trace: bool) -> Answer:
    traces = [Trace(slot.guard, slot.layer, log.rho, log.delta) for slot, log in hook.logs.items()]
    return Answer(
        text=writer.text, prompt_ids=read.ids, ids=tuple(writer.ids),
        finished="stop" if writer.stopped else "length",
        tokens_seen=hook.seen, tokens_moved=hook.moved, shift=hook.shift, traces=tuple(traces) if trace else (),
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------- folders


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer  # heavy: loaded with a model, not on import

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} has no tokenizer that transformers can read: {error}") from error


def _end_tokens(folder: Path, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a turn: the generation configuration's, else the configuration's, and the tokenizer's."""
    import json

    path = folder / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    named = settings.get("eos_token_id", read_config(folder).get("eos_token_id"))
    ids = named if isinstance(named, list) else [named]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)
