"""How the prior errs: a Bayesian model of per-target sensitivities behind a monotone link.

Notation (all tensors float64):
    n, d, q        observations, targets, columns of `Phi`
    E      `n x d` E_ti = predicted tail loss of target i at trial t's rank
    z      `(d,)`  log sensitivities; the prior's error. z ~ N(0, sigma^2 K), K = Phi Phi^T + rho I
    Phi    `d x q` square root of the structured part of K: kind, depth, kind x depth (see `structure`)
    S      `(n,)`  S_t = sum_i exp(z_i) E_ti
    y      `(n,)`  log excess loss
    f      `(n,)`  f_t = alpha + o_g(t) + beta (log S_t - c), the link in logs: a power law
    theta          (z, beta, alpha, o), with o one small offset per sibling study; prior N(theta_0, C)
    J              Jacobian of f by theta; d f_t / d z_i = beta P_ti with the shares P_ti = exp(z_i) E_ti / S_t
    s              standard deviation of y about f, times `spread_t` for trials seen only in part

The posterior is Laplace's: Gauss-Newton steps find the mode, and about it f is linear in theta. All algebra is `n x n`:

    theta <- theta_0 + C J^T A^-1 r,   r = y - f + J (theta - theta_0),   A = J C J^T + s^2 diag(spread^2)

so the cost grows linearly with the number of targets. sigma and s maximize the evidence log N(r; 0, A) plus weak
log-normal priors. Draws follow Matheron's rule: a draw from the prior plus the same update of what it missed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ranksearch.search.coordinates import Coordinates
from ranksearch.search.space import Floats

_SHARES = {"kind": 0.3, "depth": 0.15, "both": 0.25, "alone": 0.3}
"""Shares of the variance of z, in the order: common to a kind, to a depth, to a kind near a depth, to one target."""
_DEPTH_SCALE = 0.5
"""Correlation length in depth, where the model spans [-1, 1]."""
_SIGMAS = (0.2, 0.35, 0.5, 0.7, 1.0, 1.4)
_NOISES = (0.003, 0.01, 0.03, 0.1, 0.3)
_SIGMA_PRIOR = (0.6, 0.5)
_NOISE_PRIOR = (0.02, 1.5)
"""Median and log standard deviation of the hyperpriors."""
_BETA = (1.0, 0.3)
_ALPHA_SPREAD = 5.0
_OFFSET_SPREAD = 0.15
_STEPS = 12
_CHOOSING = (0, 2, 5)
_TINY = 1e-12


def structure(coordinates: Coordinates) -> tuple[Tensor, float]:
    """The prior correlation of sensitivities.

    K = .3 [same kind] + .15 k(depth) + .25 [same kind] k(depth) + .3 I with a squared-exponential k, whose
    eigenvectors below 1e-3 of the largest are left out.

    Returns:
        `Phi`, `d x q`, and `rho`.
    """
    depth = torch.as_tensor(coordinates.depth, dtype=torch.float64)
    levels, index = torch.unique(depth, return_inverse=True)
    gaps = (levels[:, None] - levels[None, :]) / _DEPTH_SCALE
    values, vectors = torch.linalg.eigh(torch.exp(-0.5 * gaps.square()))
    large = values > 1e-3 * values.max()
    smooth = (vectors[:, large] * values[large].sqrt())[index]
    kind = torch.as_tensor(coordinates.one_hot, dtype=torch.float64)
    both = (kind[:, :, None] * smooth[:, None, :]).flatten(1)
    parts = [_SHARES["kind"] ** 0.5 * kind, _SHARES["depth"] ** 0.5 * smooth, _SHARES["both"] ** 0.5 * both]
    return torch.cat(parts, dim=1), _SHARES["alone"]


@dataclass(frozen=True, kw_only=True)
class Observations:
    """What was measured.

    Attributes:
        tails: E, `n x d`.
        values: y, log excess losses, `(n,)`.
        spread: How many times wider than s an observation scatters, `(n,)`; 1 for complete trials.
        group: 0 for the study itself, 1.. for sibling studies, `(n,)`.
    """

    tails: Tensor
    values: Tensor
    spread: Tensor
    group: Tensor


class SensitivityModel:
    """The posterior of theta given observations."""

    def __init__(self, coordinates: Coordinates, observations: Observations) -> None:
        """Find the mode and the hyperparameters.

        Args:
            coordinates: Kind and depth of every target.
            observations: At least one.
        """
        self._phi, self._rho = structure(coordinates)
        self._seen = observations
        self._groups = int(observations.group.max()) + 1
        self._unit = max(float(observations.tails.sum(dim=1).median()), 1e-300)
        self.z = torch.zeros(self._phi.shape[0], dtype=torch.float64)
        self._linear = torch.zeros(1 + self._groups, dtype=torch.float64)
        self._center = float(torch.log(self._sums(observations.tails)).mean())
        self._origin = torch.zeros_like(self._linear)
        self._origin[0], self._origin[1] = _BETA[0], float(observations.values.mean())
        self._linear = self._origin.clone()
        self._scales = torch.full_like(self._linear, _OFFSET_SPREAD)
        self._scales[0], self._scales[1] = _BETA[1], _ALPHA_SPREAD
        self.sigma, self.noise = _SIGMA_PRIOR[0], _NOISE_PRIOR[0]
        self._fit()

    def predict(self, tails: Tensor) -> Tensor:
        """f at the mode for vectors of this study; `(m, d)` tail losses -> `(m,)` log excess."""
        return self._link(tails, self._design(tails, None))

    def features(self, tails: Tensor, group: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The linearized model as a Gaussian process: mean m and features phi with f ~ N(m, phi phi^T) a priori.

        Args:
            tails: `m x d`.
            group: Study of each row, `(m,)`; this study when omitted.

        Returns:
            m(r) = f(r; mode) - J (mode - theta_0), `(m,)`, and phi = J C^(1/2), `m x (q + d + 1 + groups)`.
        """
        jacobian, design = self._jacobian(tails, group)
        step = jacobian @ self.z + design @ (self._linear - self._origin)
        mean = self._link(tails, design) - step
        alone = self._rho**0.5 * self.sigma * jacobian
        return mean, torch.cat([self.sigma * jacobian @ self._phi, alone, design * self._scales], dim=1)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` draws of z from the posterior, `count x d`."""
        d, q = self._phi.shape
        normal = [torch.randn(count, k, dtype=torch.float64, generator=generator) for k in (q, d, len(self._linear))]
        z = self.sigma * (normal[0] @ self._phi.T + self._rho**0.5 * normal[1])
        linear = normal[2] * self._scales
        jacobian, design = self._jacobian(self._seen.tails, self._seen.group)
        residual = self._residual(jacobian, design)
        scatter = torch.randn(count, len(residual), dtype=torch.float64, generator=generator) * self._deviation()
        missed = residual - z @ jacobian.T - linear @ design.T - scatter
        weights = torch.cholesky_solve(missed.T, self._factor(jacobian, design)).T
        draws: Tensor = z + self.sigma**2 * self._prior_times(weights @ jacobian)
        return draws

    def _fit(self) -> None:
        """Gauss-Newton with halved steps; hyperparameters at the first steps and once more near the mode."""
        objective = float("inf")
        duals = torch.zeros_like(self.z)
        for step in range(_STEPS):
            jacobian, design = self._jacobian(self._seen.tails, self._seen.group)
            residual = self._residual(jacobian, design)
            if step in _CHOOSING:
                before_sigma = self.sigma
                self._choose(jacobian, design, residual)
                duals = duals * (before_sigma / self.sigma) ** 2
                objective = self._objective(duals)
            weights = torch.cholesky_solve(residual[:, None], self._factor(jacobian, design))[:, 0]
            target = (jacobian.T @ weights, self._origin + self._scales.square() * (design.T @ weights))
            before = (duals, self._linear)
            for size in (1.0, 0.5, 0.25, 0.1):
                duals = before[0] + size * (target[0] - before[0])
                self._linear = before[1] + size * (target[1] - before[1])
                self._linear[0].clamp_(0.2, 4.0)
                self.z = self.sigma**2 * self._prior_times(duals)
                found = self._objective(duals)
                if found <= objective:
                    break
            moved, objective = objective - found, found
            if step > 6 and abs(moved) < 1e-6:
                break

    def _objective(self, duals: Tensor) -> float:
        """Minus the log posterior; `duals` = C_z^-1 z."""
        f = self._link(self._seen.tails, self._design(self._seen.tails, self._seen.group))
        misfit = ((self._seen.values - f) / self._deviation()).square().sum()
        shift = ((self._linear - self._origin) / self._scales).square().sum()
        return 0.5 * float(misfit + duals @ self.z + shift)

    def _choose(self, jacobian: Tensor, design: Tensor, residual: Tensor) -> None:
        """sigma and s of the largest evidence over a grid, from one eigendecomposition.

        With rows divided by their spread and J_z K J_z^T = Q diag(l) Q^T, every A of the grid is Q (B + W W^T) Q^T
        with B = sigma^2 diag(l) + s^2 I and W the scaled linear columns; the matrix inversion and determinant lemmas
        do the rest.
        """
        rows = self._seen.spread[:, None]
        shape, alone = (jacobian @ self._phi) / rows, jacobian / rows
        values, vectors = torch.linalg.eigh(shape @ shape.T + self._rho * alone @ alone.T)
        columns = vectors.T @ (design * self._scales / rows)
        target = vectors.T @ (residual / self._seen.spread)
        sigmas, noises = (grid.flatten() for grid in torch.meshgrid(_double(_SIGMAS), _double(_NOISES), indexing="ij"))
        diagonal = sigmas[:, None] ** 2 * values.clamp_min(0.0) + noises[:, None] ** 2
        inner = torch.einsum("ni,gn,nj->gij", columns, 1 / diagonal, columns) + torch.eye(columns.shape[1])
        factor = torch.linalg.cholesky(inner)
        crossed = torch.einsum("ni,gn,n->gi", columns, 1 / diagonal, target)
        explained = torch.linalg.solve_triangular(factor, crossed[:, :, None], upper=False).square().sum(dim=(1, 2))
        evidence = -0.5 * (diagonal.log().sum(dim=1) + (target.square() / diagonal).sum(dim=1) - explained)
        evidence -= factor.diagonal(dim1=1, dim2=2).log().sum(dim=1)
        for grid, (median, width) in ((sigmas, _SIGMA_PRIOR), (noises, _NOISE_PRIOR)):
            evidence -= 0.5 * ((grid / median).log() / width).square()
        best = int(evidence.argmax())
        self.sigma, self.noise = float(sigmas[best]), float(noises[best])

    def _factor(self, jacobian: Tensor, design: Tensor) -> Tensor:
        """Cholesky factor of A, `n x n`."""
        shape = jacobian @ self._phi
        kernel = self.sigma**2 * (shape @ shape.T + self._rho * jacobian @ jacobian.T)
        kernel += (design * self._scales.square()) @ design.T
        factor: Tensor = torch.linalg.cholesky(kernel + torch.diag(self._deviation().square()))
        return factor

    def _residual(self, jacobian: Tensor, design: Tensor) -> Tensor:
        """r = y - f + J (theta - theta_0), `(n,)`."""
        step = jacobian @ self.z + design @ (self._linear - self._origin)
        return self._seen.values - self._link(self._seen.tails, design) + step

    def _deviation(self) -> Tensor:
        return self.noise * self._seen.spread

    def _sums(self, tails: Tensor) -> Tensor:
        """S, `(m,)`, in units of the median prediction."""
        return (tails @ self.z.exp() / self._unit).clamp_min(_TINY)

    def _link(self, tails: Tensor, design: Tensor) -> Tensor:
        return design @ self._linear

    def _design(self, tails: Tensor, group: Tensor | None) -> Tensor:
        """Columns of f that are linear in beta, alpha and the offsets; `m x (1 + groups)`."""
        design = torch.zeros(len(tails), 1 + self._groups, dtype=torch.float64)
        design[:, 0] = torch.log(self._sums(tails)) - self._center
        design[:, 1] = 1.0
        if group is not None and self._groups > 1:
            design[:, 2:] = torch.nn.functional.one_hot(group, self._groups)[:, 1:].double()
        return design

    def _jacobian(self, tails: Tensor, group: Tensor | None) -> tuple[Tensor, Tensor]:
        """The columns of J for z, `m x d`, and for beta, alpha, o, `m x (1 + groups)`."""
        shares = tails * self.z.exp() / (self._unit * self._sums(tails))[:, None]
        return self._linear[0] * shares, self._design(tails, group)

    def _prior_times(self, rows: Tensor) -> Tensor:
        """K rows^T, row by row; `(..., d)` -> `(..., d)`."""
        return (rows @ self._phi) @ self._phi.T + self._rho * rows


def _double(values: tuple[float, ...] | Floats) -> Tensor:
    return torch.as_tensor(np.asarray(values), dtype=torch.float64)
