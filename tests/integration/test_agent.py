"""The agent in this process: what it does when its database fails it, or another worker has its job."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine

from ranksearch.search.spec import JobSpec
from ranksearch.service.store.artifacts import ArtifactStore
from ranksearch.service.store.checkpoints import Checkpoints
from ranksearch.service.store.database import database_url
from ranksearch.service.store.jobs import Job, Jobs
from ranksearch.service.store.queue import JobQueue
from ranksearch.service.store.settings import Settings
from ranksearch.service.store.workers import Workers
from ranksearch.worker.agent import Agent
from ranksearch.worker.attempts import deaths
from ranksearch.worker.device_client import DeviceClient
from ranksearch.worker.finish import publish
from ranksearch.worker.reaper import Reaper
from ranksearch.worker.running_job import JobLost, RunningJob, WorkerState

pytestmark = pytest.mark.one_database
ME = "me:cpu"


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    """One connection for all: whoever holds it keeps the database from answering."""
    engine = create_engine(settings.database, pool_size=1, max_overflow=0, pool_timeout=0.05)
    yield engine
    engine.dispose()


@pytest.fixture
def state(settings: Settings, engine: Engine) -> WorkerState:
    return WorkerState(
        identity=ME,
        settings=settings,
        jobs=Jobs(engine),
        artifacts=ArtifactStore.of(settings, engine),
        checkpoints=Checkpoints(engine),
        device=DeviceClient("cpu"),
    )


@pytest.fixture
def job(state: WorkerState) -> Job:
    job = state.jobs.create(JobSpec.model_validate({"model": {"source": "some/model"}, "budget": {"kept": [0.5]}}))
    state.jobs.set_running(job.id, ME)
    state.job_id = job.id
    return job


@pytest.fixture
def agent(settings: Settings, engine: Engine, state: WorkerState) -> Iterator[Agent]:
    """An agent as it is between start and stop."""
    agent = Agent(settings, "cpu")
    agent._beat_seconds = 0.05
    agent._engine, agent._state = engine, state
    agent._workers = Workers(engine, 30.0)
    agent._queue = JobQueue(database_url(engine))
    agent._reaper = Reaper(state.jobs, agent._workers, agent._queue)
    agent._workers.register(ME, host="me", device="cpu", pid=1)
    yield agent
    agent._queue.close()


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set where the process would have become another, or none."""
    event = threading.Event()

    def end(*_: object) -> None:
        event.set()
        raise SystemExit

    monkeypatch.setattr("os.execv", end)
    monkeypatch.setattr("os._exit", end)
    return event


def in_a_thread(do: Callable[[], None]) -> threading.Thread:
    def until_exit() -> None:
        try:
            do()
        except SystemExit:
            return

    thread = threading.Thread(target=until_exit, daemon=True)
    thread.start()
    return thread


def test_a_worker_whose_heartbeat_fails_starts_afresh(
    agent: Agent, engine: Engine, state: WorkerState, job: Job, ended: threading.Event
) -> None:
    assert deaths(state.jobs, job.id) == 1
    with engine.connect():
        thread = in_a_thread(agent._keep_alive)
        assert state.stopping.wait(10)
        assert not ended.wait(0.2)
    thread.join(10)
    assert ended.is_set()
    assert deaths(state.jobs, job.id) == 0  # the job was not to blame


def test_a_defect_counts_against_the_job(agent: Agent, state: WorkerState, job: Job, ended: threading.Event) -> None:
    with pytest.raises(SystemExit):
        agent._start_afresh("the database failed: it refuses what the job wants to write")
    assert deaths(state.jobs, job.id) == 1


def test_a_worker_can_be_stopped_while_the_database_is_away(
    agent: Agent, engine: Engine, job: Job, ended: threading.Event
) -> None:
    with engine.connect():
        thread = in_a_thread(agent._shut_down)
        thread.join(10)
        assert ended.is_set()


def test_a_job_that_another_worker_has_is_not_ended(state: WorkerState, job: Job, tmp_path: Path) -> None:
    own = tmp_path / "ranksearch.json"
    own.write_text(json.dumps({"budgets": [{"kept_exact": 0.5, "parameters": 1, "bytes": 1, "scores": {"final": {}}}]}))
    blob = state.artifacts.put_file(own, job_id=job.id)
    run = RunningJob(state, state.jobs.get(job.id))
    state.jobs.release(job.id, ME, "it fell silent")
    state.jobs.set_running(job.id, "other:cpu")
    with pytest.raises(JobLost):
        publish(run, {0.5: {"files": [{"path": own.name, "size": blob.size, "sha256": blob.sha256}]}}, {})
    assert state.jobs.get(job.id).status == "running"
