"""Likelihood: how probable answers are to the unguarded model, and how far a guard moves its predictions.

Both are teacher-forced: the answer is given, and each of its tokens is predicted from what stands before it, the first
from the prompt alone. The end-of-turn token counts as a token where the model drew it. log-softmax in float64, over as
many positions at a time as memory likes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from steerguard.backends.base import Backend, Floats
from steerguard.errors import InputError
from steerguard.fitting import Stage
from steerguard.guard import Guard, Positions
from steerguard.metrics.reading import Exchange, check_unguarded, each

TOKENS = 50
"""How many tokens of an answer cross-entropy looks at. Source: arXiv 2604.08169."""
CHUNK = 2**22
"""Logits that are turned into float64 at a time: 32 MB to an array."""

K = TypeVar("K", bound=Hashable)
Doubles = npt.NDArray[np.float64]


def cross_entropy(model: Backend, exchanges: Sequence[Exchange], *, tokens: int = TOKENS) -> list[float | None]:
    """Mean -log p, in nats per token, of the first `tokens` tokens of each answer under the unguarded model.

    The prompt is the context that answers are judged in: give the aligned one, whatever the answer was given under.
    None for an answer without tokens.

    Raises:
        InputError: a model inside `guarded`, fewer than one token, or logits that are not finite.
    """
    if tokens < 1:
        raise InputError(f"cross-entropy needs at least 1 token, got tokens = {tokens}")
    check_unguarded(model)
    out: list[float | None] = []
    for i, (prompt, answer) in enumerate(exchanges):
        ids = tuple(answer)[:tokens]
        predicted = _predictions(model, prompt, ids, "response") if ids else None
        out.append(None if predicted is None else _finite(surprisal(predicted, ids), f"answer {i}"))
    return out


def divergences(
    model: Backend,
    exchanges: Sequence[Exchange],
    guards: Mapping[K, Guard],
    *,
    positions: Positions = "response",
    idle: Mapping[K, Sequence[bool]] | None = None,
    progress: Stage | None = None,
) -> dict[K, list[float | None]]:
    """KL(unguarded || guarded) of the next token, in nats, the mean over each conversation's predictions.

    A guard that moves no token of a conversation leaves exactly 0. One unguarded forward serves all guards.

    Args:
        idle: per guard and conversation, true where it is known to move no token (`metrics.benign.fires` tells): that
            is 0 without a forward.
        positions: `response`: the predictions of the answer's tokens, None for an answer without any; `all`: those of
            the prompt's tokens too, all but its first.

    Raises:
        InputError: a model inside `guarded`, or logits that are not finite.
    """
    if positions not in get_args(Positions):
        raise InputError(f"positions must be {' or '.join(get_args(Positions))}, got {positions!r}")
    check_unguarded(model)
    out: dict[K, list[float | None]] = {key: [] for key in guards}
    for i, (prompt, answer) in enumerate(each(exchanges, progress, "conversations read for KL")):
        still = {key for key in guards if idle and idle[key][i] and (len(answer) or positions == "all")}
        unguarded = _predictions(model, prompt, answer, positions) if still < guards.keys() else None
        for key, guard in guards.items():
            if key in still:
                out[key].append(0.0)
                continue
            guarded = None if unguarded is None else _predictions(model, prompt, answer, positions, guard)
            if unguarded is None or guarded is None:
                out[key].append(None)
            else:
                out[key].append(_finite(kl(unguarded, guarded), f"conversation {i} under guard {guard.name!r}"))
    return out


def _predictions(
    model: Backend, prompt: Any, answer: Sequence[int], positions: Positions, guard: Guard | None = None
) -> Floats | None:
    """Logits `[predictions, vocabulary]` of the answer's tokens, or of all tokens but the first; None if there are none."""
    ids = tuple(answer)
    if positions == "response" and not ids:
        return None
    logits = model.logits(prompt, ids[:-1], guards=guard)  # row t predicts token t + 1: the last token is not read
    kept = logits[len(logits) - len(ids) :] if positions == "response" else logits[: len(logits) - (not ids)]
    return kept if len(kept) else None


# ------------------------------------------------------------------------------------------------ the arithmetic


def surprisal(logits: npt.NDArray[Any], ids: Sequence[int]) -> Doubles:
    """-log p of each token in nats, `[tokens]`, from the logits `[tokens, vocabulary]` that predict them."""
    tokens = np.asarray(ids)
    out = np.empty(len(tokens))
    for rows in _chunks(*logits.shape):
        out[rows] = -np.take_along_axis(log_softmax(logits[rows]), tokens[rows, None], axis=1)[:, 0]
    return out


def kl(p: npt.NDArray[Any], q: npt.NDArray[Any]) -> Doubles:
    """KL(p || q) in nats at each position, `[positions]`, of two arrays of logits `[positions, vocabulary]`.

    Exactly 0 where the logits are the same; never below it. A token that p cannot say adds nothing.
    """
    if p.shape != q.shape:
        raise InputError(f"KL compares predictions of the same tokens, got logits of shape {p.shape} and {q.shape}")
    out = np.empty(len(p))
    for rows in _chunks(*p.shape):
        log_p, log_q = log_softmax(p[rows]), log_softmax(q[rows])
        known = np.isneginf(log_p)
        gap = np.subtract(log_p, log_q, out=np.zeros_like(log_p), where=~known)
        out[rows] = (np.exp(log_p) * gap).sum(axis=1)
    return np.maximum(out, 0.0)  # NaN stays NaN


def log_softmax(logits: npt.NDArray[Any]) -> Doubles:
    """log of the probabilities `[positions, vocabulary]`, float64. A logit of -inf is a token that cannot be said."""
    centred = logits.astype(np.float64)
    top = centred.max(axis=1, keepdims=True)
    if not np.isfinite(top).all():
        return np.full_like(centred, np.nan)
    centred -= top
    result: Doubles = centred - np.log(np.exp(centred).sum(axis=1, keepdims=True))
    return result


def _chunks(positions: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, CHUNK // max(1, vocabulary))
    return (slice(start, start + size) for start in range(0, positions, size))


def _finite(values: Doubles, what: str) -> float:
    """The mean. Raises InputError if it is no number."""
    mean = float(values.mean())
    if not np.isfinite(mean):
        raise InputError(
            f"{what}: the logits give no finite figure ({mean}); a guard may push this model out of its numbers' range: "
            "choose a smaller strength, or a wider dtype"
        )
    return mean
