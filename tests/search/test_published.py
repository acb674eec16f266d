from __future__ import annotations

import numpy as np
import optuna
import pytest

from ranksearch.search.allocate import Allocator
from ranksearch.search.errors import InvalidInput
from ranksearch.search.published import (
    MOVED,
    d_rank,
    d_rank_ranks,
    effective_rank,
    mgaa,
    sublayer_budgets,
    sublayers,
)
from ranksearch.search.space import RankSpace, proportional, uniform
from ranksearch.search.spec import Search
from ranksearch.search.study import RankStudy

from .cases import llama_space, power_spectra, target

SPACE = llama_space(blocks=4)
SPECTRA = power_spectra(SPACE)
RNG = np.random.default_rng(5)
SIMILARITY = {t.name: 0.5 + 0.1 * t.depth + (0.05 if "mlp" in t.name else 0.0) for t in SPACE.targets}
FORMS = [SPACE, llama_space(blocks=4, form="pivoted"), llama_space(blocks=4, rank_multiple=4, keep_dense=("*.0.*",))]
CLOSED = ["uniform", "svd-llm", "fwsvd", "mgaa", "d-rank", "grasp"]


def test_shares_are_met_up_to_rounding_and_are_dense_from_one_on() -> None:
    shares = RNG.uniform(0.2, 1.0, len(SPACE.targets))
    ranks = proportional(SPACE, 0.4, shares)
    level = SPACE.costs(ranks) / SPACE.dense_costs / shares
    one_rank = SPACE.marginals / SPACE.dense_costs / shares
    assert SPACE.is_exact(ranks, 0.4)
    assert np.all(np.abs(level - np.median(level)) <= one_rank)
    shares[3] = 50.0
    assert proportional(SPACE, 0.4, shares)[3] == SPACE.full_ranks[3]


@pytest.mark.parametrize("space", FORMS, ids=["factored", "pivoted", "multiples"])
def test_costs_are_turned_into_the_largest_ranks_that_fit(space: RankSpace) -> None:
    costs = RNG.uniform(0, 1.1, len(space.targets)) * space.dense_costs
    exact = space.costs(space.at_costs(costs)).astype(float)
    for wanted in (costs, exact):
        ranks = space.at_costs(wanted)
        following = space.next_ranks(ranks)
        assert space.is_allowed(ranks)
        assert np.all((space.costs(ranks) <= wanted) | (ranks == space.low_ranks))
        assert np.all((space.costs(following) > wanted) | (following == ranks))


def test_effective_rank_is_the_exponential_of_the_entropy() -> None:
    assert effective_rank(np.ones(7)) == pytest.approx(7)
    assert effective_rank(np.array([3.0, 0.0, 0.0])) == pytest.approx(1)
    squares = np.array([0.5, 0.25, 0.25])
    assert effective_rank(np.sqrt(10 * squares)) == pytest.approx(2 ** (0.5 * 1 + 0.25 * 2 + 0.25 * 2))


def test_d_rank_before_rounding_is_its_closed_form() -> None:
    kept, ranks = 0.3, d_rank_ranks(SPACE.targets, 0.3, SPECTRA)
    effective = np.array([effective_rank(SPECTRA[t.name]) for t in SPACE.targets])
    expected = {}
    for kind in {t.kind for t in SPACE.targets}:
        own = [i for i, t in enumerate(SPACE.targets) if t.kind == kind]
        omega = SPACE.targets[own[0]].marginal
        total = kept * sum(SPACE.targets[i].parameters for i in own)
        root = np.sqrt(effective[own] * omega).sum()
        expected |= {SPACE.targets[i].name: total / root * np.sqrt(effective[i] / omega) for i in own}
    moved = sum(MOVED * k * 128 for name, k in expected.items() if "q_proj" in name)
    moved += sum(MOVED * k * 96 for name, k in expected.items() if "k_proj" in name)
    for t, rank in zip(SPACE.targets, ranks, strict=True):
        share = 1 - MOVED if t.name.endswith(("q_proj", "k_proj")) else 1.0
        more = moved / (4 * 96) if t.name.endswith("v_proj") else 0.0
        assert rank == pytest.approx(share * expected[t.name] + more, rel=1e-9)
    rounded = d_rank(SPACE, kept, SPECTRA)
    assert np.all(np.abs(rounded - ranks) <= 1.5)


def test_d_rank_moves_no_more_to_v_than_it_holds_and_nothing_without_q_k_v() -> None:
    ranks = d_rank_ranks(SPACE.targets, 0.9, SPECTRA)
    costs = ranks * SPACE.marginals
    assert np.all(costs <= SPACE.dense_costs * (1 + 1e-9))
    assert costs.sum() == pytest.approx(0.9 * SPACE.parameters)
    others = tuple(target(f"h.{i}.mlp.c_fc", 40, 20, "mlp.c_fc", i) for i in range(3))
    spectra = power_spectra(RankSpace(targets=others))
    root = np.sqrt([effective_rank(spectra[t.name]) for t in others])
    np.testing.assert_allclose(d_rank_ranks(others, 0.3, spectra), 0.3 * 3 * 800 / 60 * root / root.sum())


def test_mgaa_gives_sublayers_their_share_and_equal_energy_within() -> None:
    kept, ranks = 0.4, mgaa(SPACE, 0.4, SPECTRA, SIMILARITY)
    members = sublayers(SPACE.targets)
    assert len(set(members)) == 8
    allotted = sublayer_budgets(SPACE, kept, members, SIMILARITY)
    dense = np.bincount(members, weights=SPACE.dense_costs)
    change = np.bincount(members, weights=[(1 - SIMILARITY[t.name]) ** 0.5 for t in SPACE.targets]) / np.bincount(
        members
    )
    free = allotted < dense - 1
    factor = allotted[free] / dense[free] / change[free]
    np.testing.assert_allclose(factor, factor[0], rtol=1e-3)
    assert 0 <= SPACE.budget(kept) - allotted.sum() < len(allotted)

    def energy(index: int, rank: int) -> float:
        squares = SPECTRA[SPACE.targets[index].name] ** 2
        return float(squares[:rank].sum() / squares.sum())

    for sublayer in range(8):
        own = [i for i in np.flatnonzero(members == sublayer) if ranks[i] < SPACE.full_ranks[i]]
        below, at = zip(*((energy(i, ranks[i] - 1), energy(i, ranks[i])) for i in own), strict=True)
        assert max(below) <= min(at) + 0.02
        used = SPACE.costs(ranks)[members == sublayer].sum()
        assert abs(used - allotted[sublayer]) <= SPACE.marginals.max() or not free[sublayer]


def test_mgaa_says_when_the_bank_has_no_similarities() -> None:
    with pytest.raises(InvalidInput, match="Preset mgaa needs the similarity"):
        mgaa(SPACE, 0.4, SPECTRA, {})


@pytest.mark.parametrize("kept", [0.06, 0.4, 0.93, 1.0])
@pytest.mark.parametrize("preset", CLOSED)
@pytest.mark.parametrize("space", FORMS, ids=["factored", "pivoted", "multiples"])
def test_a_formula_takes_one_exact_trial(space: RankSpace, preset: str, kept: float) -> None:
    if space.minimum > space.budget(kept):
        pytest.skip("impossible")
    study = RankStudy(
        storage=optuna.storages.InMemoryStorage(),
        job_id="job_a",
        kept=kept,
        space=space,
        spectra=SPECTRA,
        spec=Search(trials=5),
        dense_score=1.0,
        preset=preset,
        similarity=SIMILARITY,
    )
    proposal = study.ask()
    assert proposal is not None
    assert (study.planned, study.required, proposal.number, proposal.origin) == (1, 1, 0, preset)
    assert space.is_exact(proposal.ranks, kept)
    assert study.report(0, 0, [1.0]) is False
    study.tell(0, score=2.0, scores={}, seconds=0.1, worker="w")
    assert study.ask() is None
    assert study.best is not None
    np.testing.assert_array_equal(study.best.ranks, proposal.ranks)
    if preset in ("uniform", "svd-llm", "fwsvd"):
        np.testing.assert_array_equal(proposal.ranks, uniform(space, kept))
    if preset == "grasp":
        np.testing.assert_array_equal(proposal.ranks, Allocator(space, SPECTRA).prior(kept))
