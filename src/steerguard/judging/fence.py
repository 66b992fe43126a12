"""Fences: text to be judged, so wrapped that it cannot speak as the one who asks.

Three walls. Every material stands between two lines that carry a mark which is the hash of what is asked: to hold its
own mark, a text would have to hold its own hash. The brackets of these lines occur in no material: they are replaced.
And what a chat template takes for the change of a speaker is broken by a space, so that an endpoint that reads special
tokens out of a user's text finds none.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

from steerguard.files import canonical_json

OPEN, CLOSE = "⟦", "⟧"
"""The brackets of a fence; no material holds them."""

_NAMES = (
    "s|bos|eos|pad|unk|sep|cls|think|thinking|reasoning|analysis|final|system|user|assistant|human|developer|tool|"
    "tool_call|tool_response|start_of_turn|end_of_turn|start_of_image|im_start|im_end|sys|inst|channel|message"
)
_SPECIAL = re.compile(
    rf"<(?=\s*[|｜])"  # <|im_start|>, <|start_header_id|>, <|channel|>, and with the full-width bar
    rf"|(?<=[|｜])(?=>)"
    rf"|<(?=/?(?:{_NAMES})\b[^<>\n]{{0,40}}>)"  # </s>, <start_of_turn>, <<SYS>>, <think>
    rf"|\[(?=/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|ARGS|THINK)\])",
    re.IGNORECASE,
)


def neutral(text: str) -> str:
    """The text without fences and special tokens of chat templates; everything else as it is.

    `⟦` and `⟧` become `[` and `]`; a space breaks special tokens; half a surrogate pair becomes a question mark.
    """
    text = text.encode("utf-8", "replace").decode().replace(OPEN, "[").replace(CLOSE, "]")
    return _SPECIAL.sub(lambda found: found.group() + " ", text)


def fences(parts: Mapping[str, str], *, of: object) -> dict[str, str]:
    """Each part, made neutral, between its two fences.

    Args:
        parts: what it is called, in capitals -> the text.
        of: what else is asked, as a JSON value; it goes into the mark.
    """
    clean = {name: neutral(text) for name, text in parts.items()}
    mark = hashlib.sha256(canonical_json([of, clean]).encode()).hexdigest()[:32]
    return {name: f"{OPEN}{name} {mark}{CLOSE}\n{text}\n{OPEN}END {name} {mark}{CLOSE}" for name, text in clean.items()}
