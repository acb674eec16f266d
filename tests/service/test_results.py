"""What a job leaves: trials, report, and the files of its checkpoints."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from ranksearch.service.context import Context
from ranksearch.service.store.checkpoints import CheckpointFile
from ranksearch.service.store.settings import Settings, load_settings

from .studies import SPACE, run_study

WEIGHTS = os.urandom(300_000)
FILES = {"config.json": b'{"a": 1}', "model-00001.safetensors": WEIGHTS, "sub/ä b.txt": b"text", "empty": b""}


@pytest.fixture
def job(client: TestClient, body: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = client.post("/v1/jobs", json={**body, "budget": {"kept": [0.5, 0.25]}}).json()
    return answer


def publish(context: Context, job_id: str, kept: float = 0.5) -> None:
    """What the worker's last stage does."""
    context.jobs.set_running(job_id, "w")
    held = []
    for path, content in FILES.items():
        blob = context.artifacts.put([content], job_id=job_id)
        held.append(CheckpointFile(path=path, size=blob.size, sha256=blob.sha256))
    context.checkpoints.add(job_id, kept, held, facts={"parameters": 7})


def test_trials_come_from_the_studies(client: TestClient, context: Context, job: dict[str, Any]) -> None:
    assert client.get(job["links"]["trials"]).json() == {"data": [], "next": None}
    run_study(context.studies, job["id"], kept=0.5, trials=4)
    run_study(context.studies, job["id"], kept=0.25, trials=3)
    trials = client.get(job["links"]["trials"]).json()["data"]
    assert [(trial["budget"], trial["number"]) for trial in trials] == [
        *((0.5, 0), (0.5, 1), (0.5, 2), (0.5, 3), (0.25, 0), (0.25, 1), (0.25, 2)),
    ]
    assert [trial["origin"] for trial in trials[:3]] == ["prior", "uniform", "search"]
    first = trials[0]
    assert set(first["ranks"]) == {target.name for target in SPACE.targets}
    assert SPACE.kept(SPACE.from_dict(first["ranks"])) == pytest.approx(first["kept"])
    assert first["kept"] <= 0.5
    assert (first["state"], first["worker"]) == ("COMPLETE", "host:cpu")
    assert first["score"] == first["scores"]["perplexity"]
    assert first["seconds"] == 1.5


@pytest.mark.one_database
def test_trials_are_paged_over_all_budgets(client: TestClient, context: Context, job: dict[str, Any]) -> None:
    run_study(context.studies, job["id"], kept=0.5, trials=3)
    run_study(context.studies, job["id"], kept=0.25, trials=3)
    url, found, after = job["links"]["trials"], [], None
    while True:
        page = client.get(url, params={"limit": 2, **({"after": after} if after else {})}).json()
        found += [(trial["budget"], trial["number"]) for trial in page["data"]]
        after = page["next"]
        if after is None:
            break
    assert found == [(kept, number) for kept in (0.5, 0.25) for number in range(3)]
    only = client.get(url, params={"kept": "0.250"}).json()["data"]
    assert [(trial["budget"], trial["number"]) for trial in only] == [(0.25, 0), (0.25, 1), (0.25, 2)]
    answer = client.get(url, params={"kept": "0.3"})
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "query/kept")


@pytest.mark.one_database
def test_the_dashboard_link_leads_to_the_study(client: TestClient, context: Context, body: dict[str, Any]) -> None:
    job = client.post("/v1/jobs", json=body).json()
    assert job["links"]["dashboard"] == "http://127.0.0.1:8000/dashboard/"
    run_study(context.studies, job["id"], kept=0.5, trials=2)
    link = client.get(job["links"]["self"]).json()["links"]["dashboard"]
    study = client.get(f"/api/studies/{link.rpartition('/')[2]}").json()
    assert len(study["trials"]) == 2


@pytest.mark.one_database
def test_the_report_is_the_one_that_was_saved(client: TestClient, context: Context, job: dict[str, Any]) -> None:
    missing = client.get(job["links"]["report"])
    assert (missing.status_code, missing.json()["code"]) == (404, "report_not_found")
    document = {"version": 1, "job": job["id"], "budgets": [{"kept": 0.5, "scores": {"final": None}}]}
    context.jobs.save_report(job["id"], document)
    assert client.get(job["links"]["report"]).json() == document


def test_checkpoints_list_what_can_be_fetched(client: TestClient, context: Context, job: dict[str, Any]) -> None:
    assert client.get(job["links"]["checkpoints"]).json()["data"] == []
    publish(context, job["id"])
    (checkpoint,) = client.get(job["links"]["checkpoints"]).json()["data"]
    assert (checkpoint["kept"], checkpoint["facts"]) == (0.5, {"parameters": 7})
    assert checkpoint["hub_id"] == f"ranksearch/{job['id']}-0.5"
    assert checkpoint["size"] == sum(map(len, FILES.values()))
    assert {file["path"] for file in checkpoint["files"]} == set(FILES)
    for file in checkpoint["files"]:
        answer = client.get(file["url"])
        assert answer.status_code == 200
        assert answer.content == FILES[file["path"]]
        assert hashlib.sha256(answer.content).hexdigest() == file["sha256"]
        assert int(answer.headers["content-length"]) == file["size"]
        assert answer.headers["etag"] == f'"{file["sha256"]}"'
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-disposition"].startswith("attachment")
    publish(context, job["id"], 0.25)
    first = client.get(job["links"]["checkpoints"], params={"limit": 1}).json()
    second = client.get(job["links"]["checkpoints"], params={"limit": 1, "after": first["next"]}).json()
    assert [page["data"][0]["kept"] for page in (first, second)] == [0.5, 0.25]
    assert second["next"] is None


@pytest.fixture
def fetched(client: TestClient, context: Context, job: dict[str, Any]) -> str:
    """URL of the weights file."""
    publish(context, job["id"])
    return f"/v1/jobs/{job['id']}/checkpoints/0.5/files/model-00001.safetensors"


@pytest.mark.one_database
def test_a_download_can_be_resumed(client: TestClient, fetched: str) -> None:
    whole = client.get(fetched)
    assert whole.headers["accept-ranges"] == "bytes"
    rest = client.get(fetched, headers={"Range": "bytes=200000-"})
    assert (rest.status_code, rest.content) == (206, WEIGHTS[200_000:])
    assert rest.headers["content-range"] == "bytes 200000-299999/300000"
    assert rest.headers["etag"] == whole.headers["etag"]
    same = client.get(fetched, headers={"Range": "bytes=0-9", "If-Range": whole.headers["etag"]})
    assert (same.status_code, same.content) == (206, WEIGHTS[:10])
    other = client.get(fetched, headers={"Range": "bytes=0-9", "If-Range": '"other"'})
    assert (other.status_code, len(other.content)) == (200, 300_000)
    for asked, status, code in (("bytes=300000-", 416, "range_not_satisfiable"), ("bytes=x-", 400, "invalid_range")):
        refused = client.get(fetched, headers={"Range": asked})
        assert (refused.status_code, refused.json()["code"]) == (status, code)
        assert refused.headers["content-type"] == "application/problem+json"
        assert refused.headers["content-range"] == "bytes */300000"
        assert "etag" not in refused.headers
    assert client.get(fetched, headers={"Range": "bytes=-5"}).content == WEIGHTS[-5:]


@pytest.mark.one_database
def test_head_tells_size_and_hash(client: TestClient, fetched: str) -> None:
    answer = client.head(fetched)
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-length"] == "300000"
    assert answer.headers["etag"] == f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'


@pytest.mark.one_database
def test_what_the_client_has_is_not_sent_again(client: TestClient, fetched: str) -> None:
    etag = client.head(fetched).headers["etag"]
    for tags in (etag, f"W/{etag}", f'"x", {etag}', "*"):
        answer = client.get(fetched, headers={"If-None-Match": tags})
        assert (answer.status_code, answer.content) == (304, b"")
        assert answer.headers["etag"] == etag
    assert client.get(fetched, headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.one_database
def test_nothing_but_published_files_can_be_fetched(client: TestClient, context: Context, job: dict[str, Any]) -> None:
    publish(context, job["id"])
    base = f"/v1/jobs/{job['id']}/checkpoints"
    for path in (
        *("0.5/files/", "0.5/files/nope", "0.5/files/%2e%2e/%2e%2e/config.json", "0.5/files/..%2f..%2fetc%2fpasswd"),
        *("0.5/files//etc/passwd", "0.5/files/%2e/config.json", "0.5/files/sub"),
        *("0.25/files/config.json", "x/files/config.json", "nan/files/config.json", "9e999/files/config.json"),
        f"0.5/files/{hashlib.sha256(WEIGHTS).hexdigest()}",
    ):
        answer = client.get(f"{base}/{path}")
        assert (answer.status_code, answer.json()["code"]) == (404, "file_not_found"), path
    assert client.get(f"{base}/0.50/files/config.json").status_code == 200
    other = client.get("/v1/jobs/job_other/checkpoints/0.5/files/config.json")
    assert other.json()["code"] == "job_not_found"


@pytest.mark.one_database
def test_a_file_that_was_lost_is_said(client: TestClient, context: Context, fetched: str) -> None:
    context.artifacts.path(hashlib.sha256(WEIGHTS).hexdigest()).unlink()
    answer = client.get(fetched)
    assert (answer.status_code, answer.json()["code"]) == (500, "file_lost")


def test_climbing_over_a_real_connection(serve: Callable[[Settings], str], tmp_path: Any) -> None:
    """Raw request lines, as no client library would send them."""
    import socket

    url = httpx.URL(serve(load_settings(data_dir=tmp_path)))
    for target in ("/v1/jobs/x/checkpoints/0.5/files/../../../../../../etc/passwd", "/static/../../../etc/passwd"):
        with socket.create_connection((url.host, url.port), timeout=30) as connection:
            connection.sendall(f"GET {target} HTTP/1.1\r\nHost: {url.host}\r\nConnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 403"))
        assert b"root:" not in answer


@pytest.mark.one_database
def test_a_broken_download_is_completed_over_a_real_connection(
    serve: Callable[[Settings], str], settings: Settings, body: dict[str, Any]
) -> None:
    from ranksearch.service.context import open_context

    url = serve(settings)
    job = httpx.post(f"{url}/v1/jobs", json=body).json()
    context = open_context(settings)
    publish(context, job["id"])
    context.close()
    (checkpoint,) = httpx.get(job["links"]["checkpoints"]).json()["data"]
    (file,) = (file for file in checkpoint["files"] if file["path"] == "model-00001.safetensors")
    assert file["url"].startswith(url)
    with httpx.stream("GET", file["url"]) as response:
        part = next(response.iter_bytes(100_000))
    rest = httpx.get(file["url"], headers={"Range": f"bytes={len(part)}-"})
    assert rest.status_code == 206
    assert hashlib.sha256(part + rest.content).hexdigest() == file["sha256"]
