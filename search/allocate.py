"""The closed-form prior and exact weighted water-filling.

Keeping the first r_i components of every target loses about `sum_i E_i(r_i)`, where `E_i(r) = sum_{j > r} sigma_ij^2`
is the tail of target i's spectrum in the metric of its factor bank. Under a linear budget the best vector keeps the
components of the largest value per parameter: one sort over all components of all targets.

Notation:
    d        number of targets
    z        `(d,)`, a log weight per target: the loss to minimize is sum_i exp(z_i) E_i(r_i)
    segment  an indivisible step of one target: a block of `rank_multiple` components, or a jump to dense
    density  loss saved / parameters spent by a segment
    lambda   log of the multiplier: a vector takes all segments with log density + z_i >= lambda

Dense is one more option: from rank r it costs m n - r (m + n) and removes the whole tail. On the concave hull of a
target's (parameters, loss saved) curve the jump starts at the rank r* with the smallest E(r) / (m n - r (m + n)); from
there on the jump is worth more per parameter than any further block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ranksearch.search.errors import NumericalError
from ranksearch.search.space import Floats, Ranks, RankSpace, fill

_RANGE = 80.0
"""Log densities are kept within this distance of the largest; exp(-80) of a component is no component."""
_ROW = 1000.0
"""Distance between the keys of neighbouring rows; larger than `_RANGE` plus any spread of log weights in use."""
_BLOCKED_ROUNDS = 6


@dataclass(frozen=True, kw_only=True)
class _Segments:
    """Segments of `rows` targets, one after the other in flat arrays.

    Attributes:
        keys: `row * _ROW - log density`, ascending over the whole array.
        starts: Index of each row's first segment; `(rows + 1,)`.
        ranks: Rank after a row's first k segments at `starts[row] + row + k`, so a row has one entry more than
            segments.
        costs: Parameters at these ranks.
    """

    keys: Floats
    starts: Ranks
    ranks: Ranks
    costs: Ranks

    def taken(self, rows: Ranks, thresholds: Floats) -> Ranks:
        """Index into `ranks` and `costs` after all segments with log density >= threshold; `(d,)`."""
        found = np.searchsorted(self.keys, rows * _ROW - thresholds, side="right")
        return np.clip(found, self.starts[rows], self.starts[rows + 1]) + rows


class Allocator:
    """Best rank vectors of a space under given spectra and log weights."""

    def __init__(self, space: RankSpace, spectra: Mapping[str, Floats]) -> None:
        """Sort every target's segments once.

        Args:
            space: The rank space.
            spectra: Target name -> singular values in the metric of the factor bank, descending, `(k,)` with k <=
                min(m, n); missing ones are zero.

        Raises:
            NumericalError: A spectrum is missing or not finite; `data` names the target.
        """
        self.space = space
        tails = [_tail(t.name, t.full_rank, spectra) for t in space.targets]
        self._tail_starts = np.concatenate([[0], np.cumsum(space.full_ranks + 1)]).astype(np.int64)
        self._tails = np.concatenate(tails)
        positive = self._tails[self._tails > 0]
        self._tiny = float(positive.max()) * 1e-40 if positive.size else 1e-300
        self._segments = self._sort()

    def tail_loss(self, ranks: Ranks) -> Floats:
        """E_i(r_i), the predicted loss of each target; `(d,)`. Ranks may be `(..., d)`."""
        return np.asarray(self._tails[self._tail_starts[:-1] + ranks])

    def loss(self, ranks: Ranks, log_weights: Floats | None = None) -> float:
        """sum_i exp(z_i) E_i(r_i); z is zero when omitted."""
        weights = 1.0 if log_weights is None else np.exp(log_weights)
        return float(np.sum(weights * self.tail_loss(ranks)))

    def prior(self, kept: float) -> Ranks:
        """The vector that minimizes the predicted loss as the spectra tell it: `waterfill` with equal weights."""
        return self.waterfill(kept, np.zeros(len(self.space.targets)))

    def waterfill(self, kept: float, log_weights: Floats) -> Ranks:
        """The vector that minimizes sum_i exp(z_i) E_i(r_i) within the budget, which it uses exactly from below.

        A bisection on lambda takes whole hull segments. Where the first segment that no longer fits is a jump to
        dense, both ways on are followed (the target stays factored; the target is dense and the others pay) and the
        better one is kept. What is left is filled one allowed rank at a time by value per parameter.

        Args:
            kept: The budget.
            log_weights: z, `(d,)`; a constant added to all changes nothing.

        Raises:
            ImpossibleBudget: No vector meets the budget.
        """
        self.space.check_budget(kept)
        z = np.asarray(log_weights, dtype=np.float64)
        z = np.clip(z - z.mean(), -_RANGE, _RANGE)
        targets = len(self.space.targets)
        rows = np.arange(targets)
        ranks, split = self._fill_hull(kept, z, rows)
        if split is None:
            return self._fill(kept, z, ranks)
        forced = rows.copy()
        forced[split] += 2 * targets
        candidates = [self._follow(kept, z, forced)]
        rows[split] += targets
        candidates.append(self._follow(kept, z, rows))
        return min((c for c in candidates if c is not None), key=lambda c: self.loss(c, z))

    def tilts(self, ranks: Ranks) -> Floats:
        """Log weights z with mean zero under which water-filling gives back these ranks, up to rounding; `(d,)`.

        At the optimum log density_i(r_i) + z_i = lambda for every target, with the density at r_i read between the last
        segment taken and the first one left. A target at its smallest rank or dense only bounds its z from one side
        and gets the value nearest zero.
        """
        space = self.space
        after = self._log_density(ranks, space.next_ranks(ranks))
        before = self._log_density(space.previous_ranks(ranks), ranks)
        dense, low = ranks >= space.full_ranks, ranks <= space.low_ranks
        inner = ~dense & ~low
        if not inner.any():
            return np.zeros(len(ranks))
        here = (before + after) / 2
        level = here[inner].mean()
        z = np.where(low, np.minimum(level - after, 0.0), level - here)
        z = np.where(dense, np.maximum(level - self._jumps, 0.0), z)
        z = np.where(space.low_ranks < space.full_ranks, z, 0.0)
        return np.asarray(z - z.mean())

    def _follow(self, kept: float, z: Floats, rows: Ranks) -> Ranks | None:
        """Water-filling over the given rows; further jumps that do not fit leave their targets factored."""
        targets = len(self.space.targets)
        for _ in range(_BLOCKED_ROUNDS):
            ranks, split = self._fill_hull(kept, z, rows)
            if self.space.cost(ranks) > self.space.budget(kept):
                return None
            if split is None:
                break
            rows = rows.copy()
            rows[split] += targets
        return self._fill(kept, z, ranks)

    def _fill_hull(self, kept: float, z: Floats, rows: Ranks) -> tuple[Ranks, int | None]:
        """All segments above the smallest lambda that fits; and the first target whose jump to dense does not fit."""
        budget, segments = self.space.budget(kept), self._segments
        low, high = self._floor + z.min() - 1, self._ceiling + z.max() + 1
        at_low, at_high = segments.taken(rows, low - z), segments.taken(rows, high - z)
        for _ in range(48):
            if int(segments.costs[at_low].sum()) <= budget:
                return segments.ranks[at_low], None
            middle = (low + high) / 2
            at = segments.taken(rows, middle - z)
            if int(segments.costs[at].sum()) <= budget:
                high, at_high = middle, at
            else:
                low, at_low = middle, at
            if int(np.abs(at_low - at_high).sum()) <= 1:
                break
        ranks, following = segments.ranks[at_high], segments.ranks[at_low]
        jumps = np.flatnonzero((following == self.space.full_ranks) & (ranks < self.space.full_ranks))
        return ranks, int(jumps[0]) if jumps.size else None

    def _fill(self, kept: float, z: Floats, ranks: Ranks) -> Ranks:
        """Use what is left one allowed rank at a time, the largest value per parameter first."""
        return fill(self.space, ranks, kept, lambda r: z + self._log_density(r, self.space.next_ranks(r)))

    def _log_density(self, ranks: Ranks, following: Ranks) -> Floats:
        """Log of loss saved / parameters spent between two vectors, per target; `(d,)`."""
        steps = np.maximum(self.space.costs(following) - self.space.costs(ranks), 1)
        saved = np.maximum(self.tail_loss(ranks) - self.tail_loss(following), self._tiny)
        return np.asarray(np.log(saved / steps))

    def _sort(self) -> _Segments:
        """Rows 0..d-1: hull segments; d..2d-1: blocks only (the jump is blocked); 2d..3d-1: dense, nothing to take."""
        space, keys, starts, ranks, costs = self.space, [], [0], [], []
        everything = [self._blocks(i) for i in range(len(space.targets))]
        hulls = [self._hull(i, blocks) for i, blocks in enumerate(everything)]
        dense = [space.full_ranks[i : i + 1] for i in range(len(space.targets))]
        densities = [self._densities(i % len(dense), path) for i, path in enumerate([*hulls, *everything])]
        flat = np.concatenate(densities)
        self._ceiling = float(flat.max()) if flat.size else 0.0
        self._floor = self._ceiling - _RANGE
        self._jumps = np.array([density[-1] if len(density) else 0.0 for density in densities[: len(dense)]])
        for row, path in enumerate([*hulls, *everything, *dense]):
            target = row % len(dense)
            density = densities[row] if row < len(densities) else np.empty(0)
            keys.append(row * _ROW - np.minimum.accumulate(np.maximum(density, self._floor)))
            starts.append(starts[-1] + len(density))
            ranks.append(path)
            costs.append(self._path_costs(target, path))
        return _Segments(
            keys=np.concatenate(keys),
            starts=np.array(starts, dtype=np.int64),
            ranks=np.concatenate(ranks),
            costs=np.concatenate(costs),
        )

    def _blocks(self, target: int) -> Ranks:
        """The factored ranks of a target, ascending; its full rank where there are none; `(levels,)`."""
        low, top = int(self.space.low_ranks[target]), int(self.space.top_ranks[target])
        return np.arange(low, top + 1, self.space.rank_multiple, dtype=np.int64)

    def _hull(self, target: int, blocks: Ranks) -> Ranks:
        """The ranks on the concave hull: blocks up to r*, then dense; `(levels,)`."""
        full = int(self.space.full_ranks[target])
        if blocks[0] == full:
            return blocks
        tail = self._tails[self._tail_starts[target] + blocks]
        slope = tail / (self.space.dense_costs[target] - self._path_costs(target, blocks))
        return np.append(blocks[: int(np.argmin(slope)) + 1], full)

    def _path_costs(self, target: int, path: Ranks) -> Ranks:
        dense, marginal = int(self.space.dense_costs[target]), int(self.space.marginals[target])
        costs: Ranks = np.where(path == self.space.full_ranks[target], dense, path * marginal)
        return costs

    def _densities(self, target: int, path: Ranks) -> Floats:
        """Log density of each step of a path of ranks; `(levels - 1,)`."""
        saved = -np.diff(self._tails[self._tail_starts[target] + path])
        return np.asarray(np.log(np.maximum(saved, self._tiny) / np.diff(self._path_costs(target, path))))


def _tail(name: str, full_rank: int, spectra: Mapping[str, Floats]) -> Floats:
    """E(r) = sum_{j > r} sigma_j^2 for r = 0..full_rank; `(full_rank + 1,)`, summed from the small end."""
    if name not in spectra:
        raise NumericalError(f"There is no spectrum for target {name}.", target=name)
    squares = np.square(np.asarray(spectra[name], dtype=np.float64)[:full_rank])
    if not np.all(np.isfinite(squares)):
        raise NumericalError(f"The spectrum of target {name} is not finite.", target=name)
    tail = np.zeros(full_rank + 1)
    tail[: len(squares)] = np.cumsum(squares[::-1])[::-1]
    return tail
