"""A thin client of the REST API, for the commands and the demo. Each call may be repeated, so each is retried."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, cast
from urllib.parse import quote

import httpx

from ranksearch.search.errors import RequestRefused, ServerUnreachable
from ranksearch.service.store.settings import is_loopback

DEFAULT_URL: Final = "http://127.0.0.1:8000"
#: Answers of proxies and of a server that is just starting: worth another try.
PASSING: Final = frozenset({429, 502, 503, 504})
#: A server that was there is waited for so long: it is being started again, or its proxy is.
PATIENCE_SECONDS: Final = 120.0
FINISHED: Final = frozenset({"succeeded", "failed", "cancelled"})
#: The server sends a comment at least every 15 seconds.
SILENCE_SECONDS: Final = 60.0

JSON = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line of a job's history."""

    id: int
    kind: str
    data: JSON = field(default_factory=dict)


class Client:
    """Speaks to one server.

    Args:
        url: Address of the server; `RANKSEARCH_URL`, else the local default.
        token: Bearer token, empty for none; `RANKSEARCH_TOKEN` when omitted.
        attempts: How often a call is tried while the server does not answer.
        patience: How long after its last sign of life a server is still waited for, in seconds.
        transport: Another way to reach the server, for tests.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        attempts: int = 3,
        patience: float = PATIENCE_SECONDS,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = (url or os.environ.get("RANKSEARCH_URL") or DEFAULT_URL).rstrip("/")
        token = os.environ.get("RANKSEARCH_TOKEN") if token is None else token
        headers = {"User-Agent": "ranksearch", **({"Authorization": f"Bearer {token}"} if token else {})}
        self._attempts, self._patience = attempts, patience
        self._heard = -math.inf  # when the server last gave a sign of life
        try:
            base_url = httpx.URL(self.url)
            self._http = httpx.Client(
                base_url=base_url,
                headers=headers,
                timeout=httpx.Timeout(30.0, connect=5.0),
                follow_redirects=True,
                transport=transport,
                trust_env=not is_loopback(base_url.host),  # the way to this machine leads through no proxy
            )
        except (httpx.InvalidURL, UnicodeEncodeError) as error:
            raise ServerUnreachable(
                f"{self.url!r} is no address, or the token holds odd characters: {error}"
            ) from error

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # jobs

    def submit(self, spec: Mapping[str, Any], *, idempotency_key: str | None = None) -> JSON:
        """Create a job. The key makes a repeated call harmless; a fresh one is drawn for each call without one."""
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        return self._json("POST", "/v1/jobs", json=dict(spec), headers=headers)

    def estimate(self, spec: Mapping[str, Any]) -> JSON:
        return self._json("POST", "/v1/estimates", json=dict(spec))

    def job(self, job_id: str) -> JSON:
        return self._json("GET", f"/v1/jobs/{_part(job_id)}")

    def jobs(self, *, limit: int | None = None) -> Iterator[JSON]:
        """Jobs, newest first, fetched page by page."""
        return self._pages("/v1/jobs", limit)

    def cancel(self, job_id: str) -> JSON:
        return self._json("POST", f"/v1/jobs/{_part(job_id)}/cancel")

    def report(self, job_id: str) -> JSON:
        return self._json("GET", f"/v1/jobs/{_part(job_id)}/report")

    def workers(self) -> list[JSON]:
        return list(self._pages("/v1/workers", None))

    def checkpoints(self, job_id: str) -> list[JSON]:
        return list(self._pages(f"/v1/jobs/{_part(job_id)}/checkpoints", None))

    def healthy(self) -> bool:
        """Whether the server is up, asked once and without waiting."""
        try:
            return self._http.get("/healthz", timeout=2.0).status_code == 200
        except httpx.TransportError:
            return False

    def events(self, job_id: str, *, after: int = 0) -> Iterator[Event]:
        """A job's events as they happen, until it has finished; a lost connection is taken up where it broke."""
        failures = 0
        while True:
            try:
                for event in self._stream(job_id, after):
                    failures = 0
                    after = event.id
                    yield event
            except httpx.TransportError as error:
                failures += 1
                if self._gives_up(failures):
                    raise self._unreachable(error) from error
                _wait(failures)
                continue
            if self.job(job_id)["status"] in FINISHED:
                return

    # files

    @contextmanager
    def open(self, url: str, *, offset: int = 0) -> Iterator[httpx.Response]:
        """One streamed answer to a GET from byte `offset` on; the caller reads its body. Not retried.

        Only what lies below `/v1/jobs/` is taken from the URL: a server behind a proxy may not know its own address.
        """
        path = "/v1/jobs/" + url.partition("/v1/jobs/")[2]
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        request = self._http.build_request("GET", path, headers={**headers, "Accept-Encoding": "identity"})
        with closing(self._http.send(request, stream=True)) as response:
            if response.status_code >= 400:
                response.read()
                raise refusal(response)
            yield response

    # the wire

    def _json(self, method: str, path: str, **options: Any) -> JSON:
        response = self._send(method, path, **options)
        try:
            return cast(JSON, response.json())
        except ValueError as error:
            raise ServerUnreachable(f"{self.url} answers, but not as a ranksearch server does.") from error

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        for attempt in itertools.count(1):
            try:
                response = self._http.request(method, path, **options)
            except (httpx.TransportError, httpx.UnsupportedProtocol) as error:
                if isinstance(error, httpx.UnsupportedProtocol) or self._gives_up(attempt):
                    raise self._unreachable(error) from error
            else:
                passing = response.status_code in PASSING
                if not passing:
                    self._heard = time.monotonic()
                if not passing or self._gives_up(attempt):
                    if response.status_code >= 400:
                        raise refusal(response)
                    return response
            _wait(attempt)
        raise AssertionError("unreachable")

    def _gives_up(self, failures: int) -> bool:
        return failures >= self._attempts and time.monotonic() - self._heard >= self._patience

    def _pages(self, path: str, limit: int | None) -> Iterator[JSON]:
        after: str | None = None
        seen = 0
        while True:
            page = min(100, limit - seen) if limit else 100
            query = {"limit": page, **({"after": after} if after else {})}
            answer = self._json("GET", path, params=query)
            for item in answer["data"]:
                yield item
                seen += 1
                if seen == limit:
                    return
            after = answer.get("next")
            if not after:
                return

    def _stream(self, job_id: str, after: int) -> Iterator[Event]:
        headers = {"Accept": "text/event-stream", **({"Last-Event-ID": str(after)} if after else {})}
        timeout = httpx.Timeout(SILENCE_SECONDS, connect=5.0)
        with self._http.stream("GET", f"/v1/jobs/{_part(job_id)}/events", headers=headers, timeout=timeout) as response:
            if response.status_code in PASSING:
                raise httpx.RemoteProtocolError(f"it answers {response.status_code}")
            if response.status_code >= 400:
                response.read()
                raise refusal(response)
            yield from _parse_events(self._listening(response.iter_lines()), after)

    def _listening(self, lines: Iterator[str]) -> Iterator[str]:
        for line in lines:
            self._heard = time.monotonic()
            yield line

    def _unreachable(self, error: Exception) -> ServerUnreachable:
        return ServerUnreachable(
            f"No server answers at {self.url} ({error}). Start one with `ranksearch serve`, or set RANKSEARCH_URL.",
            url=self.url,
        )


def refusal(response: httpx.Response) -> RequestRefused | ServerUnreachable:
    """The error that an answer with status 400 or above stands for."""
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if not isinstance(problem, dict):
        problem = {"status": response.status_code, "detail": f"{response.request.url} answers {response.status_code}."}
    detail = str(problem.get("detail") or problem.get("title") or f"The server answers {response.status_code}.")
    if response.status_code == 401:
        detail += ". The commands read the token from RANKSEARCH_TOKEN."
    kind = ServerUnreachable if response.status_code >= 500 else RequestRefused
    return kind(detail, problem=problem)


def _parse_events(lines: Iterator[str], last: int) -> Iterator[Event]:
    """Server-sent events, as far as this API uses them: `id`, `event`, `data`, comments."""
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "data" and name in fields:
                value = f"{fields[name]}\n{value}"
            fields[name] = value
            continue
        if "data" in fields:
            last = int(fields.get("id") or last)
            data = json.loads(fields["data"])
            kind = fields.get("event") or str(data.get("kind", "message"))
            yield Event(id=last, kind=kind, data=data)
        fields = {}


def _part(name: str) -> str:
    """One path segment, whatever the user typed."""
    return quote(name, safe="")


def _wait(attempt: int) -> None:
    """0.2, 0.4, 0.8 ... s, with jitter so that clients do not come back in step."""
    time.sleep(min(5.0, 0.1 * 2**attempt) * random.uniform(0.5, 1.0))
