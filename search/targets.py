"""Targets: the weight matrices a job may compress, and how to address them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Form = Literal["factored", "pivoted"]
"""How a target below full rank is stored; see `ranksearch.search.space`."""

Metric = Literal["weight", "feature", "two_sided", "centred", "activation", "fisher", "attribution"]
"""The inner product in which truncation error is measured; see `ranksearch.worker.metrics`."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One weight matrix of shape `out_features x in_features`.

    Attributes:
        name: Module path in the model, e.g. `model.layers.3.mlp.down_proj`.
        out_features: Rows, m.
        in_features: Columns, n.
        kind: The path without its block index, the matrix type: `mlp.down_proj`.
        depth: Index of the decoder block, counted from 0.
    """

    name: str
    out_features: int
    in_features: int
    kind: str
    depth: int

    @property
    def parameters(self) -> int:
        """Parameters of the dense matrix, m n."""
        return self.out_features * self.in_features

    @property
    def full_rank(self) -> int:
        """min(m, n); as a rank it means "stored dense"."""
        return min(self.out_features, self.in_features)

    @property
    def marginal(self) -> int:
        """Parameters that one more rank costs in form `factored`, m + n."""
        return self.out_features + self.in_features

    @property
    def break_even(self) -> int:
        """The largest rank whose two factors (form `factored`) hold fewer parameters than the dense matrix."""
        return (self.parameters - 1) // self.marginal

    def largest_rank(self, form: Form) -> int:
        """The largest rank that holds fewer parameters than the dense matrix; 0 when there is none."""
        return self.full_rank - 1 if form == "pivoted" else self.break_even
