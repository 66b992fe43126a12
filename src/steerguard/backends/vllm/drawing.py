"""Our drawing inside vLLM: the same token for the same logits, whatever else is in the batch.

vLLM's own sampler draws from one stream of random numbers, so that a request's text depends on its neighbours and a
guarded answer is drawn with other luck than an unguarded one. A request that carries a draw key is decoded greedily
over logits to which this processor has added the noise of `steerguard.backends.drawing`.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality

from steerguard.backends.drawing import draw_keys, perturbed
from steerguard.backends.vllm.catalogue import DRAW


class KeyedDraw(LogitsProcessor):  # type: ignore[misc]  # vLLM is not there where types are checked
    """Perturbs the rows of requests that carry a draw key, so that the largest logit is the token drawn."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, tuple[int, float, float, Any]] = {}
        "row -> key, temperature, top_p, the tokens drawn so far (the runner's own list)"

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow the requests as they come, go and move in the batch."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._rows.pop(row, None)
        for row, params, _, drawn in batch_update.added:
            self._rows.pop(row, None)
            draw = (params.extra_args or {}).get(DRAW)
            if draw is not None:
                self._rows[row] = (int(draw[0]), float(draw[1]), float(draw[2]), drawn)
        for here, there, way in batch_update.moved:
            one, other = self._rows.pop(here, None), self._rows.pop(there, None)
            if one is not None:
                self._rows[there] = one
            if other is not None and way == MoveDirectionality.SWAP:
                self._rows[here] = other

    def apply(self, logits: Tensor) -> Tensor:
        """logits [requests, vocabulary], rows with a key replaced."""
        alike: dict[tuple[float, float], list[int]] = defaultdict(list)
        for row, (_, temperature, top_p, _) in self._rows.items():
            alike[temperature, top_p].append(row)
        for (temperature, top_p), rows in alike.items():
            steps = torch.tensor([len(self._rows[row][3]) for row in rows])
            keys = draw_keys([self._rows[row][0] for row in rows], steps).to(logits.device)
            logits[rows] = perturbed(logits[rows], temperature, top_p, keys).to(logits.dtype)
        return logits
