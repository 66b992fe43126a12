"""steerguard: activation steering of language models as a runtime defence.

    import steerguard as sg

    model = sg.load("Qwen/Qwen3-8B")            # any causal LM: a hub name or a local folder
    trait = sg.trait("my-honesty/")             # bundled, or a folder of yours
    probes = sg.fit(model, trait)               # own answers under both poles -> one probe per layer
    guard = probes.guard(sg.StTP(12), layer=16)
    guard.save("honesty.guard")
    with model.guarded(guard):                  # proves its effect on entry, undone on exit, or raises
        print(model.generate("Did the audit find anything?")[0].text)

Every name below is loaded when it is first used, so that `import steerguard` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from steerguard.backends import load
    from steerguard.backends.base import GREEDY, Answer, Backend, Sampling
    from steerguard.checking import check
    from steerguard.errors import SteerguardError
    from steerguard.fitting import Contrast, Fit, collect, fit
    from steerguard.guard import Guard
    from steerguard.identity import ModelIdentity
    from steerguard.probe import Probe
    from steerguard.rules import Ablate, Ceiling, Floor, Gate, MeanAblate, Rule, StMP, StTP, SwFC, Target, rule
    from steerguard.sweeping import sweep
    from steerguard.traits import Scenario, Trait, trait

_HOME = {
    "backends": ("load",),
    "backends.base": ("GREEDY", "Answer", "Backend", "Sampling"),
    "checking": ("check",),
    "errors": ("SteerguardError",),
    "fitting": ("Contrast", "Fit", "collect", "fit"),
    "guard": ("Guard",),
    "identity": ("ModelIdentity",),
    "probe": ("Probe",),
    "rules": ("Ablate", "Ceiling", "Floor", "Gate", "MeanAblate", "Rule", "StMP", "StTP", "SwFC", "Target", "Watch", "rule"),
    "sweeping": ("sweep",),
    "traits": ("Scenario", "Trait", "trait"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Ablate", "Answer", "Backend", "Ceiling", "check", "collect", "Contrast", "Fit", "fit", "Floor", "Gate",
    "GREEDY", "Guard", "load", "MeanAblate", "ModelIdentity", "Probe", "Rule", "rule", "Sampling", "Scenario",
    "SteerguardError", "StMP", "StTP", "sweep", "SwFC", "Target", "Trait", "trait", "Watch",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'steerguard' has no attribute {name!r}")
    value = getattr(import_module(f"steerguard.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
