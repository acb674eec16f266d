"""The demo as users run it, made small: every step is real, from training to the picture."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(280)
def test_the_demo_runs_from_training_to_the_picture(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "ranksearch.service.cli",
        "demo",
        "--seconds",
        "3",
        "--trials",
        "3",
        "--kept",
        "0.3",
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / ".ns"),
        "OMP_NUM_THREADS": "1",  # on a busy machine, threads that wait for each other cost more than they bring
        "RANKSEARCH_DATABASE_URL": "sqlite:////nowhere/else.db",  # the demo keeps to its folder
    }
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    log = tmp_path / "demo" / "serve.log"
    assert done.returncode == 0, done.stderr + (log.read_text() if log.exists() else "")

    shown, folder = done.stderr, tmp_path / "demo"
    for row in ("dense", "uniform", "prior", "best", "final"):
        assert re.search(rf"^(1|0\.3) +{row} +[\d.,]+ +[\d.]+", shown, re.MULTILINE), row
    assert re.search(r"dashboard +http://127\.0\.0\.1:\d+/dashboard/", shown)
    assert "it writes: 'If the argument is" in shown
    assert "ranksearch serve --data-dir demo/data" in shown

    (budget,) = json.loads((folder / "report.json").read_text())["budgets"]
    assert budget["kept_exact"] <= 0.3
    assert len(budget["history"]) == 3
    assert (folder / "search.png").read_bytes().startswith(b"\x89PNG")
    assert {"config.json", "ranksearch.json", "model.safetensors"} <= {
        p.name for p in (folder / "compressed-0.3").iterdir()
    }
