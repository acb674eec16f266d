"""The last two stages: export the best vector and prove it, then publish the checkpoints and the report."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ranksearch.search.allocate import Allocator
from ranksearch.search.space import uniform
from ranksearch.search.spec import budget_label
from ranksearch.search.trials import pareto_front, trials_of
from ranksearch.service.store.checkpoints import CheckpointFile
from ranksearch.service.store.database import optuna_storage
from ranksearch.worker.report import build_budget, build_report, write_documents
from ranksearch.worker.running_job import RunningJob
from ranksearch.worker.stages import Facts, Ground

_REPORT: Final = "ranksearch.json"
_HISTORY: Final = ("number", "state", "origin", "score", "kept", "seconds", "worker", "evaluations")


def finish(
    run: RunningJob, ground: Ground, prepared: Facts, searched: Facts, kept: float, seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Export and score one budget, and put the checkpoint's files into the artifact store, where nobody sees them yet.

    Args:
        run: The job.
        ground: Rank space and what the bank says.
        prepared: Facts of the prepare stage.
        searched: Facts of this budget's search.
        kept: The budget.
        seconds: Of the stages so far.
    """
    begun, space = time.monotonic(), ground.space
    best = space.unpack(searched["best"]["ranks"])
    rows = {"uniform": uniform(space, kept), "prior": Allocator(space, ground.spectra).prior(kept), "best": best}
    folder = run.fresh_folder("finish") / "checkpoint"
    refined = _refine(run, space.as_dict(best), kept)
    vectors = {row: space.as_dict(ranks) for row, ranks in rows.items()}
    trials = _trials(run, kept)
    proof = run.ask("finish", vectors=vectors, folder=str(folder), refined=refined and refined["path"])
    budget = build_budget(
        kept=kept,
        space=space,
        ranks=refined["ranks"] if refined else vectors["best"],
        refine=refined["steps"] if refined else [],
        spectra=ground.spectra,
        facts=ground.target_facts,
        scores=proof["scores"],
        against=proof["against"],
        parameters=proof["parameters"],
        bytes={**proof["bytes"], **_asked(run, kept)},
        speed=proof["speed"],
        seconds={**seconds, "finish": round(time.monotonic() - begun, 3)},
        history=[{key: row[key] for key in _HISTORY} for row in trials],
        pareto_front=pareto_front(trials) if run.spec.search.objective == "both" else [],
    )
    report = build_report(job=run.id, spec=run.spec_json, fingerprints=_fingerprints(prepared), budgets=[budget])
    write_documents(folder, report, source_card=proof["card"], auto_class=proof["auto_class"])
    return {"files": _store(run, folder)}


def publish(run: RunningJob, finished: Mapping[float, Facts], failed: Mapping[float, Facts]) -> dict[str, Any]:
    """Show checkpoints and report, and end the job, which has failed if one of its budgets has.

    Args:
        run: The job.
        finished: Budget -> facts of its finish stage; at least one.
        failed: Budget -> the error it ended with.
    """
    worker, report = run.worker, None
    for kept, facts in finished.items():
        files = [CheckpointFile(**file) for file in facts["files"]]
        own = json.loads(worker.artifacts.path(next(f.sha256 for f in files if f.path == _REPORT)).read_text("utf-8"))
        (budget,) = own["budgets"]
        shown = {key: budget[key] for key in ("kept_exact", "parameters", "bytes")} | {
            "scores": budget["scores"]["final"]
        }
        worker.checkpoints.add(run.id, kept, files, facts=shown)
        report = own if report is None else {**report, "budgets": [*report["budgets"], budget]}
    assert report is not None
    worker.jobs.save_report(run.id, report)
    if failed:
        run.keep(worker.jobs.fail(run.id, _error(failed, finished), worker=worker.identity))
    else:
        run.keep(worker.jobs.succeed(run.id, worker=worker.identity))
    return {"checkpoints": [budget_label(kept) for kept in finished]}


def _error(failed: Mapping[float, Facts], finished: Mapping[float, Facts]) -> dict[str, Any]:
    """The first budget's error, saying which others failed and what there is all the same."""
    lost, there = (", ".join(map(budget_label, budgets)) for budgets in (failed, finished))
    error = next(iter(failed.values()))
    said = f"kept {lost} failed: {error['message']} Report and checkpoints are there for kept {there}."
    return {**error, "message": said}


def _asked(run: RunningJob, kept: float) -> dict[str, int]:
    """The bytes that a budget stands for, where the user named bytes."""
    budget = run.spec.budget
    return {} if budget.bytes is None else {"asked": budget.bytes[budget.kept.index(kept)]}


def _refine(run: RunningJob, ranks: dict[str, int], kept: float) -> dict[str, Any] | None:
    """The steps of `method.refine`: where the factors are, their ranks, and what each step did."""
    if not run.spec.method.steps:
        return None
    output = run.worker.refine_folder / f"{run.id}-{budget_label(kept)}"
    done: dict[str, Any] = run.ask("refine", ranks=ranks, kept=kept, output=str(output))
    for step in done["steps"]:
        run.tell("refined", kept=kept, **{key: value for key, value in step.items() if key != "history"})
    return {"path": str(output), **done}


def _trials(run: RunningJob, kept: float) -> list[dict[str, Any]]:
    storage = optuna_storage(run.worker.settings)
    try:
        return trials_of(storage, run.id, kept)
    finally:
        storage.engine.dispose()


def _fingerprints(prepared: Facts) -> dict[str, Any]:
    text = prepared["text"]
    return {
        "model": prepared["model_fingerprint"],
        "dataset": {name: blocks["dataset"] for name, blocks in text.items()},
        "sequences": {name: blocks["tokens"] for name, blocks in text.items()},
        "sequence_ids": {name: blocks["ids"] for name, blocks in text.items()},
    }


def _store(run: RunningJob, folder: Path) -> list[dict[str, Any]]:
    """Put every file of a folder into the artifact store; returns path, size and sha256 of each."""
    stored = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        run.check()
        blob = run.worker.artifacts.put_file(path, job_id=run.id)
        stored.append({"path": path.relative_to(folder).as_posix(), "size": blob.size, "sha256": blob.sha256})
    return stored
