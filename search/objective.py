"""What a search minimizes: perplexity, KL divergence, or both at once.

Both are losses over the dense model in nats per token, e1 = ln(perplexity / dense perplexity) and e2 = KL. A study of
both keeps the two values of each trial; whatever takes one number of a trial takes e1 + e2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

Objective = Literal["perplexity", "kl", "both"]

#: Objective -> names of the scores that are a trial's values.
METRICS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"perplexity": ("perplexity",), "kl": ("kl",), "both": ("perplexity", "kl")}
)


def score_of(values: Sequence[float], dense_score: float) -> float:
    """The one number that a trial is compared by: its value, or of two the excess e1 + e2 in nats per token.

    Args:
        values: Perplexity, KL, or perplexity and KL.
        dense_score: Perplexity of the dense model; it counts where there are two.
    """
    if len(values) == 1:
        return values[0]
    perplexity, kl = values
    return math.log(perplexity / dense_score) + kl


def objective_of(scores: Mapping[str, Any], objective: Objective, dense_score: float) -> float:
    """The one number of a trial (`score_of`) from its scores by name."""
    return score_of([scores[name] for name in METRICS[objective]], dense_score)


def caption(objective: str) -> str:
    """What that number is called where a person reads it."""
    return "excess + KL" if objective == "both" else objective
