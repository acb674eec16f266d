"""`/healthz`, `/readyz` and `/metrics`."""

from __future__ import annotations

import os
from typing import Any

from fastapi import APIRouter, Response
from sqlalchemy.exc import SQLAlchemyError

from ranksearch.service.context import Ctx
from ranksearch.service.metrics import CONTENT_TYPE, metrics_text
from ranksearch.service.problems import problem
from ranksearch.service.store.database import is_current

router = APIRouter(tags=["operations"])


@router.get("/healthz")
def healthz() -> dict[str, str]:
    """Whether the process lives."""
    return {"status": "ok"}


@router.get("/readyz", response_model=dict[str, str])
def readyz(context: Ctx) -> Any:
    """Whether jobs can be taken: database there and up to date, artifact folder writable."""
    try:
        current = is_current(context.engine)
    except SQLAlchemyError:
        return problem(503, "database_unavailable", "the database does not answer")
    if not current:
        return problem(503, "schema_outdated", "the database has another schema; restart the server to migrate it")
    folder = context.settings.artifacts_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        return problem(503, "artifacts_unavailable", "the artifact folder cannot be written")
    return {"status": "ready"}


@router.get("/metrics", response_class=Response)
def metrics(context: Ctx) -> Response:
    """Prometheus metrics."""
    return Response(metrics_text(context), media_type=CONTENT_TYPE)
