"""A job in a worker's hands, without a device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ranksearch.search.errors import PathNotAllowed
from ranksearch.search.spec import JobSpec
from ranksearch.service.store.artifacts import ArtifactStore
from ranksearch.service.store.checkpoints import Checkpoints
from ranksearch.service.store.database import open_database
from ranksearch.service.store.jobs import Jobs
from ranksearch.service.store.settings import Settings
from ranksearch.worker.device_client import DeviceClient
from ranksearch.worker.running_job import RunningJob, WorkerState


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


@pytest.mark.one_database
def test_a_stage_looks_once_at_the_paths_it_may_read(worker: WorkerState, allowed: Path, tmp_path: Path) -> None:
    model = allowed / "model"
    model.mkdir()
    spec = {"model": {"source": f"{allowed}/../allowed/model"}, "budget": {"kept": [0.5]}}
    job = worker.jobs.create(JobSpec.model_validate(spec))
    worker.jobs.set_running(job.id, worker.identity)
    run = RunningJob(worker, job)
    run.enter("prepare")
    assert run.context()["source"] == str(model)
    (model / "tokenizer.json").symlink_to(tmp_path / "secret")
    assert run.context()["source"] == str(model)  # asked for every part of every trial
    with pytest.raises(PathNotAllowed, match=r"tokenizer\.json"):
        run.enter("calibrate")
