"""Searches for both perplexity and KL at once."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage

from ranksearch.search.sampler import RankSampler
from ranksearch.search.space import Ranks
from ranksearch.search.spec import Search
from ranksearch.search.study import RankStudy
from ranksearch.search.trials import best_trial, pareto_front, trials_of

from .synthetic import DENSE, Problem, problem

MADE = problem(0, blocks=2)
KEPT = 0.4


def open_study(storage: BaseStorage, kept: float = KEPT, preset: str = "ranksearch", **changes: object) -> RankStudy:
    options: dict[str, object] = {"trials": 8, "pruner": "none", "objective": "both"}
    spec = Search(**(options | changes))  # type: ignore[arg-type]
    return RankStudy(
        storage=storage,
        job_id="job_a",
        kept=kept,
        space=MADE.space,
        spectra=MADE.spectra,
        spec=spec,
        dense_score=0.0 if spec.objective == "kl" else DENSE,
        siblings=(0.4, 0.6),
        preset=preset,
    )


def measure(ranks: Ranks, made: Problem = MADE) -> dict[str, float]:
    """Scores that do not agree: what the first block keeps adds to the KL."""
    perplexity = made.score(ranks)
    first = made.space.costs(ranks)[:7].sum() / made.space.dense_costs[:7].sum()
    return {"perplexity": perplexity, "kl": 0.6 * math.log(perplexity / DENSE) + 0.8 * first}


def tell(study: RankStudy, number: int, ranks: Ranks) -> None:
    scores = measure(ranks)
    total = math.log(scores["perplexity"] / DENSE) + scores["kl"]
    score = [scores["perplexity"], scores["kl"]] if study.spec.objective == "both" else total
    study.tell(number, score=score, scores=scores, seconds=0.0, worker="w")


def run(study: RankStudy) -> list[str]:
    while (proposal := study.ask()) is not None:
        tell(study, proposal.number, proposal.ranks)
    return [row["ranks"] for row in study.history()]


def test_a_study_of_both_has_a_front_and_its_best_is_the_smallest_sum(tmp_path: Path) -> None:
    storage = RDBStorage(f"sqlite:///{tmp_path / 'study.db'}")
    study = open_study(storage, sampler="random", trials=12)
    run(study)
    loaded = optuna.load_study(study_name="job_a/0.4", storage=storage)
    assert (len(loaded.directions), loaded.metric_names) == (2, ["perplexity", "kl"])
    rows = trials_of(storage, "job_a", KEPT)
    assert rows == study.history()
    sums = []
    for row, trial in zip(rows, loaded.trials, strict=True):
        scores = measure(MADE.space.unpack(row["ranks"]))
        assert trial.values == [scores["perplexity"], scores["kl"]]
        sums.append(math.log(scores["perplexity"] / DENSE) + scores["kl"])
    assert [row["score"] for row in rows] == pytest.approx(sums, rel=1e-12)
    front = pareto_front(rows)
    assert 1 < len(front) < 12
    assert sorted(point["number"] for point in front) == sorted(trial.number for trial in loaded.best_trials)
    assert [point["perplexity"] for point in front] == sorted(point["perplexity"] for point in front)
    best, stored = study.best, best_trial(storage, loaded._study_id)
    assert best is not None
    assert stored is not None
    assert best.number == stored.number == int(np.argmin(sums))
    assert best.number in {point["number"] for point in front}


def test_a_tie_goes_to_the_first() -> None:
    study = open_study(InMemoryStorage(), trials=3)
    for _ in range(3):
        proposal = study.ask()
        assert proposal is not None
        study.tell(proposal.number, score=[12.0, 0.5], scores={"perplexity": 12.0, "kl": 0.5}, seconds=0.0, worker="w")
    assert study.best is not None
    assert study.best.number == 0
    assert pareto_front(study.history()) == [{"number": 0, "perplexity": 12.0, "kl": 0.5}]


@pytest.mark.parametrize("sampler", ["ranksearch", "tpe", "turbo", "evolutionary", "bolaco"])
def test_a_killed_search_goes_on_and_every_sampler_minimizes_the_sum(sampler: str) -> None:
    storage = InMemoryStorage()
    while (left := open_study(storage, sampler=sampler, trials=6).ask()) is not None:
        again = open_study(storage, sampler=sampler, trials=6)
        proposal = again.ask()
        assert proposal is not None
        assert proposal.number == left.number
        np.testing.assert_array_equal(proposal.ranks, left.ranks)
        tell(again, proposal.number, proposal.ranks)
    found = [row["ranks"] for row in trials_of(storage, "job_a", KEPT)]
    # told the sum as a KL, which is an excess as it stands, a search of one objective does the same
    assert found == run(open_study(InMemoryStorage(), sampler=sampler, trials=6, objective="kl"))


def test_a_trial_without_either_score_failed() -> None:
    study = open_study(InMemoryStorage(), trials=4)
    for score in ([math.nan, 0.5], [12.0, math.inf], [12.0, 0.5]):
        proposal = study.ask()
        assert proposal is not None
        study.tell(proposal.number, score=score, scores={"perplexity": 12.0, "kl": 0.5}, seconds=0.0, worker="w")
    assert [row["state"] for row in study.history()] == ["FAIL", "FAIL", "COMPLETE"]
    assert "inf" in study.history()[1]["error"]
    assert study.ask() is not None


def test_trials_are_stopped_by_the_sum_of_both_losses() -> None:
    study = open_study(InMemoryStorage(), trials=4, pruner="wilcoxon")
    texts = np.random.default_rng(0).standard_normal((8, 4))
    while (proposal := study.ask()) is not None and proposal.number < 2:
        assert not any(study.report(proposal.number, step, texts[step] + 4) for step in range(8))
        tell(study, proposal.number, proposal.ranks)
    assert proposal is not None
    noise = 0.1 * np.random.default_rng(1).standard_normal((8, 4))
    stops = [study.report(proposal.number, step, texts[step] + noise[step] + 4.3) for step in range(8)]
    assert any(stops)
    study.tell_pruned(proposal.number)
    row = study.history()[proposal.number]
    assert (row["state"], row["score"], len(row["intermediate"])) == ("PRUNED", None, 8)
    following = study.ask()  # learns from what was stopped
    assert following is not None
    tell(study, following.number, following.ranks)
    assert len(pareto_front(study.history())) >= 1


@pytest.mark.parametrize("preset", ["asvd", "dp-knapsack"])
def test_probes_are_not_on_the_front(preset: str) -> None:
    storage = InMemoryStorage()
    study = open_study(storage, preset=preset)
    run(study)
    (point,) = pareto_front(study.history())
    assert study.best is not None
    assert point["number"] == study.best.number == study.planned - 1
    loaded = optuna.load_study(study_name="job_a/0.4", storage=storage)
    assert [trial.number for trial in loaded.best_trials] == [study.planned - 1]


@pytest.mark.parametrize("other", ["both", "kl", "perplexity"])
def test_another_search_reads_the_sum_as_its_excess(other: str) -> None:
    storage = InMemoryStorage()
    earlier = open_study(storage, kept=0.6, trials=5)
    run(earlier)
    sums = {row["number"]: row["score"] for row in earlier.history()}

    def excesses(study: RankStudy) -> dict[int, float]:
        sampler = study.proposer.rank_sampler()
        assert isinstance(sampler, RankSampler)
        return {t.number: t.excess for t in sampler._told([]) if t.group == 1}

    if other == "both":
        assert excesses(open_study(storage)) == sums
    study = RankStudy(
        storage=storage,
        job_id="job_b",
        kept=KEPT,
        space=MADE.space,
        spectra=MADE.spectra,
        spec=Search(objective=other),  # type: ignore[arg-type]
        dense_score=0.0 if other == "kl" else DENSE,
        learn_from=["job_a/0.6"],
    )
    assert excesses(study) == sums
