"""Run by `test_runners`: vLLM's V2 model runner on a machine without a GPU, its Triton kernels interpreted.

Triton's CPU backend is not in the package; vLLM looks for one before it lets its V2 runner start. The kernels need none
when they are interpreted. Prints one line of JSON: the greedy tokens under each configuration.
"""

from __future__ import annotations

import json
import os
import sys
import types

os.environ.update(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")

from triton.backends import backends


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


backends["cpu"] = types.SimpleNamespace(driver=_Driver, compiler=None)  # type: ignore[assignment]

from serving import ask, engine, tokens


def main() -> None:
    asked = json.loads(sys.stdin.read())
    rows = [(prompt, one) for one in asked["asked"] for prompt in asked["prompts"]]
    with engine({"guards": asked["guards"], "default": []}, enforce_eager=True, max_num_batched_tokens=24) as llm:
        assert llm.llm_engine.vllm_config.use_v2_model_runner
        outputs = ask(llm, [prompt for prompt, _ in rows], [one for _, one in rows], steps=asked["steps"])
        counters = llm.collective_rpc("steerguard_counters")
        proved = llm.collective_rpc("steerguard_prove")
    print(json.dumps({"tokens": tokens(outputs), "counters": counters, "proved": proved}))


if __name__ == "__main__":
    main()
