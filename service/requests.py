"""Around every request: an id, a log line, a size limit, and an answer when something breaks."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from contextvars import ContextVar
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

MAX_BODY_BYTES: Final = 1_000_000
_ID: Final = re.compile(r"[\w.\-]{1,64}", re.ASCII)
_request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


def request_id() -> str | None:
    """The id of the request that is being answered."""
    return _request_id.get()


def name_request(record: logging.LogRecord) -> bool:
    """A filter of log records: each gets the id of the request it belongs to."""
    record.request_id = request_id()
    return True


class Requests:
    """ASGI middleware: takes or makes `X-Request-ID`, logs each request, turns a crash into a 500."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        identity = given if _ID.fullmatch(given) else secrets.token_hex(8)
        token = _request_id.set(identity)
        status, begun = 0, time.perf_counter()

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = identity
                headers.setdefault("X-Content-Type-Options", "nosniff")
            await send(message)

        try:
            await self.app(scope, receive, named)
        except Exception:
            log.exception("%s %s broke", scope["method"], scope["path"])
            if status:
                raise
            await _broken(identity, named)
        finally:
            facts = {"method": scope["method"], "path": scope["path"], "status": status}
            milliseconds = round(1000 * (time.perf_counter() - begun), 1)
            log.info("%(method)s %(path)s %(status)s", facts, extra={**facts, "milliseconds": milliseconds})
            _request_id.reset(token)


async def _broken(identity: str, send: Send) -> None:
    body = {
        "type": "urn:ranksearch:problem:internal",
        "title": "Internal Server Error",
        "status": 500,
        "detail": f"something broke in the server; its log tells more under request id {identity}",
        "code": "internal",
        "errors": [],
        "data": {},
        "request_id": identity,
    }
    raw = json.dumps(body).encode()
    headers = [(b"content-type", b"application/problem+json"), (b"content-length", str(len(raw)).encode())]
    await send({"type": "http.response.start", "status": 500, "headers": headers})
    await send({"type": "http.response.body", "body": raw})


class BodyLimit:
    """ASGI middleware: a body of more than `MAX_BODY_BYTES` is not read to its end."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        from ranksearch.service.problems import problem

        refusal = problem(413, "body_too_large", f"the body is larger than {MAX_BODY_BYTES} bytes")
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and (len(declared) > 12 or int(declared) > MAX_BODY_BYTES):
            await refusal(scope, receive, send)
            return
        chunks: list[Message] = []
        total = 0
        if scope["method"] not in ("GET", "HEAD"):
            # Specs are small, so the whole body is taken before the application sees any of it.
            while True:
                message = await receive()
                chunks.append(message)
                total += len(message.get("body", b""))
                if total > MAX_BODY_BYTES:
                    await refusal(scope, receive, send)
                    return
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    break
        replay = iter(chunks)

        async def replayed() -> Message:
            for message in replay:
                return message
            return await receive()

        await self.app(scope, replayed, send)
