from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from ranksearch.service.logs import configure_logging

pytestmark = pytest.mark.one_database


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("ranksearch").setLevel(logging.NOTSET)


def lines(client: TestClient, monkeypatch: pytest.MonkeyPatch, log_format: str) -> list[str]:
    """What the server writes while it answers one request."""
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    configure_logging(log_format)  # type: ignore[arg-type]
    client.get("/v1/jobs/job_x", headers={"X-Request-ID": "abc"})
    return stderr.getvalue().splitlines()


def test_json_lines_are_objects(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = (json.loads(line) for line in lines(client, monkeypatch, "json"))
    assert (line["message"], line["level"], line["request_id"]) == ("GET /v1/jobs/job_x 404", "info", "abc")
    assert (line["method"], line["path"], line["status"]) == ("GET", "/v1/jobs/job_x", 404)
    assert line["milliseconds"] > 0


def test_text_lines_end_with_the_request(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = lines(client, monkeypatch, "text")
    assert line.endswith("GET /v1/jobs/job_x 404 [abc]")
