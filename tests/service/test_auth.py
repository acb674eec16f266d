from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from ranksearch.service.app import create_app
from ranksearch.service.store.settings import load_settings

TOKENS = ("rs_first", "rs_second-ä")
ROUTES = [
    ("POST", "/v1/jobs"),
    ("GET", "/v1/jobs"),
    ("GET", "/v1/jobs/job_x"),
    ("POST", "/v1/jobs/job_x/cancel"),
    ("DELETE", "/v1/jobs/job_x"),
    ("GET", "/v1/jobs/job_x/events"),
    ("GET", "/v1/jobs/job_x/trials"),
    ("GET", "/v1/jobs/job_x/report"),
    ("GET", "/v1/jobs/job_x/checkpoints"),
    ("GET", "/v1/jobs/job_x/checkpoints/0.5/files/config.json"),
    ("HEAD", "/v1/jobs/job_x/checkpoints/0.5/files/config.json"),
    ("POST", "/v1/estimates"),
    ("GET", "/v1/workers"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/docs"),
    ("GET", "/"),
    ("GET", "/dashboard/"),
    ("GET", "/static/bundle.js"),
    ("GET", "/api/studies"),
    ("DELETE", "/api/studies/1"),
    ("GET", "/csv/1"),
    ("GET", "/nothing/here"),
]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A server with tokens that other machines can reach."""
    hashes = [hashlib.sha256(token.encode()).hexdigest() for token in TOKENS]
    settings = load_settings(data_dir=tmp_path_factory.mktemp("guarded"), tokens=hashes, host="0.0.0.0")
    with TestClient(create_app(settings), base_url="http://ranksearch.example") as client:
        yield client


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A server without tokens on this machine."""
    settings = load_settings(data_dir=tmp_path_factory.mktemp("local"))
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
        yield client


def test_every_route_of_the_application_is_in_the_list(guarded: TestClient) -> None:
    answer = guarded.get("/openapi.json", headers={"Authorization": f"Bearer {TOKENS[0]}"})
    named = {(method.upper(), path) for path, methods in answer.json()["paths"].items() for method in methods}
    values = {"{job_id}": "job_x", "{kept}": "0.5", "{path}": "config.json"}
    for part, value in values.items():
        named = {(method, path.replace(part, value)) for method, path in named}
    assert named - set(ROUTES) == {("GET", "/healthz"), ("GET", "/readyz")}


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_strangers_get_401(guarded: TestClient, method: str, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKENS[0]}"}):
        answer = guarded.request(method, path, headers=headers, follow_redirects=False)
        assert answer.status_code == 401
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["www-authenticate"].startswith(("Bearer", "Basic"))
        if method != "HEAD":
            assert answer.json()["code"] == "unauthorized"


@pytest.mark.parametrize("token", TOKENS)
def test_each_token_opens(guarded: TestClient, token: str) -> None:
    headers = {"Authorization": b"bearer " + token.encode()}
    for path in ("/v1/jobs", "/metrics", "/api/studies", "/openapi.json"):
        assert guarded.get(path, headers=headers).status_code == 200


def test_the_hash_itself_is_no_token(guarded: TestClient) -> None:
    hashed = hashlib.sha256(TOKENS[0].encode()).hexdigest()
    assert guarded.get("/v1/jobs", headers={"Authorization": f"Bearer {hashed}"}).status_code == 401


def test_health_needs_no_token(guarded: TestClient) -> None:
    assert guarded.get("/healthz").json() == {"status": "ok"}
    assert guarded.get("/readyz").json() == {"status": "ready"}


def basic(password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"anyone:{password}".encode()).decode()}


def test_a_browser_may_give_the_token_as_password(guarded: TestClient) -> None:
    asked = guarded.get("/dashboard/")
    assert asked.headers["www-authenticate"].startswith("Basic realm=")
    assert guarded.get("/dashboard/", headers=basic(TOKENS[1])).status_code == 200
    assert guarded.get("/docs", headers=basic(TOKENS[0])).status_code == 200
    assert guarded.get("/dashboard/", headers=basic("wrong")).status_code == 401
    for broken in ("Basic", "Basic %%%", "Basic /////w==", "Digest x"):
        assert guarded.get("/dashboard/", headers={"Authorization": broken}).status_code == 401


def test_a_password_that_browsers_send_by_themselves_changes_nothing(guarded: TestClient) -> None:
    assert guarded.post("/v1/jobs", headers=basic(TOKENS[0])).status_code == 401
    assert guarded.delete("/api/studies/1", headers=basic(TOKENS[0])).status_code == 401


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:8000"])
def test_without_tokens_this_machine_is_answered(local: TestClient, host: str) -> None:
    assert local.get("/v1/jobs", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[::1", "10.0.0.1:8000"])
def test_without_tokens_other_names_are_not_answered(local: TestClient, host: str) -> None:
    answer = local.get("/v1/jobs", headers={"Host": host})
    assert (answer.status_code, answer.json()["code"]) == (403, "foreign_host")
    assert local.get("/healthz", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://[", "http://127.0.0.1.evil.example"])
def test_without_tokens_pages_of_other_sites_are_refused(local: TestClient, origin: str) -> None:
    answer = local.post("/v1/jobs", headers={"Origin": origin})
    assert (answer.status_code, answer.json()["code"]) == (403, "foreign_origin")
    assert local.get("/v1/jobs", headers={"Origin": "http://localhost:8000"}).status_code == 200


def test_tokens_stay_out_of_the_log(guarded: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="ranksearch"):
        guarded.get("/v1/jobs", headers={"Authorization": f"Bearer {TOKENS[0]}"})
        guarded.get("/v1/jobs", headers={"Authorization": "Bearer rs_wrong"})
    assert "GET /v1/jobs 401" in caplog.text
    assert not any(secret in caplog.text for secret in (*TOKENS, "rs_wrong"))


def test_data_folder_is_made(tmp_path: Path) -> None:
    with TestClient(create_app(load_settings(data_dir=tmp_path / "a" / "b")), base_url="http://localhost") as client:
        assert client.get("/readyz").status_code == 200
    assert (tmp_path / "a" / "b" / "ranksearch.db").is_file()
