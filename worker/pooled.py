"""Covariances of experts that saw too few tokens to have their own.

From t tokens an expert has at most t directions of its inputs, and from none nothing at all; the experts of one layer
and matrix are fed from the same place. So with t below the n directions there are, its second moment is

    (t / n) own + (1 - t / n) pooled,       pooled = the mean over the tokens of all experts of that layer and matrix,

a linear shrinkage as in [LW2004]_ with the weight that the counts give. How often an expert is used stays its own; one
that was never used counts as used once.

.. [LW2004] Ledoit, Wolf, A well-conditioned estimator for large-dimensional covariance matrices, Journal of
   Multivariate Analysis 88, 2004
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ranksearch.search.targets import Target
from ranksearch.worker.calibrate import Calibration


def own_share(tokens: int, size: int) -> float:
    """How much of its own second moment a target keeps.

    Args:
        tokens: Feature vectors it saw.
        size: Their length.
    """
    return min(1.0, tokens / size)


def shrink(own: Tensor, pooled: Tensor, tokens: int) -> Tensor:
    """Moves a second moment from few tokens towards that of its peers.

    Args:
        own: `n x n` mean over the target's own tokens.
        pooled: `n x n` mean over the tokens of its peers.
        tokens: Number of own tokens.

    Returns:
        `n x n`; `own` itself from n tokens on.
    """
    share = own_share(tokens, own.shape[0])
    return own if share == 1 else share * own + (1 - share) * pooled


class Pooled:
    """The covariances of a calibration, those of rarely used experts shrunk towards those of their peers."""

    def __init__(self, calibration: Calibration, targets: Sequence[Target]) -> None:
        """Looks which targets are each other's peers: those of one kind and depth.

        Args:
            calibration: The covariances as they were collected.
            targets: All targets of the model.
        """
        self._calibration = calibration
        self._peers: dict[tuple[str, int], list[str]] = {}
        for target in targets:
            self._peers.setdefault((target.kind, target.depth), []).append(target.name)
        self._known: dict[tuple[int, str, str], Tensor] = {}

    def share(self, target: Target) -> float:
        """Share of the text's tokens that a target sees."""
        return self._seen(target) / self._calibration.total_tokens

    def input(self, target: Target) -> Tensor:
        """`n x n` second moment of a target's inputs, per token that it sees."""
        return self._borrowed(target, "input", self._calibration.inputs)

    def absolute(self, target: Target) -> Tensor:
        """`n` mean sizes of a target's inputs."""
        return self._borrowed(target, "absolute", self._calibration.absolute)

    def mean(self, target: Target) -> Tensor:
        """`n` mean of a target's inputs, its own from the first token on: it is what makes the mean output exact."""
        own = self._calibration.means[self._calibration.leader[target.name]]
        if self._calibration.tokens[target.name] or len(self._names(target)) == 1:
            return own
        return self._mean(target, "mean", self._of_leader(self._calibration.means), weighted=True).to(own)

    def gradient(self, target: Target) -> Tensor:
        """`m x m` second moment of the gradients at a target's output, per token of the text."""
        own, tokens = self._calibration.gradients[target.name], self._calibration.tokens[target.name]
        if self._enough(target, own):
            return own
        pooled = self._mean(target, "gradient", self._calibration.gradients.__getitem__, weighted=False)
        return shrink(own / max(1, tokens) * self._calibration.total_tokens, pooled, tokens) * self.share(target)

    def facts(self, target: Target, *, inputs: bool = True, gradients: bool) -> dict[str, Any]:
        """What a report says: tokens seen and, where there were few, how much is the target's own."""
        tokens = self._calibration.tokens[target.name]
        sizes = {"input": target.in_features} if inputs else {}
        sizes |= {"output": target.out_features} if gradients else {}
        shares = {f"{side}_own_share": own_share(tokens, size) for side, size in sizes.items()}
        alone = len(self._names(target)) == 1
        return {"tokens": tokens, **{key: share for key, share in shares.items() if share < 1 and not alone}}

    def _borrowed(self, target: Target, side: str, moments: Mapping[str, Tensor]) -> Tensor:
        of = self._of_leader(moments)
        own = of(target.name)
        if self._enough(target, own):
            return own
        peers = self._mean(target, side, of, weighted=True)
        return shrink(own, peers, self._calibration.tokens[target.name])

    def _of_leader(self, moments: Mapping[str, Tensor]) -> Callable[[str], Tensor]:
        return lambda name: moments[self._calibration.leader[name]]

    def _names(self, target: Target) -> list[str]:
        return self._peers[target.kind, target.depth]

    def _seen(self, target: Target) -> int:
        return max(self._calibration.tokens[target.name], int(len(self._names(target)) > 1))

    def _enough(self, target: Target, own: Tensor) -> bool:
        return len(self._names(target)) == 1 or self._calibration.tokens[target.name] >= own.shape[0]

    def _mean(self, target: Target, side: str, moment: Callable[[str], Tensor], *, weighted: bool) -> Tensor:
        """Mean per token seen, over the peers; `weighted` where their moments are per token seen already."""
        key = (target.depth, target.kind, side)
        if key not in self._known:
            # targets come layer by layer
            self._known = {other: mean for other, mean in self._known.items() if other[0] == target.depth}
            counts = {name: self._calibration.tokens[name] for name in self._names(target)}
            factor = {name: tokens if weighted else self._calibration.total_tokens for name, tokens in counts.items()}
            total = torch.zeros_like(moment(target.name), dtype=torch.float64)
            for name in counts:
                total += moment(name).double() * factor[name]
            self._known[key] = total / max(1, sum(counts.values()))
        return self._known[key]
