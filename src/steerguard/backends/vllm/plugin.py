"""The plugin: how steerguard gets into a stock vLLM. vLLM calls `register` in each of its processes.

An engine whose `additional_config` has no `steerguard` runs vLLM's own code, but for one look at that key. With it:

  configuration   `EngineArgs.create_engine_config`: guards are read and checked against the model, what cannot be
                  served rightly is refused, and the open layers become part of the configuration (so of its hash, and
                  of the key of the compile cache)
  frontend        `InputProcessor.process_inputs`: what a request asks for is decided, or refused with a 400
  engine core     the hash of a block of tokens covers what acted on it
  worker          after `load_model`, the op goes behind each open layer; after warm-up, the canary proves it
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

from steerguard.backends.vllm.catalogue import ASKED, RESOLVED, SETTINGS, Catalogue, Settings, cache_key
from steerguard.errors import InputError, SteerguardError, Unsupported

log = logging.getLogger(__name__)
SUPPORTED = ("0.32",)
"""Versions of vLLM that this plugin was tested with, by their first two numbers."""
EXTENSION = "steerguard.backends.vllm.worker.Extension"


def register() -> None:
    """Hook into this process's vLLM; does nothing the second time. Called through the entry point."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.gpu_worker import Worker

    if getattr(EngineArgs.create_engine_config, "steerguard", False):
        return
    _wrap(EngineArgs, "create_engine_config", _configured)
    _wrap(InputProcessor, "__init__", _fronted)
    _wrap(InputProcessor, "process_inputs", _decided)
    _wrap(kv_cache_utils, "generate_block_hash_extra_keys", _keyed)
    workers = [Worker, *_cpu_workers()]
    for cls in workers:
        for method, wrapper in (("load_model", _loaded), ("compile_or_warm_up_model", _warmed)):
            if method in vars(cls):
                _wrap(cls, method, wrapper)
    _speak_openai()


def _cpu_workers() -> list[Any]:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return []
    from vllm.triton_utils import dispatcher
    from vllm.v1.worker.cpu_worker import CPUWorker

    _wrap(dispatcher, "_rebind_kernels", _without_llvmlite)
    return [CPUWorker]


def _without_llvmlite(inner: Any, *args: Any, **kwargs: Any) -> Any:
    """vLLM's CPU worker looks into every loaded module and stumbles over Numba's `llvmlite.binding.ffi.lib`, whose every
    attribute is a foreign function; so a second engine in a process, or any after Numba was imported, would not start."""
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("llvmlite.")}
    try:
        return inner(*args, **kwargs)
    finally:
        sys.modules.update(hidden)


def _wrap(owner: Any, name: str, wrapper: Any) -> None:
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def outer(*args: Any, **kwargs: Any) -> Any:
        return wrapper(inner, *args, **kwargs)

    outer.steerguard = True  # type: ignore[attr-defined]
    setattr(owner, name, outer)


# ------------------------------------------------------------------------------------------------- configuration


def _configured(inner: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
    config = inner(args, *rest, **kwargs)
    settings = Settings.read(config.additional_config)
    if settings is not None:
        resolve(config, settings)
    return config


def resolve(config: Any, settings: Settings) -> None:
    """Check these settings against an engine's configuration, and write into it what its workers and its hash need.

    Raises:
        SteerguardError: a guard of another model, or something that cannot be guarded rightly.
    """
    from steerguard.backends.vllm.model import identity_of
    from steerguard.backends.vllm.op import ABI

    check_supported(config, settings)
    catalogue = Catalogue(settings)
    identity = identity_of(config.model_config, config.load_config)
    for name in catalogue:
        catalogue[name].guard.check_model(identity, allow_mismatch=settings.allow_mismatch)
    depth = config.model_config.get_total_num_hidden_layers()
    more = range(depth) if settings.layers == "all" else settings.layers
    layers = tuple(sorted({*catalogue.layers, *more}))
    if not layers:
        raise InputError(f'{SETTINGS}: no guard and no layer; give "guards", or "layers" for guards to come')
    if layers[0] < 0 or layers[-1] >= depth:
        raise InputError(f"{SETTINGS}: layers {list(layers)}: the model has layers 0 to {depth - 1}")
    resolved = settings.model_copy(update={"open_layers": layers, "abi": ABI})
    config.additional_config = {**config.additional_config, SETTINGS: resolved.model_dump(mode="json")}
    config.parallel_config.worker_extension_cls = EXTENSION


def check_supported(config: Any, settings: Settings) -> None:
    """Raise Unsupported for an engine that cannot be guarded rightly, with what is supported."""
    import vllm

    if ".".join(vllm.__version__.split(".")[:2]) not in SUPPORTED:
        raise Unsupported(f"vLLM {vllm.__version__} is not supported; steerguard was tested with {', '.join(SUPPORTED)}")
    parallel, scheduler = config.parallel_config, config.scheduler_config
    refused = {
        "pooling models": config.model_config.runner_type != "generate",
        "encoder-decoder models": config.model_config.is_encoder_decoder,
        "speculative decoding": config.speculative_config is not None,
        "dual-batch overlap": parallel.enable_dbo or parallel.use_ubatching,
        "context parallelism": parallel.prefill_context_parallel_size > 1 or parallel.decode_context_parallel_size > 1,
        "KV transfer between engines": config.kv_transfer_config is not None,
        "a scheduler of your own": scheduler.scheduler_cls is not None and not _stock_scheduler(scheduler),
        'LoRA (a guard is fitted on the weights without it; "allow_mismatch": ["weights"] says that you accept that)': (
            config.lora_config is not None and "weights" not in settings.allow_mismatch
        ),
        "another worker extension": parallel.worker_extension_cls not in ("", EXTENSION),
    }
    named = [what for what, is_so in refused.items() if is_so]
    if named:
        raise Unsupported(f"steerguard does not support {'; '.join(named)} on vLLM; start without it")


def _stock_scheduler(scheduler: Any) -> bool:
    return str(scheduler.get_scheduler_cls().__module__).startswith("vllm.")


# ------------------------------------------------------------------------------------------------------ frontend


def _fronted(inner: Any, processor: Any, vllm_config: Any, *rest: Any, **kwargs: Any) -> None:
    inner(processor, vllm_config, *rest, **kwargs)
    settings = Settings.read(vllm_config.additional_config)
    processor.steerguard = None if settings is None else Catalogue(settings)


def _decided(inner: Any, processor: Any, request_id: str, prompt: Any, params: Any, *rest: Any, **kwargs: Any) -> Any:
    catalogue: Catalogue | None = processor.steerguard
    if catalogue is None:
        if ASKED in (getattr(params, "extra_args", None) or {}):
            raise _bad_request(f"this engine serves no guards, so there is nothing to choose under {ASKED!r}; see {SETTINGS!r}")
        return inner(processor, request_id, prompt, params, *rest, **kwargs)
    if kwargs.get("resumable"):
        raise _bad_request("sessions whose input streams in cannot be guarded; send the whole conversation")
    params = params.clone()
    params.extra_args = decide(catalogue, getattr(params, "extra_args", None))
    return inner(processor, request_id, prompt, params, *rest, **kwargs)


def decide(catalogue: Catalogue, extra_args: Any) -> dict[str, Any]:
    """A request's `extra_args` with the decision on its guards. Raises vLLM's validation error, which is a 400."""
    given = dict(extra_args or {})
    strange = [key for key in given if "steer" in str(key).casefold() and key != ASKED]
    if strange:
        raise _bad_request(f"there is no argument {', '.join(map(repr, strange))}; guards are chosen under {ASKED!r}")
    try:
        choice = catalogue.choose(given.pop(ASKED, None))
    except InputError as error:
        raise _bad_request(str(error)) from error
    return {**given, RESOLVED: choice.as_args()}


def _bad_request(message: str) -> Exception:
    from vllm.exceptions import VLLMValidationError

    error: Exception = VLLMValidationError(message, parameter=ASKED)
    return error


def _speak_openai() -> None:
    """Let a request's body have a `steering` object of its own, beside `vllm_xargs`; see `door` for what they drop."""
    from vllm.entrypoints.launchers import app
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    for cls in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
        _wrap(cls, "to_sampling_params", _with_body)
    for cls in (ChatCompletionRequest, CompletionRequest):
        _wrap(cls, "to_beam_search_params", _beams)
    _wrap(app, "init_entrypoints_middleware", _doored)


def _doored(inner: Any, args: Any, app: Any, *rest: Any, **kwargs: Any) -> None:
    from steerguard.backends.vllm.door import Door

    app.add_middleware(Door)  # first, so that it stands behind authentication
    inner(args, app, *rest, **kwargs)


def _said(request: Any) -> dict[str, Any]:
    """What a request's body says of steering beside `vllm_xargs`."""
    return {key: value for key, value in (request.model_extra or {}).items() if "steer" in key.casefold()}


def _beams(inner: Any, request: Any, *rest: Any, **kwargs: Any) -> Any:
    if _said(request) or any("steer" in key.casefold() for key in request.vllm_xargs or {}):
        raise _bad_request(f"beam search cannot choose guards and has the server's default; leave out {ASKED!r} or the beams")
    return inner(request, *rest, **kwargs)


def _with_body(inner: Any, request: Any, *rest: Any, **kwargs: Any) -> Any:
    params = inner(request, *rest, **kwargs)
    ours = _said(request)
    if ours:
        given = dict(params.extra_args or {})
        if set(ours) & set(given):
            raise _bad_request(f"{ASKED!r} stands in the body and in vllm_xargs; say it once")
        params.extra_args = {**given, **ours}
    return params


# --------------------------------------------------------------------------------------------------- engine core


def _keyed(inner: Any, request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int) -> Any:
    keys, mm_idx = inner(request, start_token_idx, end_token_idx, start_mm_idx)
    args = getattr(request.sampling_params, "extra_args", None)
    if args and RESOLVED in args:
        own = cache_key(args[RESOLVED], request.num_prompt_tokens, start_token_idx, end_token_idx)
        keys = keys if own is None else (*(keys or ()), own)
    return keys, mm_idx


# -------------------------------------------------------------------------------------------------------- worker


def _loaded(inner: Any, worker: Any, *rest: Any, **kwargs: Any) -> Any:
    result = inner(worker, *rest, **kwargs)
    settings = Settings.read(worker.vllm_config.additional_config)
    if settings is not None:
        from steerguard.backends.vllm.worker import install

        install(worker, settings)
    return result


def _warmed(inner: Any, worker: Any, *rest: Any, **kwargs: Any) -> Any:
    result = inner(worker, *rest, **kwargs)
    if Settings.read(worker.vllm_config.additional_config) is not None:
        from steerguard.backends.vllm.worker import prove

        prove(worker)
    return result


__all__ = ["SteerguardError", "check_supported", "decide", "register", "resolve"]
