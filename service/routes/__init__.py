"""The routes under `/v1`, one file per noun."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request

from ranksearch.search.errors import NotFound
from ranksearch.service.problems import Problem
from ranksearch.service.routes import checkpoints, estimates, events, jobs, results, workers

_PROBLEM = {"model": Problem, "content": {"application/problem+json": {}}}


def _plain_path(request: Request) -> None:
    """Nothing has a control character in its name, and PostgreSQL takes no NUL."""
    if any(ord(c) < 32 or ord(c) == 127 for c in request.scope["path"]):
        raise NotFound("there is nothing at a path with a control character")


v1 = APIRouter(
    prefix="/v1", dependencies=[Depends(_plain_path)], responses={"default": {**_PROBLEM, "description": "Any error."}}
)
for _module in (jobs, events, results, checkpoints, estimates, workers):
    v1.include_router(_module.router)
