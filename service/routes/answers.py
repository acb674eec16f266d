"""What the routes answer."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Generic, TypeVar

from fastapi import Query, Request
from pydantic import BaseModel, Field

from ranksearch.search.errors import InvalidInput
from ranksearch.service.store.jobs import Job, Stage, Status

Item = TypeVar("Item")

Limit = Annotated[int, Query(ge=1, le=1000, description="Items on one page.")]
After = Annotated[str | None, Query(max_length=64, description="`next` of the page before.")]


class Page(BaseModel, Generic[Item]):
    """A part of a list; `next` is the `after` of the following part, null at the end."""

    data: list[Item]
    next: str | None = None


class Best(BaseModel):
    """The best trial of one budget so far."""

    score: float | None
    trial: int


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    data: dict[str, Any] = Field(default_factory=dict)


class Links(BaseModel):
    """Where to go from a job."""

    self: str
    events: str
    trials: str
    report: str
    checkpoints: str
    cancel: str
    dashboard: str


class JobAnswer(BaseModel):
    """Where a job stands."""

    id: str
    name: str | None
    status: Status
    stage: Stage | None
    progress: float = Field(description="0..1")
    eta_seconds: float | None
    best: dict[str, Best] = Field(description="Per budget.")
    error: JobError | None
    worker: str | None
    cancel_requested: bool
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    updated_at: datetime
    spec: dict[str, Any] = Field(description="As submitted, defaults filled in.")
    links: Links


def cursor(after: str | None) -> int | None:
    """A list's place as a number.

    Raises:
        InvalidInput: It is not one that a list gave.
    """
    if after is None:
        return None
    if not (after.isascii() and after.isdecimal() and len(after) <= 18):
        raise InvalidInput("after: take the `next` of the page before", pointer="query/after")
    return int(after)


def page_of(items: Sequence[Item], limit: int, after: str | None) -> tuple[Sequence[Item], str | None]:
    """A page of a list that is read whole, and the `next` of it."""
    begin = cursor(after) or 0
    end = begin + limit
    return items[begin:end], str(end) if end < len(items) else None


def base_url(request: Request) -> str:
    """Address of this server as the caller sees it, without a slash at the end."""
    return str(request.base_url).rstrip("/")


def job_answer(job: Job, base: str, *, dashboard: str = "/dashboard/") -> JobAnswer:
    """A job as the API shows it; `base` is the server's address, `dashboard` the best page for this job."""
    here = f"{base}/v1/jobs/{job.id}"
    parts = {name: f"{here}/{name}" for name in ("events", "trials", "report", "checkpoints", "cancel")}
    return JobAnswer(
        id=job.id,
        name=job.name,
        status=job.status,
        stage=job.stage,
        progress=job.progress,
        eta_seconds=job.eta_seconds,
        best={label: Best(**best) for label, best in job.best.items()},
        error=None if job.error is None else JobError(**{"code": "internal", "message": "", **job.error}),
        worker=job.worker,
        cancel_requested=job.cancel_requested,
        created_at=job.created,
        started_at=job.started,
        finished_at=job.finished,
        updated_at=job.updated,
        spec=job.spec,
        links=Links(self=here, dashboard=base + dashboard, **parts),
    )
