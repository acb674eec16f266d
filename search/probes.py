"""Methods that first measure what each target does to the model on its own, at a few shares of its parameters.

`asvd` leaves all other targets dense; each target then takes its smallest share whose score is within one threshold for
all. `dp-knapsack` has the others at the uniform allocation; the sum of the measured divergences is then the smallest
that the budget allows. Shares below the smallest one measured are left to the spectra, and so is what is left over.

References:
    ASVD     Activation-aware Singular Value Decomposition, arXiv 2312.05821
    Duo-SVD  arXiv 2510.19385
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

import numpy as np

from ranksearch.search.allocate import Allocator
from ranksearch.search.presets import PRESETS
from ranksearch.search.space import Floats, Ranks, RankSpace, uniform

_TENTHS = np.arange(1, 11) / 10
BINS, BINS_PER_TARGET = 10_000, 100
"""The knapsack counts parameters in units of which the budget holds at most so many, whichever is more: what rounding
up costs each target, half a unit on average, is half a percent of the budget then."""
MOST_CHOICES = 1 << 28
"""Targets times units, at most; the choices, one byte each, are held at once."""


class Probes:
    """The vectors that a preset measures, by trial number, and the vector it concludes from their scores.

    Attributes:
        base: The vector that probes change one target of, `(d,)`.
        score: Name of the score that is measured.
    """

    def __init__(self, preset: str, space: RankSpace, kept: float) -> None:
        """List the probes; those that give the same vector are one.

        Args:
            preset: `asvd` or `dp-knapsack`.
            space: The rank space.
            kept: The budget.

        Raises:
            ImpossibleBudget: No vector meets the budget.
        """
        space.check_budget(kept)
        self._preset, self._space, self._kept = preset, space, kept
        alone = preset == "asvd"
        self.score = "perplexity" if alone else "kl"
        self.base = space.full_ranks if alone else uniform(space, kept)
        shares = _TENTHS[:-1] if alone else _TENTHS
        found = np.stack([space.at_costs(share * space.dense_costs) for share in shares], axis=1)
        self._levels = [np.unique(row) for row in found]
        if space.budget(kept) >= space.whole:
            self._levels = []  # there is nothing to find out
        every = [(i, int(rank)) for i, row in enumerate(self._levels) for rank in row]
        unchanged = [(i, rank) for i, rank in every if rank == self.base[i] and not alone]
        #: The changes to the base that each probe stands for; those that change nothing are one probe.
        self._probes = [
            *([unchanged] if unchanged else []),
            *([pair] for pair in every if pair[1] != self.base[pair[0]]),
        ]

    def __len__(self) -> int:
        """How many there are."""
        return len(self._probes)

    def vector(self, number: int) -> Ranks:
        """The vector of trial `number`, `(d,)`; it need not meet the budget."""
        target, rank = self._probes[number][0]
        ranks = self.base.copy()
        ranks[target] = rank
        return ranks

    def choose(self, allocator: Allocator, scores: Mapping[int, float]) -> Ranks:
        """The vector that follows, `(d,)`; it uses the budget exactly.

        Args:
            allocator: Space and spectra.
            scores: Trial number -> score; a probe without one does not count.
        """
        if not self._levels:
            return self.base
        measured = self._measured(scores)
        rule = threshold if self._preset == "asvd" else knapsack
        return allocator.fill(rule(self._space, self._kept, measured), self._kept)

    def _measured(self, scores: Mapping[int, float]) -> list[dict[int, float]]:
        """Per target, rank -> score."""
        measured: list[dict[int, float]] = [{} for _ in self._levels]
        for number, score in scores.items():
            for target, rank in self._probes[number]:
                measured[target][rank] = score
        return measured


def planned_trials(preset: str, trials: int, space: RankSpace, kept: float) -> int:
    """How many trials a preset takes at a budget where a search may take `trials`.

    Raises:
        ImpossibleBudget: No vector meets the budget.
    """
    ways = PRESETS[preset].ranks
    if ways == "search":
        return trials
    return 1 if ways == "closed form" else len(Probes(preset, space, kept)) + 1


def threshold(space: RankSpace, kept: float, measured: Sequence[Mapping[int, float]]) -> Ranks:
    """ASVD's rule: each target at its smallest rank with a score up to a limit, else dense; the lowest limit that fits.

    Args:
        space: The rank space.
        kept: The budget.
        measured: Per target, rank -> score, lower is better.

    Returns:
        `(d,)`, within the budget; the smallest ranks where no limit fits.
    """

    def at(limit: float) -> Ranks:
        fit = [[rank for rank, score in known.items() if score <= limit] for known in measured]
        dense = space.full_ranks
        return np.array([min(ranks, default=int(full)) for ranks, full in zip(fit, dense, strict=True)])

    limits = sorted({score for known in measured for score in known.values()})
    lowest = bisect_left(limits, True, key=lambda limit: space.cost(at(limit)) <= space.budget(kept))
    return at(limits[lowest]) if lowest < len(limits) else space.low_ranks.copy()


def knapsack(space: RankSpace, kept: float, measured: Sequence[Mapping[int, float]]) -> Ranks:
    """One rank per target with the smallest sum of scores within the budget, by dynamic programming.

    Args:
        space: The rank space.
        kept: The budget.
        measured: Per target, rank -> score; a target without any takes its smallest rank.

    Returns:
        `(d,)`, within the budget; the smallest ranks where nothing measured fits.
    """
    ranks = [np.array(sorted(known) or [low]) for known, low in zip(measured, space.low_ranks, strict=True)]
    losses = [
        np.array([known.get(int(r), 0.0) for r in row], dtype=np.float64)
        for known, row in zip(measured, ranks, strict=True)
    ]
    costs = [space.costs_of(i, row) for i, row in enumerate(ranks)]
    room = space.budget(kept) - sum(int(row[0]) for row in costs)
    if room < 0:
        return space.low_ranks.copy()
    bins = min(max(BINS, BINS_PER_TARGET * len(ranks)), MOST_CHOICES // len(ranks))
    unit = max(1, -(-room // bins))
    chosen = _fewest([-(-(row - row[0]) // unit) for row in costs], losses, room // unit)
    return np.array([row[index] for row, index in zip(ranks, chosen, strict=True)])


def _fewest(weights: Sequence[Ranks], losses: Sequence[Floats], capacity: int) -> list[int]:
    """The option of each item with the smallest sum of losses whose weights sum up to the capacity at most.

    The first option of each item has weight 0.
    """
    best, choices = np.zeros(capacity + 1), []
    for weight, loss in zip(weights, losses, strict=True):
        lowest, choice = best + loss[0], np.zeros(capacity + 1, dtype=np.int8)
        for option, (w, cost) in enumerate(zip(weight[1:], loss[1:], strict=True), start=1):
            if w <= capacity:
                total = best[: capacity + 1 - w] + cost
                choice[w:][total < lowest[w:]] = option
                np.minimum(lowest[w:], total, out=lowest[w:])
        choices.append(choice)
        best = lowest
    found, left = [], capacity
    for weight, choice in zip(reversed(weights), reversed(choices), strict=True):
        found.append(int(choice[left]))
        left -= int(weight[found[-1]])
    return found[::-1]
