"""Conversations as messages, and messages as tokens.

What this module knows: how a conversation is written (`Message` dicts with `role` and `content`), how the model's own
chat template renders it, where the prompt ends, and which tokens are the answer's. It refuses to invent a chat
template for a model that has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from steerguard.errors import PromptError


class Message(TypedDict):
    """One message of a conversation."""

    role: str
    "system, user or assistant"
    content: str


Conversation = Sequence[Message]
"""Messages in order; the last is the user's, except where an answer is read again."""

Prompt = str | Conversation
"""What may be asked of a model: a user's text, or a whole conversation."""

Reply = str | Sequence[int]
"""An answer that is read again: its text, or its tokens (a text need not give its own tokens again)."""


def conversation(system: str | None, turns: Sequence[str]) -> list[Message]:
    """Messages of a system prompt and turns that alternate user, assistant, user, ..."""
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return messages


def as_conversation(prompt: Prompt) -> list[Message]:
    """A prompt in either form as messages. Raises PromptError for anything else."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    messages = list(prompt)
    if not messages:
        raise PromptError("a conversation needs at least one message, got none")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or set(message) != {"role", "content"} or not isinstance(message["content"], str):
            raise PromptError(f'message {i} must be {{"role": ..., "content": text}}, got {message!r}')
        if message["role"] not in ("system", "user", "assistant"):
            raise PromptError(f"message {i} has role {message['role']!r}; allowed are system, user, assistant")
    return messages


@dataclass(frozen=True)
class Rendered:
    """A conversation as the model sees it."""

    ids: tuple[int, ...]
    "token ids, no padding"
    answer_start: int
    "position of the first token of the answer (the prompt's length where there is no answer yet)"


def render(tokenizer: Any, messages: Conversation, answer: Reply | None = None) -> Rendered:
    """Render a conversation with the model's own chat template, up to where the answer begins or through the answer.

    The answer's tokens are appended to the prompt's, so that positions are those that generation saw, whatever the
    template would do with a finished assistant message (strip it, drop its reasoning, close it).

    Raises:
        PromptError: no chat template, or the template refuses the conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError(
            f"{getattr(tokenizer, 'name_or_path', 'this tokenizer')!r} has no chat template; steerguard guards chat models. "
            "Load the instruct variant, or set tokenizer.chat_template"
        )
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # the template is the model author's code: it raises what it likes
        raise PromptError(f"the model's chat template refuses this conversation: {error}") from error
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise PromptError("the conversation renders to no tokens at all")
    if isinstance(answer, str):
        answer = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return Rendered(ids + tuple(answer or ()), len(ids))
