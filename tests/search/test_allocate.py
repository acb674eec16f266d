from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ranksearch.search.allocate import Allocator
from ranksearch.search.errors import NumericalError
from ranksearch.search.space import RankSpace, uniform
from ranksearch.search.targets import Form

from .cases import llama_space, power_spectra, priced, steep_spectra, target

FORMS: tuple[Form, ...] = ("factored", "pivoted")


def optimum(allocator: Allocator, kept: float, z: np.ndarray) -> float:
    """The smallest weighted loss of any feasible vector, by enumeration."""
    space = allocator.space
    levels = [
        sorted({*range(low, top + 1, space.rank_multiple), full})
        for low, top, full in zip(space.low_ranks, space.top_ranks, space.full_ranks, strict=True)
    ]
    grid = np.array(list(itertools.product(*levels)))
    fits = space.costs(grid).sum(axis=1) <= space.budget(kept)
    return float((np.exp(z) * allocator.tail_loss(grid[fits])).sum(axis=1).min())


@st.composite
def problems(draw: st.DrawFn, equal_marginals: bool = False) -> tuple[Allocator, float, np.ndarray]:
    count = draw(st.integers(1, 4))
    side = st.integers(3, 9)
    shapes = [(9, 9)] * count if equal_marginals else [(draw(side), draw(side)) for _ in range(count)]
    space = RankSpace(
        targets=tuple(target(f"t{i}", m, n) for i, (m, n) in enumerate(shapes)),
        rank_multiple=1 if equal_marginals else draw(st.sampled_from([1, 2])),
        form="factored" if equal_marginals else draw(st.sampled_from(FORMS)),
    )
    if not equal_marginals:
        space = draw(priced(space))
    kept = draw(st.floats(0.1, 1.0).map(lambda k: round(k, 2)))
    assume(space.budget(kept) >= space.minimum)
    seed = draw(st.integers(0, 10_000))
    z = np.random.default_rng(seed).standard_normal(count)
    return Allocator(space, power_spectra(space, seed, scale=1.0)), kept, z


@given(problems())
@settings(deadline=None, max_examples=200)
def test_waterfilling_is_within_one_segment_of_the_optimum(problem: tuple[Allocator, float, np.ndarray]) -> None:
    allocator, kept, z = problem
    space = allocator.space
    ranks = allocator.waterfill(kept, z)
    assert space.is_exact(ranks, kept)
    best = optimum(allocator, kept, z)
    steps = np.exp(z) * (allocator.tail_loss(space.low_ranks))
    assert best <= allocator.loss(ranks, z) * (1 + 1e-12)
    assert allocator.loss(ranks, z) <= best + steps.max() + 1e-12


@given(problems(equal_marginals=True))
@settings(deadline=None, max_examples=100)
def test_with_equal_shapes_and_no_jump_waterfilling_is_optimal(problem: tuple[Allocator, float, np.ndarray]) -> None:
    allocator, kept, z = problem
    space = allocator.space
    ranks = allocator.waterfill(kept, z)
    assume(space.budget(kept) < space.minimum + int((space.dense_costs - space.costs(space.low_ranks)).min()))
    assert allocator.loss(ranks, z) == pytest.approx(optimum(allocator, kept, z), rel=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_the_gap_to_the_optimum_is_small_on_average(form: Form) -> None:
    gaps = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        shapes = rng.integers(4, 12, size=(4, 2))
        targets = tuple(target(f"t{i}", int(m), int(n)) for i, (m, n) in enumerate(shapes))
        space = RankSpace(targets=targets, form=form)
        allocator, z = Allocator(space, power_spectra(space, seed, 1.0)), rng.standard_normal(4)
        kept = round(rng.uniform(0.45, 0.95), 2)
        best, weights = optimum(allocator, kept, z), np.exp(z) * allocator.tail_loss(space.low_ranks)
        gaps.append((allocator.loss(allocator.waterfill(kept, z), z) - best) / weights.sum())
    print(
        f"{form}: gap to the optimum, share of the loss at rank 1: mean {np.mean(gaps):.4f}, worst {np.max(gaps):.4f}"
    )
    assert np.mean(gaps) < 0.02


@given(
    st.integers(0, 1000),
    st.sampled_from([0.12, 0.25, 0.4, 0.6, 0.8, 0.95]),
    st.sampled_from([1, 4]),
    st.sampled_from(FORMS),
)
@settings(deadline=None, max_examples=50)
def test_any_tilt_gives_a_feasible_vector_that_uses_the_budget(
    seed: int, kept: float, multiple: int, form: Form
) -> None:
    space = llama_space(blocks=2, rank_multiple=multiple, form=form)
    allocator = Allocator(space, power_spectra(space, seed))
    z = 3 * np.random.default_rng(seed).standard_normal(len(space.targets))
    assert space.is_exact(allocator.waterfill(kept, z), kept)


def test_the_prior_beats_uniform_and_equals_one_sort() -> None:
    space = llama_space()
    allocator = Allocator(space, steep_spectra(space))
    for kept in (0.25, 0.4):
        prior = allocator.prior(kept)
        assert allocator.loss(prior) < allocator.loss(uniform(space, kept))
        spectra = steep_spectra(space)
        worth = np.concatenate([spectra[t.name] ** 2 / t.marginal for t in space.targets])
        owner = np.repeat(np.arange(len(prior)), space.full_ranks)
        order = np.argsort(-worth, kind="stable")
        spent = np.cumsum(space.marginals[owner[order]])
        taken = np.bincount(owner[order][spent <= space.budget(kept)], minlength=len(prior))
        assert np.abs(np.maximum(taken, 1) - prior).sum() <= 2


def test_a_flat_spectrum_goes_dense_and_a_steep_one_does_not() -> None:
    space = RankSpace(targets=(target("flat", 32, 32), target("steep", 32, 32)))
    flat, steep = np.ones(32), np.exp(-np.arange(32.0))
    ranks = Allocator(space, {"flat": flat, "steep": steep}).prior(0.7)
    assert ranks[0] == 32
    assert ranks[1] < 16


def test_a_common_factor_changes_nothing() -> None:
    space = llama_space()
    allocator = Allocator(space, power_spectra(space))
    z = np.random.default_rng(0).standard_normal(len(space.targets))
    np.testing.assert_array_equal(allocator.waterfill(0.4, z), allocator.waterfill(0.4, z + 5.0))


def test_more_weight_never_costs_a_target_rank() -> None:
    space = llama_space(blocks=2)
    allocator = Allocator(space, steep_spectra(space))
    z = np.zeros(len(space.targets))
    before = allocator.waterfill(0.4, z)
    for i in range(len(z)):
        z_up = z.copy()
        z_up[i] += 1.0
        assert allocator.waterfill(0.4, z_up)[i] > before[i]


@pytest.mark.parametrize("form", FORMS)
def test_tilts_invert_waterfilling(form: Form) -> None:
    space = llama_space(blocks=4, width=256, hidden=688, kv=128, form=form)
    allocator = Allocator(space, steep_spectra(space))
    z = 0.7 * np.random.default_rng(1).standard_normal(len(space.targets))
    ranks = allocator.waterfill(0.4, z)
    np.testing.assert_allclose(allocator.tilts(ranks), z - z.mean(), atol=0.12)
    again = allocator.waterfill(0.4, allocator.tilts(ranks))
    assert np.abs(again - ranks).max() <= 1


def test_a_missing_or_broken_spectrum_is_named() -> None:
    space = RankSpace(targets=(target("a", 8, 8), target("b", 8, 8)))
    with pytest.raises(NumericalError, match="b"):
        Allocator(space, {"a": np.ones(8)})
    with pytest.raises(NumericalError, match="b"):
        Allocator(space, {"a": np.ones(8), "b": np.full(8, np.nan)})


@pytest.mark.parametrize("form", FORMS)
def test_rank_deficient_spectra_are_served(form: Form) -> None:
    space = RankSpace(targets=(target("a", 16, 16), target("b", 16, 16)), form=form)
    allocator = Allocator(space, {"a": np.r_[np.ones(2), np.zeros(14)], "b": np.ones(3)})
    for kept in (0.2, 0.5, 0.9, 1.0):
        assert space.is_exact(allocator.prior(kept), kept)
    assert allocator.loss(allocator.prior(0.5)) == 0.0


@pytest.mark.parametrize("form", FORMS)
def test_waterfilling_a_7b_shaped_model_takes_milliseconds(form: Form) -> None:
    space = llama_space(blocks=32, width=4096, hidden=11008, kv=4096, form=form)
    allocator = Allocator(space, power_spectra(space))
    rng = np.random.default_rng(0)
    for kept in (0.4, 0.8):
        start = time.process_time()
        for _ in range(20):
            allocator.waterfill(kept, rng.standard_normal(len(space.targets)))
        seconds = (time.process_time() - start) / 20
        print(f"{form}: water-filling 224 x 4096 at kept {kept}: {seconds * 1e3:.2f} ms")
        assert seconds < 0.1
