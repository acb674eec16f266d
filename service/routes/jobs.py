"""`/v1/jobs`: submit, look, cancel, delete."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import optuna
from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import BeforeValidator
from sqlalchemy import bindparam, text

from ranksearch.search.errors import Conflict
from ranksearch.search.spec import JobSpec
from ranksearch.search.trials import study_name
from ranksearch.service import submission
from ranksearch.service.context import Context, Ctx
from ranksearch.service.routes.answers import After, JobAnswer, Limit, Page, base_url, cursor, job_answer
from ranksearch.service.store.database import reading
from ranksearch.service.store.jobs import Job, Status

router = APIRouter(prefix="/jobs", tags=["jobs"])


def _plain_text(value: Any) -> Any:
    """Refuse characters that no name or path has and no database takes."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            pending += item
        elif isinstance(item, str) and any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) < 0xE000 for c in item):
            raise ValueError(f"{item[:40]!r} holds a control character or half of a surrogate pair")
    return value


SpecBody = Annotated[JobSpec, BeforeValidator(_plain_text)]


@router.post("", status_code=202, response_model=JobAnswer)
def submit(
    spec: SpecBody,
    context: Ctx,
    request: Request,
    response: Response,
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$", description="Same key, same job, for 24 hours."
        ),
    ] = None,
) -> Any:
    """Queue a job. What can be seen to be impossible is refused with 422, naming the field and the way out."""
    base = base_url(request)
    answer = submission.submit(
        context,
        spec,
        owner=getattr(request.state, "owner", ""),
        key=idempotency_key,
        show=lambda job: job_answer(job, base).model_dump(mode="json"),
    )
    response.headers["Location"] = f"{base}/v1/jobs/{answer['id']}"
    return answer


@router.get("", response_model=Page[JobAnswer])
def page(
    context: Ctx,
    request: Request,
    limit: Limit = 20,
    after: After = None,
    status: Annotated[Status | None, Query(description="Only these.")] = None,
) -> Any:
    """Jobs, newest first."""
    jobs = context.jobs.page(limit=limit + 1, after=cursor(after), status=status)
    more = str(jobs[limit - 1].number) if len(jobs) > limit else None
    return Page(data=_answers(context, request, jobs[:limit]), next=more)


@router.get("/{job_id}", response_model=JobAnswer)
def show(job_id: str, context: Ctx, request: Request) -> Any:
    """Where a job stands."""
    return _answers(context, request, [context.jobs.get(job_id)])[0]


@router.post("/{job_id}/cancel", status_code=202, response_model=JobAnswer)
def cancel(job_id: str, context: Ctx, request: Request) -> Any:
    """Stop a job and keep what it found. A running job ends as soon as its worker has put its things away."""
    job = context.jobs.request_cancel(job_id)
    if job.status == "running" and job.worker not in context.workers.alive():
        # No worker is there to see the request, and none may ever come.
        context.queue.requeue_lost(context.workers.alive, job_id=job_id)
        if context.queue.cancel_job(job_id):
            context.jobs.cancelled(job_id)
            job = context.jobs.get(job_id)
    elif job.status == "cancelled":
        context.queue.cancel_job(job_id)
    return _answers(context, request, [job])[0]


@router.delete("/{job_id}", status_code=204)
def delete(job_id: str, context: Ctx) -> None:
    """Delete a job that is over, its studies, and the artifacts that no other job uses."""
    job = context.jobs.get(job_id)
    if not job.over:
        raise Conflict(f"the job is {job.status}; cancel it first", status=job.status)
    for kept in job.spec["budget"]["kept"]:
        try:
            optuna.delete_study(study_name=study_name(job_id, kept), storage=context.shown)
        except KeyError:
            continue  # the search had not begun
    context.queue.delete_job(job_id)
    context.artifacts.delete_job(job_id)


def _answers(context: Context, request: Request, jobs: Sequence[Job]) -> list[JobAnswer]:
    pages = _study_pages(context, jobs)
    return [job_answer(job, base_url(request), dashboard=pages.get(job.id, "/dashboard/")) for job in jobs]


def _study_pages(context: Context, jobs: Sequence[Job]) -> dict[str, str]:
    """The dashboard's page of the study of each job that has one only; the others are found in its list."""
    names = {study_name(job.id, kept[0]): job.id for job in jobs if len(kept := job.spec["budget"]["kept"]) == 1}
    if not names:
        return {}
    query = text("SELECT study_id, study_name FROM studies WHERE study_name IN :names")
    query = query.bindparams(bindparam("names", list(names), expanding=True))
    with reading(context.engine) as connection:
        return {names[row.study_name]: f"/dashboard/studies/{row.study_id}" for row in connection.execute(query)}
