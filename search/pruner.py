"""Stopping a trial that is worse than the best one on the sequences that both have read.

Sequences differ far more from each other than vectors do, so losses are compared sequence by sequence; there are too
few parts of the text for a test to tell as much. A trial is looked at after each part, so the level is stricter than
5%. Replayed on 100 trials of a search on a LLaMA of 3 M parameters at kept 0.25, 64 sequences in 8 parts:

    level   work saved   stopped although they were better than the best one so far
    5%      20%          6
    2%      10%          2
    1%       5%          0

The best vector of all was found at each level.
"""

from __future__ import annotations

import base64
import warnings
from collections.abc import Sequence

import numpy as np
import optuna
from optuna.trial import TrialState, create_trial

from ranksearch.search.draw import stable

LOSSES = "ranksearch:losses"
"""The trial's system attribute with the packed losses of its sequences."""
MOST = 1024
"""Sequences of a trial that are compared, at most; the first ones."""
_P = 0.02


def pack_losses(losses: Sequence[float]) -> str:
    """Losses of the first sequences, nats per token, as base64 of little-endian float32."""
    return base64.b64encode(np.asarray(losses[:MOST], dtype="<f4").tobytes()).decode("ascii")


def unpack_losses(packed: str) -> list[float]:
    """The inverse of `pack_losses`."""
    return [float(loss) for loss in np.frombuffer(base64.b64decode(packed), dtype="<f4")]


def is_worse(losses: Sequence[float], best: Sequence[float]) -> bool:
    """Whether a trial is worse than the best one, by Wilcoxon's signed-rank test at 2% as Optuna's pruner runs it.

    Args:
        losses: Of its sequences so far, nats per token.
        best: Of the best trial's, in the same order.
    """
    # the pruner wants a study whose steps are the things to compare: one that holds the best trial and nothing else
    study = optuna.create_study()
    study.add_trial(create_trial(value=float(np.mean(best)), intermediate_values=dict(enumerate(best))))
    trial = create_trial(state=TrialState.RUNNING, intermediate_values=dict(enumerate(losses[:MOST])))
    with stable(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return optuna.pruners.WilcoxonPruner(p_threshold=_P).prune(study, trial)
