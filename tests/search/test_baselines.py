from __future__ import annotations

import json
import math

import numpy as np
import optuna
import pytest
import torch

from ranksearch.search.allocate import Allocator
from ranksearch.search.baselines import SEPARABLE, CmaEs
from ranksearch.search.bolaco import Bolaco
from ranksearch.search.coordinates import RANKS
from ranksearch.search.draw import POINT
from ranksearch.search.errors import ImpossibleBudget
from ranksearch.search.evolution import LEVEL
from ranksearch.search.presets import PRESETS
from ranksearch.search.space import RankSpace, uniform
from ranksearch.search.spec import Search
from ranksearch.search.study import RankStudy
from ranksearch.search.turbo import Turbo, project, trust_region

from .cases import llama_space, power_spectra, target

SPACE = llama_space(blocks=2)
SPECTRA = power_spectra(SPACE)
SAMPLERS = ["cmaes", "turbo", "evolutionary", "swaps", "bolaco", "bolaco-20"]
PUBLISHED = [name for name, preset in PRESETS.items() if preset.sampler]
KEPT = 0.4


def open_study(
    storage: optuna.storages.BaseStorage, space: RankSpace = SPACE, preset: str = "ranksearch", **changes: object
) -> RankStudy:
    spec = Search(**{"trials": 8, "pruner": "none", "seed": 3, **changes})  # type: ignore[arg-type]
    return RankStudy(
        storage=storage,
        job_id="job_a",
        kept=KEPT,
        space=space,
        spectra=SPECTRA,
        spec=spec,
        dense_score=10.0,
        preset=preset,
    )


def score(space: RankSpace, ranks: np.ndarray) -> float:
    """A loss the prior does not know: every second target matters four times as much."""
    weights = np.where(np.arange(len(ranks)) % 2, 4.0, 1.0)
    return float(10 * np.exp(0.02 * np.sum(weights * Allocator(space, SPECTRA).tail_loss(ranks))))


def tell_next(study: RankStudy) -> bool:
    if (proposal := study.ask()) is None:
        return False
    value = score(study.space, proposal.ranks)
    study.tell(proposal.number, score=value, scores={"perplexity": value}, seconds=0.5, worker="w")
    return True


def run(study: RankStudy) -> list[np.ndarray]:
    while tell_next(study):
        pass
    return [study.space.unpack(row["ranks"]) for row in study.history()]


@pytest.mark.parametrize(
    ("sampler", "form"), [*((name, "factored") for name in SAMPLERS), ("swaps", "pivoted"), ("bolaco", "pivoted")]
)
def test_every_vector_is_new_and_exact_and_follows_from_the_trials_alone(sampler: str, form: str) -> None:
    space = llama_space(blocks=2, form=form, keep_dense=("*.1.*.o_proj",))
    # a generation of CMA-ES is eleven trials here
    trials = {"cmaes": 15, "turbo": 6}.get(sampler, 8)
    vectors = run(open_study(optuna.storages.InMemoryStorage(), space, sampler=sampler, trials=trials))
    assert len({space.pack(ranks) for ranks in vectors}) == trials
    assert all(space.is_exact(ranks, KEPT) for ranks in vectors)
    storage = optuna.storages.InMemoryStorage()
    while (left := open_study(storage, space, sampler=sampler, trials=trials).ask()) is not None:
        again = open_study(storage, space, sampler=sampler, trials=trials)
        assert tell_next(again)
        np.testing.assert_array_equal(left.ranks, vectors[left.number])
    assert again.finished == trials


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_published_search_starts_from_uniform(preset: str) -> None:
    study = open_study(optuna.storages.InMemoryStorage(), preset=preset, trials=3)
    vectors = run(study)
    np.testing.assert_array_equal(vectors[0], uniform(SPACE, KEPT))
    assert [row["origin"] for row in study.history()] == ["uniform", "search", "search"]
    assert (study.planned, study.required) == (3, 1)


@pytest.mark.parametrize(("sampler", "preset"), [("ranksearch", "evolutionary"), ("swaps", "ranksearch")])
def test_a_search_beats_what_it_starts_from(sampler: str, preset: str) -> None:
    study = open_study(optuna.storages.InMemoryStorage(), sampler=sampler, preset=preset, trials=30)
    vectors = run(study)
    values = [score(SPACE, ranks) for ranks in vectors]
    assert min(values) < 0.995 * min(values[: study.required])


def test_the_points_of_trials_are_small_and_json() -> None:
    for sampler in SAMPLERS:
        study = open_study(optuna.storages.InMemoryStorage(), sampler=sampler, trials=4)
        run(study)
        points = [trial.user_attrs.get(POINT) for trial in study._study.trials]
        assert (points[2] is not None) == (sampler in ("cmaes", "bolaco", "bolaco-20"))
        assert all(len(json.dumps(point)) < 1024 for point in points)


def test_a_swap_moves_one_target_up_and_one_down_by_a_level() -> None:
    study = open_study(optuna.storages.InMemoryStorage(), sampler="swaps", trials=6)
    for _ in range(5):
        assert tell_next(study)
    best, proposal = study.best, study.ask()
    assert best is not None
    assert proposal is not None
    change = (SPACE.costs(proposal.ranks) - SPACE.costs(best.ranks)) / SPACE.dense_costs
    assert (change < 0).sum() == 1
    assert 0.5 * LEVEL < -change.min() * SPACE.dense_costs[change.argmin()] / SPACE.dense_costs.min() <= 6 * LEVEL


def test_bolaco_shares_ranks_over_layers_and_leaves_values_dense() -> None:
    sampler = Bolaco(SPACE, KEPT, 0)
    assert sampler.names == ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "qk", "self_attn.o_proj")
    shares = dict(zip(sampler.names, (0.9, 0.3, 0.5, 0.25, 0.6), strict=True))
    ranks = sampler.ranks(shares)
    assert SPACE.is_exact(ranks, KEPT)
    costs = SPACE.costs(ranks) / SPACE.dense_costs
    level = {t.name: cost / shares.get("qk" if t.name.endswith(("q_proj", "k_proj")) else t.kind, 1.0) for t, cost in
             zip(SPACE.targets, costs, strict=True)}  # fmt: skip
    others = [value for name, value in level.items() if "v_proj" not in name]
    assert all(value == 1.0 for name, value in level.items() if "v_proj" in name)
    assert max(others) - min(others) < 2 * float((SPACE.marginals / SPACE.dense_costs).max()) / 0.25


def test_the_space_of_the_paper_has_four_groups_of_five_and_other_models_one_share_per_type() -> None:
    assert len(Bolaco(llama_space(blocks=8), KEPT, 0, groups=4).names) == 20
    kinds = ("attn.c_attn", "mlp.c_fc")
    gpt = RankSpace(targets=tuple(target(f"h.{i}.{kind}", 48, 16, kind, i) for i in range(3) for kind in kinds))
    assert Bolaco(gpt, KEPT, 0).names == kinds
    with pytest.raises(ImpossibleBudget, match="v_proj") as caught:
        Bolaco(SPACE, 0.05, 0)
    Bolaco(SPACE, caught.value.data["minimum_kept"], 0)


def test_projection_is_the_nearest_point_of_the_box_on_the_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    points, weights = torch.rand(5, 6, dtype=torch.float64, generator=generator), torch.arange(1.0, 7.0).double() / 21
    low, high = torch.full((6,), 0.1).double(), torch.full((6,), 0.8).double()
    found = project(points, weights, KEPT, low, high)
    np.testing.assert_allclose((found @ weights).numpy(), KEPT, atol=1e-9)
    assert bool(((found >= low) & (found <= high)).all())
    for point, nearest in zip(points, found, strict=True):
        # a nearest point on a convex set: no feasible direction leads closer
        others = project(torch.rand(200, 6, dtype=torch.float64, generator=generator), weights, KEPT, low, high)
        assert float(((others - nearest) @ (point - nearest)).max()) <= 1e-9


def test_the_trust_region_grows_with_successes_and_shrinks_with_failures() -> None:
    assert trust_region([], 4) == (0.8, 0)
    assert trust_region([3.0, 2.0, 1.0], 4) == (1.6, 0)
    assert trust_region([1.0, *[2.0] * 4], 4) == (0.4, 0)
    assert trust_region([1.0, *[math.inf] * 8], 4) == (0.2, 0)
    assert trust_region([1.0, 0.9999, 0.9998], 4) == (0.8, 0)
    # too small: it starts anew, and a score is a success that the first region had bettered
    assert trust_region([1.0, *[2.0] * 28], 4) == (0.8, 29)
    assert trust_region([1.0, *[2.0] * 28, 5.0, 4.0, 3.0], 4) == (1.6, 29)


def test_a_trust_region_that_starts_anew_forgets_what_came_before() -> None:
    sampler = Turbo(SPACE, KEPT, 0)
    study = optuna.create_study()
    good = Allocator(SPACE, SPECTRA).prior(KEPT)
    for value in [1.0, *[2.0] * (7 * len(SPACE.targets))]:
        study.add_trial(optuna.trial.create_trial(value=value, user_attrs={RANKS: SPACE.pack(good)}))
    number = len(study.trials)
    np.testing.assert_array_equal(sampler.propose(study.trials, number).ranks, sampler.propose([], number).ranks)
    assert not np.array_equal(sampler.propose(study.trials[:-1], number).ranks, sampler.propose([], number).ranks)


def test_many_targets_are_searched_with_a_diagonal_covariance() -> None:
    space = llama_space(blocks=SEPARABLE // 7 + 1)
    sampler = CmaEs(Allocator(space, power_spectra(space)), KEPT, 0)
    study = optuna.create_study()
    for number in range(25):  # more than a generation
        draw = sampler.propose(study.trials, number)
        assert space.is_exact(draw.ranks, KEPT)
        study.add_trial(optuna.trial.create_trial(value=1.0 + number, user_attrs={POINT: draw.point}))
    again = CmaEs(Allocator(space, power_spectra(space)), KEPT, 0).propose(study.trials[:24], 24)
    assert again.point == study.trials[24].user_attrs[POINT]
