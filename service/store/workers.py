"""Workers: who is there, measured by the database's clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Engine, Row, delete, insert, select, update

from ranksearch.service.store.clock import ago, now
from ranksearch.service.store.database import reading, writing
from ranksearch.service.store.tables import worker as table


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One worker process; `flops` is its measured speed (operations per second), `facts` what else it tells."""

    id: str
    host: str
    device: str
    memory_bytes: int | None
    flops: float | None
    pid: int
    facts: dict[str, Any]
    job_id: str | None
    trial: int | None
    started: datetime
    heartbeat: datetime
    alive: bool


class Workers:
    """The worker repository."""

    def __init__(self, engine: Engine, ttl_seconds: float) -> None:
        """A worker silent for `ttl_seconds` counts as dead."""
        self.engine = engine
        self.ttl_seconds = ttl_seconds

    def register(
        self,
        worker_id: str,
        *,
        host: str,
        device: str,
        pid: int,
        memory_bytes: int | None = None,
        flops: float | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Announce a worker; a row of the same id is replaced."""
        values = {
            "id": worker_id,
            "host": host,
            "device": device,
            "pid": pid,
            "memory_bytes": memory_bytes,
            "flops": flops,
            "facts": dict(facts or {}),
            "started": now(),
            "heartbeat": now(),
        }
        with writing(self.engine) as connection:
            connection.execute(delete(table).where(table.c.id == worker_id))
            connection.execute(insert(table).values(values))

    def heartbeat(self, worker_id: str, *, pid: int, job_id: str | None = None, trial: int | None = None) -> bool:
        """Say "alive", and at what; False when the row is gone or another process has taken the id."""
        mine = update(table).where(table.c.id == worker_id, table.c.pid == pid)
        with writing(self.engine) as connection:
            beaten = connection.execute(mine.values(heartbeat=now(), job_id=job_id, trial=trial))
        return bool(beaten.rowcount)

    def all(self) -> list[Worker]:
        """All workers, dead ones too, by id."""
        with reading(self.engine) as connection:
            return [_worker(row) for row in connection.execute(self._query().order_by(table.c.id))]

    def alive(self) -> set[str]:
        """The ids of those that are not silent."""
        return {worker.id for worker in self.all() if worker.alive}

    def get(self, worker_id: str) -> Worker | None:
        """One worker."""
        with reading(self.engine) as connection:
            row = connection.execute(self._query().where(table.c.id == worker_id)).one_or_none()
        return None if row is None else _worker(row)

    def stale(self) -> list[Worker]:
        """Workers that have been silent for too long."""
        return [worker for worker in self.all() if not worker.alive]

    def remove(self, worker_id: str, *, pid: int | None = None) -> bool:
        """Forget a worker; with `pid`, only if it is still that process."""
        query = delete(table).where(table.c.id == worker_id)
        if pid is not None:
            query = query.where(table.c.pid == pid)
        with writing(self.engine) as connection:
            return bool(connection.execute(query).rowcount)

    def _query(self) -> Any:
        return select(table, (table.c.heartbeat > ago(self.ttl_seconds)).label("alive"))


def _worker(row: Row[Any]) -> Worker:
    return Worker(**{**row._mapping, "alive": bool(row.alive)})
