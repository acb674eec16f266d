"""What a job has found: its trials and its report."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from ranksearch.search.errors import InvalidInput, NotFound
from ranksearch.search.spec import budget_label
from ranksearch.search.trials import space_of, trials_of
from ranksearch.service.context import Context, Ctx
from ranksearch.service.routes.answers import After, Limit, Page, cursor
from ranksearch.service.store.jobs import Job

router = APIRouter(prefix="/jobs/{job_id}", tags=["results"])


class TrialAnswer(BaseModel):
    """One evaluated rank vector."""

    budget: float = Field(description="The budget whose study this is.")
    number: int
    state: str = Field(description="Optuna's: RUNNING, WAITING, COMPLETE, PRUNED, FAIL")
    origin: str | None = Field(description="prior, uniform, search, probe, or a preset whose rule gave the vector")
    kept: float | None = Field(description="Exactly kept.")
    score: float | None
    scores: dict[str, float | None]
    intermediate: dict[str, float | None] = Field(description="Chunk of the evaluation set -> its loss.")
    ranks: dict[str, int] | None = Field(description="Target -> rank; the full rank means dense.")
    seconds: float | None
    worker: str | None
    error: str | None
    evaluations: int = Field(description="As how many it counts: three and more where gradients were measured too.")


class ReportMissing(NotFound):
    """The job has no report yet."""

    code = "report_not_found"


@router.get("/trials", response_model=Page[TrialAnswer])
def trials(
    job_id: str,
    context: Ctx,
    kept: Annotated[float | None, Query(gt=0, le=1, description="Only this budget.")] = None,
    limit: Limit = 100,
    after: After = None,
) -> Any:
    """The trials of all budgets, in the order of the spec."""
    job = context.jobs.get(job_id)
    begin = cursor(after) or 0
    found = _trials(context, job, kept, begin, limit)
    shown = [_answer(context, job_id, budget, rows) for budget, rows in found.items()]
    data = [trial for part in shown for trial in part]
    return Page(data=data[:limit], next=str(begin + limit) if len(data) > limit else None)


def _trials(
    context: Context, job: Job, kept: float | None, begin: int, limit: int
) -> dict[float, list[dict[str, Any]]]:
    """The rows `begin` to `begin + limit` (and one more) of the budgets' trials, one after the other."""
    budgets: list[float] = job.spec["budget"]["kept"]
    if kept is not None:
        budgets = [budget for budget in budgets if budget_label(budget) == budget_label(kept)]
        if not budgets:
            raise InvalidInput(f"the job has no budget {budget_label(kept)}", pointer="query/kept")
    found: dict[float, list[dict[str, Any]]] = {}
    passed = 0
    for budget in budgets:
        rows = trials_of(context.studies, job.id, budget)
        found[budget] = rows[max(0, begin - passed) : max(0, begin + limit + 1 - passed)]
        passed += len(rows)
    return found


def _answer(context: Context, job_id: str, budget: float, rows: list[dict[str, Any]]) -> list[TrialAnswer]:
    if not rows:
        return []
    space = space_of(context.studies, job_id, budget)
    answers = []
    for row in rows:
        packed = row.pop("ranks")
        ranks = space.as_dict(space.unpack(packed)) if space is not None and packed else None
        answers.append(TrialAnswer(budget=budget, ranks=ranks, **row))
    return answers


@router.get("/report", response_model=dict[str, Any])
def report(job_id: str, context: Ctx) -> Any:
    """The proof: scores, sizes, speed before and after, history."""
    job = context.jobs.get(job_id)
    document = context.jobs.report(job_id)
    if document is None:
        raise ReportMissing(f"the job is {job.status} and has no report yet", status=job.status)
    return document
