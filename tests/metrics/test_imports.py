"""What needs no model brings none: no torch, no backend, no embeddings before they are asked for."""

from __future__ import annotations

import subprocess
import sys


def test_the_part_without_a_model_is_light() -> None:
    code = (
        "import sys, steerguard.metrics, steerguard.metrics.similarity\n"
        "heavy = ('torch', 'transformers', 'sentence_transformers', 'steerguard.backends', 'steerguard.backends.base')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_what_asks_a_model_does_without_torch_until_there_is_one() -> None:
    code = "import sys, steerguard.metrics.arms, steerguard.metrics.benign; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
