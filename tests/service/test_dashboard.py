"""The Optuna dashboard behind our guard, up to what a person sees."""

from __future__ import annotations

import gzip
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import optuna
import pytest
from fastapi.testclient import TestClient

from ranksearch.service.context import Context, open_context
from ranksearch.service.store.settings import Settings

from .studies import run_study

ARTIFACTS = Path(__file__).parents[2] / "test-artifacts"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)

pytestmark = pytest.mark.one_database


@pytest.fixture
def study_id(client: TestClient, context: Context) -> int:
    run_study(context.studies, "job_a", kept=0.5, trials=3)
    return context.studies.get_study_id_from_name("job_a/0.5")


def test_the_dashboard_has_its_paths_and_no_others(client: TestClient, study_id: int) -> None:
    assert client.get("/", follow_redirects=False).headers["location"] == "/dashboard/"
    for path in ("/dashboard", "/dashboard/", f"/dashboard/studies/{study_id}", "/static/bundle.js", "/favicon.ico"):
        assert client.get(path).status_code == 200, path
    for path in ("/api/meta", "/api/studies", f"/api/studies/{study_id}", f"/csv/{study_id}"):
        assert client.get(path).status_code == 200, path
    for path in ("/api/llm/x", "/artifacts/1/2", "/incompatible-rdb-schema", "/api", "/dashboards"):
        answer = client.get(path)
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), path


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("DELETE", "/api/studies/{id}"),
        ("POST", "/api/studies"),
        ("POST", "/api/studies/{id}/rename"),
        ("PUT", "/api/studies/{id}/note"),
        ("POST", "/api/trials/1/tell"),
        ("POST", "/api/trials/1/user-attrs"),
        ("DELETE", "/api/artifacts/{id}/1"),
        ("PATCH", "/dashboard/"),
    ],
)
def test_the_dashboard_changes_nothing(
    client: TestClient, context: Context, study_id: int, method: str, path: str
) -> None:
    answer = client.request(method, path.format(id=study_id), json={"study_name": "gone", "state": "Fail"})
    assert (answer.status_code, answer.json()["code"]) == (403, "dashboard_read_only")
    assert optuna.get_all_study_names(context.studies) == ["job_a/0.5"]
    assert client.get(f"/api/studies/{study_id}").status_code == 200


def test_large_answers_are_compressed(client: TestClient, study_id: int) -> None:
    with client.stream("GET", f"/api/studies/{study_id}", headers={"Accept-Encoding": "gzip"}) as answer:
        raw = b"".join(answer.iter_raw())
    assert answer.headers["content-encoding"] == "gzip"
    assert len(gzip.decompress(raw)) > 2 * len(raw)
    del client.headers["accept-encoding"]
    assert client.get("/static/bundle.js").status_code == 200


def browse(url: str, profile: Path, *options: str) -> str:
    """Let Chromium render a page; returns what it prints."""
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "--virtual-time-budget=20000", *options, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_finished_study_is_seen_in_a_browser(
    serve: Callable[[Settings], str], settings: Settings, body: dict[str, Any], tmp_path: Path
) -> None:
    url = serve(settings)
    job = httpx.post(f"{url}/v1/jobs", json=body).json()
    context = open_context(settings)
    study = run_study(context.studies, job["id"], kept=0.5, trials=12)
    context.jobs.set_running(job["id"], "w")
    context.jobs.succeed(job["id"])
    context.close()
    page = httpx.get(job["links"]["self"]).json()["links"]["dashboard"]
    best = min(row["score"] for row in study.history())

    listed = browse(f"{url}/dashboard/", tmp_path / "first", "--dump-dom")
    assert f"{job['id']}/0.5" in listed

    rendered = browse(page, tmp_path / "second", "--dump-dom")
    assert f"{job['id']}/0.5" in rendered
    assert "Best Trial" in rendered
    assert f"{best:.4f}"[:6] in rendered
    assert "History" in rendered
    assert "js-plotly-plot" in rendered

    ARTIFACTS.mkdir(exist_ok=True)
    picture = ARTIFACTS / "dashboard.png"
    picture.unlink(missing_ok=True)
    browse(page, tmp_path / "third", f"--screenshot={picture}", "--window-size=1400,1600")
    assert picture.stat().st_size > 30_000
