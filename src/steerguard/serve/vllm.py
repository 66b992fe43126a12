"""vLLM's own server under the same policy: the command line that starts it.

What the plugin cannot honour is refused here, before anything starts: other model names, keys, shadow, projections. Nothing
may reach vLLM beside this policy: a second `--additional-config`, or an environment in which vLLM would not load the plugin,
is refused, too, since such a server would answer unguarded. This module knows vLLM's flags; it does not import vLLM.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from steerguard.backends import BUNDLED
from steerguard.backends.vllm.catalogue import SETTINGS
from steerguard.errors import InputError, Unsupported
from steerguard.serve.policy import Policy

CONFIG = "--additional-config"
PLUGINS, GROUP, PLUGIN = "VLLM_PLUGINS", "vllm.general_plugins", "steerguard"


def settings(policy: Policy) -> dict[str, Any]:
    """The plugin's settings that mean what the policy means. Raises Unsupported for what it has no words for."""
    file = policy.file
    unable = {
        "models (other names of the model)": bool(file.models),
        "keys (vLLM has one: pass --api-key after --)": bool(file.keys),
        "admin": file.admin is not None,
        "trace": file.trace,
        "mode: shadow": any(one.mode == "shadow" for one in file.guards),
    }
    named = [what for what, is_so in unable.items() if is_so]
    if named:
        raise Unsupported(
            f"vLLM's server cannot do what the policy says of {'; '.join(named)}; leave it out, or use --backend hf"
        )
    view = policy.views[None, policy.name].catalogue
    served = [(one, guard) for one, guard in zip(file.guards, policy.guards, strict=True) if one.mode != "off"]
    if not served:
        raise InputError("every guard of the policy is off; a server without guards is vLLM's alone, so start that")
    guards = [one.model_dump(mode="json", exclude={"mode"}, exclude_none=True) for one, _ in served]
    return {"guards": guards, "default": list(view.default), "allow_mismatch": list(file.allow_mismatch)}


def argv(model: str, policy: Policy, *, host: str, port: int, flags: Sequence[str] = ()) -> list[str]:
    """The command that starts vLLM's server under this policy.

    Args:
        flags: vLLM's own, passed on as they are.

    Raises:
        Unsupported: the policy says what the plugin cannot do.
        InputError: a flag that would put other settings in place of the policy.
    """
    for flag in flags:
        word = flag.partition("=")[0].replace("_", "-")
        if word.startswith("--") and len(word) > 3 and (word.startswith(CONFIG) or CONFIG.startswith(word)):
            raise InputError(f"{flag} would take the place of the policy; what it says of guards belongs into the policy file")
    config = json.dumps({SETTINGS: settings(policy)})
    return [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(BUNDLED.get(model, model)), "--served-model-name",
        policy.name, "--host", host, "--port", str(port), *flags, CONFIG, config,
    ]  # fmt: skip


def installed() -> bool:
    """Whether there is a vLLM to start."""
    return importlib.util.find_spec("vllm") is not None


def check_environment(environ: Mapping[str, str]) -> None:
    """Raise InputError unless a vLLM started here would load the plugin."""
    if not installed():
        raise InputError("vLLM is not installed here; pip install vllm, or use --backend hf")
    chosen = environ.get(PLUGINS)
    if chosen is not None and PLUGIN not in chosen.split(","):
        raise InputError(f"{PLUGINS}={chosen} keeps vLLM from loading the plugin, so it would answer unguarded; unset it")
    if PLUGIN not in {point.name for point in importlib.metadata.entry_points(group=GROUP)}:
        raise InputError("vLLM would not find the plugin: steerguard is not installed, only on the path; pip install it")
