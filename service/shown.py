"""The studies as the dashboard sees them."""

from __future__ import annotations

import copy
from collections.abc import Container
from typing import Any, Final

from optuna.storages import _CachedStorage
from optuna.storages._rdb.models import TrialModel
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.orm import Session

from ranksearch.search.coordinates import RANKS
from ranksearch.search.trials import picture_attribute

DRAWN: Final = 60
"""Trials of a study, the last ones, whose intermediate values are shown: the browser draws a line for each that is
complete, and with 76 lines, of a search of 300 trials, drawing the page took it 0.95 s instead of 0.56 s."""


class Shown(_CachedStorage):
    """Optuna's storage that reads each finished trial once, shows the intermediate values of the last trials only, and
    a picture of its ranks with every trial.

    SQLite gives the ids of deleted studies to new ones, so studies are deleted through it.
    """

    def delete_study(self, study_id: int) -> None:
        """Deletes a study, and forgets what a page that was open read of it meanwhile."""
        super().delete_study(study_id)
        with self._lock:
            self._studies.pop(study_id, None)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """The trials, in the order of their numbers; not copies unless asked for."""
        trials = super().get_all_trials(study_id, deepcopy=deepcopy, states=states)
        drawn = len(trials) - DRAWN
        return [_shown(trial, study_id, line=place >= drawn) for place, trial in enumerate(trials)]

    def get_trial_system_attrs(self, trial_id: int) -> dict[str, Any]:
        """The attributes, with the picture."""
        with Session(self._backend.engine) as session:
            study_id: Any = TrialModel.find_or_raise_by_id(trial_id, session).study_id
        return _shown(self.get_trial(trial_id), study_id, line=True).system_attrs


def _shown(trial: FrozenTrial, study_id: int, *, line: bool) -> FrozenTrial:
    found = copy.copy(trial)
    if not line:
        found.intermediate_values = {}
    if RANKS in trial.user_attrs:
        key, picture = picture_attribute(study_id, trial.number)
        found._system_attrs = {**trial.system_attrs, key: picture}
    return found
