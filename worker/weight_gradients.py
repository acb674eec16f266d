"""Sums over the gradients of weights that nobody keeps: pure arithmetic, no hooks and no model.

Notation:
    X: inputs of a linear layer as rows, `tokens x n`.
    Y: gradients of the summed loss at its outputs, `tokens x m`.

The gradient of the loss with respect to the layer's weight is then `Y' X`, `m x n`.
"""

from __future__ import annotations

import torch
from torch import Tensor


class WeightGradient:
    """The gradient of the summed loss of a text."""

    def __init__(self, rows: int, columns: int, *, device: torch.device | str = "cpu") -> None:
        """Allocates the sum.

        Args:
            rows: Of the weight, m.
            columns: Of the weight, n.
            device: Where the layer computes.
        """
        self._sum = torch.zeros(rows, columns, dtype=torch.float32, device=device)

    def expect(self) -> None:
        """One more call of the layer will bring its gradient: nothing to prepare."""

    def add(self, X: Tensor, Y: Tensor) -> None:
        """Adds a batch: inputs `... x n` and output gradients `... x m` of one call."""
        X, Y = _rows(X), _rows(Y)
        self._sum.addmm_(Y.mT, X)

    def close_batch(self) -> None:
        """Ends a batch: nothing to do, as the gradient of a sum is the sum of gradients."""

    @property
    def finite(self) -> bool:
        """Whether no NaN or Inf came in."""
        return bool(self._sum.sum().isfinite())

    def take_mean(self, count: int) -> Tensor:
        """`m x n`, the sum divided by a count of tokens, in the memory of the sum."""
        return self._sum.div_(max(1, count))


class SquaredWeightGradient:
    """Per column of the weight, the squared gradient of the summed loss of a sequence, summed over rows and sequences.

    A batch must be one sequence. Its `m x n` gradient exists only while the layer's gradients come in.
    """

    def __init__(self, columns: int, *, device: torch.device | str = "cpu") -> None:
        """Allocates the sum.

        Args:
            columns: Of the weight, n.
            device: Where the layer computes.
        """
        self._sum = torch.zeros(columns, dtype=torch.float32, device=device)
        self._open: Tensor | None = None
        self._expected = 0

    def expect(self) -> None:
        """One more call of the layer in this sequence will bring its gradient."""
        self._expected += 1

    def add(self, X: Tensor, Y: Tensor) -> None:
        """Adds inputs `... x n` and output gradients `... x m` of one call; the last one expected ends the sequence."""
        X, Y = _rows(X), _rows(Y)
        self._open = Y.mT @ X if self._open is None else self._open.addmm_(Y.mT, X)
        self._expected -= 1
        if self._expected == 0:
            self.close_batch()

    def close_batch(self) -> None:
        """Ends a sequence, should a call not have brought the gradient that was expected of it."""
        if self._open is not None:
            self._sum += self._open.square().sum(0)
        self._open, self._expected = None, 0

    @property
    def finite(self) -> bool:
        """Whether no NaN or Inf came in."""
        return bool(self._sum.isfinite().all())

    def take_mean(self, count: int) -> Tensor:
        """`n`, the sum divided by a count of sequences, in the memory of the sum."""
        return self._sum.div_(max(1, count))


def _rows(X: Tensor) -> Tensor:
    return X.detach().reshape(-1, X.shape[-1]).float()
