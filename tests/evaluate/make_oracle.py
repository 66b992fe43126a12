"""What AlpacaEval's own code says of synthetic annotations: run in an environment of its own that has `alpaca-eval` 0.6.6.

    python make_oracle.py COMPARISONS SEED ANNOTATIONS.json GAMED.csv

Nothing of AlpacaEval's data is used: the gamed baselines and the difficulties are drawn.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np


def main(n: int, seed: int, annotations: str, gamed: str) -> None:
    import pandas as pd
    from alpaca_eval.metrics import glm_winrate

    rng = np.random.default_rng(seed)
    hard = rng.normal(size=n)
    rows: list[dict[str, Any]] = []
    for model, middle in (("concise", 1.0), ("verbose", -1.0)):
        for i in range(n):
            d = rng.normal(middle, 0.3)
            p = 1 / (1 + np.exp(1.2 * np.tanh(d)))
            preference = round(float(1 - p), 4) if rng.random() < 0.5 else float(rng.random() < p)
            rows.append({"index": i, "preference": preference, "std_delta_len": d, "instruction_difficulty": hard[i],
                         "not_gamed_baseline": False, "model": model})  # fmt: skip
    pd.DataFrame(rows).to_csv(gamed, index=False)
    one, other = rng.integers(50, 900, n), rng.integers(20, 1200, n)
    delta = (one - other) / np.std(one - other, ddof=1)
    p = 1 / (1 + np.exp(-(0.5 - 1.5 * np.tanh(delta) + 0.4 * hard)))
    preferred = np.where(rng.random(n) < 0.1, 1.5, 1.0 + (rng.random(n) < p))
    given = [
        {"preference": float(a), "index": i, "output_1": "x" * int(b), "output_2": "y" * int(c), "generator_1": "base",
         "generator_2": "guarded", "annotator": "synthetic", "instruction": str(i)}
        for i, (a, b, c) in enumerate(zip(preferred, one, other, strict=True))
    ]  # fmt: skip
    glm_winrate.hf_hub_download = lambda **_: gamed
    expected = {
        name: float(
            glm_winrate.get_length_controlled_winrate(given, glm_name=name, save_weights_dir=None)["length_controlled_winrate"]
        )
        for name in ("length_controlled_v1", "length_controlled_noreg", "length_controlled_minimal")
    }
    lengths = [[int(a), int(b)] for a, b in zip(one, other, strict=True)]
    with open(annotations, "w", encoding="utf-8") as file:
        json.dump({"preference": [float(a) - 1 for a in preferred], "lengths": lengths, "expected": expected}, file)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:5])
