"""Errors on the wire: every one is `application/problem+json` (RFC 9457) with a stable `code`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from ranksearch.search.errors import RanksearchError
from ranksearch.service.requests import request_id

log = logging.getLogger(__name__)

_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large", 415: "unsupported_media_type"}


class Fault(BaseModel):
    """One thing wrong with the request."""

    pointer: str = Field(description="JSON pointer into the body; for a parameter its place and name: `query/limit`.")
    detail: str


class Problem(BaseModel):
    """What went wrong, and the way out."""

    type: str
    title: str
    status: int
    detail: str
    code: str = Field(description="Stable, for programs.")
    errors: list[Fault] = Field(default_factory=list)
    data: dict[str, Any] = Field(default_factory=dict, description="Facts a caller can act on.")
    request_id: str | None = None


def problem(
    status: int,
    code: str,
    detail: str,
    *,
    errors: Sequence[Fault] = (),
    data: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """A problem as a response."""
    body = Problem(
        type=f"urn:ranksearch:problem:{code}",
        title=HTTPStatus(status).phrase,
        status=status,
        detail=_encodable(detail),
        code=code,
        errors=list(errors),
        data=dict(data or {}),
        request_id=request_id(),
    )
    return JSONResponse(
        body.model_dump(mode="json"), status, headers=dict(headers or {}), media_type="application/problem+json"
    )


@contextmanager
def at(pointer: str) -> Iterator[None]:
    """Errors raised inside are about this place of the body."""
    try:
        yield
    except RanksearchError as error:
        error.data.setdefault("pointer", pointer)
        raise


def of_error(error: RanksearchError) -> JSONResponse:
    """The problem that one of our errors stands for."""
    data = dict(error.data)
    pointer = data.pop("pointer", None)
    errors = [Fault(pointer=pointer, detail=error.message)] if pointer else []
    return problem(error.status, error.code, error.message, errors=errors, data=data)


def install(app: FastAPI) -> None:
    """Give every error of the application the form above."""

    @app.exception_handler(RanksearchError)
    def _ours(_request: Request, error: RanksearchError) -> JSONResponse:
        if error.status >= 500:
            log.error("%s", error.message, exc_info=error.__cause__)
        return of_error(error)

    @app.exception_handler(RequestValidationError)
    def _invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        faults = list(error.errors())
        if any(fault["type"] == "json_invalid" for fault in faults):
            reason = faults[0].get("ctx", {}).get("error", "")
            place = faults[0]["loc"][-1]
            return problem(400, "invalid_json", f"the body is not JSON: {reason} at character {place}")
        if any(fault["type"] == "missing" and tuple(fault["loc"]) == ("body",) for fault in faults):
            return problem(400, "invalid_json", "the body is empty; send a job spec as JSON")
        if any(fault["loc"] == ("body",) and isinstance(fault.get("input"), bytes) for fault in faults):
            return problem(
                415, "unsupported_media_type", "the body's Content-Type must be application/json, as in curl --json"
            )
        errors = list(_unique(Fault(pointer=_pointer(fault["loc"]), detail=_detail(fault)) for fault in faults))[:100]
        detail = "; ".join(f"{fault.pointer}: {fault.detail}" for fault in errors[:3])
        more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
        return problem(
            422, "invalid_spec" if faults[0]["loc"][0] == "body" else "invalid_parameter", detail + more, errors=errors
        )

    @app.exception_handler(HTTPException)
    def _http(request: Request, error: HTTPException) -> JSONResponse:
        code = _CODES.get(error.status_code, "http_error")
        detail = str(error.detail)
        if error.status_code == 400:
            code, detail = "invalid_json", "the body is not JSON that can be read: not UTF-8, or nested too deeply"
        elif error.status_code == 404:
            detail = f"there is nothing at {request.url.path[:200]}"
        elif error.status_code == 405:
            detail = f"{request.method} is not possible at {request.url.path[:200]}"
        return problem(error.status_code, code, detail, headers=error.headers)

    @app.exception_handler(OperationalError)
    @app.exception_handler(PoolTimeout)
    def _database(_request: Request, error: Exception) -> JSONResponse:
        log.error("the database does not answer", exc_info=error)
        return problem(
            503, "database_unavailable", "the database does not answer; try again", headers={"Retry-After": "2"}
        )


def _pointer(location: Sequence[str | int]) -> str:
    place, *path = location
    if place == "body":
        return "".join(f"/{str(part).replace('~', '~0').replace('/', '~1')}" for part in path)[:500] or "/"
    return "/".join([str(place), *map(str, path)])


def _detail(fault: Mapping[str, Any]) -> str:
    if fault["type"] == "extra_forbidden":
        return "unknown field"
    if fault["type"] == "missing":
        return "required"
    return str(fault["msg"]).removeprefix("Value error, ")


def _unique(faults: Iterable[Fault]) -> Iterator[Fault]:
    seen: set[str] = set()
    for fault in faults:
        fault = Fault(pointer=_encodable(fault.pointer), detail=_encodable(fault.detail))
        if fault.pointer not in seen:
            seen.add(fault.pointer)
            yield fault


def _encodable(text: str) -> str:
    """Lone surrogates, which JSON allows and UTF-8 does not, become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")
