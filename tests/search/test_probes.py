from __future__ import annotations

import itertools

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from ranksearch.search.allocate import Allocator
from ranksearch.search.probes import Probes, knapsack, planned_trials, threshold
from ranksearch.search.space import RankSpace, uniform
from ranksearch.search.spec import Search
from ranksearch.search.study import RankStudy

from .cases import llama_space, power_spectra, target

SMALL = RankSpace(
    targets=(
        target("a", 40, 30, "k", 0),
        target("b", 24, 24, "k", 0),
        target("c", 60, 20, "k", 1),
        target("d", 32, 48, "k", 1),
    )
)
SPECTRA = power_spectra(SMALL)
KEPT = 0.45


def open_study(
    storage: optuna.storages.BaseStorage,
    preset: str,
    kept: float = KEPT,
    siblings: tuple[float, ...] = (),
    **options: object,
) -> RankStudy:
    return RankStudy(
        storage=storage,
        job_id="job_a",
        kept=kept,
        space=RankSpace(targets=SMALL.targets, **options),  # type: ignore[arg-type]
        spectra=SPECTRA,
        spec=Search(trials=3, pruner="wilcoxon"),
        dense_score=10.0,
        siblings=siblings,
        preset=preset,
    )


def tell(study: RankStudy, number: int, ranks: np.ndarray) -> None:
    loss = Allocator(study.space, SPECTRA).tail_loss(ranks) @ np.array([1.0, 3.0, 0.2, 2.0])
    scores = {"perplexity": float(10 * np.exp(loss)), "kl": float(loss)}
    study.tell(number, score=scores["perplexity"], scores=scores, seconds=0.1, worker="w")


def measure(rng: np.random.Generator, levels: int = 4) -> list[dict[int, float]]:
    tops = zip(SMALL.low_ranks, SMALL.top_ranks, strict=True)
    return [
        dict(zip(np.linspace(low, top, levels).astype(int).tolist(), np.sort(rng.random(levels))[::-1], strict=True))
        for low, top in tops
    ]


@pytest.mark.parametrize("seed", range(5))
def test_the_knapsack_is_the_best_of_all_combinations(seed: int) -> None:
    measured = measure(np.random.default_rng(seed))
    found = knapsack(SMALL, KEPT, measured)
    fit = [np.array(v) for v in itertools.product(*measured) if SMALL.cost(np.array(v)) <= SMALL.budget(KEPT)]
    best = min(sum(known[int(r)] for known, r in zip(measured, v, strict=True)) for v in fit)
    assert SMALL.cost(found) <= SMALL.budget(KEPT)
    assert sum(known[int(r)] for known, r in zip(measured, found, strict=True)) == pytest.approx(best, abs=1e-12)


def test_a_knapsack_with_few_bins_stays_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ranksearch.search.probes.BINS", 20)
    monkeypatch.setattr("ranksearch.search.probes.BINS_PER_TARGET", 5)
    for seed in range(5):
        assert SMALL.cost(knapsack(SMALL, KEPT, measure(np.random.default_rng(seed)))) <= SMALL.budget(KEPT)


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_is_the_lowest_that_fits(seed: int) -> None:
    measured = measure(np.random.default_rng(seed))

    def at(limit: float) -> np.ndarray:
        rows = [[r for r, s in known.items() if s <= limit] for known in measured]
        return np.array([min(row) if row else full for row, full in zip(rows, SMALL.full_ranks, strict=True)])

    found = threshold(SMALL, KEPT, measured)
    limits = sorted(score for known in measured for score in known.values())
    lowest = next(limit for limit in limits if SMALL.cost(at(limit)) <= SMALL.budget(KEPT))
    np.testing.assert_array_equal(found, at(lowest))


@pytest.mark.parametrize("form", ["factored", "pivoted"])
@pytest.mark.parametrize("preset", ["asvd", "dp-knapsack"])
def test_probes_come_first_and_are_never_the_best(preset: str, form: str) -> None:
    storage = optuna.storages.InMemoryStorage()
    study = open_study(storage, preset, form=form)
    space, planned = study.space, study.planned
    assert planned == study.required == planned_trials(preset, 3, space, KEPT)
    assert planned <= 1 + 4 * (9 if preset == "asvd" else 10)
    base = space.full_ranks if preset == "asvd" else uniform(space, KEPT)
    # a new process each time, as after a crash
    while (left := open_study(storage, preset, form=form).ask()) is not None:
        assert study.best is None
        again = open_study(storage, preset, form=form)
        proposal = again.ask()
        assert proposal is not None
        np.testing.assert_array_equal(proposal.ranks, left.ranks)
        if proposal.origin == "probe":
            assert (proposal.ranks != base).sum() <= 1
            assert again.report(proposal.number, 0, [50.0] * 8) is False
        tell(again, proposal.number, proposal.ranks)
    rows = study.history()
    assert [row["origin"] for row in rows] == ["probe"] * (planned - 1) + [preset]
    assert len({row["ranks"] for row in rows[:-1]}) == planned - 1
    assert study.best is not None
    assert study.best.number == planned - 1
    assert space.is_exact(study.best.ranks, KEPT)
    loaded = optuna.load_study(study_name="job_a/0.45", storage=storage)
    assert loaded.best_trial.number == planned - 1
    if preset == "asvd":
        assert min(t.value for t in loaded.trials if t.value) < loaded.best_value
    assert all(trial.state == TrialState.COMPLETE for trial in loaded.trials)


def test_what_the_others_stand_at_is_measured_once_for_all() -> None:
    probes = Probes("dp-knapsack", SMALL, KEPT)
    measured = probes._measured({number: float(number) for number in range(len(probes))})
    base = uniform(SMALL, KEPT)
    same = [known[int(rank)] for known, rank in zip(measured, base, strict=True) if int(rank) in known]
    assert len(set(same)) <= 1
    for number in range(len(probes)):
        changed = np.flatnonzero(probes.vector(number) != base)
        if len(changed):
            target_ = int(changed[0])
            assert measured[target_][int(probes.vector(number)[target_])] == number


def test_failed_probes_do_not_count_and_fixed_targets_are_not_probed() -> None:
    for preset in ("asvd", "dp-knapsack"):
        study = open_study(optuna.storages.InMemoryStorage(), preset, keep_dense=("b",))
        while (proposal := study.ask()) is not None:
            assert proposal.ranks[1] == 24
            if proposal.number % 3 == 1 and proposal.origin == "probe":
                study.tell_failed(proposal.number, "broken")
            else:
                tell(study, proposal.number, proposal.ranks)
        assert study.best is not None
        assert study.space.is_exact(study.best.ranks, KEPT)


@pytest.mark.parametrize("preset", ["asvd", "dp-knapsack"])
@pytest.mark.parametrize("kept", [0.08, 1.0])
def test_budgets_below_every_share_and_above_all_work_too(preset: str, kept: float) -> None:
    study = open_study(optuna.storages.InMemoryStorage(), preset, kept=kept)
    while (proposal := study.ask()) is not None:
        tell(study, proposal.number, proposal.ranks)
    assert study.best is not None
    assert study.space.is_exact(study.best.ranks, kept)
    if kept == 1.0:
        assert study.planned == 1


def test_a_model_of_many_targets_is_probed_target_by_target() -> None:
    space = llama_space(blocks=3)
    assert planned_trials("asvd", 60, space, 0.5) == 1 + 21 * 9
    assert planned_trials("bolaco", 60, space, 0.5) == 60
    assert planned_trials("mgaa", 60, space, 0.5) == 1


def test_budgets_of_a_job_share_what_they_measure() -> None:
    storage, kepts = optuna.storages.InMemoryStorage(), (KEPT, 0.3)
    first = open_study(storage, "asvd", siblings=kepts)
    while (proposal := first.ask()) is not None:
        assert proposal.scores is None
        if proposal.number == 2:
            first.tell_failed(2, "broken")
        else:
            tell(first, proposal.number, proposal.ranks)
    alone = open_study(optuna.storages.InMemoryStorage(), "asvd", kept=0.3)
    measured = []
    # a new process each time, which may also find the trial that the last one left
    while (proposal := open_study(storage, "asvd", kept=0.3, siblings=kepts).ask()) is not None:
        study = open_study(storage, "asvd", kept=0.3, siblings=kepts)
        again = study.ask()
        assert again is not None
        assert again.scores == proposal.scores
        if proposal.scores is None:
            measured.append(proposal.number)
            tell(study, proposal.number, proposal.ranks)
        else:
            scores = dict(proposal.scores)
            study.tell(proposal.number, score=scores["perplexity"], scores=scores, seconds=0.0, worker="w")
    assert measured == [2, study.planned - 1]
    while (proposal := alone.ask()) is not None:
        tell(alone, proposal.number, proposal.ranks)
    assert study.best is not None
    assert alone.best is not None
    np.testing.assert_array_equal(study.best.ranks, alone.best.ranks)
    rows = [[(row["ranks"], row["score"]) for row in each.history()] for each in (study, alone)]
    assert rows[0] == rows[1]


def test_many_targets_leave_little_of_the_budget_to_rounding() -> None:
    rng = np.random.default_rng(0)
    space = RankSpace(targets=tuple(target(f"t{i}", 512 + 8 * (i % 64), 512, "k", i) for i in range(400)))
    levels = np.stack([space.at_costs(share * space.dense_costs) for share in np.arange(1, 11) / 10], axis=1)
    measured = [dict(zip(map(int, row), np.sort(rng.random(10))[::-1].tolist(), strict=True)) for row in levels]
    found = space.cost(knapsack(space, KEPT, measured))
    assert 0.993 * space.budget(KEPT) < found <= space.budget(KEPT)


@pytest.mark.parametrize(("kept", "method"), [(1.0, {}), (1.0, {"form": "pivoted"})])
def test_a_space_in_which_all_is_fixed_is_one_trial(kept: float, method: dict[str, str]) -> None:
    for preset in ("ranksearch", "uniform", "asvd", "dp-knapsack"):
        study = open_study(optuna.storages.InMemoryStorage(), preset, kept=kept, keep_dense=("*",), **method)
        proposal = study.ask()
        assert proposal is not None
        np.testing.assert_array_equal(proposal.ranks, SMALL.full_ranks)
        tell(study, proposal.number, proposal.ranks)
        assert study.ask() is None
