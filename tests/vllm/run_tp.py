"""Run by `test_runners`: an engine of two tensor-parallel ranks. Prints one line of JSON."""

from __future__ import annotations

import json
import sys

from serving import ask, engine, tokens


def main() -> None:
    asked = json.loads(sys.stdin.read())
    rows = [(prompt, one) for one in asked["asked"] for prompt in asked["prompts"]]
    with engine(
        {"guards": asked["guards"], "default": []}, enforce_eager=True, tensor_parallel_size=2,
        distributed_executor_backend="mp",
    ) as llm:  # fmt: skip
        outputs = ask(llm, [prompt for prompt, _ in rows], [one for _, one in rows], steps=asked["steps"])
        found = {
            "tokens": tokens(outputs), "counters": llm.collective_rpc("steerguard_counters"),
            "proved": llm.collective_rpc("steerguard_prove"), "guards": llm.collective_rpc("steerguard_guards"),
        }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
