"""How one weight matrix is factored: components in order, so that the first r are the matrix of rank r."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ranksearch.worker.linalg import DiagonalRoot, Root, check_finite, decompose


@dataclass(frozen=True, kw_only=True)
class Factors:
    """One target, factored at full rank, in fp64.

    Attributes:
        sigma: `k` singular values in the metric, or roots of scores, descending.
        left: `k x m`, transposed.
        right: `k x n`.
        facts: What was done.
    """

    sigma: Tensor
    left: Tensor
    right: Tensor
    facts: dict[str, Any]


def factor(
    W: Tensor,
    C: Root | DiagonalRoot | None = None,
    G: Root | None = None,
    *,
    components: int | None = None,
    name: str = "",
) -> Factors:
    """Factors one matrix in the metric of its roots.

    Components whose singular value vanishes beside the largest are set to zero: nothing is divided by them.

    Args:
        W: `m x n`, fp64.
        C: Root of the input covariance; None for the identity.
        G: Root of the output gradient covariance; None for the identity.
        components: How many are needed with all digits; all when None.
        name: Target to name in an error.
    """
    facts: dict[str, Any] = {}
    for side, root in (("input", C), ("output", G)):
        if root is not None:
            facts |= {f"{side}_{key}": value for key, value in root.facts.items() if key != "damping"}
    unseen = any(root is not None and root.mean_eigenvalue == 0 for root in (C, G))
    if unseen:
        # nothing is known about where this matrix matters: keep its plain factors, at no predicted loss
        C = G = None
        facts["zero_covariance"] = True
    WC = W if C is None else C.times(W)
    svd = decompose(WC if G is None else G.matrix @ WC, components=components, name=name)
    left = svd.Vh @ WC.mT
    right = svd.U.mT @ (W if G is None else G.matrix @ W)
    floor = svd.S[0] * max(W.shape) * torch.finfo(W.dtype).eps
    norms = left.norm(dim=1) * right.norm(dim=1)
    alive = svd.S.gt(floor) & norms.gt(0)
    # left_j right_j / sigma_j, with both vectors of the same norm
    size = torch.where(alive, norms / torch.where(alive, svd.S, 1.0), 0.0).sqrt()
    left = left * (size / left.norm(dim=1).where(alive, left.new_ones(()))).unsqueeze(1)
    right = right * (size / right.norm(dim=1).where(alive, right.new_ones(()))).unsqueeze(1)
    facts |= {"solver": svd.solver, "dropped": int((~alive).sum())}
    return Factors(sigma=torch.zeros_like(svd.S) if unseen else svd.S, left=left, right=right, facts=facts)


def attribute(W: Tensor, gradient: Tensor, *, name: str = "") -> Factors:
    """Takes the plain decomposition, in the order of what each component means for the loss [GRASP2025]_.

    Component i scores `|sigma_i u_i' D v_i|`, the size of the first-order change of the loss when it is left out. In
    the place of singular values stand the roots of the scores, so that a sum of squares is a predicted loss here too.

    Args:
        W: `m x n`, fp64.
        gradient: D, `m x n`, of the mean loss with respect to W.
        name: Target to name in an error.

    .. [GRASP2025] GRASP, https://arxiv.org/abs/2501.00339
    """
    svd = decompose(W, name=name)
    scores = (svd.S * ((svd.U.mT @ gradient.to(W)) * svd.Vh).sum(1)).abs()
    check_finite(scores, "weight gradient", name)
    # where nothing is known the largest components come first
    scores, order = scores.sort(descending=True, stable=True)
    alive = svd.S.gt(svd.S[0] * max(W.shape) * torch.finfo(W.dtype).eps)
    root = torch.where(alive, svd.S, 0.0).sqrt().unsqueeze(1)
    facts: dict[str, Any] = {"zero_gradient": True} if not scores.any() else {}
    facts |= {"solver": svd.solver, "dropped": int((~alive).sum())}
    left, right = (root * svd.U.mT)[order], (root * svd.Vh)[order]
    return Factors(sigma=scores.sqrt(), left=left, right=right, facts=facts)
