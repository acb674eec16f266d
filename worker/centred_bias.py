"""The bias of a target whose factors approximate its outputs about their mean [AFM2023]_.

.. [AFM2023] Yu, Wu, Compressing Transformers: Features Are Low-Rank, but Weights Are Not!, AAAI 2023
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CentredBias:
    """`b + (W - left right) mean`: the mean output is exact whatever the factors lack.

    Attributes:
        mean: Of the inputs, `n`.
    """

    def __init__(self, dense: nn.Linear, mean: Tensor) -> None:
        """Multiplies the mean out, which every rank needs.

        Args:
            dense: The layer, W `m x n` with or without b.
            mean: Mean of its inputs, `n`.
        """
        weight = dense.weight.detach()
        self._like = weight.new_empty(0)
        self.mean = mean.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        self._output = weight.to(self.mean) @ self.mean
        if dense.bias is not None:
            self._output += dense.bias.detach()

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        """`m`, in the layer's dtype and on its device, of factors `m x r` and `r x n`."""
        mean = self.mean.to(right.device)
        kept = left.to(mean) @ (right.to(mean) @ mean)
        return (self._output - kept.to(self._output)).to(self._like)
