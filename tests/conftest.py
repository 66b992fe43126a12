"""Settings for every test: no network, one seed, few threads; and vLLM on a small machine, in processes of its own."""

import os
import signal

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C; tests send it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs an engine is marked so; vLLM and what it imports warn of their own affairs there."""
    for item in items:
        if item.path.parent.name == "vllm" and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.vllm)
        if item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.filterwarnings("ignore"))
