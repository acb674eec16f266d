"""Moments of features: pure arithmetic, no hooks and no model.

Notation:
    x: one feature vector, `n`.
    X: a batch of them as rows, `tokens x n`.

Second moments uncentred, as SVD-LLM takes them, or centred within pools of sequences, as Bolaco does [Bolaco2024]_;
first moments of the sizes, as ASVD takes them.

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


class PooledCovariance:
    """Covariances within pools of sequences, averaged over the pools with their tokens as weights [Bolaco2024]_.

    A drift of the mean from pool to pool is in none of them. Within a pool, with c the mean of its first batch, t its
    tokens and d = mean(x) - c,

        covariance = (sum (x - c)(x - c)' - t d d') / (t - 1),

    which loses no digits to a large mean.

    Attributes:
        tokens: Vectors in closed pools.
        mean: `n`, fp32, mean of x; complete after `take_mean`.
    """

    def __init__(self, size: int, *, device: torch.device | str = "cpu") -> None:
        """Allocates a pool and the average.

        Args:
            size: Length n of a feature vector.
            device: Where the features are.
        """
        self.tokens = 0
        self.mean = torch.zeros(size, dtype=torch.float32, device=device)
        self._average = torch.zeros(size, size, dtype=torch.float32, device=device)
        self._open()

    def _open(self) -> None:
        self._pool = Moments(len(self.mean), device=self.mean.device)
        self._centre: Tensor | None = None
        self._sum = torch.zeros_like(self.mean)

    def add(self, X: Tensor) -> None:
        """Adds a batch of feature vectors, `... x n`, to the open pool."""
        X = X.detach().reshape(-1, X.shape[-1]).float()
        if self._centre is None and len(X):
            self._centre = X.mean(0)
        if self._centre is not None:
            self._pool.add(X - self._centre)
            self._sum += (X - self._centre).sum(0)

    def close_pool(self) -> None:
        """Ends a pool; one of fewer than two vectors stays open."""
        tokens = self._pool.tokens
        if tokens < 2 or self._centre is None:
            return
        shift = self._sum / tokens
        covariance = self._pool.take_mean(1).addr_(shift, shift, alpha=-tokens).div_(tokens - 1)
        self.tokens += tokens
        weight = tokens / self.tokens
        self._average.lerp_(covariance, weight)
        self.mean.lerp_(self._centre + shift, weight)
        self._open()

    @property
    def finite(self) -> bool:
        """Whether no NaN or Inf came in."""
        return self._pool.finite and bool(self._average.diagonal().isfinite().all())

    def take_mean(self) -> Tensor:
        """`n x n` average over the pools; zeros if there was none."""
        self.close_pool()
        return self._average


class MeanAbsolute:
    """A running sum of `|x|` in fp32.

    Attributes:
        tokens: Vectors seen so far.
    """

    def __init__(self, size: int, *, device: torch.device | str = "cpu") -> None:
        """Allocates the sum.

        Args:
            size: Length n of a feature vector.
            device: Where the features are.
        """
        self.tokens = 0
        self._sum = torch.zeros(size, dtype=torch.float32, device=device)

    def add(self, X: Tensor) -> None:
        """Adds a batch of feature vectors, `... x n`."""
        X = X.detach().reshape(-1, X.shape[-1])
        self._sum += X.float().abs().sum(0)
        self.tokens += X.shape[0]

    @property
    def finite(self) -> bool:
        """Whether no NaN or Inf came in."""
        return bool(self._sum.isfinite().all())

    def take_mean(self) -> Tensor:
        """`n` mean of |x|, in the memory of the sum."""
        return self._sum.div_(max(1, self.tokens))


class Seen:
    """Only counts, and looks for broken values.

    Attributes:
        tokens: Vectors seen so far.
    """

    def __init__(self) -> None:
        """Nothing seen as yet."""
        self.tokens = 0
        self._finite: list[Tensor] = []

    def add(self, X: Tensor) -> None:
        """Sees a batch of feature vectors, `... x n`."""
        self.tokens += X[..., 0].numel()
        self._finite.append(X.isfinite().all())

    @property
    def finite(self) -> bool:
        """Whether no NaN or Inf came in since this was asked last."""
        asked, self._finite = self._finite, []
        return all(map(bool, asked))
