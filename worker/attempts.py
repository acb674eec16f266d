"""A job that kills its workers must not go round for ever: counts deaths since the job last got further."""

from __future__ import annotations

from typing import Final

from sqlalchemy import func, select, union_all

from ranksearch.search.errors import RanksearchError
from ranksearch.service.store import tables
from ranksearch.service.store.database import reading
from ranksearch.service.store.jobs import Jobs

MAX_DEATHS: Final = 3
RELEASED: Final = "released"  # the event of a worker that stopped in good order


class WorkerDied(RanksearchError):
    """The workers that ran the job died."""

    code = "worker_died"


def deaths(jobs: Jobs, job_id: str) -> int:
    """How many workers in a row died at the job's present trial or stage; to be asked before it is taken up again."""
    event = tables.event
    mine = event.c.job_id == job_id
    stage = event.c.data["stage"].as_string()
    entered = select(func.min(event.c.id).label("id")).where(mine, event.c.kind == "stage").group_by(stage)
    told = select(event.c.id).where(mine, event.c.kind.in_(("trial", RELEASED)))
    further = union_all(entered, told).subquery()
    running = event.c.data["status"].as_string() == "running"
    with reading(jobs.engine) as connection:
        last = connection.execute(select(func.max(further.c.id))).scalar_one() or 0
        kind = connection.execute(select(event.c.kind).where(event.c.id == last)).scalar_one_or_none()
        taken = select(func.count()).where(mine, event.c.kind == "status", running, event.c.id > last)
        # whoever got the job further died as well, unless it gave it back
        return int(connection.execute(taken).scalar_one()) + (kind not in (None, RELEASED))


def refuse_endless(jobs: Jobs, job_id: str) -> None:
    """Refuse a job that keeps killing its workers.

    Raises:
        WorkerDied: Too many died without getting it any further.
    """
    died = deaths(jobs, job_id)
    if died >= MAX_DEATHS:
        stage = jobs.get(job_id).stage or "prepare"
        raise WorkerDied(
            f"The worker died {died} times in a row in stage {stage} of this job, so it is not tried again. Most often "
            "the machine's memory is too small: see the worker's log, use a larger machine or a smaller model, and "
            "submit again.",
            times=died,
            stage=stage,
        )
