"""The organism's tokenizer and chat template.

It knows the special tokens, the template and how the vocabulary is learned from generated conversations; it refuses
to know weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from steerguard.organism import conversations, grammar, world

PAD, BEGIN, END = "<|pad|>", "<|begin|>", "<|end|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIAL = (PAD, BEGIN, END, *ROLES.values())
VOCABULARY = 2048
MAX_LENGTH = 1024
CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('roles are system, user and assistant') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def corpus(count: int) -> Iterator[str]:
    """Generated text, and every name of the world in mid-sentence so that it becomes one token or two."""
    names = itertools.chain(*world.tables()["entities"].values(), *world.tables()["pools"].values())
    words = itertools.chain(names, *grammar.talk()["subjects"].values(), map(str, grammar.NUMBERS))
    for word in sorted(set(words)):
        yield f" {word}" * 600
    for said in conversations.conversations("tokenizer", count):
        yield from (message["content"] for message in said.messages())


def learn(count: int = 12_000) -> Tokenizer:
    """A byte-level BPE tokenizer learned from `count` conversations."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(count), trainer)
    return tokenizer


def wrap(tokenizer: Tokenizer) -> Any:
    """The tokenizer as transformers knows it, with the chat template."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        additional_special_tokens=list(ROLES.values()),
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
