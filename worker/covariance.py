"""Pooled second moments of features: pure arithmetic, no hooks and no model.

Notation:
    x: one feature vector, `n`.
    X: a batch of them as rows, `tokens x n`.
    pool: a run of consecutive sequences whose mean is kept, so that moments can be centred within pools (the pooled
        covariance of [Bolaco2024]_) after the pass is over.

.. [Bolaco2024] Ji et al., Adaptive Feature-based Low-Rank Compression of Large Language Models via Bayesian
Optimization,
   Findings of EMNLP 2024, https://arxiv.org/abs/2405.10616
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Sequences per pool.
POOL = 32


class Moments:
    """Running sums of `x x'` and, where pools are given, of `x` per pool; all in fp32.

    Attributes:
        second: `n x n`, sum of x x'.
        sums: `pools x n`, sum of x over each pool; no rows when means are not wanted.
        counts: `pools`, tokens in each pool, on the CPU.
        tokens: Vectors seen so far.
    """

    def __init__(self, size: int, *, pools: int = 0, device: torch.device | str = "cpu") -> None:
        """Allocates the sums.

        Args:
            size: Length n of a feature vector.
            pools: Number of pools to keep means for; 0 keeps none.
            device: Where the features are.
        """
        self.second = torch.zeros(size, size, dtype=torch.float32, device=device)
        self.sums = torch.zeros(pools, size, dtype=torch.float32, device=device)
        self.counts = torch.zeros(pools, dtype=torch.float32)
        self.tokens = 0

    def add(self, X: Tensor, pool: int = 0) -> None:
        """Adds a batch of feature vectors.

        Args:
            X: `... x n`, any float dtype.
            pool: Index of the pool that all of them belong to.
        """
        X = X.detach().reshape(-1, X.shape[-1]).float()
        self.second.addmm_(X.mT, X)
        self.tokens += X.shape[0]
        if len(self.counts):
            self.sums[pool] += X.sum(0)
            self.counts[pool] += X.shape[0]

    @property
    def finite(self) -> bool:
        """Whether no NaN or Inf came in; the diagonal alone shows it."""
        return bool(self.second.diagonal().isfinite().all())

    def mean(self, tokens: int | None = None) -> Tensor:
        """`n x n` mean of x x'.

        Args:
            tokens: What to divide by; the vectors seen when omitted.
        """
        return self.second / max(1, self.tokens if tokens is None else tokens)

    def pool_means(self) -> Tensor:
        """`pools x n` means of x, zero for a pool that saw nothing; no rows when no pools are kept."""
        return self.sums / self.counts.clamp(min=1).to(self.sums.device).unsqueeze(1)


def centred(second: Tensor, means: Tensor, counts: Tensor) -> Tensor:
    """`mean(x x') - sum_p w_p mu_p mu_p'`: the covariance within pools, weighted by their tokens.

    Args:
        second: `n x n` mean of x x' over all pools.
        means: `pools x n`.
        counts: `pools`, tokens in each pool.

    Returns:
        `n x n`, fp64.
    """
    weights = (counts / counts.sum().clamp(min=1)).double().to(means.device)
    M = means.double()
    return second.double() - (M.mT * weights) @ M
