"""Second moments of features: pure arithmetic, no hooks and no model.

Notation:
    x: one feature vector, `n`.
    X: a batch of them as rows, `tokens x n`.

Uncentred, as SVD-LLM takes them; Bolaco [Bolaco2024]_ centres them within pools of sequences.

.. [Bolaco2024] Ji et al., Adaptive Feature-based Low-Rank Compression of Large Language Models via Bayesian
   Optimization, Findings of EMNLP 2024, https://arxiv.org/abs/2405.10616
"""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """A running sum of `x x'` in fp32.

    Attributes:
        second: `n x n`, sum of x x'.
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
        if X.is_cuda and X.dtype.itemsize == 2:
            # products of 16-bit numbers are exact in fp32, and tensor cores take them at many times the speed of fp32
            self.second += torch.mm(X.mT, X, out_dtype=torch.float32)
        else:
            X = X.float()
            self.second.addmm_(X.mT, X)
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
        return self.second.div_(max(1, self.tokens if tokens is None else tokens))
