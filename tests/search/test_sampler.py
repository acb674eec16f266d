from __future__ import annotations

import math
import time

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import FrozenTrial, TrialState, create_trial

from ranksearch.search.allocate import Allocator
from ranksearch.search.coordinates import BOUND, RANKS, Coordinates
from ranksearch.search.sampler import RankSampler
from ranksearch.search.siblings import Sibling
from ranksearch.search.space import uniform
from ranksearch.search.spec import Search
from ranksearch.search.study import RankStudy

from .cases import llama_space, power_spectra
from .synthetic import DENSE, Problem, problem

KEPT = 0.4


def sampler_of(made: Problem, **changes: object) -> RankSampler:
    options = {"allocator": made.allocator, "kept": KEPT, "seed": 0, "dense_score": DENSE, **changes}
    return RankSampler(**options)  # type: ignore[arg-type]


def told(made: Problem, ranks: np.ndarray, number: int, state: TrialState = TrialState.COMPLETE) -> FrozenTrial:
    value = made.score(ranks) if state == TrialState.COMPLETE else None
    trial = create_trial(state=state, value=value, user_attrs={RANKS: made.space.pack(ranks)})
    trial.number = number
    return trial


def sibling_of(made: Problem, trials: list[FrozenTrial]) -> Sibling:
    return Sibling(trials=trials, space=made.space, objective="perplexity", dense_score=DENSE)


def started(made: Problem, count: int = 6) -> list[FrozenTrial]:
    """Prior, uniform and some random tilts."""
    rng = np.random.default_rng(0)
    vectors = [made.allocator.prior(KEPT), uniform(made.space, KEPT)]
    while len(vectors) < count:
        vectors.append(made.allocator.waterfill(KEPT, 0.5 * rng.standard_normal(len(made.hidden))))
    return [told(made, ranks, number) for number, ranks in enumerate(vectors)]


def best_after(made: Problem, sampler: str, trials: int, seed: int) -> float:
    study = RankStudy(
        storage=optuna.storages.InMemoryStorage(),
        job_id="job",
        kept=KEPT,
        space=made.space,
        spectra=made.spectra,
        spec=Search(trials=trials, sampler=sampler, seed=seed, pruner="none"),  # type: ignore[arg-type]
        dense_score=DENSE,
    )
    while (proposal := study.ask()) is not None:
        study.tell(proposal.number, score=made.score(proposal.ranks), scores={}, seconds=0, worker="w")
    assert study.best is not None
    return made.score(study.best.ranks)


def test_thirty_trials_close_most_of_the_gap_and_beat_random_tilts() -> None:
    gains: dict[str, list[float]] = {"ranksearch": [], "random": []}
    for seed in range(2):
        made = problem(seed)
        for sampler, found in gains.items():
            found.append(made.gain(best_after(made, sampler, 30, seed), KEPT))
    print("share of the gap from prior to oracle after 30 trials, 42 targets:", gains)
    assert min(gains["ranksearch"]) > 0.4
    assert all(ours > other + 0.2 for ours, other in zip(*gains.values(), strict=True))


@pytest.mark.parametrize("number", [2, 3, 6, 9])
def test_a_proposal_is_exact_new_and_a_function_of_seed_number_and_trials(number: int) -> None:
    made, trials = problem(0), started(problem(0))
    ranks = sampler_of(made).propose(trials, number)
    assert made.space.is_exact(ranks, KEPT)
    assert made.space.pack(ranks) not in {t.user_attrs[RANKS] for t in trials}
    torch.rand(7)
    np.testing.assert_array_equal(sampler_of(made).propose(trials, number), ranks)
    assert torch.get_num_threads() >= 1


def test_the_callers_random_state_and_threads_are_left_alone() -> None:
    made = problem(0)
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    sampler_of(made).propose(started(made), 9)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)


def test_pending_trials_are_not_proposed_again() -> None:
    made, trials = problem(1), started(problem(1))
    for number in range(6, 12):
        ranks = sampler_of(made).propose(trials, number)
        assert made.space.pack(ranks) not in {t.user_attrs[RANKS] for t in trials}
        trials.append(told(made, ranks, number, TrialState.RUNNING))


def test_failed_vectors_are_not_proposed_again() -> None:
    made, trials = problem(1), started(problem(1))
    first = sampler_of(made).propose(trials, 6)
    again = sampler_of(made).propose([*trials, told(made, first, 6, TrialState.FAIL)], 6)
    assert not np.array_equal(first, again)


def test_without_any_score_the_prior_is_tilted_at_random() -> None:
    made = problem(0)
    pending = [told(made, made.allocator.prior(KEPT), 0, TrialState.RUNNING)]
    first, second = (sampler_of(made).propose(pending, number) for number in (1, 2))
    assert made.space.is_exact(first, KEPT)
    assert not np.array_equal(first, second)


def test_another_budget_of_the_job_teaches_the_sensitivities() -> None:
    made, gains = problem(2), []
    rng = np.random.default_rng(1)
    at_half = [made.allocator.waterfill(0.5, 0.7 * rng.standard_normal(len(made.hidden))) for _ in range(40)]
    sibling = sibling_of(made, [told(made, ranks, number) for number, ranks in enumerate(at_half)])
    own = started(made, 2)
    for siblings in ([], [sibling]):
        ranks = sampler_of(made, siblings=siblings).propose(own, 4)
        gains.append(made.gain(made.score(ranks), KEPT))
    print("gain of the first search trial without and with a sibling budget:", gains)
    assert gains[1] > max(gains[0], 0.3)


def test_an_excess_of_another_study_that_is_next_to_none_does_not_count() -> None:
    made, own = problem(0), started(problem(0))
    smallest = min(np.log(t.value / DENSE) for t in own)  # type: ignore[operator]
    other = [told(made, made.allocator.prior(0.6), number) for number in range(3)]
    for trial, share in zip(other, (-1.0, 0.001, 0.1), strict=True):
        trial.values = [float(DENSE * np.exp(share * smallest))]
    found = sampler_of(made, siblings=[sibling_of(made, other)])._told(own)
    assert [t.number for t in found if t.group == 1] == [2]
    assert sampler_of(made, siblings=[sibling_of(made, other)])._told([])[0].number == 1


def test_a_job_of_many_budgets_proposes_no_slower_than_one_of_two() -> None:
    made = problem(0)
    own, ranks = started(made), made.allocator.prior(0.5)
    sibling = sibling_of(made, [told(made, ranks, number) for number in range(200)])
    sampler = sampler_of(made, siblings=[sibling] * 6)
    groups = [t.group for t in sampler._told(own)]
    assert [groups.count(group) for group in range(7)] == [len(own), 200, 320 - 200 - len(own), 0, 0, 0, 0]


def test_a_pruned_trial_informs_through_its_difference_to_a_complete_one() -> None:
    made, trials = problem(0), started(problem(0), 3)
    noise = np.random.default_rng(0).standard_normal(8)
    for trial in trials:
        assert trial.value is not None
        trial.intermediate_values = {s: float(np.log(trial.value) + noise[s]) for s in range(8)}
    pruned = told(made, made.allocator.waterfill(KEPT, -made.hidden), 3, TrialState.PRUNED)
    excess = np.log(made.score(made.allocator.waterfill(KEPT, -made.hidden)) / DENSE)
    pruned.intermediate_values = {s: float(np.log(DENSE) + excess + noise[s]) for s in range(3)}
    found = sampler_of(made)._told([*trials, pruned])
    assert found[-1].excess == pytest.approx(excess)
    assert found[-1].spread > found[0].spread


def test_scores_at_and_below_the_dense_one_are_served() -> None:
    made, trials = problem(0), started(problem(0))
    for trial in trials:
        assert trial.value is not None
        trial.values = [trial.value - trials[0].value + 0.99 * DENSE]
    assert made.space.is_exact(sampler_of(made).propose(trials, 7), KEPT)


def test_kl_is_its_own_excess() -> None:
    made, trials = problem(0), started(problem(0))
    for trial in trials:
        assert trial.value is not None
        trial.values = [float(np.log(trial.value / DENSE))]
    ranks = sampler_of(made, objective="kl", dense_score=0.0).propose(trials, 7)
    np.testing.assert_array_equal(ranks, sampler_of(made).propose(started(made), 7))


def test_it_is_an_optuna_sampler_like_any_other() -> None:
    made = problem(0)
    study = optuna.create_study(sampler=sampler_of(made))
    coordinates = Coordinates(made.space.targets)

    def objective(trial: optuna.Trial) -> float:
        for name in coordinates.names:
            trial.suggest_float(name, -BOUND, BOUND)
        packed = study.get_trials(deepcopy=False)[trial.number].user_attrs[RANKS]
        return made.score(made.space.unpack(packed))

    study.optimize(objective, n_trials=6)
    assert len({trial.user_attrs[RANKS] for trial in study.trials}) == 6
    assert study.best_value < study.trials[0].value * 1.01  # type: ignore[operator]


def test_as_an_optuna_sampler_it_takes_two_objectives_as_their_sum() -> None:
    made = problem(0)
    study = optuna.create_study(sampler=sampler_of(made, objective="both"), directions=["minimize"] * 2)
    coordinates = Coordinates(made.space.targets)

    def objectives(trial: optuna.Trial) -> tuple[float, float]:
        for name in coordinates.names:
            trial.suggest_float(name, -BOUND, BOUND)
        packed = study.get_trials(deepcopy=False)[trial.number].user_attrs[RANKS]
        score = made.score(made.space.unpack(packed))
        return score, math.log(score / DENSE)

    study.optimize(objectives, n_trials=5)
    assert len({trial.user_attrs[RANKS] for trial in study.trials}) == 5


def test_a_proposal_at_224_targets_and_300_trials_is_quick() -> None:
    space = llama_space(blocks=32, width=4096, hidden=11008, kv=4096)
    allocator = Allocator(space, power_spectra(space))
    hidden = 0.7 * np.random.default_rng(0).standard_normal(224)
    unit = allocator.loss(allocator.prior(KEPT), hidden)
    made = Problem(space=space, allocator=allocator, hidden=hidden, spectra={}, unit=unit)
    trials, sampler = started(made, 300), sampler_of(made)
    sampler.propose(trials, 300)
    seconds = {}
    for name, number in (("greedy", 301), ("expected improvement", 303)):
        begun, wall = time.process_time(), time.perf_counter()
        sampler.propose(trials, number)
        seconds[name] = time.process_time() - begun
        print(f"{name}: {seconds[name]:.3f} s of one core, {time.perf_counter() - wall:.3f} s wall")
    assert max(seconds.values()) < 1.5
