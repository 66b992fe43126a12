"""The house: the order of modules, what the core may import, and the public names."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

import steerguard

ROOT = Path(steerguard.__file__).parent
ORDER = [
    "errors", "embeddings", "rules", "probe", "files", "strict_yaml", "journal", "probe_file", "identity",
    "prompts", "traits", "guard_card", "guard", "metrics", "layers", "backends.base", "backends", "scorers",
    "judging", "fitting", "exchange.torch_file", "exchange", "metrics.reading", "metrics.likelihood",
    "metrics.projection", "metrics.benign", "metrics.arms", "drift", "recalibrating", "sweeping", "checking",
    "report", "organism", "recipes", "evaluate", "serve", "cli",
]  # fmt: skip
"""From top to bottom; a module imports only what stands above it, or its own room."""
NUMPY_ONLY = [
    *ORDER[: ORDER.index("layers")], "scorers", "judging", "exchange", "drift",
    *(name for name in ORDER if name.startswith("metrics.")),
]  # fmt: skip
"""Modules that must not import torch or transformers, not even late."""
RULE_NAMES = ("SwFC", "StTP", "StMP", "MeanAblate")
MAY_NAME_RULES = ("rules", "__init__", "sweeping", "organism", "cli", "report", "backends.proof", "evaluate")
"""Grids, examples, help texts, and the canaries of the proof; never what captures, projects or corrects."""


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(module: str) -> str:
    """The entry of ORDER that a module belongs to: the longest that it starts with."""
    fits = [name for name in ORDER if module == name or module.startswith(name + ".")]
    return max(fits, key=len, default="")


def imports(path: Path) -> list[tuple[str, bool]]:
    """Modules imported in a file, and whether only for types."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.unparse(test.test)
        for node in ast.walk(test)
    }
    out = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out += [(alias.name, id(node) in typing_only) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "steerguard":
                names = [f"steerguard.{alias.name}" for alias in node.names]
            out += [(name, id(node) in typing_only) for name in names]
    return out


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_a_module_imports_only_what_stands_above_it(path: Path) -> None:
    own = room(dotted(path))
    if dotted(path) in ("", "__init__", "steerguard"):
        return
    assert own, f"{dotted(path)} has no place in the house: add it to ORDER, and to CONTRIBUTING.md"
    for name, typing_only in imports(path):
        if typing_only or not name.startswith("steerguard.") or name == "steerguard.__version__":
            continue
        other = room(name.removeprefix("steerguard."))
        assert ORDER.index(other) <= ORDER.index(own), f"{own} imports {other}, which stands below it"


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_the_core_knows_numpy_only(path: Path) -> None:
    if room(dotted(path)) in NUMPY_ONLY:
        foreign = {"torch", "transformers", "vllm", "accelerate"}
        assert not foreign & {name.split(".")[0] for name, typing_only in imports(path) if not typing_only}


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_no_rule_leaks_past_the_wall(path: Path) -> None:
    if any(dotted(path) == name or dotted(path).startswith(name + ".") for name in MAY_NAME_RULES) or dotted(path) == "":
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & set(RULE_NAMES)
    assert not named, f"{dotted(path)} names {named}: a backend is handed gates, never rules"


def test_the_public_names() -> None:
    assert list(steerguard.__all__) == sorted(set(steerguard.__all__), key=lambda name: (name.lower(), name))
    assert set(steerguard.__all__) == set(steerguard._MODULE_OF)
    for name in steerguard.__all__:
        assert getattr(steerguard, name) is not None
        assert not isinstance(getattr(steerguard, name), type(sys)), f"sg.{name} is a module"
    with pytest.raises(AttributeError, match="no attribute 'stear'"):
        steerguard.stear  # noqa: B018


def _seconds(*command: str) -> float:
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        best = min(best, time.perf_counter() - start)
    return best


def test_import_is_fast_and_brings_nothing_heavy() -> None:
    code = "import sys, steerguard; print([m for m in ('torch', 'transformers', 'sklearn', 'scipy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert _seconds("-c", "import steerguard") < 0.5


def test_help_answers_at_once() -> None:
    code = "import sys; sys.argv = ['steerguard', '--help']\nfrom steerguard.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers', 'sklearn'} & set(sys.modules)"
    assert _seconds("-c", code) < 1.5
