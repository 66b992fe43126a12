"""Which model an engine serves, from its configuration, before its weights are loaded."""

from __future__ import annotations

from typing import Any

from steerguard.backends.fingerprint import model_identity
from steerguard.backends.hf_load import checkpoint_fingerprint
from steerguard.identity import ModelIdentity

NO_CHECKPOINT = {"checkpoint": "none: the weights are not read from safetensors files"}


def identity_of(model_config: Any, load_config: Any) -> ModelIdentity:
    """The identity of the model of these vLLM configurations; the same that `sg.load` gives the folder.

    Weights that are not read from safetensors files (a `dummy` load format, say) match no guard unless they are waived.
    """
    from transformers import AutoTokenizer

    where = {"revision": model_config.tokenizer_revision, "trust_remote_code": model_config.trust_remote_code}
    tokenizer = None if model_config.skip_tokenizer_init else AutoTokenizer.from_pretrained(model_config.tokenizer, **where)
    read = load_config.load_format in ("auto", "hf", "safetensors", "fastsafetensors", "runai_streamer")
    weights = checkpoint_fingerprint(model_config.model, revision=model_config.revision) if read else None
    return model_identity(
        model_config.model, architecture=model_config.architectures[0], width=model_config.get_hidden_size(),
        depth=model_config.get_total_num_hidden_layers(), tokenizer=tokenizer, weights=weights or NO_CHECKPOINT,
    )  # fmt: skip
