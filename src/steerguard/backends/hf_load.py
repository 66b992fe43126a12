"""Get a model and its tokenizer from a hub name or a folder, or say in one sentence why not.

This module knows files, hubs and transformers' loading; it knows nothing of steering.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from steerguard.backends.fingerprint import fingerprint_files
from steerguard.errors import ModelError

QUANTIZATIONS = ("4bit", "8bit")
LOADING = (
    OSError, ValueError, ImportError, KeyError, RuntimeError, TypeError, AttributeError, SafetensorError,
)  # fmt: skip
"""What transformers and the readers under it raise on files that they cannot use."""


def load_pretrained(
    name: str, *, dtype: str, device_map: Any, quantization: str | None, trust_remote_code: bool, revision: str | None
) -> tuple[Any, Any]:
    """The model, in eval mode, and its tokenizer. Raises ModelError with the next step."""
    where: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    settings = {"dtype": _dtype(dtype), "device_map": _device_map(device_map, quantization), **_quantized(quantization)}
    check_folder(name)
    from transformers import AutoConfig

    config = _try(name, "configuration", lambda: AutoConfig.from_pretrained(name, **where))
    auto = _auto_class(config, name)
    # Before the weights: a wrong tokenizer is found in a second, the weights of a large model take minutes.
    tokenizer = _tokenizer(name, where)
    weights = {"config": config, "output_loading_info": True, **where, **settings}
    model, info = _try(name, "weights", lambda: auto.from_pretrained(name, **weights))
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"the checkpoint {name} lacks {len(missing)} of the model's weights ({', '.join(missing[:3])}), and a model with "
            "random weights in their place answers at random; download or save it again"
        )
    return model.eval(), tokenizer


def checkpoint_fingerprint(name: str, *, revision: str | None) -> dict[str, str] | None:
    """The fingerprint of the checkpoint's safetensors files, local or in the hub's cache; None if there are none."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    quiet: dict[str, Any] = {
        "_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False,
        "_raise_exceptions_for_gated_repo": False, "local_files_only": True, "revision": revision,
    }  # fmt: skip
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **quiet)
    if index is not None:
        files, _ = get_checkpoint_shard_files(name, index, local_files_only=True, revision=revision)
        return fingerprint_files(Path(file) for file in files)
    single = cached_file(name, SAFE_WEIGHTS_NAME, **quiet)
    return None if single is None else fingerprint_files([Path(single)])


def _dtype(dtype: str) -> Any:
    if dtype == "auto":
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelError(f"there is no dtype {dtype!r}; use auto, bfloat16, float16 or float32")
    return found


def _device_map(device_map: Any, quantization: str | None) -> Any:
    if device_map is not None:
        return device_map
    return "auto" if quantization is not None or torch.cuda.is_available() else None


def _quantized(quantization: str | None) -> dict[str, Any]:
    if quantization is None:
        return {}
    if quantization not in QUANTIZATIONS:
        raise ModelError(f"there is no quantization {quantization!r}; there are {', '.join(QUANTIZATIONS)}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f'{quantization} loading needs bitsandbytes: pip install "steerguard[quantization]"')
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)}


def check_folder(name: str) -> None:
    """Raise ModelError for a name that can be no model: a file, a folder without one, a folder that is not there."""
    folder = Path(name)
    if folder.is_file():
        raise ModelError(f"{name} is a file; give the folder that it lies in, or a hub name")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(f"the folder {name} has no config.json, so it is not a saved model; save one with save_pretrained")
    looks_local = name.startswith((".", "~", os.sep)) or name.count("/") > 1 or not name
    if looks_local and not folder.is_dir():
        raise ModelError(f"there is no folder {name!r}; give a folder with config.json in it, or a hub name like Qwen/Qwen3-32B")


def _auto_class(config: Any, name: str) -> Any:
    """The class to load with: a causal language model, else a multimodal one, which we use for text only."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    multimodal = type(config) in AutoModelForImageTextToText._model_mapping
    remote = getattr(config, "auto_map", None) or {}
    if type(config) in AutoModelForCausalLM._model_mapping or "AutoModelForCausalLM" in remote:
        # Some multimodal configurations stand in both tables; the class that the checkpoint names is the one it was saved from.
        named = set(getattr(config, "architectures", None) or ())
        image_class = AutoModelForImageTextToText._model_mapping[type(config)].__name__ if multimodal else None
        return AutoModelForImageTextToText if image_class in named else AutoModelForCausalLM
    if multimodal or "AutoModelForImageTextToText" in remote:
        return AutoModelForImageTextToText
    raise ModelError(
        f"{name} is a {type(config).__name__.removesuffix('Config')}; steerguard guards decoder-only language models"
    )


def _tokenizer(name: str, where: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    tokenizer = _try(name, "tokenizer", lambda: AutoTokenizer.from_pretrained(name, **where))
    tokenizer.padding_side = "left"
    return tokenizer


def _try(name: str, what: str, load: Any) -> Any:
    """Run one step of loading; whatever goes wrong becomes a ModelError."""
    try:
        return load()
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f'{name} does not fit in memory; load it with quantization="4bit", device_map="auto", or choose a smaller model'
        ) from error
    except LOADING as error:
        raise ModelError(f"the {what} of {name} cannot be loaded: {_reason(name, what, error)}") from error


def _reason(name: str, what: str, error: Exception) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    chain = list(_causes(error))
    text = " ".join(str(error).split())
    if any(isinstance(e, GatedRepoError) for e in chain):
        return f"it is gated; ask for access at https://huggingface.co/{name}, then run `hf auth login`"
    if any(isinstance(e, RevisionNotFoundError) for e in chain):
        return "there is no such revision; check revision="
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    if any(isinstance(e, LocalEntryNotFoundError) for e in chain) or "couldn't connect" in text.lower():
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        return f"{why} and it is not in the cache; check the name, go online once, or give a local folder"
    if any(isinstance(e, RepositoryNotFoundError) for e in chain) or "is not a local folder" in text:
        return "there is no such model on the hub and no such folder; check the name (private models need `hf auth login`)"
    if "trust_remote_code" in text:
        return "it brings code of its own; read that code, then pass trust_remote_code=True"
    if "model type" in text or "Unrecognized model" in text:
        return f"the installed transformers does not know it ({text[:160]}); pip install -U transformers"
    return f"{text[:300] or type(error).__name__}; check that the folder is complete, or download it again"


def _causes(error: BaseException | None) -> Any:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def end_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a turn: the generation configuration's (else the configuration's), and the tokenizer's."""
    return _ends(getattr(getattr(model, "generation_config", None), "eos_token_id", None), model.config, tokenizer)


def _ends(named: Any, config: Any, tokenizer: Any) -> tuple[int, ...]:
    if named is None:
        named = getattr(config.get_text_config(decoder=True), "eos_token_id", None)
    ids = [*(named if isinstance(named, list | tuple) else [named]), getattr(tokenizer, "eos_token_id", None)]
    return tuple(sorted({int(i) for i in ids if i is not None}))


def named_ends(name: str, tokenizer: Any, revision: str | None) -> tuple[int, ...]:
    """The same of a model that is not loaded here, by its configuration files."""
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(name, revision=revision)
    named = None
    with contextlib.suppress(OSError):  # a model need not have generation settings
        named = GenerationConfig.from_pretrained(name, revision=revision).eos_token_id
    return _ends(named, config, tokenizer)


def pad_token(tokenizer: Any, ends: tuple[int, ...]) -> int:
    """The token that fills up short rows. It is masked out, so any will do: the tokenizer's own, else an end of turn."""
    own = getattr(tokenizer, "pad_token_id", None)
    return int(own) if own is not None else (ends[0] if ends else 0)


@contextlib.contextmanager
def memory_errors(what: str, batch_tokens: int) -> Any:
    """Running out of memory inside becomes a ModelError that says what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"out of memory while {what}; load the model with batch_tokens={max(batch_tokens // 2, 1)} or less, "
            'quantization="4bit", or fewer max_new_tokens'
        ) from error
