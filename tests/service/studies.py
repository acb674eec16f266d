"""Studies as a search leaves them, with made-up scores: no model is evaluated."""

from __future__ import annotations

import numpy as np
from optuna.storages import BaseStorage

from ranksearch.search.objective import METRICS, Objective
from ranksearch.search.space import RankSpace
from ranksearch.search.spec import Search
from ranksearch.search.study import RankStudy
from ranksearch.search.targets import Target


def _target(block: int, kind: str, rows: int, columns: int) -> Target:
    name = f"model.layers.{block}.{kind}"
    return Target(name=name, out_features=rows, in_features=columns, kind=kind, depth=block)


SPACE = RankSpace(
    targets=tuple(
        _target(block, kind, rows, columns)
        for block in range(3)
        for kind, rows, columns in (("self_attn.q_proj", 32, 32), ("mlp.up_proj", 64, 32), ("mlp.down_proj", 32, 64))
    )
)


def run_study(
    storage: BaseStorage, job_id: str, *, kept: float, trials: int, seed: int = 0, objective: Objective = "perplexity"
) -> RankStudy:
    """Ask and tell as the worker does; the score falls with what is kept in the late blocks."""
    rng = np.random.default_rng(seed)
    spectra = {t.name: np.sort(rng.exponential(size=t.full_rank))[::-1] for t in SPACE.targets}
    study = RankStudy(
        storage=storage,
        job_id=job_id,
        kept=kept,
        space=SPACE,
        spectra=spectra,
        spec=Search(trials=trials, sampler="random", seed=seed, objective=objective),
        dense_score=20.0,
    )
    weights = np.array([1.0 + t.depth for t in SPACE.targets])
    while (proposal := study.ask()) is not None:
        score = 20.0 + 10.0 * float(np.sum(weights / (1 + proposal.ranks)))
        scores = {"perplexity": score, "kl": 3.0 - score / 100 if objective == "both" else score / 100}
        study.report(proposal.number, 0, [float(np.log(score))])
        values = [scores[name] for name in METRICS[objective]]
        study.tell(proposal.number, score=values, scores=scores, seconds=1.5, worker="host:cpu")
    return study
