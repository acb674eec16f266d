"""The modules that stand in for a compressed linear layer, one per form. Needs torch only.

Both take the same arguments, run `... x n` to `... x m`, show `weight` and `bias` like an `nn.Linear`, and can be
multiplied out with `merged`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FactoredLinear(nn.Module):
    """A linear layer whose weight is the product `left @ right` of two thin matrices; `y = left (right x) + bias`."""

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make room for the factors; their values are loaded or assigned later.

        Args:
            in_features: Columns of the weight, n.
            out_features: Rows of the weight, m.
            rank: Columns of `left` (`m x r`) and rows of `right` (`r x n`).
            bias: Whether a bias of `m` values is added.
            device: Device of the factors.
            dtype: Dtype of the factors.
        """
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.right = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.left = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    def forward(self, features: Tensor) -> Tensor:
        """`... x n` to `... x m`."""
        projected: Tensor = self.left(self.right(features))
        return projected

    @staticmethod
    def tensor_names(bias: bool) -> tuple[str, ...]:
        """Names of its tensors in a state dict."""
        return ("right.weight", "left.weight", "left.bias") if bias else ("right.weight", "left.weight")

    @property
    def weight(self) -> Tensor:
        """The product, `m x n`, for code that looks at a weight instead of calling the layer."""
        return self.left.weight @ self.right.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias, `m`, if there is one."""
        return self.left.bias

    def merged(self) -> nn.Linear:
        """The same map as one dense layer, multiplied in fp32 at least."""
        return _dense(_product(self.left.weight, self.right.weight), self.bias, self.left.weight.requires_grad)

    def extra_repr(self) -> str:
        """Shape and rank, for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class _Rows(nn.Linear):
    """`n x tokens` to `m x tokens`; a module of its own, so that whoever moves weights to and fro finds them."""

    def forward(self, columns: Tensor) -> Tensor:
        return self.weight @ columns


class PivotedLinear(nn.Module):
    """A linear layer that stores r rows of its weight, and the other rows as combinations of these.

    `y = cat([pivot x, rest (pivot x)])[order] + bias`: no more multiplications than parameters, and for the same
    parameters a larger rank than two thin matrices have. A feature is a row inside, so that putting the rows in order
    copies whole rows; the result is contiguous like an `nn.Linear`'s, so that a model may `view` it.
    """

    order: Tensor

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make room for the rows; their values are loaded or assigned later.

        Args:
            in_features: Columns of the weight, n.
            out_features: Rows of the weight, m.
            rank: Rows of `pivot` (`r x n`) and columns of `rest` (`(m - r) x r`).
            bias: Whether a bias of `m` values is added.
            device: Device of all tensors.
            dtype: Dtype of all but `order` (`m`, int32), which says where each row is found among pivot rows and rest.
        """
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.pivot = _Rows(in_features, rank, bias=False, device=device, dtype=dtype)
        self.rest = _Rows(rank, out_features - rank, bias=False, device=device, dtype=dtype)
        self.register_buffer("order", torch.arange(out_features, dtype=torch.int32, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    def forward(self, features: Tensor) -> Tensor:
        """`... x n` to `... x m`."""
        pivots = self.pivot(features.reshape(-1, self.in_features).mT)
        rows = torch.cat([pivots, self.rest(pivots)]).index_select(0, self.order)
        if self.bias is not None:
            rows = rows + self.bias[:, None]
        return rows.mT.contiguous().view(*features.shape[:-1], self.out_features)

    @staticmethod
    def tensor_names(bias: bool) -> tuple[str, ...]:
        """Names of its tensors in a state dict."""
        names = ("pivot.weight", "rest.weight", "order")
        return (*names, "bias") if bias else names

    @property
    def weight(self) -> Tensor:
        """The whole weight, `m x n`, for code that looks at a weight instead of calling the layer."""
        pivots = self.pivot.weight
        return torch.cat([pivots, self.rest.weight @ pivots]).index_select(0, self.order)

    def merged(self) -> nn.Linear:
        """The same map as one dense layer, multiplied in fp32 at least."""
        pivots = self.pivot.weight
        weight = torch.cat([pivots, _product(self.rest.weight, pivots)]).index_select(0, self.order)
        return _dense(weight, self.bias, pivots.requires_grad)

    def extra_repr(self) -> str:
        """Shape and rank, for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def _product(left: Tensor, right: Tensor) -> Tensor:
    accurate = torch.promote_types(left.dtype, torch.float32)
    return (left.to(accurate) @ right.to(accurate)).to(left.dtype)


def _dense(weight: Tensor, bias: Tensor | None, requires_grad: bool) -> nn.Linear:
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    dense.weight = nn.Parameter(weight.detach(), requires_grad=requires_grad)
    if bias is not None:
        dense.bias = nn.Parameter(bias.detach(), requires_grad=requires_grad)
    return dense
