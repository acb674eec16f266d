"""Rank vectors as points of a cube: the share of its own dense cost that each target keeps, in [0, 1]^d.

The budget is a plane there, weights @ x = kept, in either form of storage.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor
from torch.quasirandom import SobolEngine

from ranksearch.search.coordinates import RANKS
from ranksearch.search.space import Floats, Ranks, RankSpace, proportional


class Shares:
    """Turns rank vectors into shares and back.

    Attributes:
        weights: Each target's part of what all of them cost dense, `(d,)`.
    """

    def __init__(self, space: RankSpace, kept: float) -> None:
        """Set space and budget."""
        self._space, self._kept = space, kept
        self.weights = torch.as_tensor(space.dense_costs / space.whole)

    def of(self, ranks: Ranks) -> Tensor:
        """The shares of a vector, `(d,)`."""
        shares: Floats = self._space.costs(ranks) / self._space.dense_costs
        return torch.as_tensor(shares)

    def of_trial(self, trial: FrozenTrial) -> Tensor:
        """The shares of a trial's vector, `(d,)`."""
        return self.of(self._space.unpack(trial.user_attrs[RANKS]))

    def ranks(self, shares: Tensor) -> Ranks:
        """The vector of these shares that uses the budget exactly, `(d,)`; see `proportional`."""
        return proportional(self._space, self._kept, np.maximum(shares.numpy(), 1e-3))

    def project(self, points: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The points of the box on the budget that lie nearest, `count x d`."""
        return project(points, self.weights, self._kept, low, high)


def log_score(trial: FrozenTrial) -> float:
    """Smaller is better; infinite for a trial that has no score.

    The logarithm from 1 on, where perplexities lie, and linear below, where losses in nats do, which may be negative.
    """
    if trial.state != TrialState.COMPLETE or trial.value is None:
        return math.inf
    return math.log(trial.value) if trial.value > 1 else trial.value - 1


def sobol(count: int, dimensions: int, seed: int, *, skip: int = 0) -> Tensor:
    """Scrambled Sobol points in the unit cube, `count x dimensions`, after the first `skip` of their sequence."""
    engine = SobolEngine(dimensions, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    points: Tensor = engine.fast_forward(skip).draw(count, dtype=torch.float64)  # type: ignore[no-untyped-call]
    return points


def project(points: Tensor, weights: Tensor, total: float, low: Tensor, high: Tensor) -> Tensor:
    """The points of the box with `weights @ x = total` that lie nearest, `count x d`: clip(x - tau * weights).

    Where the box has no such point, its corner that comes nearest to the total.
    """
    reach = 1.0 / float(weights.min())
    below, above = torch.full((len(points), 1), -reach), torch.full((len(points), 1), reach)
    below, above = below.to(points), above.to(points)
    for _ in range(80):
        tau = (below + above) / 2
        over = (torch.clamp(points - tau * weights, low, high) @ weights)[:, None] > total
        below, above = torch.where(over, tau, below), torch.where(over, above, tau)
    return torch.clamp(points - above * weights, low, high)
