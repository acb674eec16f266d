from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ranksearch.search.spec import JobSpec
from ranksearch.search.trials import trials_of
from ranksearch.service.store.database import open_database, optuna_storage
from ranksearch.service.store.settings import Settings
from ranksearch.worker import stages, workbench
from ranksearch.worker.known_errors import as_known_error
from ranksearch.worker.running_job import RunningJob, WorkerState
from ranksearch.worker.search_loop import search

from .here import HereAndNow, small_spec, worker_here


@pytest.fixture
def device() -> Iterator[HereAndNow]:
    device = HereAndNow()
    yield device
    device.bench.recover()


@pytest.fixture
def worker(settings: Settings, device: HereAndNow) -> Iterator[WorkerState]:
    engine = open_database(settings)
    yield worker_here(settings, engine, device)
    engine.dispose()


def until_search(worker: WorkerState, spec: dict[str, Any]) -> tuple[RunningJob, stages.Ground]:
    """A job whose bank is there."""
    created = worker.jobs.create(JobSpec.model_validate(spec))
    worker.jobs.set_running(created.id, worker.identity)
    run = RunningJob(worker, created)
    run.enter("prepare")
    prepared = stages.prepare(run)
    run.known = stages.known_of(worker.artifacts.path, prepared)
    calibrated = stages.calibrate(run, prepared)
    run.known = stages.known_of(worker.artifacts.path, prepared, calibrated)
    factored = stages.factor(run, prepared, calibrated)
    run.known = stages.known_of(worker.artifacts.path, prepared, calibrated, factored)
    return run, stages.Ground.of(run, prepared)


@pytest.mark.one_database
def test_a_job_measures_what_its_budgets_share_once(
    worker: WorkerState, device: HereAndNow, allowed: Path, tiny: Callable[..., nn.Module]
) -> None:
    spec = small_spec(
        allowed,
        tiny(vocab_size=300),
        budget={"kept": [0.93, 0.97]},
        method={"preset": "asvd", "keep_dense": ["*.0.*", "*.mlp.*"], "rank_multiple": 4},
    )
    run, ground = until_search(worker, spec)
    run.enter("search", 0.93)
    first = search(run, ground, 0.93)
    planned = first["best"]["number"] + 1
    assert device.begun == planned > 4
    second = search(run, ground, 0.97)
    assert second["best"]["number"] + 1 == planned
    assert device.begun == planned + 1
    assert run.told_trials(0.93) == run.told_trials(0.97) == set(range(planned))
    assert first["best"]["ranks"] != second["best"]["ranks"]
    run.put_away()


@pytest.mark.one_database
def test_a_search_goes_by_gradients_and_without_them_by_scores_alone(
    worker: WorkerState,
    device: HereAndNow,
    allowed: Path,
    tiny: Callable[..., nn.Module],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = small_spec(
        allowed,
        tiny(vocab_size=300),
        budget={"kept": [0.6, 0.4]},
        search={"trials": 4, "pruner": "none"},
    )
    run, ground = until_search(worker, spec)
    run.enter("search", 0.6)
    search(run, ground, 0.6)
    assert device.asked.count("gradients") == 2  # not at uniform, and not at the last
    rows = trials_of(optuna_storage(worker.settings), run.id, 0.6)
    counted = [row["evaluations"] for row in rows]
    assert counted == [counted[0], 1, counted[0], 1]
    assert counted[0] > 3  # the evaluation is shorter than the text of the gradients

    def no_memory(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("not enough memory")

    monkeypatch.setattr(workbench, "component_gradients", no_memory)
    run.enter("search", 0.4)
    with pytest.raises(torch.OutOfMemoryError):  # the device process would say it in our words
        search(run, ground, 0.4)
    monkeypatch.setattr(device, "ask", in_our_words(device.ask))
    found = search(run, ground, 0.4)
    assert found["best"]["number"] in range(4)
    warnings = [event.data["message"] for event in worker.jobs.events(run.id) if event.kind == "warning"]
    assert len(warnings) == 1
    assert "by scores alone" in warnings[0]
    run.put_away()


@pytest.mark.one_database
def test_a_search_that_runs_out_of_vectors_says_so(
    worker: WorkerState, allowed: Path, tiny: Callable[..., nn.Module]
) -> None:
    spec = small_spec(
        allowed,
        tiny(vocab_size=300),
        budget={"kept": [0.9, 1.0]},
        search={"trials": 2},
    )
    run, ground = until_search(worker, spec)
    for kept in (0.9, 1.0):
        run.enter("search", kept)
        search(run, ground, kept)
    (warning,) = [event.data["message"] for event in worker.jobs.events(run.id) if event.kind == "warning"]
    assert warning.startswith("The search at kept 1 ends after 1 of 2 trials")
    run.put_away()


def in_our_words(ask: Callable[..., Any]) -> Callable[..., Any]:
    """As the device process answers."""

    def asked(operation: str, **arguments: Any) -> Any:
        try:
            return ask(operation, **arguments)
        except torch.OutOfMemoryError as error:
            raise as_known_error(error, operation) from error  # type: ignore[misc]

    return asked
