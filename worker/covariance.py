"""Second moments of features: pure arithmetic, no hooks and no model.

Notation:
    x: one feature vector, `n`.
    X: a batch of them as rows, `tokens x n`.

Uncentred, as SVD-LLM takes them; Bolaco [Bolaco2024]_ centres them within pools of sequences.

.. [Bolaco2024] Ji et al., Adaptive Feature-based Low-Rank Compression of Large Language Models via Bayesian
   Optimization, Findings of EMNLP 2024, https://arxiv.org/abs/2405.10616
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Below this size half the work saves no time.
SMALL = 512


class Moments:
    """A running sum of `x x'` in fp32.

    Attributes:
        second: `n x n`, sum of x x'; of a large one the lower triangle of blocks only, until the mean is taken.
        tokens: Vectors seen so far.
    """

    def __init__(self, size: int, *, device: torch.device | str = "cpu") -> None:
        """Allocates the sum.

        Args:
            size: Length n of a feature vector.
            device: Where the features are.
        """
        self.second = torch.zeros(size, size, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, X: Tensor) -> None:
        """Adds a batch of feature vectors.

        Args:
            X: `... x n`, any float dtype.
        """
        X = X.detach().reshape(-1, X.shape[-1])
        # products of 16-bit numbers are exact in fp32, and tensor cores take them at many times the speed of fp32
        exact = X.is_cuda and X.dtype.itemsize == 2
        X = X if exact else X.float()
        for start, stop in self._block_rows():
            rows = self.second[start:stop, :stop]
            if exact:
                rows += torch.mm(X[:, start:stop].mT, X[:, :stop], out_dtype=torch.float32)
            else:
                rows.addmm_(X[:, start:stop].mT, X[:, :stop])
        self.tokens += X.shape[0]

    @property
    def finite(self) -> bool:
        """Whether no NaN or Inf came in; the diagonal alone shows it."""
        return bool(self.second.diagonal().isfinite().all())

    def take_mean(self, tokens: int | None = None) -> Tensor:
        """`n x n` mean of x x', in the memory of the sum, which is gone then.

        Args:
            tokens: What to divide by; the vectors seen when omitted.
        """
        for start, stop in self._block_rows():
            self.second[start:stop, stop:] = self.second[stop:, start:stop].mT
        return self.second.div_(max(1, self.tokens if tokens is None else tokens))

    def _block_rows(self) -> Iterator[tuple[int, int]]:
        """Start and stop of each block of rows; four of them are 5/8 of the whole square's work."""
        size = self.second.shape[0]
        step = size if size < SMALL else -(-size // 4 // 64) * 64  # multiples of 64: fast to read on any device
        for start in range(0, size, step):
            yield start, min(start + step, size)
