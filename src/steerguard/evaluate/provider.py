"""A guarded model as a model of inspect-ai: `steerguard/NAME`, in this process, for any task that Inspect runs.

    inspect eval inspect_evals/gsm8k --model steerguard/Qwen/Qwen3-8B -M guards=honesty.guard
    inspect eval inspect_evals/gsm8k --model steerguard/Qwen/Qwen3-8B                            # its unguarded twin

The options after `-M` are `guards` (files, in order), `backend`, `batch`, `allow_mismatch`, and the backend's own.

Inspect's cache knows a model by its name and by nothing else: its options are not in the key. So the name that a model
goes by here holds a digest of everything that decides its answers: the weights, the backend and its options, and every
guard in order. Baseline and guarded can share one cache; they cannot share an entry.

What Inspect asks for is done or refused: a setting that is not known here is an error, never dropped. Epochs are drawn
with the seed plus one for each epoch after the first; all else being equal, an answer is the same at every run.

It knows Inspect's model interface. It knows no task.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

from steerguard.backends import backends, load
from steerguard.backends.base import Answer, Backend, Sampling
from steerguard.errors import InputError
from steerguard.evaluate import BATCH
from steerguard.evaluate.engine import Engine, Request
from steerguard.evaluate.names import canonical_name, plain
from steerguard.files import canonical_json, shown
from steerguard.guard import Guard
from steerguard.prompts import Message

INSTALL = 'pip install "steerguard[evaluate]"'

try:
    import anyio
    from inspect_ai.model import (
        ChatCompletionChoice,
        ChatMessageAssistant,
        GenerateConfig,
        ModelAPI,
        ModelOutput,
        ModelUsage,
        get_model,
        modelapi,
    )
    from inspect_ai.model._cache import epoch as _epoch  # no public name tells a provider which epoch it answers
except ImportError as error:  # pragma: no cover
    raise InputError(f"evaluating through Inspect needs inspect-ai, and {error.name} is not there; {INSTALL}") from error

__all__ = ["guarded_model", "GuardedAPI"]

HONOURED = ("temperature", "top_p", "seed", "max_tokens", "stop_seqs", "num_choices")
"""What a request may set."""
INSPECTS = (
    "max_retries", "timeout", "attempt_timeout", "stream_idle_timeout", "max_connections", "adaptive_connections",
    "system_message", "cache", "cache_prompt", "max_tool_output", "fail_on_refusal", "reasoning_history",
    "parallel_tool_calls",
)  # fmt: skip
"""What Inspect does itself, or what means nothing where there are no tools."""

_engines: WeakValueDictionary[str, Engine] = WeakValueDictionary()
"""One engine to a model, whoever asks it: twins share their weights, and a model is never run by two threads at once."""
_lent: dict[str, tuple[Engine, tuple[Guard, ...]]] = {}
_lock = threading.RLock()
_numbers = count()


def guarded_model(model: Backend, *guards: Guard, batch: int = BATCH) -> Any:
    """A model that is loaded already as a `Model` of inspect-ai; without guards, its unguarded twin.

    Raises:
        NotSteering: a guard that cannot be shown to act on it.
        GuardMismatch: a guard of another model.
        InputError: a model inside `guarded`.
    """
    token = f"{next(_numbers)}"
    _lent[token] = _engine(f"lent {id(model)}", lambda: model, batch), tuple(guards)  # the engine keeps the model, and its id
    try:
        made = get_model(f"steerguard/{model.identity.name}", memoize=False, lent=token)
    finally:
        _lent.pop(token, None)
    made.model_args = {"guards": [guard.digest for guard in guards]}  # what the log says of it
    return made


@modelapi(name="steerguard")
class GuardedAPI(ModelAPI):
    """Inspect's side of an engine.

    Args:
        guards: guard files, in order; a list, or one text with commas.
        backend: hf, vllm or another of `steerguard.backends`.
        batch: rows that are answered at a time.
        allow_mismatch: what may differ between a guard's model and this one, by name.
        options: the backend's own.

    Raises:
        NotSteering: a guard that cannot be shown to act on this model.
        GuardMismatch: a guard of another model.
        InputError: an option that does not exist, or a base URL or key, which a model in this process has not.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),
        guards: str | Sequence[str] = (),
        backend: str = "hf",
        batch: int = BATCH,
        allow_mismatch: str | Sequence[str] = (),
        lent: str | None = None,
        **options: Any,
    ) -> None:
        if base_url is not None:
            raise InputError(
                f"steerguard/{model_name} runs in this process and has no base URL, got {base_url}; a server is reached "
                "as openai-api/NAME/MODEL, see docs/evaluation.md"
            )
        _check_config(config)
        if lent is not None:
            self.engine, found = _lent[lent]
            how: dict[str, Any] = {}
        else:
            found = tuple(Guard.load(path) for path in _several(guards))
            how = {"backend": backend, **options}
            if backend not in backends():
                raise InputError(f"there is no backend {backend!r}; there are {', '.join(backends())}")
            key = canonical_json([model_name, plain(how)])
            self.engine = _engine(key, lambda: load(model_name, backend=backend, **options), batch)
        identity = self.engine.model.identity
        self.guards = tuple(guard.for_model(identity, allow_mismatch=_several(allow_mismatch)) for guard in found)
        if self.guards:
            self.engine.prove(self.guards)
        super().__init__(canonical_name(model_name, self.engine.model, how, self.guards), None, api_key, [], config)

    async def generate(self, input: list[Any], tools: list[Any], tool_choice: Any, config: GenerateConfig) -> ModelOutput:
        """Inspect's call. Raises InputError for tools, images, and settings that cannot be honoured."""
        if tools:
            raise InputError(f"{self.model_name} calls no tools, and the task gives it {tools[0].name!r}; choose a task without")
        _check_config(config)
        prompt = tuple(_message(message) for message in input)
        if not prompt or prompt[-1]["role"] != "user":
            raise InputError(
                "the last message must be the user's: steerguard's models do not go on from words put into their mouth"
            )
        future = self.engine.ask(Request(prompt, self.guards, sampling_of(config), config.num_choices or 1))
        try:
            answers = await anyio.to_thread.run_sync(future.result, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1))
        finally:
            future.cancel()  # of no effect on what is done
        return self._output(answers)

    def _output(self, answers: Sequence[Answer]) -> ModelOutput:
        sent, received = len(answers[0].prompt_ids), sum(len(answer.ids) for answer in answers)
        choices = [
            ChatCompletionChoice(
                message=ChatMessageAssistant(content=answer.text, model=self.model_name, source="generate"),
                stop_reason="stop" if answer.finished == "stop" else "max_tokens",
            )
            for answer in answers
        ]
        acted = {
            "guards": [guard.digest for guard in self.guards],
            "tokens_seen": sum(answer.tokens_seen for answer in answers),
            "tokens_moved": sum(answer.tokens_moved for answer in answers),
            "shift": sum(answer.shift for answer in answers),
        }
        usage = ModelUsage(input_tokens=sent, output_tokens=received, total_tokens=sent + received)
        return ModelOutput(model=self.model_name, choices=choices, usage=usage, metadata={"steerguard": acted})

    def max_tokens(self) -> int:
        """Tokens of an answer where a task does not say."""
        return Sampling().max_new_tokens

    def max_connections(self) -> int:
        """As many as are answered at a time."""
        return self.engine.batch

    def connection_key(self) -> str:
        """Models do not wait for each other."""
        return str(self.model_name)


# ------------------------------------------------------------------------------------------------------- names


def _several(texts: str | Sequence[str]) -> list[str]:
    """`a,b` or a list as a list."""
    parts = texts.split(",") if isinstance(texts, str) else texts
    return [part.strip() for part in parts if part.strip()]


# ----------------------------------------------------------------------------------------------------- engines


def _engine(key: str, make: Callable[[], Backend], batch: int) -> Engine:
    """The engine of that key, made now if there is none."""
    with _lock:
        engine = _engines.get(key)
        if engine is None:
            engine = _engines[key] = Engine(make, batch=batch)
    if engine.batch != batch:
        raise InputError(f"this model is in use already with a batch of {engine.batch}, got {batch}; give all its twins one size")
    return engine


# ---------------------------------------------------------------------------------------------- what is asked for


def _check_config(config: GenerateConfig) -> None:
    """Refuse every setting that would have to be ignored."""
    for name, value in config.model_dump(exclude_none=True).items():
        if value and name not in HONOURED and name not in INSPECTS:
            raise InputError(
                f"a model in this process cannot honour {name} = {shown(value)}; it honours {', '.join(HONOURED)}. Leave it "
                "unset, or serve the guard with vLLM"
            )


def sampling_of(config: GenerateConfig) -> Sampling:
    """How answers are drawn for a configuration of Inspect's; what it leaves open is ours."""
    ours = Sampling()
    given = {
        "temperature": config.temperature,
        "top_p": config.top_p,
        "max_new_tokens": config.max_tokens,
        "stop": tuple(config.stop_seqs) if config.stop_seqs else None,
        "seed": (ours.seed if config.seed is None else config.seed) + max(_epoch.get(1), 1) - 1,
    }
    return Sampling(**{name: value for name, value in given.items() if value is not None})


def _message(message: Any) -> Message:
    """One of Inspect's messages. Raises InputError for anything but text."""
    if message.role not in ("system", "user", "assistant"):
        raise InputError(
            f"a message of the role {message.role!r} cannot be given to this model; there are system, user, assistant"
        )
    parts = [] if isinstance(message.content, str) else message.content
    other = [part.type for part in parts if part.type != "text"]
    if other or getattr(message, "tool_calls", None):
        raise InputError(
            f"a message of the {message.role} holds {other[0] if other else 'tool calls'}; this model reads text only"
        )
    return {"role": message.role, "content": message.text}
