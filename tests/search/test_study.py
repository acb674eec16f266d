from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import optuna
import pytest

from ranksearch.search.allocate import Allocator
from ranksearch.search.coordinates import BOUND
from ranksearch.search.prices import Curve
from ranksearch.search.space import RankSpace, uniform
from ranksearch.search.spec import Search
from ranksearch.search.study import RankStudy, space_of, study_name, trials_of

from .cases import llama_space, power_spectra

SPACE = llama_space(blocks=2)
SPECTRA = power_spectra(SPACE)
SAMPLERS = ["ranksearch", "random", "tpe", "gp"]


@pytest.fixture(params=["memory", "sqlite"])
def open_storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], optuna.storages.BaseStorage]]:
    """Opens the same storage again and again, as a new process would."""
    if request.param == "memory":
        memory = optuna.storages.InMemoryStorage()
        yield lambda: memory
        return
    url = f"sqlite:///{tmp_path / 'study.db'}"
    yield lambda: optuna.storages.RDBStorage(url)


def open_study(storage: optuna.storages.BaseStorage, kept: float = 0.4, **changes: object) -> RankStudy:
    spec = Search(**{"trials": 8, "pruner": "none", "seed": 3, **changes})  # type: ignore[arg-type]
    return RankStudy(
        storage=storage, job_id="job_a", kept=kept, space=SPACE, spectra=SPECTRA, spec=spec, dense_score=10.0
    )


def score(ranks: np.ndarray) -> float:
    """A loss the prior does not know: every second target matters four times as much."""
    weights = np.where(np.arange(len(ranks)) % 2, 4.0, 1.0)
    return float(10 * np.exp(0.02 * np.sum(weights * Allocator(SPACE, SPECTRA).tail_loss(ranks))))


def tell(study: RankStudy, number: int, ranks: np.ndarray) -> None:
    study.tell(number, score=score(ranks), scores={"perplexity": score(ranks)}, seconds=0.5, worker="host:cpu")


def run(study: RankStudy) -> list[str]:
    while (proposal := study.ask()) is not None:
        tell(study, proposal.number, proposal.ranks)
    return [row["ranks"] for row in study.history()]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_starts_from_prior_and_uniform_and_stays_exact(sampler: str) -> None:
    study = open_study(optuna.storages.InMemoryStorage(), sampler=sampler, trials=14 if sampler == "gp" else 8)
    packed = run(study)
    vectors = [SPACE.unpack(p) for p in packed]
    np.testing.assert_array_equal(vectors[0], study.allocator.prior(0.4))
    np.testing.assert_array_equal(vectors[1], uniform(SPACE, 0.4))
    assert all(SPACE.is_exact(ranks, 0.4) for ranks in vectors)
    assert len(set(packed)) == len(packed) == study.finished == study.spec.trials
    assert [row["origin"] for row in study.history()] == ["prior", "uniform"] + ["search"] * (len(packed) - 2)


@pytest.mark.parametrize("sampler", ["ranksearch", "tpe"])
def test_a_killed_search_gives_the_vectors_of_an_undisturbed_one(
    sampler: str, open_storage: Callable[[], optuna.storages.BaseStorage]
) -> None:
    undisturbed = run(open_study(optuna.storages.InMemoryStorage(), sampler=sampler, trials=5))
    while True:
        first = open_study(open_storage(), sampler=sampler, trials=5).ask()
        if first is None:
            break
        again = open_study(open_storage(), sampler=sampler, trials=5)
        second = again.ask()
        assert second is not None
        assert second.number == first.number
        np.testing.assert_array_equal(second.ranks, first.ranks)
        tell(again, second.number, second.ranks)
    rows = trials_of(open_storage(), "job_a", 0.4)
    assert [row["ranks"] for row in rows] == undisturbed
    assert {row["state"] for row in rows} == {"COMPLETE"}


def test_parallel_asks_give_different_vectors_and_never_the_same_trial() -> None:
    study = open_study(optuna.storages.InMemoryStorage())
    proposals = [study.ask() for _ in range(8)]
    assert [p.number for p in proposals if p] == list(range(8))
    assert len({SPACE.pack(p.ranks) for p in proposals if p}) == 8
    assert study.ask() is None
    assert study.finished == 0


def test_telling_twice_changes_nothing(open_storage: Callable[[], optuna.storages.BaseStorage]) -> None:
    study = open_study(open_storage())
    proposal = study.ask()
    assert proposal is not None
    tell(study, proposal.number, proposal.ranks)
    before = study.history()
    study.tell(proposal.number, score=1.0, scores={}, seconds=9.0, worker="other")
    study.tell_failed(proposal.number, "late")
    assert study.report(proposal.number, 0, [1.0]) is False
    assert study.history() == before


def test_rows_carry_what_the_api_shows(open_storage: Callable[[], optuna.storages.BaseStorage]) -> None:
    study = open_study(open_storage())
    for _ in range(3):
        proposal = study.ask()
        assert proposal is not None
        study.report(proposal.number, 0, [2.0, 3.0])
        if proposal.number < 2:
            tell(study, proposal.number, proposal.ranks)
    study.tell_failed(2, "out of memory", seconds=3.0, worker="host:cpu")
    rows = trials_of(open_storage(), "job_a", 0.4)
    assert json.loads(json.dumps(rows)) == rows
    assert [row["state"] for row in rows] == ["COMPLETE", "COMPLETE", "FAIL"]
    assert rows[0]["score"] == rows[0]["scores"]["perplexity"] == score(SPACE.unpack(rows[0]["ranks"]))
    assert (rows[0]["seconds"], rows[0]["worker"], rows[0]["intermediate"]) == (0.5, "host:cpu", {"0": 2.5})
    assert (rows[2]["error"], rows[2]["seconds"], rows[2]["worker"]) == ("out of memory", 3.0, "host:cpu")
    assert [row["evaluations"] for row in rows] == [1, 1, 1]
    assert rows[2]["score"] is None
    assert all(row["kept"] <= 0.4 for row in rows)
    assert space_of(open_storage(), "job_a", 0.4) == SPACE
    assert study.best is not None
    assert study.best.number == min(rows[:2], key=lambda row: row["score"])["number"]


def test_an_unknown_study_is_empty() -> None:
    storage = optuna.storages.InMemoryStorage()
    assert trials_of(storage, "job_b", 0.4) == []
    assert space_of(storage, "job_b", 0.4) is None


def test_a_failed_vector_is_not_tried_again() -> None:
    study = open_study(optuna.storages.InMemoryStorage())
    while (proposal := study.ask()) is not None:
        if proposal.number % 2:
            study.tell(proposal.number, score=float("nan"), scores={}, seconds=0.1, worker="w")
        else:
            tell(study, proposal.number, proposal.ranks)
    rows = study.history()
    assert [row["state"] for row in rows] == ["COMPLETE", "FAIL"] * 4
    assert len({row["ranks"] for row in rows}) == 8
    assert study.finished == 8


def test_when_everything_fails_the_search_goes_on() -> None:
    study = open_study(optuna.storages.InMemoryStorage(), trials=5)
    while (proposal := study.ask()) is not None:
        study.tell_failed(proposal.number, "broken")
    assert study.finished == 5
    assert study.best is None


def test_a_space_with_one_vector_ends_after_it() -> None:
    study = open_study(optuna.storages.InMemoryStorage(), kept=1.0)
    packed = run(study)
    assert [SPACE.unpack(p).tolist() for p in packed] == [SPACE.full_ranks.tolist()]


def test_clearly_worse_trials_are_pruned_but_never_the_first_two() -> None:
    study = open_study(optuna.storages.InMemoryStorage(), pruner="wilcoxon", trials=4)
    texts = np.random.default_rng(0).standard_normal((8, 4))
    noise = 0.1 * np.random.default_rng(1).standard_normal((8, 4))
    for offset in (1.0, 3.0):
        proposal = study.ask()
        assert proposal is not None
        assert not any(study.report(proposal.number, s, 3 + texts[s] + offset) for s in range(8))
        study.tell(proposal.number, score=float(np.exp(3 + offset)), scores={}, seconds=1, worker="w")
    worse = study.ask()
    assert worse is not None
    stops = [study.report(worse.number, s, 3 + texts[s] + noise[s] + 1.2) for s in range(8)]
    assert stops.index(True) < 3  # four sequences a part: more than parts alone could tell
    assert study.history()[2]["intermediate"]["0"] == pytest.approx(np.mean(3 + texts[0] + noise[0] + 1.2))
    study.tell_pruned(worse.number, seconds=0.5, worker="w")
    better = study.ask()
    assert better is not None
    assert not any(study.report(better.number, s, 3 + texts[s] + noise[s] + 0.5) for s in range(8))
    assert study.history()[2]["state"] == "PRUNED"
    assert study.history()[2]["score"] is None


@pytest.mark.parametrize("sampler", get_args(Search.model_fields["sampler"].annotation))
def test_a_sampler_that_models_scores_gets_the_score_of_every_trial(sampler: str) -> None:
    study = open_study(optuna.storages.InMemoryStorage(), pruner="wilcoxon", trials=3, sampler=sampler)
    rng = np.random.default_rng(0)
    for offset in (1.0, 1.5):
        proposal = study.ask()
        assert proposal is not None
        assert not any(study.report(proposal.number, s, rng.normal(3 + offset, 0.1, 8)) for s in range(8))
        study.tell(proposal.number, score=float(np.exp(3 + offset)), scores={}, seconds=1, worker="w")
    worse = study.ask()
    assert worse is not None
    stopped = any(study.report(worse.number, s, rng.normal(6, 0.1, 8)) for s in range(8))
    assert stopped == (sampler in ("ranksearch", "random", "tpe", "evolutionary", "swaps"))


def test_a_study_is_small_and_speaks_for_itself(open_storage: Callable[[], optuna.storages.BaseStorage]) -> None:
    study = open_study(open_storage())
    run(study)
    loaded = optuna.load_study(study_name=study_name("job_a", 0.4), storage=open_storage())
    assert loaded.user_attrs["job"] == "job_a"
    assert loaded.user_attrs["kept"] == 0.4
    assert loaded.metric_names == ["perplexity"]
    for trial in loaded.trials:
        assert len(trial.params) <= 12
        assert all(abs(value) <= BOUND for value in trial.params.values())
        assert all(len(json.dumps(value)) < 1024 for value in trial.user_attrs.values())
    assert loaded.trials[0].params == pytest.approx(dict.fromkeys(loaded.trials[0].params, 0.0), abs=0.5)


def test_a_trial_costs_few_commits(tmp_path: Path) -> None:
    from sqlalchemy import event

    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'study.db'}")
    study = open_study(storage)
    commits = []
    event.listen(storage.engine, "commit", lambda connection: commits.append(1))
    writes = []

    @event.listens_for(storage.engine, "before_cursor_execute")
    def count(conn: object, cursor: object, statement: str, *rest: object) -> None:
        if statement.startswith(("INSERT", "UPDATE")):
            writes.append(statement)

    run(study)
    print(f"commits per trial {len(commits) / 8:.1f}, writes per trial {len(writes) / 8:.1f}")
    assert len(commits) / 8 < 16


def test_optuna_is_quiet(caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder) -> None:
    optuna.logging.enable_propagation()
    try:
        with caplog.at_level(logging.DEBUG):
            run(open_study(optuna.storages.InMemoryStorage(), pruner="wilcoxon"))
    finally:
        optuna.logging.disable_propagation()
    assert [r for r in caplog.records if r.name.startswith("optuna")] == []
    assert [str(w.message) for w in recwarn] == []


def test_siblings_of_the_same_job_are_read() -> None:
    storage = optuna.storages.InMemoryStorage()
    run(open_study(storage, kept=0.5))
    spec = Search(trials=4, seed=3)

    def vectors(siblings: tuple[float, ...], storage: optuna.storages.BaseStorage) -> list[str]:
        study = RankStudy(
            storage=storage,
            job_id="job_a",
            kept=0.3,
            space=SPACE,
            spectra=SPECTRA,
            spec=spec,
            dense_score=10.0,
            siblings=siblings,
        )
        return run(study)

    warm, cold = vectors((0.5,), storage), vectors((), optuna.storages.InMemoryStorage())
    assert warm[:2] == cold[:2]
    assert warm[2] != cold[2]
    assert score(SPACE.unpack(warm[2])) < score(SPACE.unpack(cold[2]))


def test_a_space_survives_in_the_study(tmp_path: Path) -> None:
    space = RankSpace(targets=SPACE.targets, rank_multiple=4, keep_dense=("*.v_proj",), form="pivoted")
    url = f"sqlite:///{tmp_path / 'study.db'}"
    RankStudy(
        storage=url, job_id="job_c", kept=0.5, space=space, spectra=SPECTRA, spec=Search(), dense_score=1.0, model="m"
    )
    assert space_of(url, "job_c", 0.5) == space


def test_the_prices_of_a_space_survive_in_the_study() -> None:
    storage = optuna.storages.InMemoryStorage()
    curves = tuple(
        Curve(ranks=(1, t.full_rank // 3), times=(10**6, 10**8), dense=10**9 + t.full_rank) for t in SPACE.targets
    )
    space = replace(SPACE, prices=curves)
    study = RankStudy(
        storage=storage, job_id="job_c", kept=0.5, space=space, spectra=SPECTRA, spec=Search(), dense_score=1.0
    )
    found = space_of(storage, "job_c", 0.5)
    assert found == space != SPACE
    proposal = study.ask()
    assert proposal is not None
    np.testing.assert_array_equal(found.unpack(found.pack(proposal.ranks)), proposal.ranks)
