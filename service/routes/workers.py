"""`/v1/workers`: who computes."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, Field

from ranksearch.service.context import Ctx
from ranksearch.service.routes.answers import After, Limit, Page, page_of

router = APIRouter(prefix="/workers", tags=["workers"])


class WorkerAnswer(BaseModel):
    """One worker process."""

    id: str
    host: str
    device: str
    memory_bytes: int | None
    flops: float | None = Field(description="Measured operations per second.")
    facts: dict[str, Any]
    job: str | None
    trial: int | None
    alive: bool
    started_at: datetime
    last_seen: datetime


@router.get("", response_model=Page[WorkerAnswer])
def workers(context: Ctx, limit: Limit = 100, after: After = None) -> Any:
    """All workers, those that have gone silent too."""
    shown, more = page_of(context.workers.all(), limit, after)
    return Page(
        next=more,
        data=[
            WorkerAnswer(
                id=worker.id,
                host=worker.host,
                device=worker.device,
                memory_bytes=worker.memory_bytes,
                flops=worker.flops,
                facts=worker.facts,
                job=worker.job_id,
                trial=worker.trial,
                alive=worker.alive,
                started_at=worker.started,
                last_seen=worker.heartbeat,
            )
            for worker in shown
        ],
    )
