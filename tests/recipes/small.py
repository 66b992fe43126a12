"""A small trait of the bundled model's world, and a small recipe on it."""

from __future__ import annotations

from pathlib import Path

from steerguard.traits import BUNDLED

SIZES = {"train": 24, "select": 8, "test": 10}


def small_trait(at: Path) -> Path:
    """A folder with some of the scenarios of organism-honesty, spread over its categories."""
    source = BUNDLED / "organism-honesty"
    at.mkdir()
    for name in ("trait.yaml", "grammar.json"):
        (at / name).write_bytes((source / name).read_bytes())
    for split, n in SIZES.items():
        lines = (source / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        chosen = [lines[i * len(lines) // n] for i in range(n)]
        (at / f"{split}.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return at


def small_recipe(trait: Path, at: Path) -> Path:
    """A recipe of four settings on it."""
    at.write_text(
        f"model: organism\ntrait: {trait}\nbenign: organism\nbatch: 8\n"
        "sampling: {max_new_tokens: 60}\n"
        "grid: {rules: {StTP: [30], SwFC: [1, 3]}, layers: [3], positions: [all]}\n"
        "estimate: {layers: 8, tokens_per_second: 100, answer_tokens: 20}\n",
        encoding="utf-8",
    )
    return at
