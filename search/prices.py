"""What ranks cost in decode time: a measured curve per target, in whole picoseconds so that a budget stays exact."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

PICOSECONDS = 1e12  # in a second


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Time of one decode step of one matrix.

    Attributes:
        ranks: Ranks that were measured, ascending, at least one unless the matrix has none below dense.
        times: What they take, ps, never falling.
        dense: What the dense matrix takes, ps.
    """

    ranks: tuple[int, ...]
    times: tuple[int, ...]
    dense: int

    def table(self, full_rank: int) -> npt.NDArray[np.int64]:
        """The price of each rank 0..full_rank, ps; `(full_rank + 1,)`, the last one that of dense.

        Linear between the ranks measured, and constant outside, plus a picosecond per rank: it rises at every step but
        the one to dense.
        """
        ranks = np.arange(full_rank, dtype=np.int64)
        x, y = np.array(self.ranks or (0,), dtype=np.int64), np.array(self.times or (self.dense,), dtype=np.int64)
        before = np.clip(np.searchsorted(x, ranks, side="right") - 1, 0, None)
        after = np.minimum(before + 1, len(x) - 1)
        # floor division of integers: the same on every machine
        slope = (np.clip(ranks, x[0], x[-1]) - x[before]) * (y[after] - y[before])
        return np.append(y[before] + slope // np.maximum(x[after] - x[before], 1) + ranks, max(self.dense, 1))


def as_document(names: Sequence[str], curves: Sequence[Curve]) -> dict[str, Any]:
    """Target -> curve as short JSON; curves that several targets share are written once."""
    distinct = list(dict.fromkeys(curves))
    place = {curve: index for index, curve in enumerate(distinct)}
    return {
        "curves": [{"ranks": list(c.ranks), "times": list(c.times), "dense": c.dense} for c in distinct],
        "targets": {name: place[curve] for name, curve in zip(names, curves, strict=True)},
    }


def read_prices(path: str | None) -> dict[str, Any] | None:
    """The document in a file; None without one."""
    found: dict[str, Any] | None = None if path is None else json.loads(Path(path).read_text("utf-8"))
    return found


def from_document(document: Mapping[str, Any], names: Iterable[str]) -> tuple[Curve, ...]:
    """The curves of these targets; the inverse of `as_document`."""
    distinct = [Curve(ranks=tuple(c["ranks"]), times=tuple(c["times"]), dense=c["dense"]) for c in document["curves"]]
    return tuple(distinct[document["targets"][name]] for name in names)
