"""How much the next components of every target are worth where a vector is, by one backward pass of the compressed
model: what the spectra predict of the dense model and a score tells about all targets together.

Notation, for a target at rank r:
    E(r)       tail loss that its spectrum predicts (see `allocate`)
    s_j        a gate on component j of the compressed model: 1 up to r, 0 after
    L          its loss on a text, nats per token
    first      components low+1..r, which would be the first to go; next: components r+1..high, the next to come
    less       - sum of dL/ds_j over `first`;  more: the same over `next`

    k          nats per unit of E: less + more of all targets together by twice their E(r) - E(high)

If the loss by a gate is k D (1 - s)^2 plus a slope, where E says D, then removing `first` costs
`less + k (E(low) - E(r))` and adding `next` saves `more - k (E(r) - E(high))`. The log of how far their sum is from the
predicted k (E(low) - E(high)) is the target's sensitivity as measured there; with k as above they are 1 on average. It
holds nearby, so what several vectors say is averaged, the later ones more.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ranksearch.search.allocate import Allocator
from ranksearch.search.coordinates import RANKS
from ranksearch.search.space import Floats, Ranks, RankSpace

if TYPE_CHECKING:  # gradients are measured where there may be no optuna
    from optuna.trial import FrozenTrial

GRADIENTS = "ranksearch:gradients"
"""The trial's system attribute with `less` and `more`, packed."""
COST = "ranksearch:gradient evaluations"
"""The trial's system attribute that says as how many evaluations its gradients count."""
GRADIENT_TOKENS = 16384
"""Tokens that they are measured on, at least; otherwise as many as the evaluation has."""
MEASURED = 4
"""Trials of a search whose gradients are measured, the first that have a score; each is some three evaluations."""
OFF = "ranksearch:no gradients"
"""The study's system attribute that says why none are measured any more."""
_BAND = 0.15
"""Components looked at in either direction, as a share of the rank."""
_STEP = 0.5
"""Weight of the latest measurement against all before."""
_LEAST = 0.05
"""A target is taken to be worth at least so much of what is predicted."""


@dataclass(frozen=True, kw_only=True)
class Bands:
    """Components that are looked at, `(targets,)` each: `low` to `rank` and `rank` to `high`; none where all are equal.

    For a dense target `rank` is the largest below dense.
    """

    low: Ranks
    rank: Ranks
    high: Ranks

    def edges(self, space: RankSpace) -> dict[str, list[int]]:
        """Target -> the three of them, without targets that have no choice."""
        ends = zip(space.targets, self.low, self.rank, self.high, strict=True)
        return {t.name: [int(low), int(rank), int(high)] for t, low, rank, high in ends if low < high}


def bands(space: RankSpace, ranks: Ranks) -> Bands:
    """The components around a vector's ranks whose gradients tell where the budget should go."""
    free = space.low_ranks < space.full_ranks
    rank = np.where(free, np.minimum(ranks, space.top_ranks), 0)
    width = np.maximum(_BAND * rank, max(2, space.rank_multiple)).astype(np.int64)
    low = np.where(free, np.maximum(rank - width, 0), 0)
    high = np.where(free & (ranks < space.full_ranks), np.minimum(rank + width, space.top_ranks), rank)
    return Bands(low=low, rank=rank, high=high)


def pack_gradients(space: RankSpace, gradients: Mapping[str, Sequence[float]]) -> str:
    """One short ASCII string of `less` and `more`.

    Args:
        space: The rank space.
        gradients: Target -> sums of dL/ds_j over `first` and `next`, of the targets in `Bands.edges`.
    """
    sums = [gradients.get(target.name, (0.0, 0.0)) for target in space.targets]
    return base64.b64encode((-np.array(sums, dtype="<f4").T).tobytes()).decode("ascii")


def measured(allocator: Allocator, trials: Sequence[FrozenTrial]) -> Floats | None:
    """Log sensitivities with mean zero, `(d,)`, from the trials that have gradients; None before the first."""
    z = None
    for trial in sorted(trials, key=lambda t: t.number):
        if (packed := trial.system_attrs.get(GRADIENTS)) is None:
            continue
        less, more = np.frombuffer(base64.b64decode(packed), dtype="<f4").astype(np.float64).reshape(2, -1)
        found = log_sensitivities(allocator, allocator.space.unpack(trial.user_attrs[RANKS]), less, more)
        z = _STEP * found if z is None else z + _STEP * (found - z)
    return z


def log_sensitivities(allocator: Allocator, ranks: Ranks, less: Floats, more: Floats) -> Floats:
    """What one vector's gradients say, `(d,)` with mean zero; zero for targets without a choice.

    Args:
        allocator: Space and spectra.
        ranks: The vector.
        less: Of each target, `(d,)`, nats per token.
        more: Likewise.
    """
    around = bands(allocator.space, ranks)
    first = allocator.tail_loss(around.low) - allocator.tail_loss(around.rank)
    following = allocator.tail_loss(around.rank) - allocator.tail_loss(around.high)
    predicted = first + following
    known = (around.low < around.high) & (predicted > 0) & np.isfinite(less + more)
    slopes = np.where(known, less + more, 0.0)
    saved = following[known].sum()
    if saved <= 0 or slopes.sum() <= 0:
        return np.zeros(len(ranks))  # all is dense, or all components do harm: there is nothing to be learned
    unit = slopes.sum() / (2 * saved)
    share = np.divide(slopes / unit + first - following, predicted, out=np.ones_like(predicted), where=known)
    z = np.log(np.maximum(share, _LEAST))
    return np.where(known, z - z[known].mean(), 0.0)
