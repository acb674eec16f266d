"""Jobs and their events. API and workers change a job only through here.

Every change is one short transaction that also appends the event telling of it. Transitions are guarded in SQL: a
change whose job is not in a state that allows it does nothing and returns False, so a finished job never goes back.
Workers pass their id as `worker`; then a change by a worker that has lost the job does nothing either.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal

from sqlalchemy import ColumnElement, Connection, Engine, Row, delete, insert, select, update

from ranksearch.search.errors import Conflict, JobNotFound, RanksearchError
from ranksearch.search.spec import JobSpec, budget_label
from ranksearch.service.store import tables
from ranksearch.service.store.clock import now
from ranksearch.service.store.database import reading, writing
from ranksearch.service.store.tables import job as table

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Stage = Literal["prepare", "calibrate", "factor", "search", "finish", "publish"]
OVER: Final = ("succeeded", "failed", "cancelled")
_ALPHABET: Final = "abcdefghjkmnpqrstuvwxyz23456789"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job as it stood when it was read; `best` maps a budget's label to `{"score", "trial"}`."""

    number: int
    id: str
    name: str | None
    spec: dict[str, Any]
    status: Status
    stage: Stage | None
    progress: float
    eta_seconds: float | None
    best: dict[str, Any]
    error: dict[str, Any] | None
    worker: str | None
    cancel_requested: bool
    created: datetime
    started: datetime | None
    finished: datetime | None
    updated: datetime

    @property
    def over(self) -> bool:
        """Whether nothing will change any more."""
        return self.status in OVER

    def parsed(self) -> JobSpec:
        """The spec as typed values."""
        return JobSpec.model_validate(self.spec)


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a job; ids grow with time."""

    id: int
    time: datetime
    kind: str
    data: dict[str, Any]


def new_job_id() -> str:
    """`job_` and twelve characters that are not mistaken for each other."""
    return "job_" + "".join(secrets.choice(_ALPHABET) for _ in range(12))


class Jobs:
    """The job repository."""

    def __init__(self, engine: Engine) -> None:
        """Use this database."""
        self.engine = engine

    # reading

    def get(self, job_id: str) -> Job:
        """Read one job, or raise JobNotFound."""
        with reading(self.engine) as connection:
            row = connection.execute(select(table).where(table.c.id == job_id)).one_or_none()
        if row is None:
            raise JobNotFound(f"there is no job {job_id[:64]!r}", job=job_id[:64])
        return _job(row)

    def page(self, *, limit: int, after: int | None = None, status: Status | None = None) -> list[Job]:
        """The newest jobs first; `after` is the `number` of the last job of the page before."""
        query = select(table).order_by(table.c.number.desc()).limit(limit)
        if after is not None:
            query = query.where(table.c.number < after)
        if status is not None:
            query = query.where(table.c.status == status)
        with reading(self.engine) as connection:
            return [_job(row) for row in connection.execute(query)]

    def unfinished(self) -> list[Job]:
        """Queued and running jobs, oldest first."""
        query = select(table).where(table.c.status.not_in(OVER)).order_by(table.c.number)
        with reading(self.engine) as connection:
            return [_job(row) for row in connection.execute(query)]

    def events(self, job_id: str, *, after: int = 0, limit: int = 1000) -> list[Event]:
        """Events with an id above `after`, oldest first."""
        events = tables.event
        query = select(events).where(events.c.job_id == job_id, events.c.id > after).order_by(events.c.id).limit(limit)
        with reading(self.engine) as connection:
            rows = connection.execute(query).all()
        return [Event(id=row.id, time=row.time, kind=row.kind, data=row.data) for row in rows]

    def cancel_requested(self, job_id: str) -> bool:
        """Whether a worker should stop: somebody asked for it, or the job is over or gone."""
        query = select(table.c.cancel_requested, table.c.status).where(table.c.id == job_id)
        with reading(self.engine) as connection:
            row = connection.execute(query).one_or_none()
        return row is None or row.cancel_requested or row.status in OVER

    def is_over(self, job_id: str) -> bool:
        """Whether the job is finished or gone."""
        with reading(self.engine) as connection:
            status = connection.execute(select(table.c.status).where(table.c.id == job_id)).scalar()
        return status is None or status in OVER

    def report(self, job_id: str) -> dict[str, Any] | None:
        """The report, once there is one."""
        query = select(tables.report.c.document).where(tables.report.c.job_id == job_id)
        with reading(self.engine) as connection:
            document: dict[str, Any] | None = connection.execute(query).scalar_one_or_none()
        return document

    # life

    def create(self, spec: JobSpec, *, enqueue: Callable[[Connection, str], object] | None = None) -> Job:
        """Write a queued job; `enqueue(connection, job_id)` runs in the same transaction."""
        with writing(self.engine) as connection:
            return create_job(connection, spec, enqueue=enqueue)

    def set_running(self, job_id: str, worker: str) -> bool:
        """Take a queued job, or take over a running one; False when the job is over or gone: then do nothing."""
        with writing(self.engine) as connection:
            row = _locked(connection, job_id)
            if row is None or row.status in OVER:
                return False
            values: dict[str, Any] = {"status": "running", "worker": worker, "updated": now()}
            if row.started is None:
                values["started"] = now()
            connection.execute(update(table).where(table.c.id == job_id).values(values))
            append_event(connection, job_id, "status", {"status": "running", "worker": worker})
        return True

    def release(self, job_id: str, worker: str, reason: str) -> bool:
        """Take the job from a worker that is gone; it stays `running` and waits for the next one."""
        return self._change(job_id, {"worker": None}, "warning", {"message": reason, "worker": worker}, worker=worker)

    def succeed(self, job_id: str, *, worker: str | None = None) -> bool:
        """running -> succeeded."""
        return self._end(job_id, "succeeded", worker, progress=1.0)

    def fail(self, job_id: str, error: RanksearchError | Mapping[str, Any], *, worker: str | None = None) -> bool:
        """queued or running -> failed; `error` is one of ours or `{"code", "message", ...}`."""
        if isinstance(error, RanksearchError):
            error = {"code": error.code, "message": error.message, "data": error.data}
        return self._end(job_id, "failed", worker, error=dict(error))

    def cancelled(self, job_id: str, *, worker: str | None = None) -> bool:
        """queued or running -> cancelled; the worker calls it when it has put its things away."""
        return self._end(job_id, "cancelled", worker)

    def request_cancel(self, job_id: str) -> Job:
        """Ask for the end: a queued job is cancelled at once, a running one by its worker.

        Raises:
            JobNotFound: There is no such job.
            Conflict: The job has succeeded or failed.
        """
        with writing(self.engine) as connection:
            row = _locked(connection, job_id)
            if row is None:
                raise JobNotFound(f"there is no job {job_id[:64]!r}", job=job_id[:64])
            if row.status in ("succeeded", "failed"):
                raise Conflict(f"the job has {row.status} already; there is nothing to cancel", status=row.status)
            if row.status == "queued":
                _finish(connection, job_id, "cancelled", {"cancel_requested": True})
            elif row.status == "running" and not row.cancel_requested:
                values = {"cancel_requested": True, "updated": now()}
                connection.execute(update(table).where(table.c.id == job_id).values(values))
                append_event(connection, job_id, "cancel_requested", {})
        return self.get(job_id)

    # progress

    def set_stage(self, job_id: str, stage: Stage, *, worker: str | None = None, **facts: Any) -> bool:
        """Enter a stage; `facts` (say `cache="hit"`) go into the event."""
        return self._change(job_id, {"stage": stage}, "stage", {"stage": stage, **facts}, worker=worker)

    def set_progress(
        self, job_id: str, fraction: float, eta_seconds: float | None = None, *, worker: str | None = None
    ) -> bool:
        """Say how much of the whole job is done, 0..1; leaves no event."""
        values = {"progress": min(max(float(fraction), 0.0), 1.0), "eta_seconds": eta_seconds}
        return self._change(job_id, values, worker=worker)

    def add_event(self, job_id: str, kind: str, data: Mapping[str, Any], *, worker: str | None = None) -> bool:
        """Tell of something while the job runs: `trial`, `warning`, `calibration`, `checkpoint`, ..."""
        return self._change(job_id, {}, kind, data, worker=worker)

    def set_best(self, job_id: str, kept: float, score: float, trial: int, *, worker: str | None = None) -> bool:
        """Record the best trial of a budget, with an event when it changes."""
        with writing(self.engine) as connection:
            row = _locked(connection, job_id)
            if row is None or row.status != "running" or worker not in (None, row.worker):
                return False
            label, best = budget_label(kept), {"score": score, "trial": trial}
            if row.best.get(label) == best:
                return True
            values = {"best": {**row.best, label: best}, "updated": now()}
            connection.execute(update(table).where(table.c.id == job_id).values(values))
            append_event(connection, job_id, "best", {"kept": kept, **best})
        return True

    def save_report(self, job_id: str, document: Mapping[str, Any]) -> None:
        """Keep the report; a second call replaces it."""
        with writing(self.engine) as connection:
            if _locked(connection, job_id) is None:
                raise JobNotFound(f"there is no job {job_id!r}", job=job_id)
            connection.execute(delete(tables.report).where(tables.report.c.job_id == job_id))
            values = {"job_id": job_id, "document": dict(document), "created": now()}
            connection.execute(insert(tables.report).values(values))

    def _change(
        self,
        job_id: str,
        values: Mapping[str, Any],
        kind: str | None = None,
        data: Mapping[str, Any] | None = None,
        *,
        worker: str | None = None,
    ) -> bool:
        with writing(self.engine) as connection:
            guard: list[ColumnElement[bool]] = [table.c.id == job_id, table.c.status == "running"]
            if worker is not None:
                guard.append(table.c.worker == worker)
            # The update locks the job's row, so the ids of a job's events grow in the order of their commits.
            changed = connection.execute(update(table).where(*guard).values(**values, updated=now()))
            if changed.rowcount and kind is not None:
                append_event(connection, job_id, kind, data or {})
        return bool(changed.rowcount)

    def _end(self, job_id: str, status: Status, worker: str | None, **values: Any) -> bool:
        with writing(self.engine) as connection:
            row = _locked(connection, job_id)
            allowed = ("running",) if status == "succeeded" else ("queued", "running")
            if row is None or row.status not in allowed or worker not in (None, row.worker):
                return False
            _finish(connection, job_id, status, values)
        return True


def create_job(
    connection: Connection, spec: JobSpec, *, enqueue: Callable[[Connection, str], object] | None = None
) -> Job:
    """Write a queued job within the caller's transaction."""
    values = {
        "id": new_job_id(),
        "name": spec.name,
        "spec": spec.model_dump(mode="json"),
        "status": "queued",
        "progress": 0.0,
        "best": {},
        "cancel_requested": False,
        "created": now(),
        "updated": now(),
    }
    row = connection.execute(insert(table).values(values).returning(*table.c)).one()
    append_event(connection, row.id, "status", {"status": "queued"})
    if enqueue is not None:
        enqueue(connection, row.id)
    return _job(row)


def append_event(connection: Connection, job_id: str, kind: str, data: Mapping[str, Any]) -> None:
    """Write an event within the caller's transaction, which must hold the job's row."""
    connection.execute(insert(tables.event).values(job_id=job_id, time=now(), kind=kind, data=dict(data)))


def _finish(connection: Connection, job_id: str, status: Status, values: Mapping[str, Any]) -> None:
    ended = {"status": status, "eta_seconds": None, "finished": now(), "updated": now(), **values}
    connection.execute(update(table).where(table.c.id == job_id).values(ended))
    told = {"status": status} | ({"error": values["error"]} if values.get("error") else {})
    append_event(connection, job_id, "status", told)


def _locked(connection: Connection, job_id: str) -> Row[Any] | None:
    return connection.execute(select(table).where(table.c.id == job_id).with_for_update()).one_or_none()


def _job(row: Row[Any]) -> Job:
    return Job(**{**row._mapping, "progress": float(row.progress)})
