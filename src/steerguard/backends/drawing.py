"""How a next token is drawn, and when a row ends.

A row's randomness is a function of (seed, its own prompt, its number among equal prompts, step, token id), computed
with integers on the logits' device. So a row's text does not depend on its neighbours or on how a call was cut into
batches, and a guarded and an unguarded answer are drawn with the same luck.

This module knows logits and token ids. It knows no model and no guard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from steerguard.backends.base import Sampling

Emit = Callable[[int, str], None]
MASK = 0xFFFFFFFF
PAUSE_EVERY = 4
"""Steps between two looks at how many rows have ended: a look waits for the device."""
FEW = 64
"""Likeliest tokens that are looked at first: a nucleus rarely has more, and then the others need no order and no noise."""


def row_keys(sampling: Sampling, prompts: Sequence[Sequence[int]], numbers: Sequence[int]) -> list[int]:
    """One 64-bit key per row of a call: of the seed, its prompt, and its number among equal rows (`numbers_of`)."""
    keys = []
    for prompt, number in zip(prompts, numbers, strict=True):
        digest = hashlib.sha256(f"{sampling.seed}|{number}|{','.join(map(str, prompt))}".encode()).digest()
        keys.append(int.from_bytes(digest[:8], "little"))
    return keys


class Draw:
    """A logits processor whose result has the drawn token as its maximum: temperature, top-p, then Gumbel noise.

    The largest of log p + Gumbel noise is a draw from p (Gumbel-max), and adding noise per token rather than walking
    along cumulated probabilities keeps the draw when the probabilities change a little.
    """

    def __init__(self, sampling: Sampling, keys: Sequence[int], begin: int, steps: int) -> None:
        self._sampling, self._begin = sampling, begin
        self._keys = draw_keys(keys, torch.arange(steps).expand(len(keys), steps))
        "[rows, steps] int64, one 32-bit key for each draw"

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Perturbed scores `[rows, vocabulary]` float32 of logits of that shape."""
        if self._keys.device != scores.device:
            self._keys = self._keys.to(scores.device)
        keys = self._keys[:, input_ids.shape[1] - self._begin]
        return perturbed(scores, self._sampling.temperature, self._sampling.top_p, keys)


def draw_keys(keys: Sequence[int], steps: Tensor) -> Tensor:
    """One 32-bit key for each draw, int64 `[rows, ...]`, of the rows' 64-bit keys and step numbers from 0 `[rows, ...]`."""
    shape = (-1, *[1] * (steps.ndim - 1))
    low = torch.tensor([key & MASK for key in keys]).view(shape)
    high = torch.tensor([key >> 32 for key in keys]).view(shape)
    return _mix(low ^ _mix(high + 0x1E3779B9 * (steps + 1)))


def perturbed(logits: Tensor, temperature: float, top_p: float, keys: Tensor) -> Tensor:
    """Scores `[rows, vocabulary]` float32 whose maximum is the token drawn from logits with draw keys `[rows]`."""
    log_p = torch.log_softmax(logits.float() / temperature, dim=-1)
    if top_p < 1 and log_p.device.type == "cpu" and log_p.shape[-1] > FEW:  # elsewhere the look would be a wait
        few = _few(log_p, top_p, keys)
        if few is not None:
            return few
    if top_p < 1:
        log_p = nucleus(log_p, top_p)
    return log_p + gumbel(keys, torch.arange(log_p.shape[-1], device=keys.device))


def _few(log_p: Tensor, top_p: float, keys: Tensor) -> Tensor | None:
    """The same from the likeliest `FEW` tokens alone; None if some row's nucleus may reach beyond them."""
    ordered, ids = log_p.topk(FEW, dim=-1)
    inside = nucleus(ordered, top_p)
    if bool((inside[:, -1] > -torch.inf).any()):
        return None
    return torch.full_like(log_p, -torch.inf).scatter_(1, ids, inside + gumbel(keys, ids))


def gumbel(keys: Tensor, ids: Tensor) -> Tensor:
    """Gumbel noise float32 of keys `[rows]` at token ids `[n]` or `[rows, n]`: `[rows, n]`."""
    u = (_mix(ids * 0x1E3779B1 + keys[:, None]) + 0.5) * 2.0**-32
    # u is uniform in (0, 1); -log1p(-u) resolves its small values, and those are the ones that win
    return -torch.log(-torch.log1p(-u))


def nucleus(log_p: Tensor, top_p: float) -> Tensor:
    """log p `[..., vocabulary]` with -inf outside the smallest set of likeliest tokens that holds `top_p`."""
    ordered = log_p.sort(dim=-1, descending=True).values
    p = ordered.exp()
    inside = p.cumsum(-1) - p < top_p
    last = inside.sum(-1, keepdim=True).clamp(min=1) - 1
    return log_p.masked_fill(log_p < ordered.gather(-1, last), -torch.inf)


def _mix(x: Tensor) -> Tensor:
    """A 32-bit hash (lowbias32) of int64 values, elementwise; products wrap, and the low 32 bits are right."""
    x = x & MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)


class Text:
    """The text of one row, as its tokens come.

    Only whole characters come out: bytes of a character that is not complete are held back. So is what may be the
    beginning of a stop text.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        self._from, self._read = 0, 0
        self._text = ""
        self._given = 0

    def push(self, token: int) -> bool:
        """Take one more token; true if a stop text is complete."""
        self._ids.append(token)
        before = decode(self._tokenizer, self._ids[self._from : self._read])
        now = decode(self._tokenizer, self._ids[self._from :])
        if len(now) > len(before) and not now.endswith("�"):
            self._text += now[len(before) :]
            self._from, self._read = self._read, len(self._ids)
        return any(stop in self._text for stop in self._stop)

    def take(self) -> str:
        """What is new and certain."""
        end = len(self._text) - max((_overlap(self._text, stop) for stop in self._stop), default=0)
        end = min([end, *(at for stop in self._stop if (at := self._text.find(stop)) >= 0)])
        new = self._text[self._given : end]
        self._given = max(self._given, end)
        return new

    def rest(self, whole: str) -> str:
        """What of the row's final text was not given yet."""
        return whole[self._given :] if whole.startswith(self._text[: self._given]) else ""


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; a character of several tokens comes with its last."""
    stream = Text(tokenizer, ())
    found = []
    for token in ids:
        stream.push(token)
        found.append(stream.take())
    if found:
        found[-1] += stream.rest(decode(tokenizer, ids))
    return found


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of tokens, special tokens left out."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop text."""
    return text[: min([len(text), *(at for s in stop if (at := text.find(s)) >= 0)])]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text could begin the stop text."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class Ends:
    """A stopping criterion that ends each row by itself: end-of-turn token, stop text, or its own limit of tokens.

    Only with stop texts or streaming are tokens brought to the host; otherwise all of this stays on the device.

    Args:
        limits: at most so many new tokens of each row.
        begin: the column of the first new token.
        pause: at least so many rows must be left for a batch to be worth a pause; None: never pause. A paused batch
            ends although rows go on, once half of its rows have ended: `keep` those that go on, and generate again.
    """

    def __init__(
        self, tokenizer: Any, sampling: Sampling, ends: Sequence[int], limits: Sequence[int], begin: int,
        emit: Emit | None, *, pause: int | None = None,
    ) -> None:  # fmt: skip
        self._ends, self._limits, self._begin = list(ends), list(limits), begin
        self._emit, self._pause = emit, pause
        self._texts = [Text(tokenizer, sampling.stop) for _ in limits] if sampling.stop or emit else []
        self._lengths: list[int | None] = [None] * len(limits)
        self._rows = list(range(len(limits)))
        "the rows that `input_ids` holds"
        self._done: Tensor | None = None
        self._tables: tuple[Tensor, Tensor] | None = None
        self.paused = False
        self.on_step: Callable[[Tensor], None] | None = None
        "called with `[rows]` true where a row goes on, after every step"
        self.unwanted: Sequence[Callable[[], bool] | None] = [None] * len(limits)
        "per row, whether nobody waits for it any more; asked where tokens are brought to the host anyway"

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """`[rows]` true where a row is done."""
        device, count = input_ids.device, input_ids.shape[1] - self._begin
        if self._tables is None:
            limits = [self._limits[row] for row in self._rows]
            self._tables = torch.tensor(self._ends, device=device), torch.tensor(limits, device=device)
        ends, limits_ = self._tables
        done = torch.isin(input_ids[:, -1], ends) | (limits_ <= count)
        if self._texts:
            done = done | torch.tensor(self._read(input_ids[:, -1].tolist(), count), device=device)
        self._done = done if self._done is None else self._done | done
        if self.on_step is not None:
            self.on_step(~self._done)
        if self._pause is not None and len(self._rows) >= self._pause and count % PAUSE_EVERY == 0:
            ended = int(self._done.sum())
            self.paused = len(self._rows) > ended >= len(self._rows) / 2
            return torch.ones_like(self._done) if self.paused else self._done
        return self._done

    def keep(self) -> list[int]:
        """After a pause: go on with the rows that have not ended; returns where they stood in the batch."""
        assert self._done is not None
        left = (~self._done).nonzero()[:, 0].tolist()
        self._rows = [self._rows[at] for at in left]
        self._done = self._tables = None
        self.paused = False
        return left

    def _read(self, tokens: Sequence[int], count: int) -> list[bool]:
        """Read one new token of each row on the host: which rows met a stop text; emit what is new."""
        for row, token in zip(self._rows, tokens, strict=True):
            text = self._texts[row]
            if self._lengths[row] is not None:
                continue
            ended = token in self._ends
            given_up = (unwanted := self.unwanted[row]) is not None and unwanted()
            if given_up or (not ended and text.push(token)) or ended or count >= self._limits[row]:
                self._lengths[row] = count
            if self._emit is not None and (new := text.take()):
                self._emit(row, new)
        return [self._lengths[row] is not None for row in self._rows]

    def answer(self, row: int, generated: Sequence[int]) -> tuple[list[int], bool]:
        """The ids of a row's answer out of all that was generated for it, and whether its last token ended the turn."""
        length = self._lengths[row]
        if length is None:
            at = next((i for i, token in enumerate(generated) if token in self._ends), len(generated) - 1)
            length = min(at + 1, self._limits[row])
        ids = list(generated[:length])
        return ids, bool(ids) and ids[-1] in self._ends

    def finish(self, row: int, text: str) -> None:
        """Emit what was held back of a row whose final text this is."""
        if self._emit is not None and (rest := self._texts[row].rest(text)):
            self._emit(row, rest)
