"""Plain BoTorch: one Gaussian process over the raw shares of all targets, and expected improvement on the budget.

What comes of the problem when it is handed to a general tool: BoTorch's default process (an RBF kernel with a length
per target and priors that grow with their number, standardized outcomes) on -log score. Its inputs are the shares,
which lie in the unit cube as they are. `optimize_acqf` maximizes the acquisition with the budget as a linear
constraint. Sobol points come first.

References:
    prior  C. Hvarfner, E. O. Hellsten, L. Nardi, Vanilla Bayesian Optimization Performs Great in High Dimensions, ICML
           2024, arXiv 2402.02229
    LogEI  S. Ament et al., Unexpected Improvements to Expected Improvement for Bayesian Optimization, NeurIPS 2023,
           arXiv 2310.20708
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from botorch.acquisition import qLogExpectedImprovement
from botorch.exceptions import BotorchError, ModelFittingError
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.transforms import Standardize
from botorch.optim import optimize_acqf
from botorch.optim.initializers import sample_points_around_best
from botorch.sampling import SobolQMCNormalSampler
from gpytorch.mlls import ExactMarginalLogLikelihood
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from ranksearch.search.draw import MOST, Draw, draw_seed
from ranksearch.search.shares import Shares, log_score, sobol
from ranksearch.search.space import RankSpace
from ranksearch.search.threads import one_thread

_FIRSTS = 2
"""Prior and uniform, which come before Sobol points."""
_SOBOL = 8
_ITERATIONS = 50
_SAMPLES = 128
_RAW = 256
_RESTARTS = 4
_STEPS = 50
_NEAR = 1e-3
"""Standard deviation of half the starts around the best points; BoTorch's."""


class BoTorch:
    """Proposes shares of all targets by expected improvement."""

    def __init__(self, space: RankSpace, kept: float, seed: int) -> None:
        """Set what a proposal depends on besides the trials."""
        self._shares, self._kept, self._seed = Shares(space, kept), kept, seed
        self._box = torch.stack([self._shares.of(space.low_ranks), torch.ones(len(space.targets)).double()])

    def propose(self, trials: Sequence[FrozenTrial], number: int) -> Draw:
        """A Sobol point on the budget at first, and then what improves most on the best score so far."""
        d = self._box.shape[1]
        scores = [(t, log_score(t)) for t in trials if t.state.is_finished()][-MOST:]
        with one_thread():
            if number < _FIRSTS + _SOBOL or all(math.isinf(score) for _, score in scores):
                start = sobol(1, d, draw_seed(self._seed, 0), skip=number)
                shares = self._shares.project(start, *self._box)[0]
            else:
                torch.manual_seed(draw_seed(self._seed, number))
                shares = self._improve(scores, [t for t in trials if t.state == TrialState.RUNNING], number)
        return Draw(ranks=self._shares.ranks(shares))

    def _improve(self, scores: list[tuple[FrozenTrial, float]], running: list[FrozenTrial], number: int) -> Tensor:
        """Shares on the budget; a trial that was stopped or failed counts as the worst that has a score."""
        worst = max(score for _, score in scores if math.isfinite(score))
        values = -torch.tensor([min(score, worst) for _, score in scores], dtype=torch.float64)
        model = _process(torch.stack([self._shares.of_trial(trial) for trial, _ in scores]), values)
        improvement = qLogExpectedImprovement(
            model=model,
            best_f=values.max(),
            sampler=SobolQMCNormalSampler(torch.Size([_SAMPLES]), seed=draw_seed(self._seed, number)),
            X_pending=torch.stack([self._shares.of_trial(trial) for trial in running]) if running else None,
        )
        starts = self._starts(improvement, number)
        with warnings.catch_warnings():
            # stopping after some iterations is meant
            warnings.simplefilter("ignore")
            try:
                best, _ = optimize_acqf(
                    improvement,
                    bounds=self._box,
                    q=1,
                    num_restarts=_RESTARTS,
                    batch_initial_conditions=starts,
                    equality_constraints=[(torch.arange(self._box.shape[1]), self._shares.weights, self._kept)],
                    options={"batch_limit": 1, "maxiter": _STEPS},
                    retry_on_optimization_warning=False,
                )
            except (BotorchError, RuntimeError):
                best = starts[0]
        return self._shares.project(best, *self._box)[0]

    def _starts(self, improvement: qLogExpectedImprovement, number: int) -> Tensor:
        """The most promising of some points on the budget, half of them near the best ones, `_RESTARTS x 1 x d`."""
        anywhere = sobol(_RAW // 2, self._box.shape[1], draw_seed(self._seed, number))
        near = sample_points_around_best(improvement, _RAW // 2, _NEAR, self._box)
        points = self._shares.project(torch.cat([anywhere, near]), *self._box)[:, None]
        with torch.no_grad():
            return points[improvement(points).topk(_RESTARTS).indices]


def _process(known: Tensor, values: Tensor) -> SingleTaskGP:
    """The process fitted, or with the modes of its priors where that fails."""
    with warnings.catch_warnings():
        # stopping after some iterations is meant, and equal scores cannot be standardized
        warnings.simplefilter("ignore")
        model = SingleTaskGP(known, values[:, None], outcome_transform=Standardize(1))
        mll = ExactMarginalLogLikelihood(model.likelihood, model)
        try:
            fit_gpytorch_mll(mll, optimizer_kwargs={"options": {"maxiter": _ITERATIONS}})
        except ModelFittingError:
            mll.eval()
    return model
