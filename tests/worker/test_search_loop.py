from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from ranksearch.search.spec import JobSpec
from ranksearch.service.store.artifacts import ArtifactStore
from ranksearch.service.store.checkpoints import Checkpoints
from ranksearch.service.store.database import open_database
from ranksearch.service.store.jobs import Jobs
from ranksearch.service.store.settings import Settings
from ranksearch.worker import stages
from ranksearch.worker.running_job import RunningJob, WorkerState
from ranksearch.worker.search_loop import search
from ranksearch.worker.tiny import train_tokenizer
from ranksearch.worker.workbench import Workbench

WORDS = " ".join(f"word{index % 37} and {index * index % 101}," for index in range(800))


class HereAndNow:
    """A device process in this one, which counts the trials that it begins."""

    pid = None

    def __init__(self) -> None:
        self.bench, self.begun = Workbench("cpu"), 0

    def ask(self, operation: str, *, progress: Any, check: Any, **arguments: Any) -> Any:
        self.begun += operation == "chunk" and arguments["index"] == 0
        return self.bench.do(operation, progress=progress, **arguments)


@pytest.mark.one_database
def test_a_job_measures_what_its_budgets_share_once(
    settings: Settings, allowed: Path, tiny: Callable[..., nn.Module]
) -> None:
    tiny(vocab_size=300).save_pretrained(allowed / "model")
    train_tokenizer(WORDS, 300).save_pretrained(allowed / "model")
    (allowed / "text.txt").write_text(WORDS)
    engine, device = open_database(settings), HereAndNow()
    worker = WorkerState(
        identity="w:cpu",
        settings=settings,
        jobs=Jobs(engine),
        artifacts=ArtifactStore.of(settings, engine),
        checkpoints=Checkpoints(engine),
        device=device,  # type: ignore[arg-type]
    )
    text = {"path": "text", "data_files": str(allowed / "text.txt"), "split": "train"}
    spec = {
        "model": {"source": str(allowed / "model")},
        "calibration": {"dataset": text, "sequences": 4, "sequence_length": 16},
        "evaluation": {"sequences": 4, "test": []},
        "budget": {"kept": [0.93, 0.97]},
        "method": {"preset": "asvd", "keep_dense": ["*.0.*", "*.mlp.*"], "rank_multiple": 4},
    }
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
