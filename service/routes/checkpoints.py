"""`/v1/jobs/{id}/checkpoints`: the model folders a job made, file by file."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field
from starlette.types import Message, Receive, Scope, Send

from ranksearch.search.errors import NotFound, RanksearchError
from ranksearch.search.spec import budget_label
from ranksearch.service.context import Ctx
from ranksearch.service.problems import problem
from ranksearch.service.routes.answers import After, Limit, Page, base_url, page_of
from ranksearch.service.store.checkpoints import Checkpoint

router = APIRouter(prefix="/jobs/{job_id}/checkpoints", tags=["results"])


class FileAnswer(BaseModel):
    """One file of a checkpoint."""

    path: str
    size: int
    sha256: str
    url: str


class CheckpointAnswer(BaseModel):
    """One model folder."""

    kept: float
    hub_id: str = Field(description="Its name as a hub model.")
    created_at: datetime
    size: int = Field(description="Bytes of all files.")
    facts: dict[str, Any]
    files: list[FileAnswer]


class FileNotThere(NotFound):
    """The checkpoint has no such file."""

    code = "file_not_found"


class FileLost(RanksearchError):
    """A file of the artifact store is gone."""

    code = "file_lost"
    status = 500


class Download(FileResponse):
    """A file; a range of it that cannot be had is a problem like any other."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal: Response | None = None

        async def told(message: Message) -> None:
            nonlocal refusal
            if message["type"] == "http.response.start" and message["status"] in (400, 416):
                refusal = self._refusal(message["status"])
                await refusal(scope, receive, send)
            elif refusal is None:
                await send(message)

        await super().__call__(scope, receive, told)

    def _refusal(self, status: int) -> Response:
        size = self.headers["content-length"]
        headers = {"Content-Range": f"bytes */{size}"}
        if status == 416:
            return problem(416, "range_not_satisfiable", f"the file ends at byte {size}", headers=headers)
        return problem(400, "invalid_range", "Range must be bytes=FIRST-LAST, either may be left out", headers=headers)


@router.get("", response_model=Page[CheckpointAnswer])
def checkpoints(job_id: str, context: Ctx, request: Request, limit: Limit = 100, after: After = None) -> Any:
    """One checkpoint per finished budget."""
    context.jobs.get(job_id)
    shown, more = page_of(context.checkpoints.of(job_id), limit, after)
    return Page(data=[_answer(found, base_url(request)) for found in shown], next=more)


@router.head("/{kept}/files/{path:path}", response_class=FileResponse, include_in_schema=False)
@router.get("/{kept}/files/{path:path}", response_class=FileResponse)
def file(job_id: str, kept: str, path: str, context: Ctx, request: Request) -> Response:
    """A file. `Range` goes on where a download stopped; `ETag` is its sha256."""
    context.jobs.get(job_id)
    # The path is looked up among the names the worker published and never touches the file system.
    found = context.checkpoints.file(job_id, _label(kept), path)
    if found is None:
        raise FileNotThere(
            f"there is no file {path[:200]!r} for kept {kept[:32]!r}; /v1/jobs/{job_id}/checkpoints lists them"
        )
    etag = f'"{found.sha256}"'
    headers = {"ETag": etag, "Cache-Control": "private, max-age=31536000, immutable"}
    if _matches(request.headers.get("if-none-match", ""), etag):
        return Response(status_code=304, headers=headers)
    stored = context.artifacts.path(found.sha256)
    if not stored.is_file():
        raise FileLost(f"the artifact store has lost {path}; was its folder cleaned by hand?", sha256=found.sha256)
    name = path.rpartition("/")[2]
    return Download(stored, headers=headers, filename=name, stat_result=stored.stat())


def _answer(checkpoint: Checkpoint, base: str) -> CheckpointAnswer:
    folder = f"{base}/v1/jobs/{checkpoint.job_id}/checkpoints/{checkpoint.kept}/files"
    return CheckpointAnswer(
        kept=float(checkpoint.kept),
        hub_id=f"ranksearch/{checkpoint.job_id}-{checkpoint.kept}",
        created_at=checkpoint.created,
        size=sum(file.size for file in checkpoint.files),
        facts=checkpoint.facts,
        files=[
            FileAnswer(path=file.path, size=file.size, sha256=file.sha256, url=f"{folder}/{quote(file.path)}")
            for file in checkpoint.files
        ],
    )


def _label(kept: str) -> str:
    """`0.250` means `0.25`; what is no number names nothing."""
    try:
        value = float(kept) if len(kept) <= 32 else math.nan
    except ValueError:
        value = math.nan
    return budget_label(value) if math.isfinite(value) else ""


def _matches(if_none_match: str, etag: str) -> bool:
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return "*" in tags or etag in tags
