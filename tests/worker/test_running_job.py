"""A job in a worker's hands, without a device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ranksearch.search.errors import PathNotAllowed
from ranksearch.search.spec import JobSpec
from ranksearch.service.store.artifacts import ArtifactStore
from ranksearch.service.store.checkpoints import Checkpoints
from ranksearch.service.store.database import open_database, writing
from ranksearch.service.store.jobs import Jobs
from ranksearch.service.store.settings import Settings
from ranksearch.worker.device_client import DeviceClient
from ranksearch.worker.running_job import RunningJob, WorkerState
from ranksearch.worker.workflow import JobWorkflow


@pytest.fixture
def worker(settings: Settings) -> Iterator[WorkerState]:
    engine = open_database(settings)
    yield WorkerState(
        identity="w:cpu",
        settings=settings,
        jobs=Jobs(engine),
        artifacts=ArtifactStore.of(settings, engine),
        checkpoints=Checkpoints(engine),
        device=DeviceClient("cpu"),
    )
    engine.dispose()


def begun(worker: WorkerState, source: str) -> RunningJob:
    job = worker.jobs.create(JobSpec.model_validate({"model": {"source": source}, "budget": {"kept": [0.5]}}))
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
