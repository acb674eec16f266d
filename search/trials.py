"""How a rank study is written down in Optuna, and how to read it back: no sampler, no spectra, no torch."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from ranksearch.search.coordinates import RANKS
from ranksearch.search.gradients import COST
from ranksearch.search.objective import METRICS, score_of
from ranksearch.search.presets import PROBE
from ranksearch.search.prices import from_document
from ranksearch.search.space import RankSpace
from ranksearch.search.spec import budget_label
from ranksearch.search.targets import Target

RESULT = "result"
"""The trial's user attribute with everything but the score that telling it brought."""
SPACE = "ranksearch:space"
"""The study's system attribute with the table of targets."""
DENSE = "dense score"
"""The study's user attribute with the score of the dense model: its perplexity, or 0 for objective `kl`."""


def study_name(job_id: str, kept: float) -> str:
    """The name of the study of one job and budget."""
    return f"{job_id}/{budget_label(kept)}"


def trials_of(storage: BaseStorage | str, job_id: str, kept: float) -> list[dict[str, Any]]:
    """The trials of one job and budget as JSON-serializable rows, in the order of their numbers.

    Returns:
        Rows with `number`, `state` (Optuna's: RUNNING, COMPLETE, PRUNED, FAIL), `origin`, `kept` (exact), `score` (one
        number, see `score_of`), `scores`, `intermediate` (step -> value), `ranks` (packed: see `space_of`), `seconds`,
        `worker`, `error`, `evaluations` (that it counts as, gradients included); empty when there is no such study yet.
    """
    storage = optuna.storages.get_storage(storage)
    try:
        study_id = storage.get_study_id_from_name(study_name(job_id, kept))
    except KeyError:
        return []
    dense_score = _dense_score(storage, study_id)
    return [row(trial, dense_score) for trial in storage.get_all_trials(study_id, deepcopy=False)]


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
    return best_of(trials, _dense_score(storage, study_id))


def best_of(trials: Sequence[FrozenTrial], dense_score: float) -> FrozenTrial | None:
    """The complete trial with the smallest score of these, the first one on ties; never a probe."""
    able = (t for t in trials if may_be_best(t.state.name, t.user_attrs.get("origin")))
    found = [(score_of(t.values, dense_score), t.number, t) for t in able]
    return min(found)[2] if found else None


def pareto_front(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The trials that no other one is better than in both perplexity and KL; of equal ones the first.

    Args:
        rows: See `trials_of`.

    Returns:
        `number`, `perplexity` and `kl` of each, the smallest perplexity first.
    """
    able = [row for row in rows if may_be_best(row["state"], row["origin"])]
    points = [{"number": row["number"], **{name: row["scores"][name] for name in METRICS["both"]}} for row in able]
    front: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda point: (point["perplexity"], point["kl"], point["number"])):
        if not front or point["kl"] < front[-1]["kl"]:
            front.append(point)
    return front


def scored(trials: Sequence[FrozenTrial], dense_score: float) -> list[FrozenTrial]:
    """The trials with their score as the only value, for samplers that know of one objective."""
    return [_scored(trial, dense_score) if len(trial.values or ()) > 1 else trial for trial in trials]


def _scored(trial: FrozenTrial, dense_score: float) -> FrozenTrial:
    found = copy.copy(trial)  # the storage's own must not change
    found.values = [score_of(trial.values, dense_score)]
    return found


def picture_attribute(study_id: int, number: int | None = None) -> tuple[str, str]:
    """The system attribute that lets the dashboard show ranks as a heat map, as Optuna writes artifacts.

    Nothing is stored: the server draws the picture when it is asked for, so the artifact's id says what of.

    Args:
        study_id: The study; of its best trial so far.
        number: Of this trial instead.
    """
    name = str(study_id) if number is None else f"{study_id}-{number}"
    facts = {"artifact_id": name, "filename": "ranks.svg", "mimetype": "image/svg+xml", "encoding": None}
    return f"artifacts:{name}", json.dumps(facts)


def row(trial: FrozenTrial, dense_score: float) -> dict[str, Any]:
    """One trial as a JSON-serializable row; see `trials_of`."""
    result = trial.user_attrs.get(RESULT, {})
    complete = trial.state == TrialState.COMPLETE
    return {
        "number": trial.number,
        "state": trial.state.name,
        "origin": trial.user_attrs.get("origin"),
        "kept": trial.user_attrs.get("kept"),
        "score": score_of(trial.values, dense_score) if complete else None,
        "scores": result.get("scores", {}) if complete else {},
        "intermediate": {str(step): value for step, value in sorted(trial.intermediate_values.items())},
        "ranks": trial.user_attrs.get(RANKS),
        "seconds": result.get("seconds"),
        "worker": result.get("worker"),
        "error": result.get("error"),
        "evaluations": result.get("evaluations", 1) + trial.system_attrs.get(COST, 0),
    }


def _dense_score(storage: BaseStorage, study_id: int) -> float:
    return float(storage.get_study_user_attrs(study_id).get(DENSE, 0.0))
