"""`/v1/estimates`: what a job would take and give."""

from __future__ import annotations

from typing import Any, Final

from fastapi import APIRouter

from ranksearch.search.errors import RanksearchError
from ranksearch.service import submission
from ranksearch.service.context import Ctx
from ranksearch.service.estimate import Estimate, estimate
from ranksearch.service.models import HubUnreachable, read_model
from ranksearch.service.problems import at
from ranksearch.service.routes.jobs import SpecBody

#: Longer than a job's check: without the model there is nothing to answer.
HUB_SECONDS: Final = 20.0

router = APIRouter(prefix="/estimates", tags=["estimates"])


class NothingToEstimate(RanksearchError):
    """The model cannot be looked at now."""

    code = "hub_unreachable"
    status = 503


@router.post("", response_model=Estimate)
def estimates(spec: SpecBody, context: Ctx) -> Any:
    """Parameters, bytes, memory, disk, break-even ranks, and minutes per stage; nothing runs and no job is made."""
    submission.check_consent(spec, context.settings)
    submission.check_datasets(spec, context.settings)
    try:
        with at("/model/source"):
            tensors = read_model(spec, context.settings, hub_seconds=HUB_SECONDS)
    except HubUnreachable:
        raise NothingToEstimate(
            f"the hub does not tell this server about {spec.model.source}; try again, or name a local folder"
        ) from None
    speeds = [worker.flops for worker in context.workers.all() if worker.alive and worker.flops]
    return estimate(spec, tensors, max(speeds, default=None))
