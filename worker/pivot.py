"""Form `pivoted`: a rank-r matrix written as r of its rows and the other rows as combinations of these [PIFA2025]_.

Let W = left right be `m x n` of rank r, P its pivot rows and Q the others. Then

    B = W[P]                      `r x n`
    W[Q] = A B                    A `(m - r) x r`, the coefficients

holds exactly, with r (m + n - r) numbers where two factors have r (m + n). How well it survives rounding depends on the
choice of P: coefficients much larger than 1 magnify the error of B and of B x. A choice of locally maximal volume
[Goreinov2010]_ keeps every one below a bound: wherever |A_ij| is larger, row i takes the place of pivot j, which
multiplies the volume of the pivot rows by |A_ij|. B is then rounded, and the coefficients are fitted anew to the
rounded rows.

.. [PIFA2025] PIFA, https://arxiv.org/abs/2501.19090
.. [Goreinov2010] S. A. Goreinov, I. V. Oseledets, D. V. Savostyanov, E. E. Tyrtyshnikov, N. L. Zamarashkin. How to find
   a good submatrix. Matrix Methods: Theory, Algorithms and Applications, 2010.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ranksearch.worker.linalg import decompose

#: Largest coefficient that is left alone. An exchange costs little, and few are needed after the LU decomposition.
BOUND = 1.1


@dataclass(frozen=True, kw_only=True)
class Pivoted:
    """A rank-r matrix in form `pivoted`: `torch.cat([pivot, rest @ pivot])[order]`.

    Attributes:
        pivot: The pivot rows B, `r x n`, fp64.
        rest: Coefficients A of the other rows, `(m - r) x r`, fp64.
        order: Place of each row of the matrix among pivot rows and others, `m`, int32.
    """

    pivot: Tensor
    rest: Tensor
    order: Tensor


def pivot(left: Tensor, right: Tensor, dtype: torch.dtype = torch.float64, *, name: str = "") -> Pivoted:
    """Re-writes the product of two factors.

    Where the product has a rank k below r (components that are zero, say), k rows are chosen as above and the other
    r - k pivot rows are those that the first k would represent with the largest coefficients; nothing is divided by
    what vanishes.

    Args:
        left: `m x r`, any float dtype.
        right: `r x n`, with r < m.
        dtype: What the result will be rounded to; the coefficients are those for rounded pivot rows.
        name: Target to name in an error.

    Raises:
        NumericalError: A factor is not finite, or no decomposition converged.
    """
    L, R = left.to(torch.float64), right.to(torch.float64)
    m, r = L.shape
    # the row space of W in an orthonormal basis: its rows are those of L T', up to a rotation
    T = torch.linalg.qr(R.mT, mode="r").R
    svd = decompose(L @ T.mT, name=name)
    floor = svd.S[0] * max(m, R.shape[1]) * torch.finfo(torch.float64).eps
    rank = int(svd.S.gt(floor).sum())
    pivots, coefficients = _maximal_volume(svd.U[:, :rank], r)
    others = torch.ones(m, dtype=torch.bool, device=L.device)
    others[pivots] = False
    A = coefficients[others]
    B = L[pivots] @ R
    A = A + _compensation(A, B, B.to(dtype).to(torch.float64), torch.finfo(dtype).eps)
    order = torch.cat([pivots, others.nonzero()[:, 0]]).argsort()
    return Pivoted(pivot=B, rest=A, order=order.to(torch.int32))


def _maximal_volume(basis: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Chooses pivot rows; after as many exchanges as there are rows, larger coefficients stay.

    Args:
        basis: Orthonormal columns, `m x k`.
        count: How many pivot rows to choose, at least k.

    Returns:
        The rows chosen, `count`; and the coefficients of all rows, `m x count`, zero beyond the first k.
    """
    m, rank = basis.shape
    if rank == 0:
        return torch.arange(count, device=basis.device), basis.new_zeros(m, count)
    pivots = _first_pivots(basis)
    coefficients = torch.linalg.solve(basis[pivots], basis, left=False)
    for _ in range(rank):
        place = int(coefficients.abs().argmax())
        row, column = divmod(place, rank)
        if coefficients[row, column].abs() <= BOUND:
            break
        update = coefficients[row].clone()
        update[column] -= 1
        coefficients -= torch.outer(coefficients[:, column] / coefficients[row, column], update)
        pivots[column] = row
    sizes = coefficients.norm(dim=1)
    sizes[pivots] = -1.0
    extra = sizes.topk(count - rank).indices
    return torch.cat([pivots, extra]), torch.nn.functional.pad(coefficients, (0, count - rank))


def _first_pivots(basis: Tensor) -> Tensor:
    """The rows that an LU decomposition with partial pivoting exchanges to the top, `k`."""
    order = list(range(basis.shape[0]))
    for row, other in enumerate(torch.linalg.lu_factor(basis).pivots.tolist()):
        order[row], order[other - 1] = order[other - 1], order[row]
    return torch.tensor(order[: basis.shape[1]], device=basis.device)


def _compensation(A: Tensor, B: Tensor, rounded: Tensor, eps: float) -> Tensor:
    """What to add to A so that it fits the rounded pivot rows B'.

    Least squares |(A + D) B' - A B|^2 + |D diag(mu)|^2. The ridge mu, what rounding to relative precision `eps` does to
    each pivot row, keeps D as small as the rounding of A itself where the pivot rows nearly depend on each other.
    """
    if torch.equal(B, rounded) or not bool(rounded.isfinite().all()):
        return torch.zeros_like(A)
    norms = B.norm(dim=1)
    ridge = eps * norms.where(norms > 0, norms.new_ones(()))
    system = torch.cat([rounded, ridge.diag()], dim=1)
    wanted = torch.cat([A @ (B - rounded), torch.zeros_like(A)], dim=1)
    change: Tensor = torch.linalg.lstsq(system.mT, wanted.mT).solution.mT
    return change
