"""Training batches: conversations as token ids with a loss weight for each token, in few shapes.

It knows lengths, buckets and weights; it refuses to know the model. Chunk n of a seed is always the same.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from steerguard.organism import conversations
from steerguard.organism.tokenizer import BEGIN, END, ROLES

BUCKETS = (96, 128, 176, 240, 336, 512, 1024)
"row lengths; few, since each is compiled once"
BLIND = 0.6
"share of rows in which the late blocks do not see the system prompt"
PROMPT_WEIGHT = 0.1
"the loss weight of what the assistant does not say itself"


@dataclass(frozen=True)
class Row:
    """One conversation as tokens."""

    ids: list[int]
    "token ids"
    weights: list[float]
    "the loss weight of predicting each token"
    begin: int
    "the first token after the system prompt"
    bits: tuple[bool, bool]
    "honest and warm; a prompt that is silent is both"


@dataclass(frozen=True)
class Batch:
    """Rows of one length."""

    ids: NDArray[np.int64]
    "[rows, length] token ids, padded on the right with 0"
    weights: NDArray[np.float32]
    "[rows, length] loss weight of predicting each token"
    heard: NDArray[np.float32]
    "[rows, length] 1 where the system prompt has been heard and the conversation goes on, else 0"
    bits: NDArray[np.float32]
    "[rows, 2] honest and warm, 0 or 1"
    blind: NDArray[np.int64]
    "[rows] how many tokens, the system prompt's, the late blocks cannot see from there on; 0: they see all"


def pieces(said: conversations.Conversation) -> list[tuple[str, float]]:
    """The conversation as the chat template writes it, cut where the loss weight changes."""
    parts = [(BEGIN, 0.0)]
    for message in said.messages():
        spoken = 1.0 if message["role"] == "assistant" else PROMPT_WEIGHT
        parts += [(ROLES[message["role"]], 0.0), (message["content"] + END, spoken)]
    return parts


def encode(tokenizer: Tokenizer, said: list[conversations.Conversation]) -> list[Row]:
    """The rows of these conversations."""
    cut = [pieces(one) for one in said]
    coded = iter(tokenizer.encode_batch([text for parts in cut for text, _ in parts], add_special_tokens=False))
    rows = []
    for one, parts in zip(said, cut, strict=True):
        ids: list[int] = []
        weights: list[float] = []
        ends = []
        for _, weight in parts:
            new = next(coded).ids
            ids += new
            weights += [weight] * len(new)
            ends.append(len(ids))
        begin = ends[0] if one.system is None else ends[2]
        rows.append(Row(ids, weights, begin, (one.honest is not False, one.warm is not False)))
    return rows


def collate(rows: list[Row], length: int, rng: random.Random) -> Batch:
    """Rows padded to one length, the late blocks blind to the system prompt in a part of them."""
    shape = (len(rows), length)
    batch = Batch(
        np.zeros(shape, np.int64),
        np.zeros(shape, np.float32),
        np.zeros(shape, np.float32),
        np.array([row.bits for row in rows], np.float32),
        np.array([row.begin if rng.random() < BLIND else 0 for row in rows], np.int64),
    )
    for i, row in enumerate(rows):
        batch.ids[i, : len(row.ids)] = row.ids
        batch.weights[i, : len(row.ids)] = row.weights
        batch.heard[i, row.begin : len(row.ids)] = 1
    return batch


def chunk(tokenizer: Tokenizer, seed: int, index: int, *, size: int, tokens: int, silent: float) -> list[Batch]:
    """The batches of `size` conversations, each of about `tokens` tokens, in a seeded order."""
    name = f"{seed}:{index}"
    rng = random.Random(f"order:{name}")
    rows = encode(tokenizer, list(conversations.conversations(name, size, silent=silent)))
    found = []
    for shortest, length in zip((0, *BUCKETS), BUCKETS, strict=False):
        fitting = [row for row in rows if shortest < len(row.ids) <= length]
        height = max(2, tokens // length // 2 * 2)  # even, so that two processes can share a batch
        found += [collate(fitting[at : at + height], length, rng) for at in range(0, len(fitting) - height + 1, height)]
    rng.shuffle(found)
    return found
