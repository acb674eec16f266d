"""The front of a job: what every budget's checkpoint costs in quality, size for size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

#: What is held against the dense model.
ALLOCATIONS: Final = ("uniform", "prior", "final")


@dataclass(frozen=True, kw_only=True)
class Excess:
    """ln(perplexity / dense perplexity), nats per token, and the ends of its 95% interval if it was measured."""

    mean: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Point:
    """One budget; what a report does not know is None or missing.

    Attributes:
        parameters: Of the whole model.
        disk: Bytes of the weights on disk.
        perplexity: Row (dense, uniform, prior, final) -> test perplexity.
        excess: Row (uniform, prior, final) -> excess over the dense model.
        kl: Of the checkpoint, nats per token.
        decode: Tokens per second that the checkpoint writes.
    """

    kept: float
    parameters: int
    disk: int
    perplexity: Mapping[str, float | None]
    excess: Mapping[str, Excess]
    kl: float | None
    decode: float | None

    def dominated_by(self, others: list[Point]) -> Point | None:
        """The best checkpoint that is no larger and no worse than this one, and not both equal; None on the front."""
        mine = self._place
        better = [
            other
            for other in others
            if other._place != mine and all(theirs <= ours for theirs, ours in zip(other._place, mine, strict=True))
        ]
        return min(better, key=lambda other: other._place[::-1], default=None)

    @property
    def _place(self) -> tuple[float, float]:
        """Size and loss; a loss that is not known is the worst."""
        perplexity = self.perplexity.get("final")
        return self.parameters, math.inf if perplexity is None else perplexity


def text_of(report: Mapping[str, Any]) -> str:
    """The text the front is read on: the first test text, or `evaluation` when there is none."""
    texts = (label for budget in report["budgets"] for label in budget["scores"].get("final", {}).get("test") or ())
    return next(texts, "evaluation")


def front(report: Mapping[str, Any]) -> list[Point]:
    """The points of a report, from the largest budget to the smallest."""
    text = text_of(report)
    return sorted((_point(budget, text) for budget in report["budgets"]), key=lambda point: -point.kept)


def _point(budget: Mapping[str, Any], text: str) -> Point:
    rows = {row: _on(scores, text) for row, scores in budget["scores"].items()}
    dense = rows.get("dense", {}).get("perplexity")
    excess = {row: found for row in ALLOCATIONS if (found := _excess(rows.get(row, {}), dense)) is not None}
    return Point(
        kept=budget["kept"],
        parameters=budget["parameters"]["model"],
        disk=budget["bytes"]["disk"],
        perplexity={row: rows.get(row, {}).get("perplexity") for row in ("dense", *ALLOCATIONS)},
        excess=excess,
        kl=rows.get("final", {}).get("kl"),
        decode=((budget.get("speed") or {}).get("after") or {}).get("decode_tokens_per_second"),
    )


def _on(scores: Mapping[str, Any], text: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] | None = scores.get(text) if text == "evaluation" else (scores.get("test") or {}).get(text)
    return found or {}


def _excess(scores: Mapping[str, Any], dense: float | None) -> Excess | None:
    """As reported; from the perplexities in a report older than that."""
    interval = scores.get("excess_interval")
    if scores.get("excess") is not None:
        return Excess(mean=scores["excess"], interval=(interval[0], interval[1]) if interval else None)
    perplexity = scores.get("perplexity")
    return Excess(mean=math.log(perplexity / dense)) if perplexity and dense else None
