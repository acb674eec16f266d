"""`ranksearch compare` with a worker that really does the jobs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ranksearch.search.spec import JobSpec
from ranksearch.search.trials import space_of
from ranksearch.service.cli import app
from ranksearch.service.heatmap import report_panels, shares_by_layer
from ranksearch.service.store.database import optuna_storage
from ranksearch.service.store.settings import Settings
from tests.integration.machine import Machine


@pytest.mark.parametrize("machine", ["sqlite"], indirect=True)
def test_two_seeds_are_two_jobs_on_one_calibration(
    worker: Machine,
    spec: Callable[..., JobSpec],
    serve: Callable[[Settings], str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("RANKSEARCH_URL", serve(worker.settings))
    file = tmp_path / "spec.json"
    file.write_text(spec(kept=[0.5]).model_dump_json())
    arguments = ["compare", str(file), "--methods", "ranksearch", "--kept", "0.35", "--seeds", "5,6", "--json"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert [(row["method"], row["seed"], row["kept"]) for row in rows] == [("ranksearch", s, 0.35) for s in (5, 6)]
    assert worker.events(rows[1]["job"], "bank.cache_hit")
    for row in rows:
        report = worker.jobs.report(row["job"])
        assert report is not None
        (budget,) = report["budgets"]
        final, dense = (budget["scores"][name]["test"]["text.txt"] for name in ("final", "dense"))
        assert (row["test_perplexity"], row["kl"]) == (final["perplexity"], final["kl"])
        assert row["test_perplexity"] == pytest.approx(dense["perplexity"] * math.exp(row["excess"]))
        assert row["evaluations"] == len(worker.trials(row["job"], 0.35)) == 4
        assert 0 < row["seconds"] < row["total_seconds"]

        storage = optuna_storage(worker.settings)
        space = space_of(storage, row["job"], 0.35)
        storage.engine.dispose()
        best = min(worker.trials(row["job"], 0.35), key=lambda trial: trial["score"])
        assert space is not None
        kinds, shares = shares_by_layer(space, space.unpack(best["ranks"]))
        ((_, (read, ranks)),) = report_panels(report).items()
        of_report = dict(zip(*shares_by_layer(read, ranks), strict=True))
        assert np.array_equal([of_report[kind] for kind in kinds], shares)
