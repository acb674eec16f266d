from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine, update

from ranksearch.service.store.clock import ago
from ranksearch.service.store.database import writing
from ranksearch.service.store.tables import worker
from ranksearch.service.store.workers import Workers


@pytest.fixture
def workers(engine: Engine) -> Workers:
    return Workers(engine, ttl_seconds=30.0)


def fall_silent(engine: Engine, worker_id: str, seconds: float) -> None:
    with writing(engine) as connection:
        connection.execute(update(worker).where(worker.c.id == worker_id).values(heartbeat=ago(seconds)))


def test_a_worker_announces_itself_and_beats(workers: Workers) -> None:
    workers.register(
        "host:cpu", host="host", device="cpu", pid=11, memory_bytes=1 << 40, flops=2.5e9, facts={"torch": "2.13"}
    )
    before = workers.get("host:cpu")
    assert before is not None
    assert (before.memory_bytes, before.facts, before.alive, before.job_id) == (1 << 40, {"torch": "2.13"}, True, None)
    assert abs(datetime.now(UTC) - before.heartbeat) < timedelta(minutes=1)
    time.sleep(0.01)  # the database's clock counts milliseconds
    assert workers.heartbeat("host:cpu", pid=11, job_id="job_a", trial=3)
    after = workers.get("host:cpu")
    assert after is not None
    assert after.heartbeat > before.heartbeat
    assert (after.job_id, after.trial, after.flops) == ("job_a", 3, 2.5e9)


def test_silence_is_measured_by_the_databases_clock(workers: Workers, engine: Engine) -> None:
    for name in ("a", "b"):
        workers.register(name, host="host", device="cpu", pid=1)
    fall_silent(engine, "a", 29.0)
    fall_silent(engine, "b", 30.5)
    assert [found.id for found in workers.stale()] == ["b"]
    assert [found.alive for found in workers.all()] == [True, False]
    assert workers.heartbeat("b", pid=1)
    assert workers.stale() == []


def test_another_process_may_take_the_id_and_the_old_one_notices(workers: Workers) -> None:
    workers.register("w", host="host", device="cpu", pid=1, flops=1.0)
    workers.register("w", host="host", device="cpu", pid=2)
    assert not workers.heartbeat("w", pid=1)
    assert workers.heartbeat("w", pid=2)
    assert not workers.remove("w", pid=1)
    assert workers.remove("w", pid=2)
    assert not workers.heartbeat("w", pid=2)
    assert workers.get("w") is None
