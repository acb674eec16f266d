"""A job in a worker's hands, without a device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dbos import DBOS

from ranksearch.search.errors import NumericalError, PathNotAllowed
from ranksearch.search.spec import JobSpec
from ranksearch.service.store.database import open_database, writing
from ranksearch.service.store.jobs import Stage
from ranksearch.service.store.settings import Settings
from ranksearch.worker.device_client import DeviceClient
from ranksearch.worker.running_job import RunningJob, WorkerState
from ranksearch.worker.workflow import JobWorkflow

from .here import worker_here


@pytest.fixture
def worker(settings: Settings) -> Iterator[WorkerState]:
    engine = open_database(settings)
    yield worker_here(settings, engine, DeviceClient("cpu"))
    engine.dispose()


def begun(worker: WorkerState, source: str, *kept: float) -> RunningJob:
    spec = {"model": {"source": source}, "budget": {"kept": kept or [0.5]}}
    job = worker.jobs.create(JobSpec.model_validate(spec))
    worker.jobs.set_running(job.id, worker.identity)
    return RunningJob(worker, job)


@pytest.mark.one_database
def test_only_a_database_that_is_gone_ends_the_worker(worker: WorkerState) -> None:
    class GivenUp(Exception):
        pass

    def give_up(why: str) -> None:
        raise GivenUp(why)

    def execute(statement: str) -> dict[str, Any]:
        with writing(worker.jobs.engine) as connection:
            connection.exec_driver_sql(statement)
        return {}

    workflow, run = JobWorkflow(worker, give_up), begun(worker, "someone/some-model")
    outcome = workflow._outcome(run, "prepare", lambda: execute("INSERT INTO job (id) VALUES ('twice')"))
    assert "IntegrityError" in outcome["error"]["message"]
    with pytest.raises(GivenUp, match="no such table"):
        workflow._outcome(run, "prepare", lambda: execute("SELECT * FROM gone"))


@pytest.mark.one_database
def test_a_stage_looks_once_at_the_paths_it_may_read(worker: WorkerState, allowed: Path, tmp_path: Path) -> None:
    model = allowed / "model"
    model.mkdir()
    run = begun(worker, f"{allowed}/../allowed/model")
    run.enter("prepare")
    assert run.context()["source"] == str(model)
    (model / "tokenizer.json").symlink_to(tmp_path / "secret")
    assert run.context()["source"] == str(model)  # asked for every part of every trial
    with pytest.raises(PathNotAllowed, match=r"tokenizer\.json"):
        run.enter("calibrate")


@pytest.mark.one_database
def test_the_progress_of_several_budgets_never_goes_back(worker: WorkerState) -> None:
    run, seen = begun(worker, "someone/some-model", 0.8, 0.6, 0.4), []
    for stage in ("search", "finish"):
        for kept in run.spec.budget.kept:
            run.enter(stage, kept)
            for fraction in (0.0, 0.5, 1.0):
                run.progress(fraction, now=True)
                seen.append(worker.jobs.get(run.id))
    progress = [job.progress for job in seen]
    assert progress == sorted(progress)
    assert [progress[0], progress[9], progress[-1]] == pytest.approx([0.25, 0.85, 0.99])
    assert [job.eta_seconds is None for job in seen] == [True] * 3 + [False] * 6 + [True] * 3 + [False] * 6
    assert seen[-1].eta_seconds == 0
    told = [event.data for event in worker.jobs.events(run.id) if event.kind == "stage"]
    assert [data["kept"] for data in told] == [0.8, 0.6, 0.4] * 2


@pytest.mark.one_database
def test_a_failure_says_that_others_go_on_only_while_there_are_others(
    worker: WorkerState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DBOS, "run_step", lambda _, step: step())  # nothing has to survive this process
    workflow = JobWorkflow(worker, lambda _: None)

    def told(stage: Stage, *failing: float) -> list[str]:
        def do(kept: float) -> dict[str, Any]:
            if kept in failing:
                raise NumericalError("A loss is NaN.")
            return {}

        run = begun(worker, "someone/some-model", 0.8, 0.6)
        workflow._each(run, stage, [0.8, 0.6], do, (), {})
        return [event.data["message"] for event in worker.jobs.events(run.id) if event.kind == "warning"]

    first, last = ("kept 0.8 failed: A loss is NaN.", "kept 0.6 failed: A loss is NaN.")
    others = " The other budgets go on."
    assert told("search", 0.8) == [first + others]
    assert told("search", 0.6) == [last + others]  # the first one is to be finished
    assert told("search", 0.8, 0.6) == [first + others, last]
    assert told("finish", 0.6) == [last]
