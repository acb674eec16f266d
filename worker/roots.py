"""The roots of C and G that a metric takes of each target, from what a calibration has collected."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import torch

from ranksearch.search.targets import Metric, Target
from ranksearch.worker.calibrate import Calibration
from ranksearch.worker.linalg import DiagonalRoot, Root, diagonal_root, square_root
from ranksearch.worker.pooled import Pooled

#: Metrics whose C is a covariance of the inputs.
COVARIANCE: Final = ("feature", "two_sided", "centred")


class Roots:
    """One target's roots at a time; targets that share their inputs share theirs, if they follow each other."""

    def __init__(
        self, calibration: Calibration, targets: Sequence[Target], *, damping: float, shrinkage: float
    ) -> None:
        """Takes a calibration.

        Args:
            calibration: With what the metric needs.
            targets: All targets of the model.
            damping: Relative eigenvalue clamp.
            shrinkage: Of covariances, as in `square_root`.
        """
        self.calibration = calibration
        self.pooled = Pooled(calibration, targets)
        self._root = partial(square_root, damping=damping, shrinkage=shrinkage)
        self._diagonal = partial(diagonal_root, damping=damping)
        self._last: tuple[str, Root] | None = None

    def input(self, target: Target, metric: Metric, device: torch.device) -> Root | DiagonalRoot | None:
        """Of C; None for the identity."""
        if metric == "activation":
            return self._diagonal(self.pooled.absolute(target).to(device), name=target.name)
        if metric == "fisher":
            return self._diagonal(self.calibration.fisher[target.name].to(device), name=target.name)
        if metric not in COVARIANCE:
            return None
        leader = self.calibration.leader[target.name]
        if self._last is None or self._last[0] != leader:
            self._last = None  # before another one is made
            self._last = leader, self._root(self.pooled.input(target).to(device), name=target.name)
        return self._last[1]

    def output(self, target: Target, metric: Metric, device: torch.device) -> Root | None:
        """Of G; None for the identity."""
        if metric != "two_sided":
            return None
        return self._root(self.pooled.gradient(target).to(device), name=target.name)

    def share(self, target: Target, metric: Metric) -> float:
        """What a squared singular value is multiplied by, so that it is per token of the text."""
        # an expert sees a share of the tokens; gradients are per token, or per sequence, of the text already
        return self.pooled.share(target) if metric in ("feature", "centred", "activation") else 1.0

    def facts(self, target: Target, metric: Metric) -> dict[str, Any]:
        """What a report says."""
        inputs = metric in (*COVARIANCE, "activation")
        seen = self.pooled.facts(target, inputs=inputs, gradients=metric == "two_sided")
        similarity = self.calibration.similarity.get(target.name)
        return seen if metric == "weight" or similarity is None else seen | {"similarity": similarity}
