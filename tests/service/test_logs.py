from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from ranksearch.service.requests import name_request
from ranksearch.service.store.logs import configure_logging

pytestmark = pytest.mark.one_database


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("ranksearch").setLevel(logging.NOTSET)
    engine = logging.getLogger("dbos")
    engine.handlers[:], engine.propagate = [], True


def lines(client: TestClient, monkeypatch: pytest.MonkeyPatch, log_format: str) -> list[str]:
    """What the server writes while it answers one request."""
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    configure_logging(log_format).addFilter(name_request)
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


def test_a_worker_writes_the_same_lines_without_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    for log_format in ("json", "text"):
        configure_logging(log_format)
        logging.getLogger("dbos").warning("a step is tried again", extra={"step": 3})
    line, text = stderr.getvalue().splitlines()
    facts = json.loads(line)
    assert (facts["logger"], facts["message"], facts["step"]) == ("dbos", "a step is tried again", 3)
    assert "request_id" not in facts
    assert text.endswith("WARNING dbos: a step is tried again")
