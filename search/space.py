"""Rank vectors and the exact arithmetic of a budget. Needs numpy and nothing else.

A target of shape `m x n` may be stored as

* form `factored` at rank r, with r (m + n) parameters, up to the break-even rank below which that is less than m n, or
* form `pivoted` at rank r, with r (m + n - r) parameters, which is less than m n for every rank below min(m, n), or
* form `dense`, with m n parameters, written as its full rank min(m, n).

A space has one of the first two forms, its ranks are multiples of `rank_multiple`, and dense is always allowed; so a
rank names its form. The indices of form `pivoted` count as bytes, not as parameters.

A space may have `prices` instead: what each rank takes to decode with, measured. A budget is then a share of that time,
and what is said of parameters below holds of picoseconds.

A budget is met *exactly from below*: a vector costs no more than the budget, and no target could be raised to its next
allowed rank with what is left.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ranksearch.search.errors import ImpossibleBudget, InvalidInput
from ranksearch.search.prices import Curve, from_document
from ranksearch.search.targets import Form, Target

if TYPE_CHECKING:  # the numerics run without pydantic
    from ranksearch.search.spec import Method

Ranks = npt.NDArray[np.int64]
"""One rank per target, `(targets,)`, in the order of `RankSpace.targets`; the full rank means dense."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class RankSpace:
    """The rank vectors a job may use.

    Attributes:
        targets: The matrices, in the order of every rank vector.
        rank_multiple: Ranks below full rank are multiples of this number.
        keep_dense: Shell patterns of target names that always stay dense.
        form: How targets below full rank are stored.
        prices: Decode time of each target, where budgets are shares of it; None where they are of parameters.

    Raises:
        InvalidInput: There is no target, or a pattern of `keep_dense` matches none.
    """

    targets: tuple[Target, ...]
    rank_multiple: int = 1
    keep_dense: tuple[str, ...] = ()
    form: Form = "factored"
    prices: tuple[Curve, ...] | None = None

    @classmethod
    def of(cls, method: Method, targets: Iterable[Target], prices: Mapping[str, Any] | None = None) -> RankSpace:
        """The space that a spec's method allows for these targets, with the document of their prices if there is one.

        Raises:
            InvalidInput: There is no target, or a pattern of `keep_dense` matches none.
        """
        targets = tuple(targets)
        return cls(
            targets=targets,
            rank_multiple=method.rank_multiple,
            keep_dense=tuple(method.keep_dense),
            form=method.form,
            prices=from_document(prices, (t.name for t in targets)) if prices else None,
        )

    def __post_init__(self) -> None:
        if not self.targets:
            raise InvalidInput("There is no target to compress.")
        for pattern in self.keep_dense:
            if not any(fnmatchcase(t.name, pattern) for t in self.targets):
                raise InvalidInput(
                    f"keep_dense: {pattern!r} matches no target; target names look like {self.targets[0].name!r}.",
                    pattern=pattern,
                )

    @cached_property
    def dense_parameters(self) -> Ranks:
        """Parameters of each dense target, m n; `(targets,)`."""
        return np.array([t.parameters for t in self.targets], dtype=np.int64)

    @cached_property
    def dense_costs(self) -> Ranks:
        """What each dense target costs; `(targets,)`."""
        return self.dense_parameters if self.prices is None else np.array([t[-1] for t in self._tables])

    @cached_property
    def _tables(self) -> list[Ranks]:
        """The price of each rank of each target."""
        made: dict[tuple[Curve, int], Ranks] = {}
        for key in zip(self.prices or (), self.full_ranks.tolist(), strict=True):
            made.setdefault(key, key[0].table(key[1]))
        return [made[key] for key in zip(self.prices or (), self.full_ranks.tolist(), strict=True)]

    @cached_property
    def _flat_tables(self) -> tuple[Ranks, Ranks]:
        """The tables one after the other, and where each begins."""
        return np.concatenate(self._tables), np.cumsum(self.full_ranks + 1) - self.full_ranks - 1

    @cached_property
    def marginals(self) -> Ranks:
        """m + n; `(targets,)`."""
        return np.array([t.marginal for t in self.targets], dtype=np.int64)

    @cached_property
    def full_ranks(self) -> Ranks:
        """min(m, n), the rank that means dense; `(targets,)`."""
        return np.array([t.full_rank for t in self.targets], dtype=np.int64)

    @cached_property
    def top_ranks(self) -> Ranks:
        """The largest allowed rank of each target below dense; its full rank where there is none; `(targets,)`."""
        multiple = self.rank_multiple
        top = [t.largest_rank(self.form) // multiple * multiple for t in self.targets]
        if self.prices is not None:  # a rank that takes as long as dense is of no use
            faster = [int(np.searchsorted(t[1:-1], t[-1])) // multiple * multiple for t in self._tables]
            top = [min(pair) for pair in zip(top, faster, strict=True)]
        fixed = [any(fnmatchcase(t.name, p) for p in self.keep_dense) for t in self.targets]
        free = [rank > 0 and not f for rank, f in zip(top, fixed, strict=True)]
        return np.where(free, top, self.full_ranks).astype(np.int64)

    @cached_property
    def low_ranks(self) -> Ranks:
        """The smallest allowed rank of each target; `(targets,)`."""
        return np.where(self.top_ranks == self.full_ranks, self.full_ranks, self.rank_multiple).astype(np.int64)

    @property
    def parameters(self) -> int:
        """Parameters of all targets together, dense."""
        return int(self.dense_parameters.sum())

    @property
    def whole(self) -> int:
        """What all targets cost together, dense: what a budget is a share of."""
        return int(self.dense_costs.sum())

    @property
    def minimum(self) -> int:
        """What the smallest vector costs."""
        return self.cost(self.low_ranks)

    def costs(self, ranks: Ranks) -> Ranks:
        """What each target costs: its parameters, or its price; `(..., targets)` like `ranks`."""
        if self.prices is None:
            return self.parameters_of(ranks)
        tables, starts = self._flat_tables
        return np.asarray(tables[starts + np.minimum(ranks, self.full_ranks)])

    def parameters_of(self, ranks: Ranks) -> Ranks:
        """Kept parameters of each target, whatever a budget counts; `(..., targets)` like `ranks`.

        That is m n for a dense target, r (m + n) for a factored one, r (m + n - r) for a pivoted one.
        """
        return np.where(ranks >= self.full_ranks, self.dense_parameters, self._below(ranks, self.marginals))

    def costs_of(self, index: int, ranks: Ranks) -> Ranks:
        """What one target costs at several ranks; shaped like `ranks`."""
        target = self.targets[index]
        if self.prices is not None:
            return np.asarray(self._tables[index][np.minimum(ranks, target.full_rank)])
        return np.where(ranks >= target.full_rank, target.parameters, self._below(ranks, target.marginal))

    def _below(self, ranks: Ranks, sides: Ranks | int) -> Ranks:
        """Kept parameters below full rank, where `sides` is m + n."""
        return ranks * (sides - ranks) if self.form == "pivoted" else ranks * sides

    def cost(self, ranks: Ranks) -> int:
        """What a vector costs."""
        return int(self.costs(ranks).sum())

    def kept(self, ranks: Ranks) -> float:
        """What a vector costs / what the dense targets cost."""
        return self.cost(ranks) / self.whole

    def budget(self, kept: float) -> int:
        """What a vector may cost, floor(kept * whole), with `kept` read as a decimal number."""
        return math.floor(Fraction(repr(float(kept))) * self.whole)

    def check_budget(self, kept: float) -> None:
        """Refuse a budget that no vector meets.

        Raises:
            ImpossibleBudget: `kept` lies outside (0, 1] or below the smallest vector; `data` holds `kept`,
                `minimum_kept`.
        """
        least = self.minimum_kept
        if not 0 < kept <= 1:
            raise ImpossibleBudget(
                f"kept {kept:g} is outside (0, 1]; this model allows {least:g} to 1.", kept=kept, minimum_kept=least
            )
        if self.budget(kept) < self.minimum:
            raise ImpossibleBudget(
                f"kept {kept:g} cannot be reached: the smallest allowed ranks (rank_multiple {self.rank_multiple}, "
                f"{len(self.keep_dense)} keep_dense patterns) already keep {self.minimum / self.whole:.4g} of the "
                f"targets' {'parameters' if self.prices is None else 'decode time'}; ask for kept >= {least:g}.",
                kept=kept,
                minimum_kept=least,
            )

    @property
    def minimum_kept(self) -> float:
        """The smallest `kept` that works, rounded up to 3 significant digits."""
        exact = Fraction(self.minimum, self.whole)
        scale = 10 ** (3 - math.floor(math.log10(exact)) - 1)
        return min(float(Fraction(math.ceil(exact * scale), scale)), 1.0)

    def is_allowed(self, ranks: Ranks) -> bool:
        """Whether every rank is one its target may have."""
        dense = ranks == self.full_ranks
        below = (ranks >= self.low_ranks) & (ranks <= self.top_ranks) & (ranks % self.rank_multiple == 0)
        return ranks.shape == self.full_ranks.shape and bool(np.all(dense | below))

    def is_feasible(self, ranks: Ranks, kept: float) -> bool:
        """Whether every rank is allowed and the vector costs no more than the budget."""
        return self.is_allowed(ranks) and self.cost(ranks) <= self.budget(kept)

    def is_exact(self, ranks: Ranks, kept: float) -> bool:
        """Whether the vector is feasible and nothing can be raised within what is left of the budget."""
        left = self.budget(kept) - self.cost(ranks)
        steps = self.costs(self.next_ranks(ranks)) - self.costs(ranks)
        return self.is_feasible(ranks, kept) and not bool(np.any((steps > 0) & (steps <= left)))

    def next_ranks(self, ranks: Ranks) -> Ranks:
        """The next allowed rank of each target: one multiple more, or dense after the last; dense stays dense."""
        return np.where(ranks < self.top_ranks, ranks + self.rank_multiple, self.full_ranks)

    def previous_ranks(self, ranks: Ranks) -> Ranks:
        """The next smaller allowed rank of each target; the smallest stays."""
        lower = np.where(ranks > self.top_ranks, self.top_ranks, ranks - self.rank_multiple)
        return np.where(ranks <= self.low_ranks, self.low_ranks, lower)

    def at_costs(self, costs: Floats) -> Ranks:
        """The largest allowed ranks that cost at most so much each, or the smallest ones; `(targets,)`.

        In parameters that is costs / (m + n) for form `factored`, and the smaller root of r (m + n - r) = costs for
        `pivoted`.
        """
        if self.prices is not None:
            return self._at_prices(costs)
        per_rank = self.marginals.astype(np.float64)
        if self.form == "pivoted":
            per_rank = (per_rank + np.sqrt(np.maximum(per_rank**2 - 4 * costs, 0.0))) / 2
        ranks = np.floor(costs / (per_rank * self.rank_multiple)).astype(np.int64) * self.rank_multiple
        ranks = np.clip(ranks, self.low_ranks, self.top_ranks)
        # dense comes after the largest rank, and a root is not exact to the last digit
        following = self.next_ranks(ranks)
        return np.where(self.costs(following) <= costs, following, ranks)

    @cached_property
    def _stacked_tables(self) -> tuple[Ranks, int]:
        """The tables without dense, each raised above the one before, as one sorted array; and the height of a step."""
        step = max(int(t.max()) for t in self._tables) + 1
        return np.concatenate([t[:-1] + place * step for place, t in enumerate(self._tables)]), step

    def _at_prices(self, costs: Floats) -> Ranks:
        stacked, step = self._stacked_tables
        place = np.arange(len(self.targets))
        wanted = np.clip(costs, 0, step - 1).astype(np.int64) + place * step
        before = np.cumsum(self.full_ranks) - self.full_ranks
        affordable = np.searchsorted(stacked, wanted, side="right") - 1 - before
        ranks = np.clip(affordable // self.rank_multiple * self.rank_multiple, self.low_ranks, self.top_ranks)
        return np.where(costs >= self.dense_costs, self.full_ranks, ranks)

    def as_dict(self, ranks: Ranks) -> dict[str, int]:
        """Target name -> rank."""
        return {target.name: int(rank) for target, rank in zip(self.targets, ranks, strict=True)}

    def from_dict(self, ranks: Mapping[str, int]) -> Ranks:
        """The inverse of `as_dict`.

        Raises:
            InvalidInput: A target is missing, or a name is no target.
        """
        if odd := set(ranks) ^ {t.name for t in self.targets}:
            raise InvalidInput(f"The rank vector and the targets differ in {sorted(odd)[0]!r}.", target=sorted(odd)[0])
        return np.array([ranks[t.name] for t in self.targets], dtype=np.int64)

    def pack(self, ranks: Ranks) -> str:
        """One short ASCII string: base64 of little-endian uint16 ranks (uint32 after `w:`), 600 characters for 224."""
        wide = int(ranks.max()) > np.iinfo(np.uint16).max
        raw = np.asarray(ranks).astype("<u4" if wide else "<u2").tobytes()
        return ("w:" if wide else "") + base64.b64encode(raw).decode("ascii")

    def unpack(self, packed: str) -> Ranks:
        """The inverse of `pack`.

        Raises:
            InvalidInput: The string does not hold one allowed rank per target.
        """
        try:
            raw = base64.b64decode(packed.removeprefix("w:"), validate=True)
            ranks = np.frombuffer(raw, dtype="<u4" if packed.startswith("w:") else "<u2").astype(np.int64)
        except ValueError as error:
            raise InvalidInput("The packed rank vector is damaged.") from error
        if ranks.shape != self.full_ranks.shape or not self.is_allowed(ranks):
            raise InvalidInput(f"The packed rank vector does not fit these {len(self.targets)} targets.")
        return ranks


def fill(space: RankSpace, ranks: Ranks, kept: float, value: Callable[[Ranks], Floats]) -> Ranks:
    """Raise targets one allowed rank at a time until nothing fits in the budget any more.

    Args:
        space: The rank space.
        ranks: A feasible vector; not modified.
        kept: The budget.
        value: Maps a vector to `(targets,)`, the worth of raising each target to its next rank; among the raises that
            fit the most valuable goes first, the first target on ties.
    """
    ranks = ranks.copy()
    left = space.budget(kept) - space.cost(ranks)
    while True:
        following = space.next_ranks(ranks)
        steps = space.costs(following) - space.costs(ranks)
        fits = (steps > 0) & (steps <= left)
        if not fits.any():
            return ranks
        chosen = int(np.argmax(np.where(fits, value(ranks), -np.inf)))
        ranks[chosen] = following[chosen]
        left -= int(steps[chosen])


def proportional(space: RankSpace, kept: float, shares: Floats) -> Ranks:
    """Targets at `level * shares` of their dense costs each, dense from 1 on, with the budget used exactly from below.

    The level is the highest one at which the vector of the largest ranks that cost no more fits; what is left then
    raises the targets that were rounded down most.

    Args:
        space: The rank space.
        kept: The budget.
        shares: `(targets,)`, above zero; a common factor changes nothing.

    Raises:
        ImpossibleBudget: No vector meets the budget.
    """
    space.check_budget(kept)
    budget = space.budget(kept)
    if space.whole <= budget:
        return space.full_ranks.copy()
    wanted = shares * space.dense_costs
    low, high = 0.0, float(1 / shares.min())
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if space.cost(space.at_costs(middle * wanted)) <= budget else (low, middle)
    ranks = space.at_costs(low * wanted)
    return fill(space, ranks, kept, lambda ranks: -space.costs(space.next_ranks(ranks)) / wanted)


def uniform(space: RankSpace, kept: float) -> Ranks:
    """The same kept for every target that is free, with the budget used exactly from below; see `proportional`.

    Raises:
        ImpossibleBudget: No vector meets the budget.
    """
    return proportional(space, kept, np.ones(len(space.targets)))
