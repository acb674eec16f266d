from __future__ import annotations

from dataclasses import replace

import numpy as np
import optuna
import pytest

from ranksearch.search.allocate import Allocator
from ranksearch.search.gradients import MEASURED, bands, log_sensitivities
from ranksearch.search.space import RankSpace
from ranksearch.search.spec import Search
from ranksearch.search.study import RankStudy
from ranksearch.search.targets import Form

from .cases import llama_space, power_spectra
from .synthetic import DENSE, Problem, problem

KEPT = 0.4


def open_study(made: Problem, storage: optuna.storages.BaseStorage, **changes: object) -> RankStudy:
    return RankStudy(
        storage=storage,
        job_id="job",
        kept=KEPT,
        space=made.space,
        spectra=made.spectra,
        spec=Search.model_validate({"trials": 9, "pruner": "none", **changes}),
        dense_score=DENSE,
    )


def step(study: RankStudy, made: Problem, *, measure: bool = True) -> bool | None:
    """One trial; whether its gradients were wanted, or None when there is none."""
    if (proposal := study.ask()) is None:
        return None
    wanted = study.bands(proposal.number) is not None
    if measure and wanted:
        study.tell_gradients(proposal.number, made.gradients(proposal.ranks))
    study.tell(proposal.number, score=made.score(proposal.ranks), scores={}, seconds=0, worker="w")
    return wanted


def gain(study: RankStudy, made: Problem) -> float:
    assert study.best is not None
    return made.gain(made.score(study.best.ranks), KEPT)


def test_gradients_count_as_evaluations_and_are_not_measured_where_nothing_follows() -> None:
    made = problem(0)
    study = open_study(made, optuna.storages.InMemoryStorage(), trials=3)
    for evaluations, asked in ((5, True), (0, False), (0, False)):  # prior, uniform, and the last trial
        proposal = study.ask()
        assert proposal is not None
        assert (study.bands(proposal.number) is not None) is asked
        if asked:
            study.tell_gradients(proposal.number, made.gradients(proposal.ranks), evaluations=evaluations)
        study.tell(proposal.number, score=made.score(proposal.ranks), scores={}, seconds=0, worker="w")
    assert [row["evaluations"] for row in study.history()] == [6, 1, 1]


def test_no_gradients_are_measured_of_a_model_without_a_choice() -> None:
    made = problem(0)
    fixed = replace(made, space=replace(made.space, keep_dense=("*",)))
    study = RankStudy(
        storage=optuna.storages.InMemoryStorage(),
        job_id="job",
        kept=1.0,
        space=fixed.space,
        spectra=made.spectra,
        spec=Search(trials=9),
        dense_score=DENSE,
    )
    proposal = study.ask()
    assert proposal is not None
    assert study.bands(proposal.number) is None


@pytest.mark.parametrize("form", ["factored", "pivoted"])
@pytest.mark.parametrize("multiple", [1, 8])
def test_bands_are_components_that_a_rank_may_reach(form: Form, multiple: int) -> None:
    space = llama_space(blocks=2)
    fixed = ("*.0.*.q_proj",)
    space = RankSpace(targets=space.targets, form=form, rank_multiple=multiple, keep_dense=fixed)
    for ranks in (space.low_ranks, space.top_ranks, space.full_ranks, (space.low_ranks + space.top_ranks) // 2):
        around = bands(space, ranks)
        assert np.all((around.low <= around.rank) & (around.rank <= around.high))
        assert np.all((around.low >= 0) & (around.high <= space.top_ranks))
        free = space.low_ranks < space.full_ranks
        assert np.all((around.low < around.high) == free)
        assert np.all((around.rank == ranks)[free & (ranks < space.full_ranks)])


def test_sensitivities_are_those_of_a_loss_that_is_quadratic_in_the_gates() -> None:
    space = llama_space(blocks=2)
    allocator = Allocator(space, power_spectra(space))
    ranks = allocator.prior(KEPT)
    hidden = np.random.default_rng(0).standard_normal(len(ranks))
    around = bands(space, ranks)
    above = allocator.tail_loss(around.rank) - allocator.tail_loss(around.high)
    below = allocator.tail_loss(around.low) - allocator.tail_loss(around.rank)
    known = around.low < around.high
    # a loss whose gates are worth exp(z) of what is predicted on either side, in another unit
    hidden -= np.log(np.sum((np.exp(hidden) * (above + below))[known]) / np.sum((above + below)[known]))
    less, more = 7 * (np.exp(hidden) - 1) * below, 7 * (np.exp(hidden) + 1) * above
    found = log_sensitivities(allocator, ranks, less, more)
    np.testing.assert_allclose(found[known], (hidden - hidden[known].mean())[known], atol=1e-9)
    # components that do harm, all together, tell nothing
    assert not log_sensitivities(allocator, ranks, less, np.full(len(ranks), -1e9)).any()
    # what is not finite is not known
    broken = np.where(np.arange(len(ranks)) < 4, np.nan, more)
    np.testing.assert_array_equal(log_sensitivities(allocator, ranks, less, broken)[:4], np.zeros(4))
    assert np.isfinite(log_sensitivities(allocator, ranks, less, broken)).all()


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.8])
def test_a_prior_that_is_right_is_left_as_it_is_dense_targets_too(kept: float) -> None:
    space = llama_space(blocks=2)
    allocator = Allocator(space, power_spectra(space))
    ranks = allocator.prior(kept)
    around = bands(space, ranks)
    more = 3 * 2 * (allocator.tail_loss(around.rank) - allocator.tail_loss(around.high))
    found = log_sensitivities(allocator, ranks, np.zeros(len(ranks)), more)
    np.testing.assert_allclose(found, np.zeros(len(ranks)), atol=1e-9)


def test_gradients_of_the_first_vectors_lead_most_of_the_way_to_the_optimum() -> None:
    gains = []
    for measure in (False, True):
        made = problem(0)
        study = open_study(made, optuna.storages.InMemoryStorage(), trials=6)
        while step(study, made, measure=measure) is not None:
            pass
        gains.append(gain(study, made))
    print("share of the gap from prior to oracle after 6 trials, without and with gradients:", gains)
    assert gains[1] > max(0.7, gains[0] + 0.2)


def test_they_are_asked_for_at_the_prior_and_the_first_proposals_only() -> None:
    made = problem(1)
    study = open_study(made, optuna.storages.InMemoryStorage())
    wanted = [step(study, made) for _ in range(9)]
    assert wanted == [True, False, *[True] * (MEASURED - 1), *[False] * (8 - MEASURED)]
    other = open_study(made, optuna.storages.InMemoryStorage(), sampler="tpe")
    assert [step(other, made) for _ in range(4)] == [False] * 4


def test_another_process_goes_on_with_the_same_vectors() -> None:
    made = problem(2)
    whole, parts = optuna.storages.InMemoryStorage(), optuna.storages.InMemoryStorage()
    study = open_study(made, whole)
    while step(study, made) is not None:
        pass
    while step(open_study(made, parts), made) is not None:
        pass
    vectors = [[row["ranks"] for row in open_study(made, storage).history()] for storage in (whole, parts)]
    assert vectors[0] == vectors[1]
    assert len(vectors[0]) == 9


def test_a_trial_that_was_measured_and_not_scored_is_offered_again_and_not_measured_twice() -> None:
    made, storage = problem(2), optuna.storages.InMemoryStorage()
    study = open_study(made, storage)
    first = study.ask()
    assert first is not None
    study.tell_gradients(first.number, made.gradients(first.ranks))
    study = open_study(made, storage)
    again = study.ask()
    assert again is not None
    assert again.number == first.number
    assert study.bands(again.number) is None
