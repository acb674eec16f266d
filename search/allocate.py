"""The closed-form prior and exact weighted water-filling.

Keeping the first r_i components of every target loses about `sum_i E_i(r_i)`, where `E_i(r) = sum_{j > r} sigma_ij^2`
is the tail of target i's spectrum in the metric of its factor bank. Under a linear budget the best vector keeps the
components of the largest value per parameter: one sort over all components of all targets.

Notation:
    d        number of targets
    z        `(d,)`, a log weight per target: the loss to minimize is sum_i exp(z_i) E_i(r_i)
    segment  an indivisible step of one target: a block of `rank_multiple` components, or a jump over several of them
    density  loss saved / parameters spent by a segment
    lambda   log of the multiplier: a vector takes all segments with log density + z_i >= lambda

Value per parameter need not fall along a target's path: dense removes the whole tail at once, and in form `pivoted`
each rank costs less than the one before, m + n - 2r - 1. So segments are those of the concave hull of the target's
(parameters, loss saved) points; a hull segment that passes over several ranks is a jump.
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
_STEPWISE_ROUNDS = 6
_NEGLIGIBLE = 1 / 4000
"""A jump smaller than this share of the budget is not worth a second look when it does not fit."""


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

        A bisection on lambda takes whole hull segments. Where the first segment that no longer fits is a jump over
        several ranks, three ways on are followed (the target takes what is left; it goes up rank by rank after all; it
        jumps and the others pay) and the best one is kept. What is left is filled one allowed rank at a time by value
        per parameter.

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
        rows, pins = np.arange(targets), np.full(targets, -1)
        ranks, jump = self._fill_hull(kept, z, rows, pins)
        if jump is None:
            return self.fill(ranks, kept, z)
        target, landing = jump
        stepwise, landed = rows.copy(), pins.copy()
        stepwise[target] += targets
        landed[target] = landing
        candidates = [
            self.fill(self._stretch(kept, ranks, target), kept, z),
            self._follow(kept, z, stepwise, pins),
            self._follow(kept, z, rows, landed),
        ]
        return min((c for c in candidates if c is not None), key=lambda c: self.loss(c, z))

    def fill(self, ranks: Ranks, kept: float, log_weights: Floats | None = None) -> Ranks:
        """Use what is left of the budget one allowed rank at a time, the largest value per parameter first.

        Args:
            ranks: A feasible vector.
            kept: The budget.
            log_weights: z, `(d,)`; zero when omitted.
        """
        z = 0.0 if log_weights is None else log_weights
        return fill(self.space, ranks, kept, lambda r: z + self._log_density(r, self.space.next_ranks(r)))

    def tilts(self, ranks: Ranks) -> Floats:
        """Log weights z with mean zero under which water-filling gives back these ranks, up to rounding; `(d,)`.

        At the optimum log density_i(r_i) + z_i = lambda for every target, with the density at r_i read between the hull
        segments before and after it; inside a segment it is that segment's own. A target at its smallest rank or dense
        only bounds its z from one side and gets the value nearest zero.
        """
        space = self.space
        dense, low = ranks >= space.full_ranks, ranks <= space.low_ranks
        inner = ~dense & ~low
        if not inner.any():
            return np.zeros(len(ranks))
        before, after = self._hull_densities(ranks)
        here = (before + after) / 2
        level = here[inner].mean()
        z = np.where(low, np.minimum(level - after, 0.0), level - here)
        z = np.where(dense, np.maximum(level - before, 0.0), z)
        z = np.where(space.low_ranks < space.full_ranks, z, 0.0)
        return np.asarray(z - z.mean())

    def _hull_densities(self, ranks: Ranks) -> tuple[Floats, Floats]:
        """Log density of the hull segments that end and begin at each rank, or hold it; `(d,)` each."""
        rows, starts = np.arange(len(ranks)), self._segments.starts
        place = np.searchsorted(self._vertices, rows * self._row_width + ranks, side="right") - 1
        inside = self._vertices[place] < rows * self._row_width + ranks
        segment = place - rows
        last = np.maximum(starts[rows + 1] - 1, starts[rows])
        before = np.clip(np.where(inside, segment, segment - 1), starts[rows], last)
        after = np.clip(segment, starts[rows], last)
        density = rows * _ROW - self._segments.keys[np.minimum([before, after], len(self._segments.keys) - 1)]
        return density[0], density[1]

    def _follow(self, kept: float, z: Floats, rows: Ranks, pins: Ranks) -> Ranks | None:
        """Water-filling over the given rows; targets whose further jumps do not fit go up rank by rank."""
        targets = len(self.space.targets)
        for _ in range(_STEPWISE_ROUNDS):
            ranks, jump = self._fill_hull(kept, z, rows, pins)
            if self.space.cost(ranks) > self.space.budget(kept):
                return None
            if jump is None:
                break
            if rows[jump[0]] >= targets:
                ranks = self._stretch(kept, ranks, jump[0])
                break
            rows = rows.copy()
            rows[jump[0]] += targets
        return self.fill(ranks, kept, z)

    def _fill_hull(self, kept: float, z: Floats, rows: Ranks, pins: Ranks) -> tuple[Ranks, tuple[int, int] | None]:
        """All segments above the smallest lambda that fits.

        Args:
            kept: The budget.
            z: Log weights.
            rows: The row of each target, `(d,)`.
            pins: Place in `_Segments.ranks` of targets that are settled, or -1; `(d,)`.

        Returns:
            The ranks; and the first target whose next segment jumps over several ranks, does not fit and is not
            negligible, with the place where it would land.
        """
        budget, segments = self.space.budget(kept), self._segments
        low, high = self._floor + z.min() - 1, self._ceiling + z.max() + 1

        def at(level: float) -> Ranks:
            return np.where(pins < 0, segments.taken(rows, level - z), pins)

        at_low, at_high = at(low), at(high)
        for _ in range(48):
            if int(segments.costs[at_low].sum()) <= budget:
                return segments.ranks[at_low], None
            middle = (low + high) / 2
            at_middle = at(middle)
            if int(segments.costs[at_middle].sum()) <= budget:
                high, at_high = middle, at_middle
            else:
                low, at_low = middle, at_middle
            if int(np.abs(at_low - at_high).sum()) <= 1:
                break
        # segments of equal density: the first targets take theirs as long as they fit
        steps = np.cumsum(segments.costs[at_low] - segments.costs[at_high])
        at_high = np.where(steps <= budget - segments.costs[at_high].sum(), at_low, at_high)
        ranks, following = segments.ranks[at_high], segments.ranks[at_low]
        size = segments.costs[at_low] - segments.costs[at_high]
        jumps = np.flatnonzero((following > self.space.next_ranks(ranks)) & (size > _NEGLIGIBLE * budget))
        return ranks, (int(jumps[0]), int(at_low[jumps[0]])) if jumps.size else None

    def _stretch(self, kept: float, ranks: Ranks, target: int) -> Ranks:
        """Raise one target as far as the budget allows."""
        levels = self._levels(target)
        left = self.space.budget(kept) - self.space.cost(ranks)
        room = left + int(self.space.costs_of(target, ranks[target : target + 1])[0])
        ranks = ranks.copy()
        ranks[target] = levels[np.searchsorted(self.space.costs_of(target, levels), room, side="right") - 1]
        return ranks

    def _log_density(self, ranks: Ranks, following: Ranks) -> Floats:
        """Log of loss saved / parameters spent between two vectors, per target; `(d,)`."""
        steps = np.maximum(self.space.costs(following) - self.space.costs(ranks), 1)
        saved = np.maximum(self.tail_loss(ranks) - self.tail_loss(following), self._tiny)
        return np.asarray(np.log(saved / steps))

    def _sort(self) -> _Segments:
        """Rows 0..d-1: hull segments; d..2d-1: the ranks below dense, one by one."""
        space, targets = self.space, range(len(self.space.targets))
        hulls = [self._hull(i, self._levels(i)) for i in targets]
        stepwise = [levels[:-1] if len(levels := self._levels(i)) > 1 else levels for i in targets]
        paths = [*enumerate(hulls), *enumerate(stepwise)]
        self._row_width = int(space.full_ranks.max()) + 1
        self._vertices = np.concatenate([i * self._row_width + hull for i, hull in enumerate(hulls)])
        densities = [self._densities(i, path) for i, path in paths]
        flat = np.concatenate(densities)
        self._ceiling = float(flat.max()) if flat.size else 0.0
        self._floor = self._ceiling - _RANGE
        keys = [
            row * _ROW - np.minimum.accumulate(np.maximum(density, self._floor))
            for row, density in enumerate(densities)
        ]
        return _Segments(
            keys=np.concatenate(keys),
            starts=np.concatenate([[0], np.cumsum([len(density) for density in densities])]).astype(np.int64),
            ranks=np.concatenate([path for _, path in paths]),
            costs=np.concatenate([space.costs_of(i, path) for i, path in paths]),
        )

    def _levels(self, target: int) -> Ranks:
        """The allowed ranks of a target, ascending; `(levels,)`."""
        space = self.space
        low, top, full = (int(bound[target]) for bound in (space.low_ranks, space.top_ranks, space.full_ranks))
        below = np.arange(low, top + 1, space.rank_multiple, dtype=np.int64)
        return below if top == full else np.append(below, full)

    def _hull(self, target: int, levels: Ranks) -> Ranks:
        """The ranks on the concave hull of (parameters, loss saved), ascending; `(vertices,)`."""
        costs = self.space.costs_of(target, levels)
        saved = -self._tails[self._tail_starts[target] + levels]
        return levels[_concave_hull(costs, saved)]

    def _densities(self, target: int, path: Ranks) -> Floats:
        """Log density of each step of a path of ranks; `(steps,)`."""
        saved = -np.diff(self._tails[self._tail_starts[target] + path])
        return np.asarray(np.log(np.maximum(saved, self._tiny) / np.diff(self.space.costs_of(target, path))))


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


def _concave_hull(x: Ranks, y: Floats) -> Ranks:
    """Indices of the vertices of the upper concave hull of points with ascending x; points on an edge are kept."""
    slopes = np.diff(y) / np.diff(x)
    rising = np.flatnonzero(slopes[1:] > slopes[:-1])
    head = int(rising[0]) + 2 if rising.size else len(x)
    hull, xs, ys = list(range(head)), x.tolist(), y.tolist()
    for new in range(head, len(xs)):
        while len(hull) > 1:
            one, two = hull[-2], hull[-1]
            if (ys[two] - ys[one]) * (xs[new] - xs[one]) >= (ys[new] - ys[one]) * (xs[two] - xs[one]):
                break
            hull.pop()
        hull.append(new)
    return np.array(hull, dtype=np.int64)
