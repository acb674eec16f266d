"""About a dozen named numbers that stand for a rank vector: what a dashboard can show and a generic sampler can search.

Notation:
    z     log weights per target, `(d,)`; water-filling under z gives a rank vector (see `allocate`)
    tilt  one number per matrix kind, and one for depth: z_i = tilt[kind_i] + tilt[depth] * t_i, with t_i in [-1, 1]

Tilts of zero are the prior. A positive tilt gives a kind (or the deeper blocks) more rank than the spectra alone would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from ranksearch.search.space import Floats, Ranks
from ranksearch.search.targets import Target

BOUND = 1.0
"""Tilts lie within +- this; a factor of exp(1) = 2.7 in loss either way."""
RANKS = "ranks"
"""The trial's user attribute that holds the rank vector itself, packed."""
_MOST_KINDS = 11
DEPTH = "tilt depth"


def kind_names(targets: Sequence[Target]) -> tuple[str, ...]:
    """The kind of each target as the coordinates count it: without expert indices, small ones together as `other`."""
    plain = [".".join(part for part in t.kind.split(".") if not part.isdigit()) for t in targets]
    sizes: dict[str, int] = {}
    for target, kind in zip(targets, plain, strict=True):
        sizes[kind] = sizes.get(kind, 0) + target.parameters
    if len(sizes) > _MOST_KINDS:
        large = sorted(sizes, key=lambda kind: -sizes[kind])[: _MOST_KINDS - 1]
        plain = [kind if kind in large else "other" for kind in plain]
    return tuple(plain)


class Coordinates:
    """Maps named tilts to log weights and back."""

    def __init__(self, targets: Sequence[Target]) -> None:
        """Find the kinds and the depth range.

        Args:
            targets: The targets, in the order of every rank vector.
        """
        kinds = kind_names(targets)
        self.kinds = tuple(dict.fromkeys(kinds))
        self.kind_of: Ranks = np.array([self.kinds.index(kind) for kind in kinds], dtype=np.int64)
        depth = np.array([t.depth for t in targets], dtype=np.float64)
        spread = max(float(np.ptp(depth)), 1.0)
        self.depth: Floats = 2 * (depth - depth.min()) / spread - (1.0 if np.ptp(depth) else 0.0)

    @property
    def names(self) -> tuple[str, ...]:
        """Parameter names, one per kind and one for depth."""
        return (*(f"tilt {kind}" for kind in self.kinds), DEPTH)

    @cached_property
    def one_hot(self) -> Floats:
        """`(d, kinds)`, 1 where target i is of kind k."""
        return np.asarray(np.eye(len(self.kinds))[self.kind_of])

    def log_weights(self, tilts: Mapping[str, float]) -> Floats:
        """z for named tilts, `(d,)`."""
        values = np.array([tilts[name] for name in self.names])
        return np.asarray(self.one_hot @ values[:-1] + self.depth * values[-1])

    def nearest(self, log_weights: Floats) -> Floats:
        """The tilts nearest to z: the mean of each kind and the common slope in depth; `(kinds + 1,)`."""
        slope = self._slope(log_weights)
        return np.append(self._kind_means(log_weights - slope * self.depth), slope)

    def project(self, log_weights: Floats) -> dict[str, float]:
        """The nearest tilts by name, within the bounds."""
        values = np.clip(self.nearest(log_weights), -BOUND, BOUND)
        return {name: round(float(value), 4) for name, value in zip(self.names, values, strict=True)}

    def _kind_means(self, values: Floats) -> Floats:
        return np.asarray(self.one_hot.T @ values / self.one_hot.sum(axis=0))

    def _slope(self, values: Floats) -> float:
        """Least-squares slope in depth within kinds."""
        centred = self.depth - self._kind_means(self.depth)[self.kind_of]
        square = float(centred @ centred)
        return float(centred @ values) / square if square > 0 else 0.0
