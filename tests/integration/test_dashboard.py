"""What a person sees of a job that a worker has finished: the Optuna dashboard, in a browser."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from ranksearch.search.spec import JobSpec
from ranksearch.service.store.settings import Settings
from tests.integration.machine import ROOT, Machine

ARTIFACTS = ROOT / "test-artifacts"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)


def browse(url: str, profile: Path, *options: str) -> str:
    """Let Chromium render a page; returns what it prints."""
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "--virtual-time-budget=20000", *options, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("machine", ["sqlite"], indirect=True)
@pytest.mark.usefixtures("done")
def test_a_finished_job_is_seen_in_a_browser(
    worker: Machine, spec: Callable[..., JobSpec], serve: Callable[[Settings], str], tmp_path: Path
) -> None:
    job = worker.succeeded(worker.submit(spec(kept=[0.45], trials=12)))
    url = serve(worker.settings)
    page = httpx.get(f"{url}/v1/jobs/{job.id}").json()["links"]["dashboard"]
    assert page.startswith(f"{url}/dashboard/studies/")

    listed = browse(f"{url}/dashboard/", tmp_path / "first", "--dump-dom")
    assert f"{job.id}/0.45" in listed

    rendered = browse(page, tmp_path / "second", "--dump-dom")
    assert f"{job.id}/0.45" in rendered
    assert "Best Trial" in rendered
    assert f"{job.best['0.45']['score']:.4f}"[:6] in rendered
    assert "History" in rendered
    assert "js-plotly-plot" in rendered

    ARTIFACTS.mkdir(exist_ok=True)
    picture = ARTIFACTS / "dashboard.png"
    picture.unlink(missing_ok=True)
    browse(page, tmp_path / "third", f"--screenshot={picture}", "--window-size=1400,1600")
    assert picture.stat().st_size > 30_000

    refused = httpx.delete(f"{url}/api/studies/{page.rpartition('/')[2]}")
    assert (refused.status_code, refused.json()["code"]) == (403, "dashboard_read_only")
    assert len(worker.trials(job.id, 0.45)) == 12
