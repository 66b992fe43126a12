"""What runs in every vLLM worker: installing behind the loaded weights, the proof after warm-up, and what can be asked.

`Extension` is vLLM's own way of adding calls to a worker (`worker_extension_cls`); the frontend sets it, so that a
worker without this module does not start.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from steerguard.backends.vllm import blocks, canary, runner
from steerguard.backends.vllm.catalogue import Catalogue, Entry, Settings
from steerguard.backends.vllm.steering import Steering
from steerguard.backends.vllm.tables import Tables
from steerguard.errors import InputError, NotSteering, Unsupported
from steerguard.guard import Guard

log = logging.getLogger(__name__)
CANARY_SIZES = (1, 8)
"""Tokens of the canary forwards: a decode step's graph, and a larger one."""


def install(worker: Any, settings: Settings) -> None:
    """Put the guards behind the weights that this worker has loaded; all or nothing.

    Raises:
        SteerguardError: the model, the runner or a guard cannot be served; the engine does not start.
    """
    if settings.open_layers is None:
        raise Unsupported("this engine's configuration was not made by vLLM's EngineArgs, so nobody checked its guards")
    model_runner, config = worker.model_runner, worker.vllm_config
    depth = config.model_config.get_total_num_hidden_layers()
    found = blocks.find_blocks(model_runner.get_model(), depth)
    own = [layer for layer in settings.open_layers if layer in found]
    _check_owned(settings.open_layers, own, config.parallel_config)
    catalogue = Catalogue(settings)
    tables = Tables(
        own, rows=2 * config.scheduler_config.max_num_seqs + 2, stages=settings.stages,
        directions=len(list(catalogue)) + settings.spare, tokens=_most_tokens(config),
        width=config.model_config.get_hidden_size(), device=model_runner.device, dtype=config.model_config.dtype,
        keep=settings.inspect,
    )  # fmt: skip
    for name in catalogue:
        tables.add(catalogue[name].guard)
    steering = Steering(catalogue, tables)
    context = config.compilation_config.static_forward_context
    handles = blocks.open_layers(found, own, tables, context)
    try:
        runner.attach(model_runner, steering)
    except BaseException:
        blocks.close_layers(handles, context)
        raise
    worker.steering, worker.steering_handles = steering, handles
    log.info("steerguard: %s on layers %s of %s", ", ".join(catalogue) or "no guard yet", own, config.model_config.model)


def _most_tokens(config: Any) -> int:
    """The most tokens of one forward, padding included."""
    sizes = config.compilation_config.cudagraph_capture_sizes or [0]
    return int(max(config.scheduler_config.max_num_batched_tokens, *sizes)) + 8


def _check_owned(layers: tuple[int, ...], own: list[int], parallel: Any) -> None:
    """Raise NotSteering unless every open layer stands in exactly one pipeline stage."""
    stages = [own]
    if parallel.pipeline_parallel_size > 1:
        from vllm.distributed import get_pp_group

        group = get_pp_group()
        stages = [[] for _ in range(group.world_size)]
        torch.distributed.all_gather_object(stages, own, group=group.cpu_group)
    check_stages(layers, stages)


def check_stages(layers: tuple[int, ...], stages: list[list[int]]) -> None:
    """Raise NotSteering unless every layer stands in exactly one of the stages."""
    held = sorted(layer for stage in stages for layer in stage)
    if held != sorted(layers):
        raise NotSteering(
            f"guarded layers {sorted(layers)} are held by pipeline stages as {stages}; each must stand in exactly one"
        )


def prove(worker: Any) -> list[str]:
    """Run the canary on this rank. Raises NotSteering; the engine does not start, or is no longer ready."""
    steering, model_runner = worker.steering, worker.model_runner

    # attention must run: what stands in its output buffer otherwise is whatever was in that memory before
    attention = {} if worker.vllm_config.use_v2_model_runner else {"force_attention": True}

    def forward(size: int) -> Any:
        out, _ = model_runner._dummy_run(size, **attention)
        return out[:size] if isinstance(out, torch.Tensor) else None

    most = worker.vllm_config.scheduler_config.max_num_batched_tokens
    sizes = sorted({min(size, most) for size in CANARY_SIZES})
    steering.tables.clear()
    steering.proving = True
    try:
        told = canary.prove(steering.tables, list(steering.tables.layers), forward, sizes)
    finally:
        steering.proving = False
    log.info("steerguard: proved %d layers at %s tokens", len(steering.tables.layers), " and ".join(map(str, sizes)))
    return told


class Extension:
    """Calls that `collective_rpc` can make on every worker; all of them begin with `steerguard_`."""

    steering: Steering

    def steerguard_prove(self) -> list[str]:
        """The canary again, now."""
        return prove(self)

    def steerguard_counters(self) -> list[Mapping[str, Any]]:
        """See `Steering.counters`."""
        return self.steering.counters()

    def steerguard_guards(self) -> dict[str, str]:
        """The guards that this worker holds: name -> digest."""
        catalogue = self.steering.catalogue
        return {name: catalogue[name].guard.digest for name in catalogue}

    def steerguard_add(self, content: bytes, strength: Any = None, positions: Any = ()) -> dict[str, str]:
        """Serve one more guard, of a guard file's bytes: its `digest`, or why it is `refused` and nothing was changed."""
        entry = entry_of(content, strength, positions)
        try:
            self.steering.add(entry)
        except InputError as error:
            return {"refused": str(error)}
        return {"digest": entry.guard.digest}

    def steerguard_remove(self, name: str) -> bool:
        """See `Steering.remove`."""
        return self.steering.remove(name)

    def steerguard_take(self, request_ids: list[str]) -> list[dict[str, Any] | None]:
        """The records of requests (`Record.plain`); None for one that has none here."""
        found = [self.steering.take(one) for one in request_ids]
        return [None if record is None else record.plain() for record in found]

    def steerguard_logits(self, hidden: Any) -> Any:
        """Logits [tokens, vocabulary] of what the head reads [tokens, d]; on ranks that have the head."""
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        with torch.no_grad():
            logits = runner.model.compute_logits(torch.from_numpy(hidden).to(runner.device, runner.dtype))
        return None if logits is None else logits.float().cpu().numpy()

    def steerguard_held(self) -> dict[str, int]:
        """How many requests this worker knows of; none, once all have ended and it has taken a step."""
        return {"requests": len(self.steering)}

    def steerguard_layers(self) -> list[int]:
        """The open layers of this rank."""
        return list(self.steering.tables.layers)


def entry_of(content: bytes, strength: Any = None, positions: Any = ()) -> Entry:
    """A catalogue entry of a guard file's bytes. Raises GuardFileError."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "added.guard"
        path.write_bytes(content)
        guard = Guard.load(path)
    return Entry(guard, None if strength is None else tuple(strength), tuple(positions))
