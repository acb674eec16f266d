"""`/v1/jobs/{id}/events`: what happens to a job, as server-sent events or as a list."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Annotated, Any, Final

import anyio
from fastapi import APIRouter, Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from pydantic import BaseModel

from ranksearch.search.errors import InvalidInput
from ranksearch.service.context import Context, Ctx
from ranksearch.service.routes.answers import After, Limit, Page, cursor
from ranksearch.service.store.jobs import Event

router = APIRouter(prefix="/jobs/{job_id}/events", tags=["jobs"])

POLL_SECONDS: Final = 0.5
PING_SECONDS: Final = 10.0
RETRY_MILLISECONDS: Final = 2000
_BATCH: Final = 500


class EventAnswer(BaseModel):
    """Something that happened to a job."""

    id: int
    time: datetime
    kind: str
    data: dict[str, Any]


_BOTH: Final[dict[int | str, dict[str, Any]]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "The stream, or a page."},
    204: {"description": "The job is over and there is nothing after Last-Event-ID."},
}


@router.get("", response_model=Page[EventAnswer], responses=_BOTH)
def events(
    job_id: str,
    context: Ctx,
    request: Request,
    limit: Limit = 100,
    after: After = None,
    last_event_id: Annotated[str | None, Header(description="Go on after this event.")] = None,
) -> Response:
    """Server-sent events until the job is over; with `Accept: application/json` a page of the same.

    `event:` is the kind, `id:` grows, `data:` is the event's data with its `time`.
    """
    job = context.jobs.get(job_id)
    if "application/json" in request.headers.get("accept", ""):
        return _page(context, job_id, limit, after)
    begin = _number(last_event_id) if last_event_id else cursor(after) or 0
    if job.over and last_event_id and not context.jobs.events(job_id, after=begin, limit=1):
        return Response(status_code=204)  # tells a browser to stop coming back
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return EventSourceResponse(_stream(context, job_id, begin), headers=headers)


def _page(context: Context, job_id: str, limit: int, after: str | None) -> Response:
    found = context.jobs.events(job_id, after=cursor(after) or 0, limit=limit + 1)
    shown = [EventAnswer(id=e.id, time=e.time, kind=e.kind, data=e.data) for e in found[:limit]]
    page = Page[EventAnswer](data=shown, next=str(shown[-1].id) if len(found) > limit else None)
    return JSONResponse(page.model_dump(mode="json"))


async def _stream(context: Context, job_id: str, after: int) -> AsyncIterator[bytes]:
    yield format_sse_event(retry=RETRY_MILLISECONDS)
    silent_since = time.monotonic()
    while True:
        found, over = await run_in_threadpool(_look, context, job_id, after)
        for event in found:
            yield _encode(event)
            after = event.id
            silent_since = time.monotonic()
        if len(found) == _BATCH:
            continue
        if over:
            return
        if time.monotonic() - silent_since >= PING_SECONDS:
            yield KEEPALIVE_COMMENT
            silent_since = time.monotonic()
        await anyio.sleep(POLL_SECONDS)


def _look(context: Context, job_id: str, after: int) -> tuple[list[Event], bool]:
    """New events, and whether they are the last: the state is read first, so that none is missed between the two."""
    over = context.jobs.is_over(job_id)
    return context.jobs.events(job_id, after=after, limit=_BATCH), over


def _encode(event: Event) -> bytes:
    data = json.dumps({**event.data, "time": event.time.isoformat().replace("+00:00", "Z")})
    return format_sse_event(data_str=data, event=event.kind, id=str(event.id))


def _number(last_event_id: str) -> int:
    try:
        return cursor(last_event_id) or 0
    except InvalidInput:
        raise InvalidInput(
            "Last-Event-ID must be the id of an event of this job", pointer="header/last-event-id"
        ) from None
