"""Metrics: what can be told of answers, models and guards without a judge.

Here, numpy only and without a model: texts, intervals, and `Measured`, what several arms measured on the same cases.
What asks a model, or needs an extra, is imported from its own module:

* `similarity`: how alike answers mean (sentence embeddings, the extra `similarity`)
* `likelihood`: cross-entropy of answers, and KL to the unguarded model
* `projection`: where answers stand along a probe's direction
* `benign`: how often a guard fires where it has nothing to do, how far it moves tokens and predictions there
* `arms`: all of it for the answers of several arms to one set of scenarios

Whatever is said to be of the unguarded model must be measured outside `guarded`, and is refused inside it. None among
values means unscored: it is counted and left out, never taken for zero.
"""

from __future__ import annotations

from steerguard.metrics.intervals import (
    LEVEL,
    NIL_GAP,
    RESAMPLES,
    Interval,
    Reliability,
    bootstrap_interval,
    paired_difference,
    recovered,
    recovered_interval,
    reliability,
)
from steerguard.metrics.measured import Measured
from steerguard.metrics.texts import compression, distinct, repetition, repetition_across, words

__all__ = [
    "bootstrap_interval", "compression", "distinct", "Interval", "LEVEL", "Measured", "NIL_GAP", "paired_difference",
    "recovered", "recovered_interval", "Reliability", "reliability", "repetition", "repetition_across", "RESAMPLES", "words",
]  # fmt: skip
