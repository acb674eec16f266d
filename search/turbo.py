"""TuRBO: a Gaussian process over the raw shares of all targets, asked in a trust region around the best vector.

The region is a box in the shares, longer where the process varies less. It doubles after some successes in a row,
halves after as many failures as there are targets. When it has become too small, it starts anew around the uniform
allocation and what was learned so far is forgotten. Candidates perturb some coordinates of the best vector and are
projected onto the budget within the box; a draw from the posterior chooses.

References:
    TuRBO  Scalable Global Optimization via Local Bayesian Optimization, arXiv 1910.01739; constants of the paper and of
           BoTorch's tutorial
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from botorch.generation import MaxPosteriorSampling
from botorch.models import SingleTaskGP
from botorch.optim.fit import fit_gpytorch_mll_scipy
from gpytorch.constraints import Interval
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor
from torch.quasirandom import SobolEngine

from ranksearch.search.coordinates import RANKS
from ranksearch.search.draw import Draw, draw_seed
from ranksearch.search.sampler import one_thread
from ranksearch.search.space import Floats, Ranks, RankSpace, proportional, uniform

_LENGTH, _SHORTEST, _LONGEST = 0.8, 0.5**7, 1.6
_SUCCESSES = 3
_FEWEST = 4
"""Trials below which the process is not asked."""
_MOST = 256
"""The process learns from the latest so many trials."""
_CANDIDATES = 512
_ITERATIONS = 50


class Turbo:
    """Proposes shares of all targets from a trust region."""

    def __init__(self, space: RankSpace, kept: float, seed: int) -> None:
        """Set what a proposal depends on besides the trials."""
        self._space, self._kept, self._seed = space, kept, seed
        self._weights = torch.as_tensor(space.dense_costs / space.whole)

    def propose(self, trials: Sequence[FrozenTrial], number: int) -> Draw:
        """The candidate that a draw from the posterior likes best, or any while there is too little to learn from."""
        finished = [t for t in trials if t.state.is_finished()]
        scores = [math.log(max(t.value, 1e-300)) if _complete(t) and t.value else math.inf for t in finished]
        length, begun = trust_region(scores, len(self._weights))
        since = zip(finished[begun:], scores[begun:], strict=True)
        told = [(t, score) for t, score in since if math.isfinite(score)]
        with one_thread():
            torch.manual_seed(draw_seed(self._seed, number))
            shares = self._choose(told, length, number)
        return Draw(ranks=proportional(self._space, self._kept, np.maximum(shares.numpy(), 1e-3)))

    def _choose(self, told: list[tuple[FrozenTrial, float]], length: float, number: int) -> Tensor:
        start = uniform(self._space, self._kept)
        best = self._unpack(min(told, key=lambda pair: pair[1])[0]) if told else start
        if len(told) < _FEWEST:
            return self._candidates(self._shares(best), torch.ones_like(self._weights), length, 1, number)[0]
        known = torch.stack([self._shares(self._unpack(trial)) for trial, _ in told[-_MOST:]])
        values = torch.tensor([-score for _, score in told[-_MOST:]], dtype=torch.float64)
        model = _process(known, (values - values.mean()) / values.std().clamp_min(1e-9))
        scales = model.covar_module.base_kernel.lengthscale.detach().squeeze(0)
        stretch = scales / scales.log().mean().exp()
        candidates = self._candidates(self._shares(best), stretch, length, _CANDIDATES, number)
        with torch.no_grad():
            chosen: Tensor = MaxPosteriorSampling(model=model, replacement=False)(candidates, num_samples=1)
        return chosen[0]

    def _candidates(self, centre: Tensor, stretch: Tensor, length: float, count: int, number: int) -> Tensor:
        """Points on the budget in the box around the centre, `count x d`, each moved in about 20 coordinates."""
        low, high = (torch.clamp(centre + side * stretch * length / 2, 0.0, 1.0) for side in (-1, 1))
        d = len(centre)
        engine = SobolEngine(d, scramble=True, seed=draw_seed(self._seed, number))  # type: ignore[no-untyped-call]
        sobol = engine.draw(count, dtype=torch.float64)
        moved = torch.rand(count, d) <= min(20.0 / d, 1.0)
        moved[torch.arange(count), torch.randint(d, (count,))] = True
        points = torch.where(moved, low + (high - low) * sobol, centre)
        return project(points, self._weights, self._kept, low, high)

    def _shares(self, ranks: Ranks) -> Tensor:
        shares: Floats = self._space.costs(ranks) / self._space.dense_costs
        return torch.as_tensor(shares)

    def _unpack(self, trial: FrozenTrial) -> Ranks:
        return self._space.unpack(trial.user_attrs[RANKS])


def trust_region(scores: Sequence[float], dimensions: int) -> tuple[float, int]:
    """Side of the trust region after these scores, and how many of them came before it last started anew.

    Args:
        scores: In the order of trials, smaller is better and infinite for none.
        dimensions: How many targets there are.
    """
    length, best, successes, failures, begun = _LENGTH, math.inf, 0, 0, 0
    for count, score in enumerate(scores, start=1):
        if score < best - 1e-3 * (abs(best) if math.isfinite(best) else 0.0):
            successes, failures = successes + 1, 0
        else:
            successes, failures = 0, failures + 1
        best = min(best, score)
        if successes == _SUCCESSES:
            length, successes = min(2 * length, _LONGEST), 0
        elif failures == max(4, dimensions):
            length, failures = length / 2, 0
        if length < _SHORTEST:
            length, best, successes, failures, begun = _LENGTH, math.inf, 0, 0, count
    return length, begun


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


def _process(known: Tensor, values: Tensor) -> SingleTaskGP:
    kernel = MaternKernel(nu=2.5, ard_num_dims=known.shape[1], lengthscale_constraint=Interval(0.005, 4.0))
    model = SingleTaskGP(
        known,
        values[:, None],
        likelihood=GaussianLikelihood(noise_constraint=Interval(1e-8, 1e-3)),
        covar_module=ScaleKernel(kernel),
        outcome_transform=None,
    )
    with warnings.catch_warnings():
        # stopping after some iterations is meant
        warnings.simplefilter("ignore")
        mll = ExactMarginalLogLikelihood(model.likelihood, model)
        fit_gpytorch_mll_scipy(mll, options={"maxiter": _ITERATIONS})
    return model.eval()


def _complete(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.COMPLETE
