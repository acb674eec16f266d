from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ranksearch.search.errors import ImpossibleBudget, InvalidInput
from ranksearch.search.prices import as_document, from_document
from ranksearch.search.space import RankSpace, uniform
from ranksearch.search.spec import Method
from ranksearch.search.targets import Form, Target

from .cases import curves, llama_space, priced, target

FORMS: tuple[Form, ...] = ("factored", "pivoted")


@st.composite
def spaces(draw: st.DrawFn) -> RankSpace:
    shapes = draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=8))
    targets = tuple(target(f"block.{i}.linear", m, n, depth=i) for i, (m, n) in enumerate(shapes))
    keep = draw(st.sampled_from([(), ("block.0.*",)]))
    space = RankSpace(
        targets=targets,
        rank_multiple=draw(st.sampled_from([1, 2, 3, 8])),
        keep_dense=keep,
        form=draw(st.sampled_from(FORMS)),
    )
    return draw(priced(space))


kept_values = st.floats(0.01, 1.0).map(lambda k: round(k, 3))


def random_ranks(space: RankSpace, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    steps = [
        [*range(low, top + 1, space.rank_multiple), full]
        for low, top, full in zip(space.low_ranks, space.top_ranks, space.full_ranks, strict=True)
    ]
    return np.array([rng.choice(s) for s in steps])


@given(spaces(), kept_values)
@settings(deadline=None)
def test_uniform_is_feasible_and_uses_the_budget_exactly(space: RankSpace, kept: float) -> None:
    assume(space.budget(kept) >= space.minimum)
    ranks = uniform(space, kept)
    assert space.is_feasible(ranks, kept)
    assert space.is_exact(ranks, kept)
    left = space.budget(kept) - space.cost(ranks)
    for i in range(len(space.targets)):
        raised = ranks.copy()
        raised[i] = space.next_ranks(ranks)[i]
        assert raised[i] == ranks[i] or space.cost(raised) - space.cost(ranks) > left


@given(spaces(), st.integers(0, 1000))
def test_a_vector_survives_packing(space: RankSpace, seed: int) -> None:
    ranks = random_ranks(space, seed)
    packed = space.pack(ranks)
    assert packed.isascii()
    np.testing.assert_array_equal(space.unpack(packed), ranks)
    np.testing.assert_array_equal(space.from_dict(space.as_dict(ranks)), ranks)


@given(st.data(), st.integers(1, 40))
def test_a_curve_passes_through_what_was_measured_and_rises_at_every_rank(data: st.DataObject, full_rank: int) -> None:
    curve = data.draw(curves(full_rank))
    table = curve.table(full_rank)
    inner = [(rank, time) for rank, time in zip(curve.ranks, curve.times, strict=True) if rank < full_rank]
    assert [table[rank] - rank for rank, _ in inner] == [time for _, time in inner]
    assert np.all(np.diff(table[:-1]) >= 1)
    expected = np.interp(np.arange(full_rank), curve.ranks, curve.times) + np.arange(full_rank)
    np.testing.assert_allclose(table[:-1], expected, atol=1)
    assert (len(table), table[-1]) == (full_rank + 1, curve.dense)
    names = ["a", "b", "c"]
    assert from_document(json.loads(json.dumps(as_document(names, [curve] * 3))), names) == (curve,) * 3


@given(spaces(), st.integers(0, 1000))
def test_no_rank_below_dense_costs_as_much_as_dense(space: RankSpace, seed: int) -> None:
    ranks = random_ranks(space, seed)
    np.testing.assert_array_equal(space.costs(ranks) < space.dense_costs, ranks < space.full_ranks)
    np.testing.assert_array_equal([space.costs_of(i, r) for i, r in enumerate(ranks)], space.costs(ranks))
    costs = space.costs(ranks).astype(np.float64)
    np.testing.assert_array_equal(space.at_costs(costs), ranks)
    lower = np.where(ranks > space.low_ranks, space.previous_ranks(ranks), ranks)
    np.testing.assert_array_equal(space.at_costs(costs - 0.5), lower)
    counted = [
        t.parameters if r == t.full_rank else r * t.marginal - (r * r if space.form == "pivoted" else 0)
        for t, r in zip(space.targets, ranks.tolist(), strict=True)
    ]
    np.testing.assert_array_equal(space.parameters_of(ranks), counted)


@given(spaces(), st.integers(0, 1000))
def test_steps_up_and_down_are_inverse_and_change_the_cost(space: RankSpace, seed: int) -> None:
    ranks = random_ranks(space, seed)
    up = space.next_ranks(ranks)
    assert space.is_allowed(up)
    assert np.all((space.costs(up) > space.costs(ranks)) == (ranks < space.full_ranks))
    np.testing.assert_array_equal(space.previous_ranks(up)[ranks < space.full_ranks], ranks[ranks < space.full_ranks])
    assert space.is_allowed(space.previous_ranks(ranks))


@given(spaces(), kept_values)
def test_the_named_minimum_works_and_a_smaller_budget_is_refused(space: RankSpace, kept: float) -> None:
    if space.budget(kept) >= space.minimum:
        space.check_budget(kept)
        return
    with pytest.raises(ImpossibleBudget) as caught:
        space.check_budget(kept)
    space.check_budget(caught.value.data["minimum_kept"])
    assert caught.value.data["kept"] == kept


@pytest.mark.parametrize("kept", [0.0, -0.5, 1.5, float("nan")])
def test_a_budget_outside_the_unit_interval_is_refused(kept: float) -> None:
    with pytest.raises(ImpossibleBudget, match="outside"):
        llama_space().check_budget(kept)


def test_a_factored_target_never_costs_as_much_as_the_dense_one() -> None:
    space = llama_space()
    assert np.all(space.top_ranks * space.marginals < space.dense_costs)
    assert np.all((space.top_ranks + 1) * space.marginals >= space.dense_costs)


def test_in_form_pivoted_every_rank_below_full_is_smaller_than_dense() -> None:
    space = llama_space(form="pivoted")
    np.testing.assert_array_equal(space.top_ranks, space.full_ranks - 1)
    ranks = space.low_ranks
    for _ in range(int(space.full_ranks.max())):
        expected = [
            r * t.in_features + (t.out_features - r) * r if r < t.full_rank else t.parameters
            for t, r in zip(space.targets, ranks.tolist(), strict=True)
        ]
        np.testing.assert_array_equal(space.costs(ranks), expected)
        np.testing.assert_array_equal([space.costs_of(i, r) for i, r in enumerate(ranks)], expected)
        ranks = space.next_ranks(ranks)
    np.testing.assert_array_equal(ranks, space.full_ranks)


@pytest.mark.parametrize("form", FORMS)
def test_everything_kept_means_everything_dense(form: Form) -> None:
    space = llama_space(form=form)
    np.testing.assert_array_equal(uniform(space, 1.0), space.full_ranks)
    assert space.kept(space.full_ranks) == 1.0


def test_the_budget_reads_kept_as_a_decimal() -> None:
    space = RankSpace(targets=(target("a", 10, 10),))
    assert 0.29 * space.parameters < 29
    assert space.budget(0.29) == 29


@pytest.mark.parametrize("form", FORMS)
def test_uniform_spreads_the_budget_evenly(form: Form) -> None:
    space = llama_space(form=form)
    ranks = uniform(space, 0.4)
    np.testing.assert_allclose(space.costs(ranks) / space.dense_costs, 0.4, atol=0.05)


def test_keep_dense_holds_targets_at_full_rank_and_counts_them() -> None:
    space = llama_space(keep_dense=("*.v_proj",))
    ranks = uniform(space, 0.5)
    dense = np.array([t.kind == "self_attn.v_proj" for t in space.targets])
    np.testing.assert_array_equal(ranks[dense], space.full_ranks[dense])
    assert np.all(ranks[~dense] < space.full_ranks[~dense])
    assert space.is_exact(ranks, 0.5)


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(InvalidInput, match="lm_head"):
        llama_space(keep_dense=("lm_head",))


def test_a_target_too_small_for_the_multiple_stays_dense() -> None:
    space = RankSpace(targets=(target("small", 8, 8), target("large", 64, 64)), rank_multiple=8)
    assert space.low_ranks.tolist() == [8, 8]
    assert space.costs(space.low_ranks).tolist() == [64, 8 * 128]


def test_a_vector_of_224_ranks_packs_below_1024_characters() -> None:
    space = llama_space(blocks=32, width=4096, hidden=11008, kv=4096)
    assert len(space.targets) == 224
    packed = space.pack(uniform(space, 0.8))
    print(f"224 ranks: {len(packed)} characters")
    assert len(packed) < 1024


def test_ranks_beyond_16_bits_pack_too() -> None:
    space = RankSpace(targets=(Target(name="a", out_features=200_000, in_features=200_000, kind="a", depth=0),))
    ranks = np.array([70_001])
    np.testing.assert_array_equal(space.unpack(space.pack(ranks)), ranks)


@pytest.mark.parametrize("packed", ["", "!!", "AAAA", "AQ=="])
def test_a_damaged_vector_is_refused(packed: str) -> None:
    with pytest.raises(InvalidInput):
        llama_space().unpack(packed)


def test_a_vector_of_other_targets_is_refused() -> None:
    with pytest.raises(InvalidInput, match="differ"):
        llama_space().from_dict({"model.layers.0.mlp.up_proj": 3})


def test_the_light_modules_import_without_torch_and_botorch() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['botorch'] = sys.modules['gpytorch'] = None\n"
        "import ranksearch.search.space, ranksearch.search.spec, ranksearch.search.study\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_specs_method_gives_the_space() -> None:
    targets = (target("block.0.q_proj", 16, 16), target("block.0.v_proj", 16, 8))
    method = Method(rank_multiple=4, keep_dense=["*.v_proj"], form="pivoted", refine=["sequential"])
    space = RankSpace.of(method, iter(targets))
    assert space == RankSpace(targets=targets, rank_multiple=4, keep_dense=("*.v_proj",), form="pivoted")
    assert space.form != RankSpace.of(Method(), targets).form
    with pytest.raises(InvalidInput, match="matches no target"):
        RankSpace.of(Method(keep_dense=["*.k_proj"]), targets)
