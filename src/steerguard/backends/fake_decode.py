"""From logits to text in the fake: drawing tokens, knowing when to stop, and streaming.

It knows numbers and a tokenizer; it knows nothing of guards and blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from steerguard.backends.base import Floats, Sampling


class Draw:
    """Draws the tokens of one row: greedy, or temperature and top-p with noise that is the row's own.

    The noise of a token is a hash of (seed, prompt, number among equal rows, step, token), so that no neighbour can
    change it. The likeliest token after Gumbel noise is a draw from the distribution; the same hash, and so the same
    luck, as in the other backends.
    """

    def __init__(self, sampling: Sampling, prompt_ids: tuple[int, ...], number: int) -> None:
        self.sampling, self.step = sampling, 0
        text = f"{sampling.seed}|{number}|{','.join(map(str, prompt_ids))}"
        self.key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")

    def __call__(self, logits: Floats) -> int:
        """The next token from logits `[vocabulary]`."""
        self.step += 1
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        # 1. log probabilities, the likeliest first
        z = logits.astype(np.float64) / self.sampling.temperature
        z -= z.max()
        log_p = z - np.log(np.exp(z).sum())
        order = np.argsort(-log_p, kind="stable")
        # 2. the fewest tokens that hold top_p
        p = np.exp(log_p[order])
        kept = order[(np.cumsum(p) - p < self.sampling.top_p) | (np.arange(len(p)) == 0)]
        # 3. the first after noise
        return int(kept[np.argmax(log_p[kept] + self._gumbel(kept))])

    def _gumbel(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Gumbel noise of tokens `[n]` at this step."""
        step = _mix(np.uint64((self.key >> 32) + 0x1E3779B9 * self.step))
        key = _mix(np.uint64(self.key & 0xFFFFFFFF) ^ step)
        u = (_mix(tokens.astype(np.uint64) * np.uint64(0x1E3779B1) + key) + 0.5) / 2**32
        noise: npt.NDArray[np.float64] = -np.log(-np.log1p(-u))
        return noise


def _mix(x: Any) -> Any:
    """The 32-bit hash lowbias32 of uint64 values, elementwise."""
    low = np.uint64(0xFFFFFFFF)
    x = x & low
    x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x7FEB352D)) & low
    x = ((x ^ (x >> np.uint64(15))) * np.uint64(0x846CA68B)) & low
    return x ^ (x >> np.uint64(16))


class Writer:
    """The text of one row as its tokens come: cut at stop texts, streamed without ever taking anything back."""

    def __init__(
        self,
        tokenizer: Any,
        sampling: Sampling,
        ends: Collection[int],
        limit: int,
        emit: Callable[[str], None] | None,
    ) -> None:
        self.tokenizer, self.sampling, self.ends, self.limit, self.emit = tokenizer, sampling, ends, limit, emit
        self.ids: list[int] = []
        self.text = ""
        self.stopped = False
        self.sent = 0

    @property
    def done(self) -> bool:
        return self.stopped or len(self.ids) >= self.limit

    def add(self, token: int) -> None:
        self.ids.append(token)
        # 1. the end of the turn, or a stop text
        told = self.ids[:-1] if token in self.ends else self.ids
        text: str = self.tokenizer.decode(told, skip_special_tokens=True)
        cuts = [text.index(stop) for stop in self.sampling.stop if stop in text]
        self.stopped = token in self.ends or bool(cuts)
        self.text = text[: min(cuts)] if cuts else text
        # 2. stream what can no longer change
        if self.emit is not None:
            final = len(self.text) if self.done else self._settled()
            if final > self.sent:
                self.emit(self.text[self.sent : final])
                self.sent = final

    def _settled(self) -> int:
        """How much of the text no later token can take back: not half a character, nor the beginning of a stop text."""
        text = self.text.rstrip("\N{REPLACEMENT CHARACTER}")
        return next((i for i in range(len(text)) if any(stop.startswith(text[i:]) for stop in self.sampling.stop)), len(text))


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to the decoded whole; "" for a token that completes no character."""
    out: list[str] = []
    before = 0
    for end in range(1, len(ids) + 1):
        text: str = tokenizer.decode(list(ids[:end]), skip_special_tokens=True)
        settled = len(text) if end == len(ids) else len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
        out.append(text[before:settled])
        before = max(before, settled)
    return out
