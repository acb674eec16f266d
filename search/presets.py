"""Published methods as presets of one pipeline: in which metric each works, and how it chooses ranks.

A preset stands on the same text and evaluation as every other, and on the same factors as every other that works in
its metric, so that a comparison is one of methods. What the publications leave open is filled in as docs/concepts.md
says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from ranksearch.search.targets import Metric

Ways = Literal["search", "closed form", "probes"]
"""How ranks are chosen: by scoring vector after vector; by a formula, in one trial; or by scoring what each target does
to the model on its own, and then in one trial."""

PROBE = "probe"
"""Origin of a trial that measures one target's sensitivity; its vector is off the budget."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One method.

    Attributes:
        description: What it does, and where that was published.
        metric: The metric it works in; None leaves the choice to the spec.
        ranks: How it chooses ranks.
        sampler: The sampler of its search; None leaves the choice to the spec.
    """

    description: str
    metric: Metric | None = None
    ranks: Ways = "search"
    sampler: str | None = None

    @property
    def needs_prior(self) -> bool:
        """Whether the search starts from the closed-form prior; the published ones start from uniform."""
        return self.ranks == "search" and self.sampler is None


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "ranksearch": Preset(description="the prior, then a search that learns how the prior errs"),
        "soco": Preset(description="learned scores choose the components in place of a search (arXiv 2502.15092)"),
        "uniform": Preset(description="the same share of every matrix", ranks="closed form"),
        "svd-llm": Preset(
            description="features whitened, uniform ranks (SVD-LLM, arXiv 2403.07378)",
            metric="feature",
            ranks="closed form",
        ),
        "fwsvd": Preset(
            description="columns weighted by Fisher information, uniform ranks (FWSVD, arXiv 2207.00112)",
            metric="fisher",
            ranks="closed form",
        ),
        "mgaa": Preset(
            description="sublayers by similarity, equal energy within (MGAA, arXiv 2507.03294)",
            metric="feature",
            ranks="closed form",
        ),
        "d-rank": Preset(
            description="layers by effective rank, then ranks of Q and K moved to V (D-Rank, arXiv 2509.25622)",
            metric="feature",
            ranks="closed form",
        ),
        "grasp": Preset(
            description="singular components by first-order loss, in one sort (GRASP, arXiv 2501.00339)",
            metric="attribution",
            ranks="closed form",
        ),
        "asvd": Preset(
            description="each target alone at nine shares, then one threshold (ASVD, arXiv 2312.05821)",
            metric="activation",
            ranks="probes",
        ),
        "dp-knapsack": Preset(
            description="each target alone at ten shares from uniform, then a knapsack (Duo-SVD, arXiv 2510.19385)",
            metric="feature",
            ranks="probes",
        ),
        "evolutionary": Preset(
            description="level switches between targets, the best so far as parent (EvoPress, arXiv 2410.14649)",
            metric="feature",
            sampler="evolutionary",
        ),
        "bolaco": Preset(
            description="Gaussian process over one share per matrix type (Bolaco as released, arXiv 2405.10616)",
            metric="centred",
            sampler="bolaco",
        ),
        "bolaco-20": Preset(
            description="Gaussian process over one share per type and quarter of depth (Bolaco, arXiv 2405.10616)",
            metric="centred",
            sampler="bolaco-20",
        ),
    }
)

UNREFINED: tuple[Metric, ...] = ("centred", "activation", "fisher", "attribution")
"""Metrics whose factors the steps of `method.refine` cannot work with."""
