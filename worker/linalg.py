"""The one place that decides how matrices are decomposed: roots of covariances and singular values.

Policy, for every caller: work in fp64 on a symmetrized matrix; clamp eigenvalues from below relative to their mean;
divide by clamped eigenvalues only, never by a formed inverse; when a LAPACK driver does not converge try the next one;
say in the result what was done. A singular or zero covariance is a fact to record, not an error. Only values that are
not finite are refused.

.. [LW2004] Ledoit, Wolf, A well-conditioned estimator for large-dimensional covariance matrices, Journal of
   Multivariate Analysis 88, 2004
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from ranksearch.search.errors import NumericalError

#: Smallest eigenvalue kept in a root, relative to the mean eigenvalue.
DAMPING = 1e-3

#: Smallest component, relative to the largest, that a Gram matrix still shows: its square is a hundred times eps.
RANGE = 1.5e-7


@dataclass(frozen=True, kw_only=True)
class Root:
    """A damped covariance by its eigenvectors, its symmetric square root, and how it was made.

    Attributes:
        vectors: `n x n`, fp64; one eigenvector per column.
        eigenvalues: `n`, fp64, after the clamp; zeros for a zero matrix.
        damping: Relative clamp that was asked for.
        clamped: Number of eigenvalues raised to the clamp.
        effective_rank: exp of the entropy of the normalized eigenvalues; 0 for a zero matrix.
        mean_eigenvalue: trace / n.
        solver: Name of the decomposition that converged.
    """

    vectors: Tensor
    eigenvalues: Tensor
    damping: float
    clamped: int
    effective_rank: float
    mean_eigenvalue: float
    solver: str

    @cached_property
    def matrix(self) -> Tensor:
        """The square root, `n x n`, fp64."""
        return (self.vectors * self.eigenvalues.sqrt()) @ self.vectors.mT

    def times(self, B: Tensor) -> Tensor:
        """`B C^(1/2)`, for B of `... x n` in fp64."""
        return B @ self.matrix

    def divide(self, B: Tensor) -> Tensor:
        """`B C^-1` of the damped covariance C.

        Args:
            B: `... x n`, fp64.

        Returns:
            `... x n`; zeros where the covariance is zero.
        """
        inverse = torch.where(self.eigenvalues > 0, self.eigenvalues, torch.inf).reciprocal()
        return ((B @ self.vectors) * inverse) @ self.vectors.mT

    @property
    def facts(self) -> dict[str, float | int | str]:
        """What was done, ready for JSON."""
        return {
            "damping": self.damping,
            "clamped": self.clamped,
            "effective_rank": self.effective_rank,
            "mean_eigenvalue": self.mean_eigenvalue,
            "solver": self.solver,
        }


@dataclass(frozen=True, kw_only=True)
class DiagonalRoot:
    """The root of a damped diagonal matrix.

    Attributes:
        eigenvalues: `n`, fp64, the diagonal after the clamp; zeros for a zero matrix.
        damping: Relative clamp that was asked for.
        clamped: Number of values raised to the clamp.
        effective_rank: exp of the entropy of the normalized diagonal; 0 for a zero matrix.
        mean_eigenvalue: Mean of the diagonal.
    """

    eigenvalues: Tensor
    damping: float
    clamped: int
    effective_rank: float
    mean_eigenvalue: float

    def times(self, B: Tensor) -> Tensor:
        """`B C^(1/2)`, for B of `... x n` in fp64."""
        return B * self.eigenvalues.sqrt()

    @property
    def facts(self) -> dict[str, float | int | str]:
        """What was done, ready for JSON."""
        return {
            "damping": self.damping,
            "clamped": self.clamped,
            "effective_rank": self.effective_rank,
            "mean_eigenvalue": self.mean_eigenvalue,
        }


@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """`M = U diag(S) Vh` with singular values in descending order, fp64.

    Attributes:
        U: `m x k`.
        S: `k`.
        Vh: `k x n`.
        solver: Name of the decomposition that converged.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    solver: str


def square_root(covariance: Tensor, *, damping: float = DAMPING, shrinkage: float = 0.0, name: str = "") -> Root:
    """Takes the symmetric root `Q diag(max(e, damping * mean(e)))^(1/2) Q'` of a positive semi-definite matrix.

    Args:
        covariance: `n x n`, any float dtype; only its symmetric part is used.
        damping: Relative clamp; 0 keeps a singular matrix singular.
        shrinkage: Weight s of the mean eigenvalue e in `(1 - s) C + s e I` [LW2004]_, taken before the clamp.
        name: Target to name in an error.

    Returns:
        The root and the facts about it. A zero matrix has a zero root.

    Raises:
        NumericalError: The matrix is not finite, or no solver converged.
    """
    A = covariance.to(torch.float64)
    A = (A + A.mT).div_(2)
    check_finite(A, "covariance", name)
    size = A.shape[0]
    mean = float(A.diagonal().mean())
    if mean <= 0:
        return Root(
            vectors=torch.eye(size, dtype=A.dtype, device=A.device),
            eigenvalues=A.new_zeros(size),
            damping=damping,
            clamped=size,
            effective_rank=0.0,
            mean_eigenvalue=0.0,
            solver="none",
        )
    # dividing by the mean eigenvalue keeps tiny gradient covariances away from the range where drivers lose accuracy
    (eigenvalues, Q), solver = _first_that_converges(A.div_(mean), [("eigh", _eigh), ("svd", _eigh_by_svd)], name)
    eigenvalues = (1 - shrinkage) * eigenvalues + shrinkage
    clamp = max(damping, 0.0)
    raised = eigenvalues.clamp(min=clamp)
    return Root(
        vectors=Q,
        eigenvalues=raised * mean,
        damping=damping,
        clamped=int((eigenvalues < clamp).sum()),
        effective_rank=_effective_rank(eigenvalues),
        mean_eigenvalue=mean,
        solver=solver,
    )


def diagonal_root(diagonal: Tensor, *, damping: float = DAMPING, name: str = "") -> DiagonalRoot:
    """Takes the root of a diagonal matrix, with the clamp of `square_root`.

    Args:
        diagonal: `n` values, none negative.
        damping: Relative clamp.
        name: Target to name in an error.

    Raises:
        NumericalError: A value is not finite.
    """
    d = diagonal.to(torch.float64)
    check_finite(d, "diagonal covariance", name)
    mean = float(d.mean())
    clamp = max(damping, 0.0) * mean
    return DiagonalRoot(
        eigenvalues=d.clamp(min=clamp),
        damping=damping,
        clamped=int((d < clamp).sum()) if mean > 0 else len(d),
        effective_rank=_effective_rank(d) if mean > 0 else 0.0,
        mean_eigenvalue=mean,
    )


def _effective_rank(eigenvalues: Tensor) -> float:
    share = eigenvalues.clamp(min=0)
    share = share / share.sum()
    return float((-torch.special.xlogy(share, share).sum()).exp())


def decompose(matrix: Tensor, *, components: int | None = None, name: str = "") -> Decomposition:
    """Takes the thin singular value decomposition in fp64.

    By the eigenvectors of the smaller Gram matrix where that is safe, at a fraction of the cost: its error in component
    j is of the order `eps (S_0 / S_j)^2`, so it is refused when a component that is needed is smaller than `RANGE` of
    the largest. The very smallest singular values may then lose digits, but never more than `eps S_0`.

    Args:
        matrix: `m x n`, any float dtype.
        components: How many are needed with all digits; all when None.
        name: Target to name in an error.

    Raises:
        NumericalError: The matrix is not finite, or no solver converged.
    """
    M = matrix.to(torch.float64)
    check_finite(M, "matrix", name)
    solvers: list[tuple[str, _Solver]] = [("gram", partial(_svd_by_gram, components=components)), ("svd", _svd)]
    if M.is_cuda:
        solvers += [("gesvd", _gesvd)]
    solvers += [("svd of the transpose", _svd_transposed), ("gram, not all digits", _svd_by_gram)]
    (U, S, Vh), solver = _first_that_converges(M, solvers, name)
    return Decomposition(U=U, S=S, Vh=Vh, solver=solver)


_Solver = Callable[[Tensor], tuple[Tensor, ...]]


def _first_that_converges(
    A: Tensor, solvers: Sequence[tuple[str, _Solver]], name: str
) -> tuple[tuple[Tensor, ...], str]:
    tried = []
    for solver, solve in solvers:
        try:
            parts = solve(A)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            tried.append(f"{solver}: {error}")
            continue
        # a driver may also fail silently
        if all(bool(part.isfinite().all()) for part in parts):
            return tuple(parts), solver
        tried.append(f"{solver}: result not finite")
    raise NumericalError(f"No decomposition of {name or 'the matrix'} converged.", target=name, tried=tried)


def _eigh(A: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.linalg.eigh(A))


def _eigh_by_svd(A: Tensor) -> tuple[Tensor, ...]:
    U, S, Vh = torch.linalg.svd(A)
    # for a symmetric matrix u_i = sign(e_i) v_i
    return S * (U * Vh.mT).sum(0).sign(), U


def _svd(M: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.linalg.svd(M, full_matrices=False))


def _gesvd(M: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.linalg.svd(M, full_matrices=False, driver="gesvd"))


def _svd_transposed(M: Tensor) -> tuple[Tensor, ...]:
    V, S, Uh = torch.linalg.svd(M.mT.contiguous(), full_matrices=False)
    return Uh.mT, S, V.mT


def _svd_by_gram(M: Tensor, components: int | None = 0) -> tuple[Tensor, ...]:
    """Raises LinAlgError when one of the first `components` (all when None) is too small to be had this way."""
    wide = M.shape[0] <= M.shape[1]
    N = M if wide else M.mT
    _, Q = torch.linalg.eigh(N @ N.mT)
    rows = Q.mT @ N
    # norms keep all digits of what the eigenvalues have only half of
    S, order = rows.norm(dim=1).sort(descending=True, stable=True)
    needed = S if components is None else S[:components]
    if len(needed) and not bool(needed[-1] > RANGE * S[0]):
        raise torch.linalg.LinAlgError("the singular values span too wide a range")  # type: ignore[attr-defined]
    Q, rows = Q[:, order], rows[order]
    rows = rows * torch.where(S.gt(0), S, 1.0).reciprocal().unsqueeze(1)
    return (Q, S, rows) if wide else (rows.mT, S, Q.mT)


def check_finite(A: Tensor, what: str, name: str) -> None:
    """Raises NumericalError naming a target where something of it is not finite."""
    if not bool(A.isfinite().all()):
        raise NumericalError(f"The {what} of {name or 'a target'} holds NaN or infinite values.", target=name)
