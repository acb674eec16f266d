from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from ranksearch.search.spec import JobSpec
from ranksearch.service.store.database import open_database
from ranksearch.service.store.settings import Settings
from ranksearch.worker import stages
from ranksearch.worker.running_job import RunningJob
from ranksearch.worker.search_loop import search

from .here import HereAndNow, small_spec, worker_here


@pytest.mark.one_database
def test_a_job_measures_what_its_budgets_share_once(
    settings: Settings, allowed: Path, tiny: Callable[..., nn.Module]
) -> None:
    engine, device = open_database(settings), HereAndNow()
    worker = worker_here(settings, engine, device)
    spec = small_spec(
        allowed,
        tiny(vocab_size=300),
        budget={"kept": [0.93, 0.97]},
        method={"preset": "asvd", "keep_dense": ["*.0.*", "*.mlp.*"], "rank_multiple": 4},
    )
    created = worker.jobs.create(JobSpec.model_validate(spec))
    worker.jobs.set_running(created.id, worker.identity)
    run = RunningJob(worker, created)
    run.enter("prepare")
    prepared = stages.prepare(run)
    run.known = stages.known_of(worker.artifacts.path, prepared)
    calibrated = stages.calibrate(run, prepared)
    run.known = stages.known_of(worker.artifacts.path, prepared, calibrated)
    factored = stages.factor(run, prepared, calibrated)
    run.known = stages.known_of(worker.artifacts.path, prepared, calibrated, factored)
    ground = stages.Ground.of(run, prepared)
    run.enter("search", 0.93)
    first = search(run, ground, 0.93)
    planned = first["best"]["number"] + 1
    assert device.begun == planned > 4
    second = search(run, ground, 0.97)
    assert second["best"]["number"] + 1 == planned
    assert device.begun == planned + 1
    assert run.told_trials(0.93) == run.told_trials(0.97) == set(range(planned))
    assert first["best"]["ranks"] != second["best"]["ranks"]
    run.put_away()
    device.bench.recover()
    engine.dispose()
