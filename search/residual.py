"""What the learned sensitivities miss: a Gaussian process on a summary of the vector, and its log expected improvement.

The log excess of a vector r is modelled as one `SingleTaskGP`

    y(r) ~ GP( m(r), phi(r) phi(r')^T + k(x(r), x(r')) )

with m and phi from the linearized sensitivities (`SensitivityModel.features`), so that their posterior uncertainty is
kept, and a Matern-5/2 kernel k on x, the tilts of the vector per kind and depth, for interactions between targets.

.. [Ament2023logei] S. Ament, S. Daulton, D. Eriksson, M. Balandat, E. Bakshy. Unexpected Improvements to Expected
   Improvement for Bayesian Optimization. NeurIPS 2023.
"""

from __future__ import annotations

import math
import warnings

import torch
from botorch.acquisition.analytic import LogExpectedImprovement
from botorch.models import SingleTaskGP
from botorch.optim.fit import fit_gpytorch_mll_scipy
from gpytorch.kernels import LinearKernel, MaternKernel, ScaleKernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
from gpytorch.means import Mean
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.priors import LogNormalPrior
from torch import Tensor

_FEWEST = 6
"""Trials below which the kernel of the residual is not fitted."""
_ITERATIONS = 12
_LENGTH = 1.5
"""Median length scale, in units of tilts."""
_WHITE = 0.5
"""Share of the noise that stays white; the rest is the kernel's to explain."""
_MOST_FITTED = 128
"""The fit looks at the best half and the latest half of this many observations; conditioning uses all."""


class _FirstColumn(Mean):  # type: ignore[misc]
    """m(r), which travels as the first input column."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., 0]


def inputs(mean: Tensor, features: Tensor, summary: Tensor) -> Tensor:
    """Columns [m, phi, x] of the process, `m x (1 + p + k)`."""
    return torch.cat([mean[:, None], features, summary], dim=1)


def residual_process(train: Tensor, values: Tensor, deviation: Tensor, width: int) -> SingleTaskGP:
    """Condition the process on observations, with the residual's scale and length of the largest marginal likelihood.

    Args:
        train: `inputs`, `n x (1 + p + k)`.
        values: y, `(n,)`.
        deviation: Known standard deviation of each observation, `(n,)`.
        width: k, the columns of the summary.
    """
    model = _process(train, values, deviation, width)
    if len(train) >= _FEWEST:
        half = _MOST_FITTED // 2
        recent = torch.arange(max(len(values) - half, 0), len(values))
        best = values.argsort(stable=True)[:half]
        chosen = torch.cat([best, recent[~torch.isin(recent, best)]])
        fitted = _process(train[chosen], values[chosen], deviation[chosen], width)
        with warnings.catch_warnings():
            # stopping after a few iterations is meant
            warnings.simplefilter("ignore")
            mll = ExactMarginalLogLikelihood(fitted.likelihood, fitted)
            fit_gpytorch_mll_scipy(mll, options={"maxiter": _ITERATIONS})
        model.covar_module.load_state_dict(fitted.covar_module.state_dict())
    return model.eval()


def _process(train: Tensor, values: Tensor, deviation: Tensor, width: int) -> SingleTaskGP:
    """The process with the kernel's starting values: the residual is as large as the noise."""
    columns = train.shape[1]
    linear = LinearKernel(active_dims=tuple(range(1, columns - width)))
    linear.variance = 1.0
    linear.raw_variance.requires_grad_(False)
    floor = float(deviation.min())
    summary = tuple(range(columns - width, columns))
    matern = MaternKernel(nu=2.5, active_dims=summary, lengthscale_prior=LogNormalPrior(math.log(_LENGTH), 0.5))
    matern.lengthscale = _LENGTH
    scaled = ScaleKernel(matern, outputscale_prior=LogNormalPrior(2 * math.log(floor), 1.5))
    scaled.outputscale = floor**2
    return SingleTaskGP(
        train,
        values[:, None],
        likelihood=FixedNoiseGaussianLikelihood(noise=(_WHITE * deviation).square().clamp_min(1e-8)),
        mean_module=_FirstColumn(),
        covar_module=linear + scaled,
        outcome_transform=None,
    )


def log_improvement(model: SingleTaskGP, candidates: Tensor, best: float) -> Tensor:
    """Log expected improvement [Ament2023logei]_ of each candidate below `best`; `(m,)`."""
    with torch.no_grad():
        found: Tensor = LogExpectedImprovement(model, best_f=best, maximize=False)(candidates[:, None, :])
    return found
