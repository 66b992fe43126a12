"""The two model runners of vLLM, and what we need of them: when a step begins, whose tokens stand where, when it ran.

Both are wrapped at the instance, so that a runner of an engine without guards is vLLM's own. What is wrapped is checked
to be there: another runner, or one whose methods were renamed, is refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from steerguard.backends.vllm.steering import Steering
from steerguard.errors import NotSteering, Unsupported


def attach(runner: Any, steering: Steering) -> None:
    """Let this runner fill the slots before each forward. Raises Unsupported for a runner that we do not know."""
    kinds = {cls.__module__ for cls in type(runner).__mro__}
    if "vllm.v1.worker.gpu_model_runner" in kinds:
        _wrap(runner, "_prepare_inputs", _v1_prepared(runner, steering))
    elif "vllm.v1.worker.gpu.model_runner" in kinds:
        _wrap(runner, "prepare_inputs", _v2_prepared(steering))
    else:
        raise Unsupported(
            f"{type(runner).__module__}.{type(runner).__name__} is not a model runner that steerguard supports; it supports "
            "vLLM's V1 and V2 runners"
        )
    _wrap(runner, "execute_model", _step(runner, steering))
    _wrap(runner, "_dummy_run", _dummy(steering))


def _wrap(runner: Any, method: str, make: Any) -> None:
    inner = getattr(runner, method, None)
    if inner is None:
        raise Unsupported(f"{type(runner).__name__} has no {method}; this version of vLLM is not supported")
    setattr(runner, method, make(inner))


def _v1_prepared(runner: Any, steering: Steering) -> Any:
    def make(inner: Any) -> Any:
        def prepare_inputs(scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
            # inside vLLM's own protection of pinned buffers, after the batch got its order
            batch = runner.input_batch
            computed = batch.num_computed_tokens_cpu[: batch.num_reqs]
            steering.fill(batch.req_ids[: batch.num_reqs], np.asarray(num_scheduled_tokens), computed)
            return inner(scheduler_output, num_scheduled_tokens)

        return prepare_inputs

    return make


def _v2_prepared(steering: Steering) -> Any:
    def make(inner: Any) -> Any:
        def prepare_inputs(*args: Any, **kwargs: Any) -> Any:
            batch = inner(*args, **kwargs)
            steering.fill(batch.req_ids, np.asarray(batch.num_scheduled_tokens), np.asarray(batch.num_computed_tokens_np))
            return batch

        return prepare_inputs

    return make


def _dummy(steering: Steering) -> Any:
    """Dummy forwards belong to no request: what the last real one left in the slots must not act, nor be counted."""

    def make(inner: Any) -> Any:
        def dummy_run(*args: Any, **kwargs: Any) -> Any:
            if not steering.proving:
                steering.tables.clear()
            return inner(*args, **kwargs)

        return dummy_run

    return make


def _step(runner: Any, steering: Steering) -> Any:
    def make(inner: Any) -> Any:
        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("dummy_run"):
                return inner(scheduler_output, *args, **kwargs)
            steering.begin(scheduler_output.scheduled_new_reqs, scheduler_output.finished_req_ids)
            result = inner(scheduler_output, *args, **kwargs)
            if scheduler_output.total_num_scheduled_tokens and not steering.filled:
                raise NotSteering("a forward ran without its slots being set; nothing that it gave is used")
            state = runner.execute_model_state
            steering.after(getattr(state, "hidden_states", None))
            return result

        return execute_model

    return make
