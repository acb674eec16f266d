from __future__ import annotations

import json
import math

import numpy as np
import optuna
import pytest
import torch
from botorch.acquisition import LogExpectedImprovement
from optuna.trial import TrialState, create_trial

from ranksearch.search.allocate import Allocator
from ranksearch.search.baselines import SEPARABLE, CmaEs
from ranksearch.search.bolaco import Bolaco
from ranksearch.search.coordinates import RANKS
from ranksearch.search.draw import POINT
from ranksearch.search.errors import ImpossibleBudget
from ranksearch.search.evolution import LEVEL, Evolution
from ranksearch.search.presets import PRESETS
from ranksearch.search.shares import Shares, log_score, project
from ranksearch.search.space import RankSpace, uniform
from ranksearch.search.spec import Search
from ranksearch.search.study import RankStudy
from ranksearch.search.turbo import Turbo, trust_region
from ranksearch.search.vanilla import BoTorch, _process

from . import synthetic
from .cases import llama_space, power_spectra, target

SPACE = llama_space(blocks=2)
SPECTRA = power_spectra(SPACE)
SAMPLERS = ["cmaes", "botorch", "turbo", "evolutionary", "swaps", "bolaco", "bolaco-20"]
PUBLISHED = [name for name, preset in PRESETS.items() if preset.sampler]
KEPT = 0.4


def open_study(
    storage: optuna.storages.BaseStorage, space: RankSpace = SPACE, preset: str = "ranksearch", **changes: object
) -> RankStudy:
    spec = Search.model_validate({"trials": 8, "pruner": "none", "seed": 3, **changes})
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
    ("sampler", "form"),
    [*((name, "factored") for name in SAMPLERS), *((name, "pivoted") for name in ("botorch", "swaps", "bolaco"))],
)
def test_every_vector_is_new_and_exact_and_follows_from_the_trials_alone(sampler: str, form: str) -> None:
    space = llama_space(blocks=2, form=form, keep_dense=("*.1.*.o_proj",))
    # a generation of CMA-ES is eleven trials here, and BoTorch learns after ten
    trials = {"cmaes": 15, "botorch": 11, "turbo": 6}.get(sampler, 8)
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
        study.add_trial(create_trial(value=value, user_attrs={RANKS: SPACE.pack(good)}))
    number = len(study.trials)
    np.testing.assert_array_equal(sampler.propose(study.trials, number).ranks, sampler.propose([], number).ranks)
    assert not np.array_equal(sampler.propose(study.trials[:-1], number).ranks, sampler.propose([], number).ranks)


def botorch_trials(sampler: BoTorch, space: RankSpace, count: int) -> list[optuna.trial.FrozenTrial]:
    """Uniform and Sobol points with their scores."""
    study = optuna.create_study()
    for number in range(count):
        ranks = sampler.propose(study.trials, number).ranks if number else uniform(space, KEPT)
        study.add_trial(create_trial(value=score(space, ranks), user_attrs={RANKS: space.pack(ranks)}))
    return study.trials


def test_scores_are_ordered_whatever_the_objective() -> None:
    values = (-1e-3, 0.0, 1e-3, 0.5, 1.0, 1.1, 40.0)
    scores = [log_score(create_trial(state=TrialState.COMPLETE, value=value)) for value in values]
    assert scores == sorted(set(scores))
    assert scores[-1] == math.log(40.0)
    assert scores[1] - scores[0] == pytest.approx(1e-3)
    assert math.isinf(log_score(create_trial(state=TrialState.FAIL)))


@pytest.mark.parametrize("kept", [0.811845975062573, 1.0])
def test_a_level_switch_uses_the_budget_exactly_where_nobody_can_take_the_level(kept: float) -> None:
    targets = tuple(target(f"t{i}", m, n) for i, (m, n) in enumerate(((1, 300), (40, 8), (1, 40))))
    space = RankSpace(targets=targets, rank_multiple=2)
    for seed in range(20):
        ranks = Evolution(space, kept, seed).propose([], seed).ranks
        assert space.is_exact(ranks, kept)


def test_botorch_maximizes_the_expected_improvement_on_the_budget() -> None:
    sampler, shares = BoTorch(SPACE, KEPT, 0), Shares(SPACE, KEPT)
    trials = botorch_trials(sampler, SPACE, 10)
    torch.manual_seed(0)
    point = sampler._improve([(trial, log_score(trial)) for trial in trials], [], 10)
    low = shares.of(SPACE.low_ranks)
    assert float(point @ shares.weights) == pytest.approx(KEPT, abs=1e-9)
    assert bool(((point >= low) & (point <= 1)).all())
    values = torch.tensor([-math.log(trial.value) for trial in trials], dtype=torch.float64)
    model = _process(torch.stack([shares.of_trial(trial) for trial in trials]), values)
    others = shares.project(torch.rand(500, len(low), dtype=torch.float64), low, torch.ones_like(low))
    near = shares.project(point + 0.05 * torch.randn(500, len(low)).double(), low, torch.ones_like(low))
    improvement = LogExpectedImprovement(model, best_f=values.max())
    found = improvement(torch.cat([point[None], others, near])[:, None]).detach()
    # the sampler's is an estimate by Monte Carlo, and it takes some steps only
    assert float(found[0]) > float(found[1:].max()) - 0.05


def test_botorch_keeps_off_trials_that_run_and_learns_from_those_that_were_stopped() -> None:
    sampler = BoTorch(SPACE, KEPT, 0)
    trials = botorch_trials(sampler, SPACE, 10)
    first = sampler.propose(trials, 10).ranks
    shares = Shares(SPACE, KEPT).of(first)
    for state in (TrialState.RUNNING, TrialState.PRUNED):
        known = create_trial(state=state, user_attrs={RANKS: SPACE.pack(first)})
        following = Shares(SPACE, KEPT).of(sampler.propose([*trials, known], 10).ranks)
        assert float((following - shares).norm()) > 0.01


def test_botorch_proposes_while_there_is_but_one_score_or_none() -> None:
    sampler = BoTorch(SPACE, KEPT, 0)
    vectors = [trial.user_attrs[RANKS] for trial in botorch_trials(sampler, SPACE, 10)]
    failed = [create_trial(state=TrialState.FAIL, user_attrs={RANKS: packed}) for packed in vectors]
    for trials in (failed, [create_trial(value=3.0, user_attrs={RANKS: vectors[0]}), *failed[1:]]):
        assert SPACE.is_exact(sampler.propose(trials, 10).ranks, KEPT)


def test_botorch_never_leaves_the_budget_of_a_made_up_model() -> None:
    made = synthetic.problem(0)
    assert len(made.space.targets) == 42
    sampler, study = BoTorch(made.space, KEPT, 0), optuna.create_study()
    for number in range(12):  # ten before it learns
        ranks = sampler.propose(study.trials, number).ranks
        assert made.space.is_exact(ranks, KEPT)
        study.add_trial(create_trial(value=made.score(ranks), user_attrs={RANKS: made.space.pack(ranks)}))
    assert len({trial.user_attrs[RANKS] for trial in study.trials}) == 12


def test_many_targets_are_searched_with_a_diagonal_covariance() -> None:
    space = llama_space(blocks=SEPARABLE // 7 + 1)
    sampler = CmaEs(Allocator(space, power_spectra(space)), KEPT, 0)
    study = optuna.create_study()
    for number in range(25):  # more than a generation
        draw = sampler.propose(study.trials, number)
        assert space.is_exact(draw.ranks, KEPT)
        study.add_trial(create_trial(value=1.0 + number, user_attrs={POINT: draw.point}))
    again = CmaEs(Allocator(space, power_spectra(space)), KEPT, 0).propose(study.trials[:24], 24)
    assert again.point == study.trials[24].user_attrs[POINT]
