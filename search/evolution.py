"""Searches that change the best vector so far a little: evolutionary level switches, and swaps of two targets.

A level is a fixed share of a matrix' own parameters.

References:
    EvoPress  Towards Optimal Dynamic Model Compression via Evolutionary Search, arXiv 2410.14649
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from optuna.trial import FrozenTrial

from ranksearch.search.allocate import Allocator
from ranksearch.search.draw import ATTEMPTS, Draw, best_ranks, taken
from ranksearch.search.space import Ranks, RankSpace, fill, uniform

LEVEL = 0.05
_MOST_SWITCHES = 3


class _Mutation(ABC):
    """Proposes a changed copy of the best vector so far."""

    def __init__(self, space: RankSpace, kept: float, seed: int) -> None:
        """Set what a proposal depends on besides the trials."""
        self._space, self._kept, self._seed = space, kept, seed

    def propose(self, trials: Sequence[FrozenTrial], number: int) -> Draw:
        """A child that no trial has, if some attempts find one."""
        rng, known = np.random.default_rng([self._seed, number]), taken(trials)
        best = best_ranks(self._space, trials)
        parent = self._first() if best is None else best
        for _ in range(ATTEMPTS):
            child = self._change(parent, rng)
            if self._space.pack(child) not in known:
                break
        return Draw(ranks=child)

    @abstractmethod
    def _first(self) -> Ranks:
        """The parent before anything has been told."""

    @abstractmethod
    def _change(self, parent: Ranks, rng: np.random.Generator) -> Ranks:
        """A child; it uses the budget exactly."""

    def _lowered(self, ranks: Ranks, target: int, parameters: float) -> Ranks:
        """One target lowered by about so many parameters, by one rank at least."""
        costs = self._space.costs(ranks).astype(np.float64) - parameters
        below = np.minimum(self._space.at_costs(costs), self._space.previous_ranks(ranks))
        return _with(ranks, target, int(below[target]))

    def _raised(self, ranks: Ranks, target: int, parameters: float) -> Ranks:
        """One target raised by up to so many parameters, as far as the budget allows."""
        room = self._space.budget(self._kept) - self._space.cost(ranks)
        costs = self._space.costs(ranks).astype(np.float64) + min(parameters, room)
        return _with(ranks, target, max(int(ranks[target]), int(self._space.at_costs(costs)[target])))

    def _free(self, ranks: Ranks) -> Ranks:
        """Indices of targets that can be lowered."""
        return np.flatnonzero(self._space.previous_ranks(ranks) < ranks)


class Evolution(_Mutation):
    """Level switches: random targets give up a level, others take it until the budget is used exactly again.

    As in EvoPress the number of switches is the smaller of two random ones, so that most children differ by one.
    """

    def _first(self) -> Ranks:
        return uniform(self._space, self._kept)

    def _change(self, parent: Ranks, rng: np.random.Generator) -> Ranks:
        child, dense = parent, self._space.dense_costs
        worth = rng.random(len(parent))
        for _ in range(rng.integers(1, _MOST_SWITCHES + 1, size=2).min()):
            if not len(free := self._free(child)):
                break
            down = int(rng.choice(free))
            child = self._lowered(child, down, LEVEL * dense[down])
            worth[down] = -1.0
            for up in rng.permutation(len(child)):
                if up == down:
                    continue
                child = self._raised(child, int(up), LEVEL * dense[up])
                if self._space.is_exact(child, self._kept):
                    break
        return fill(self._space, child, self._kept, lambda _: worth)


class Swaps(_Mutation):
    """Coordinate search from the prior: one target goes up and one goes down, by a level of the smaller of the two."""

    def __init__(self, allocator: Allocator, kept: float, seed: int) -> None:
        """Set what a proposal depends on besides the trials."""
        super().__init__(allocator.space, kept, seed)
        self._allocator = allocator

    def _first(self) -> Ranks:
        return self._allocator.prior(self._kept)

    def _change(self, parent: Ranks, rng: np.random.Generator) -> Ranks:
        free = self._free(parent)
        if not len(free):
            return parent
        down, up = int(rng.choice(free)), int(rng.integers(len(parent)))
        step = LEVEL * min(self._space.dense_costs[down], self._space.dense_costs[up])
        child = self._raised(self._lowered(parent, down, step), up, step)
        return self._allocator.fill(child, self._kept)


def _with(ranks: Ranks, target: int, rank: int) -> Ranks:
    changed = ranks.copy()
    changed[target] = rank
    return changed
