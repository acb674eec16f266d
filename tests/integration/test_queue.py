"""The queue on both databases, without a worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Connection, Engine, text

from ranksearch.search.spec import JobSpec
from ranksearch.service.store.database import database_url, open_database, writing
from ranksearch.service.store.jobs import Jobs
from ranksearch.service.store.queue import JobQueue
from ranksearch.service.store.settings import Settings
from ranksearch.service.store.workers import Worker, Workers
from ranksearch.worker.reaper import Reaper

SPEC = JobSpec.model_validate({"model": {"source": "someone/some-model"}, "budget": {"kept": [0.5]}})


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    engine = open_database(settings)
    yield engine
    engine.dispose()


@pytest.fixture
def queue(engine: Engine) -> Iterator[JobQueue]:
    queue = JobQueue(database_url(engine))
    yield queue
    queue.close()


def _waiting(queue: JobQueue) -> list[str]:
    return [workflow.workflow_id for workflow in queue._client.list_workflows(status="ENQUEUED")]


def test_job_and_place_in_the_queue_are_committed_together(engine: Engine, queue: JobQueue) -> None:
    jobs = Jobs(engine)
    job = jobs.create(SPEC, enqueue=queue.enqueue_job)

    def enqueue_and_fail(connection: Connection, job_id: str) -> None:
        queue.enqueue_job(connection, job_id)
        raise RuntimeError("something else in the request went wrong")

    with pytest.raises(RuntimeError):
        jobs.create(SPEC, enqueue=enqueue_and_fail)
    assert _waiting(queue) == [job.id]
    assert [found.id for found in jobs.unfinished()] == [job.id]


def test_a_job_is_queued_once(engine: Engine, queue: JobQueue) -> None:
    with engine.begin() as connection:
        queue.enqueue_job(connection, "job_twice")
        queue.enqueue_job(connection, "job_twice")
    assert _waiting(queue) == ["job_twice"]


def test_a_waiting_job_can_be_taken_out(engine: Engine, queue: JobQueue) -> None:
    with engine.begin() as connection:
        queue.enqueue_job(connection, "job_unwanted")
    assert queue.cancel_job("job_unwanted")
    assert not queue.cancel_job("job_unwanted")
    assert not queue.cancel_job("job_unknown")
    assert _waiting(queue) == []
    queue.delete_job("job_unwanted")
    assert queue._client.list_workflows() == []


def test_jobs_and_queue_are_brought_together_again(engine: Engine, queue: JobQueue) -> None:
    jobs = Jobs(engine)
    good, unqueued = jobs.create(SPEC, enqueue=queue.enqueue_job), jobs.create(SPEC)
    ended = jobs.create(SPEC, enqueue=queue.enqueue_job)
    queue.cancel_job(ended.id)
    Reaper(jobs, Workers(engine, 30), queue).reconcile()
    assert set(_waiting(queue)) == {good.id, unqueued.id}
    assert [job.id for job in jobs.unfinished()] == [good.id, unqueued.id]
    error = jobs.get(ended.id).error
    assert error is not None
    assert "CANCELLED" in error["message"]


def test_a_worker_that_comes_during_the_sweep_keeps_its_job(engine: Engine, queue: JobQueue) -> None:
    jobs, workers = Jobs(engine), Workers(engine, 30)
    lost, fresh = (jobs.create(SPEC, enqueue=queue.enqueue_job) for _ in range(2))
    _take(engine, lost.id, "dead")

    class Busy(Workers):
        def all(self) -> list[Worker]:
            found = super().all()
            workers.register("new", host="h", device="cpu", pid=1)
            _take(engine, fresh.id, "new")
            return found

    Reaper(jobs, Busy(engine, 30), queue).sweep()
    assert _waiting(queue) == [lost.id]


def _take(engine: Engine, job_id: str, executor: str) -> None:
    schema = "dbos." if engine.dialect.name == "postgresql" else ""
    statement = f"UPDATE {schema}workflow_status SET status = 'PENDING', executor_id = :e WHERE workflow_uuid = :j"
    with writing(engine) as connection:
        connection.execute(text(statement), {"e": executor, "j": job_id})


def test_nothing_is_pickled(engine: Engine, queue: JobQueue) -> None:
    with engine.begin() as connection:
        queue.enqueue_job(connection, "job_plain")
    schema = "dbos." if engine.dialect.name == "postgresql" else ""
    with engine.connect() as connection:
        stored = connection.exec_driver_sql(f"SELECT inputs FROM {schema}workflow_input").scalars().all()
    assert stored == ['{"namedArgs":{},"positionalArgs":["job_plain"]}']
