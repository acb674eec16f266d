"""The routes under `/v1`, one file per noun."""

from __future__ import annotations

from fastapi import APIRouter

from ranksearch.service.problems import Problem
from ranksearch.service.routes import checkpoints, estimates, events, jobs, results, workers

_PROBLEM = {"model": Problem, "content": {"application/problem+json": {}}}

v1 = APIRouter(prefix="/v1", responses={"default": {**_PROBLEM, "description": "Any error."}})
for _module in (jobs, events, results, checkpoints, estimates, workers):
    v1.include_router(_module.router)
