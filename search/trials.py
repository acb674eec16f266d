"""How a rank study is written down in Optuna, and how to read it back: no sampler, no spectra, no torch."""

from __future__ import annotations

import json
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from ranksearch.search.coordinates import RANKS
from ranksearch.search.presets import PROBE
from ranksearch.search.prices import from_document
from ranksearch.search.space import RankSpace
from ranksearch.search.spec import budget_label
from ranksearch.search.targets import Target

RESULT = "result"
"""The trial's user attribute with everything but the score that telling it brought."""
SPACE = "ranksearch:space"
"""The study's system attribute with the table of targets."""


def study_name(job_id: str, kept: float) -> str:
    """The name of the study of one job and budget."""
    return f"{job_id}/{budget_label(kept)}"


def trials_of(storage: BaseStorage | str, job_id: str, kept: float) -> list[dict[str, Any]]:
    """The trials of one job and budget as JSON-serializable rows, in the order of their numbers.

    Returns:
        Rows with `number`, `state` (Optuna's: RUNNING, COMPLETE, PRUNED, FAIL), `origin`, `kept` (exact), `score`,
        `scores`, `intermediate` (step -> value), `ranks` (packed: see `space_of`), `seconds`, `worker`, `error`; empty
        when there is no such study yet.
    """
    storage = optuna.storages.get_storage(storage)
    try:
        study_id = storage.get_study_id_from_name(study_name(job_id, kept))
    except KeyError:
        return []
    return [row(trial) for trial in storage.get_all_trials(study_id, deepcopy=False)]


def space_of(storage: BaseStorage | str, job_id: str, kept: float) -> RankSpace | None:
    """The rank space the study was created with, which unpacks its vectors; None when there is no such study yet."""
    storage = optuna.storages.get_storage(storage)
    try:
        return space_of_study(storage, storage.get_study_id_from_name(study_name(job_id, kept)))
    except KeyError:
        return None


def space_of_study(storage: BaseStorage, study_id: int) -> RankSpace | None:
    """The same by the study's id."""
    table = storage.get_study_system_attrs(study_id).get(SPACE)
    if table is None:
        return None
    targets = tuple(Target(**dict(zip(table["columns"], row, strict=True))) for row in table["targets"])
    return RankSpace(
        targets=targets,
        rank_multiple=table["rank_multiple"],
        keep_dense=tuple(table["keep_dense"]),
        form=table.get("form", "factored"),  # studies older than the choice of a form
        prices=from_document(table["prices"], (t.name for t in targets)) if "prices" in table else None,
    )


def may_be_best(state: str, origin: str | None) -> bool:
    """Whether a trial of this state and origin may be the best: probes are off the budget."""
    return state == TrialState.COMPLETE.name and origin != PROBE


def best_trial(storage: BaseStorage, study_id: int) -> FrozenTrial | None:
    """The complete trial with the smallest score, the first one on ties."""
    trials = storage.get_all_trials(study_id, deepcopy=False, states=(TrialState.COMPLETE,))
    able = (t for t in trials if may_be_best(t.state.name, t.user_attrs.get("origin")))
    scored = [(t.value, t.number, t) for t in able if t.value is not None]
    return min(scored)[2] if scored else None


def picture_attribute(study_id: int) -> tuple[str, str]:
    """The system attribute that lets the dashboard show the heat map of a study's ranks, as Optuna writes artifacts.

    Nothing is stored: the server draws the picture when it is asked for, so the artifact's id names the study.
    """
    facts = {"artifact_id": str(study_id), "filename": "ranks.svg", "mimetype": "image/svg+xml", "encoding": None}
    return f"artifacts:{study_id}", json.dumps(facts)


def row(trial: FrozenTrial) -> dict[str, Any]:
    """One trial as a JSON-serializable row; see `trials_of`."""
    result = trial.user_attrs.get(RESULT, {})
    complete = trial.state == TrialState.COMPLETE
    return {
        "number": trial.number,
        "state": trial.state.name,
        "origin": trial.user_attrs.get("origin"),
        "kept": trial.user_attrs.get("kept"),
        "score": trial.value if complete else None,
        "scores": result.get("scores", {}) if complete else {},
        "intermediate": {str(step): value for step, value in sorted(trial.intermediate_values.items())},
        "ranks": trial.user_attrs.get(RANKS),
        "seconds": result.get("seconds"),
        "worker": result.get("worker"),
        "error": result.get("error"),
    }
