"""Who may call: bearer tokens, kept as sha256. Without tokens the server answers this machine only."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ranksearch.service.dashboard import owns
from ranksearch.service.problems import problem
from ranksearch.service.store.settings import Settings

OPEN: Final = frozenset({"/healthz", "/readyz"})
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})


def token_hash(token: bytes) -> str:
    """What settings hold of a token."""
    return hashlib.sha256(token).hexdigest()


class Guard:
    """ASGI middleware that lets known callers through; `scope["state"]["owner"]` is then the hash of their token."""

    def __init__(self, app: ASGIApp, *, settings: Settings) -> None:
        self.app = app
        self.tokens = settings.tokens
        self.hosts = _LOOPBACK | {settings.host.strip("[]").lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refuse_stranger(scope, headers) if self.tokens else self._refuse_foreign_page(headers)
        await (refusal or self.app)(scope, receive, send)

    def _refuse_stranger(self, scope: Scope, headers: Headers) -> Response | None:
        browser = is_page(scope["path"]) and scope["method"] in ("GET", "HEAD")
        token = _token(headers.get("authorization", ""), basic=browser)
        if token is not None:
            hashed = token_hash(token)
            # Every hash is compared, so the time tells nothing about which one is near.
            if sum(hmac.compare_digest(hashed, known) for known in self.tokens):
                scope.setdefault("state", {})["owner"] = hashed
                return None
        scheme = 'Basic realm="ranksearch", charset="UTF-8"' if browser else "Bearer"
        detail = "the token is not known here" if token else "send a token: Authorization: Bearer TOKEN"
        return problem(401, "unauthorized", detail, headers={"WWW-Authenticate": scheme})

    def _refuse_foreign_page(self, headers: Headers) -> Response | None:
        """Without tokens, pages of other sites must not reach the server through the user's browser."""
        if _host(headers.get("host", "")) not in self.hosts:
            return problem(
                403, "foreign_host", "without RANKSEARCH_TOKENS the server answers to the names of this machine only"
            )
        origin = headers.get("origin")
        if origin is not None and _host(origin.partition("://")[2]) not in self.hosts:
            return problem(403, "foreign_origin", "a page of another site may not call this server")
        return None


def is_page(path: str) -> bool:
    """Whether a path is for browsers, which ask for a password and cannot send a bearer token."""
    return owns(path) or path in ("/docs", "/openapi.json")


def _token(authorization: str, *, basic: bool) -> bytes | None:
    scheme, _, value = authorization.partition(" ")
    raw = value.strip().encode("latin-1")  # as headers are decoded, so these are the bytes the caller sent
    if scheme.lower() == "bearer":
        return raw or None
    if scheme.lower() == "basic" and basic:
        try:
            _, _, password = base64.b64decode(raw, validate=True).partition(b":")
        except binascii.Error:
            return None
        return password or None
    return None


def _host(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
