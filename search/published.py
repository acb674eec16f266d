"""Published closed-form allocations: rank vectors that cost no trial but their own.

Notation:
    kept     the budget
    p        parameters of the dense targets, `(d,)`
    share    kept parameters of a target / its dense parameters
    energy   sum of the squared singular values that a rank keeps / sum of all of them, in the metric of the bank

References:
    MGAA    Multi-Granular Adaptive Allocation, arXiv 2507.03294
    D-Rank  Layer-wise dynamic rank, arXiv 2509.25622
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ranksearch.search.allocate import Allocator
from ranksearch.search.coordinates import kind_names
from ranksearch.search.errors import InvalidInput
from ranksearch.search.space import Floats, Ranks, RankSpace, fill, proportional, uniform
from ranksearch.search.targets import Target

MOVED = 0.3
"""D-Rank's beta: the share of the ranks of Q and K that moves to V."""
_ROLES: Mapping[str, str] = {"q_proj": "q", "k_proj": "k", "v_proj": "v"}
"""Last part of a kind -> what the matrix is in attention; other names tell nothing."""
_LEAST = 1e-6
"""Importance of a sublayer that changes nothing, so that every sublayer has some."""


def closed_form(
    preset: str, allocator: Allocator, kept: float, spectra: Mapping[str, Floats], similarity: Mapping[str, float]
) -> Ranks:
    """The vector of a preset that chooses by a formula; it uses the budget exactly from below.

    Args:
        preset: Its name.
        allocator: Space and spectra.
        kept: The budget.
        spectra: Target name -> singular values in the preset's metric.
        similarity: Target name -> mean cosine between the hidden states before and after its sublayer.

    Raises:
        ImpossibleBudget: No vector meets the budget.
        InvalidInput: The preset needs similarities that are not there.
    """
    space = allocator.space
    if preset == "mgaa":
        return mgaa(space, kept, spectra, similarity)
    if preset == "d-rank":
        return d_rank(space, kept, spectra)
    return allocator.prior(kept) if preset == "grasp" else uniform(space, kept)


def d_rank(space: RankSpace, kept: float, spectra: Mapping[str, Floats]) -> Ranks:
    """D-Rank: within each matrix type over the layers, then from Q and K to V.

    Raises:
        ImpossibleBudget: No vector meets the budget.
    """
    space.check_budget(kept)
    ranks = d_rank_ranks(space.targets, kept, spectra)
    return proportional(space, kept, ranks * space.marginals / space.dense_parameters)


def d_rank_ranks(targets: Sequence[Target], kept: float, spectra: Mapping[str, Floats]) -> Floats:
    """D-Rank's ranks before rounding, `(d,)`; what a target cannot hold below dense goes to the others of its type.

    k_g = T / sum_j sqrt(R_j omega_j) * sqrt(R_g / omega_g) with R the effective rank, omega = m + n and T the
    parameters that the type may keep; then a share beta of the ranks of Q and K goes evenly to V, as far as V has room.
    """
    omega = np.array([t.marginal for t in targets], dtype=np.float64)
    dense = np.array([t.parameters for t in targets], dtype=np.float64)
    weights = np.sqrt(np.array([effective_rank(spectra[t.name]) for t in targets]) * omega)
    kinds, held = np.array(kind_names(targets)), np.zeros(len(targets))
    for kind in np.unique(kinds):
        own = kinds == kind
        held[own] = _share_out(kept * dense[own].sum(), weights[own], least=0.0, most=dense[own])
    roles = np.array([_ROLES.get(t.kind.rpartition(".")[2], "") for t in targets])
    giving, taking = np.isin(roles, ("q", "k")), roles == "v"
    if giving.any() and taking.any():
        room = dense[taking] - held[taking]
        moved = min(MOVED * held[giving].sum(), room.sum())
        held[giving] *= 1 - moved / held[giving].sum()
        held[taking] += _share_out(moved, omega[taking], least=0.0, most=room)
    return held / omega


def effective_rank(spectrum: Floats) -> float:
    """exp of the entropy of sigma^2 / sum sigma^2; 1 where every singular value is zero."""
    squares = np.square(np.asarray(spectrum, dtype=np.float64))
    total = squares.sum()
    if total == 0:
        return 1.0
    p = squares[squares > 0] / total
    return float(np.exp(-(p * np.log(p)).sum()))


def _share_out(total: float, weights: Floats, *, least: Floats | float, most: Floats) -> Floats:
    """x = f weights within `least` and `most`, with the largest factor f at which x sums up to the total at most."""
    low, high = 0.0, float(np.max(most / weights))
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(middle * weights, least, most).sum() <= total else (low, middle)
    return np.asarray(np.clip(low * weights, least, most))


def mgaa(space: RankSpace, kept: float, spectra: Mapping[str, Floats], similarity: Mapping[str, float]) -> Ranks:
    """MGAA: between sublayers by 1 - cosine, within a sublayer by one share of energy that all its matrices keep.

    Raises:
        ImpossibleBudget: No vector meets the budget.
        InvalidInput: There is no similarity for some target.
    """
    space.check_budget(kept)
    members = sublayers(space.targets)
    allotted = sublayer_budgets(space, kept, members, similarity)
    energies = [_energies(spectra[t.name], t.full_rank) for t in space.targets]
    ranks = space.low_ranks.copy()
    for sublayer, budget in enumerate(allotted):
        own = np.flatnonzero(members == sublayer)
        ranks[own] = _equal_energy(space, own, int(budget), [energies[i] for i in own])

    def worth(ranks: Ranks) -> Floats:
        # the sublayer furthest below what it may keep, and in it, as parameters are whole, the least energy
        short = allotted - np.bincount(members, weights=space.costs(ranks))
        energy = np.array([e[rank] for e, rank in zip(energies, ranks, strict=True)])
        return np.asarray(short[members] - energy / 2)

    return fill(space, ranks, kept, worth)


def sublayers(targets: Sequence[Target]) -> Ranks:
    """Which sublayer each target belongs to, `(d,)`: its block, and the module of the block that holds it."""
    names = [(t.depth, t.kind.partition(".")[0] if "." in t.kind else "") for t in targets]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], dtype=np.int64)


def sublayer_budgets(space: RankSpace, kept: float, members: Ranks, similarity: Mapping[str, float]) -> Ranks:
    """Parameters that each sublayer may keep, `(sublayers,)`: as (1 - cosine)^(1/2) * parameters, dense at most.

    Raises:
        InvalidInput: There is no similarity for some target.
    """
    if missing := [t.name for t in space.targets if t.name not in similarity]:
        raise InvalidInput(
            f"Preset mgaa needs the similarity of each sublayer, and the factor bank, perhaps of an older version, "
            f"has none for {missing[0]}; take another calibration.seed, which makes a new one.",
            target=missing[0],
        )
    # as the angle between what goes in and out; without the root the first block takes nearly everything
    changes = np.sqrt([max(1.0 - similarity[t.name], _LEAST) for t in space.targets])
    importance = np.bincount(members, weights=changes) / np.bincount(members)
    least = np.bincount(members, weights=space.costs(space.low_ranks)).astype(np.float64)
    dense = np.bincount(members, weights=space.dense_costs).astype(np.float64)
    return np.floor(_share_out(space.budget(kept), importance * dense, least=least, most=dense)).astype(np.int64)


def _energies(spectrum: Floats, full_rank: int) -> Floats:
    """Energy at ranks 0 .. full, `(full_rank + 1,)`; all of it at the full rank, which is dense."""
    squares = np.zeros(full_rank)
    squares[: len(spectrum)] = np.square(np.asarray(spectrum, dtype=np.float64)[:full_rank])
    kept = np.append(0.0, np.cumsum(squares))
    return kept / kept[-1] if kept[-1] > 0 else np.arange(full_rank + 1) / full_rank


def _equal_energy(space: RankSpace, own: Ranks, budget: int, energies: Sequence[Floats]) -> Ranks:
    """The smallest ranks of some targets that keep the largest common energy within a budget, `(own,)`."""
    multiple, top, full = space.rank_multiple, space.top_ranks[own], space.full_ranks[own]

    def at(energy: float) -> Ranks:
        needed = np.array([np.searchsorted(e, energy) for e in energies])
        ranks = np.maximum(-(-needed // multiple) * multiple, space.low_ranks[own])
        return np.where(ranks > top, full, ranks)

    def cost(ranks: Ranks) -> int:
        return sum(int(space.costs_of(i, rank)) for i, rank in zip(own, ranks, strict=True))

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(at(middle)) <= budget else (low, middle)
    return at(low)
