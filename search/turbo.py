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

import torch
from botorch.generation import MaxPosteriorSampling
from botorch.models import SingleTaskGP
from botorch.optim.fit import fit_gpytorch_mll_scipy
from gpytorch.constraints import Interval
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from optuna.trial import FrozenTrial
from torch import Tensor

from ranksearch.search.draw import MOST, Draw, draw_seed
from ranksearch.search.shares import Shares, log_score, sobol
from ranksearch.search.space import RankSpace, uniform
from ranksearch.search.threads import one_thread

_LENGTH, _SHORTEST, _LONGEST = 0.8, 0.5**7, 1.6
_SUCCESSES = 3
_FEWEST = 4
"""Trials below which the process is not asked."""
_CANDIDATES = 512
_ITERATIONS = 50


class Turbo:
    """Proposes shares of all targets from a trust region."""

    def __init__(self, space: RankSpace, kept: float, seed: int) -> None:
        """Set what a proposal depends on besides the trials."""
        self._shares, self._seed = Shares(space, kept), seed
        self._start = self._shares.of(uniform(space, kept))

    def propose(self, trials: Sequence[FrozenTrial], number: int) -> Draw:
        """The candidate that a draw from the posterior likes best, or any while there is too little to learn from."""
        finished = [t for t in trials if t.state.is_finished()]
        scores = [log_score(t) for t in finished]
        length, begun = trust_region(scores, len(self._start))
        since = zip(finished[begun:], scores[begun:], strict=True)
        told = [(t, score) for t, score in since if math.isfinite(score)]
        with one_thread():
            torch.manual_seed(draw_seed(self._seed, number))
            shares = self._choose(told, length, number)
        return Draw(ranks=self._shares.ranks(shares))

    def _choose(self, told: list[tuple[FrozenTrial, float]], length: float, number: int) -> Tensor:
        best = self._shares.of_trial(min(told, key=lambda pair: pair[1])[0]) if told else self._start
        if len(told) < _FEWEST:
            return self._candidates(best, torch.ones_like(best), length, 1, number)[0]
        known = torch.stack([self._shares.of_trial(trial) for trial, _ in told[-MOST:]])
        values = torch.tensor([-score for _, score in told[-MOST:]], dtype=torch.float64)
        model = _process(known, (values - values.mean()) / values.std().clamp_min(1e-9))
        scales = model.covar_module.base_kernel.lengthscale.detach().squeeze(0)
        stretch = scales / scales.log().mean().exp()
        candidates = self._candidates(best, stretch, length, _CANDIDATES, number)
        with torch.no_grad():
            chosen: Tensor = MaxPosteriorSampling(model=model, replacement=False)(candidates, num_samples=1)
        return chosen[0]

    def _candidates(self, centre: Tensor, stretch: Tensor, length: float, count: int, number: int) -> Tensor:
        """Points on the budget in the box around the centre, `count x d`, each moved in about 20 coordinates."""
        low, high = (torch.clamp(centre + side * stretch * length / 2, 0.0, 1.0) for side in (-1, 1))
        d = len(centre)
        moved = torch.rand(count, d) <= min(20.0 / d, 1.0)
        moved[torch.arange(count), torch.randint(d, (count,))] = True
        spread = low + (high - low) * sobol(count, d, draw_seed(self._seed, number))
        return self._shares.project(torch.where(moved, spread, centre), low, high)


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
