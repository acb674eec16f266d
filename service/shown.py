"""The studies as the dashboard sees them."""

from __future__ import annotations

import copy
from collections.abc import Container
from typing import Final

from optuna.storages import _CachedStorage
from optuna.trial import FrozenTrial, TrialState

DRAWN: Final = 60
"""Trials of a study, the last ones, whose intermediate values are shown: the browser draws a line for each that is
complete, and with 76 lines, of a search of 300 trials, drawing the page took it 0.95 s instead of 0.56 s."""


class Shown(_CachedStorage):
    """Optuna's storage that reads each finished trial once, and shows the intermediate values of the last trials only.

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
        return [*map(_without_line, trials[:-DRAWN]), *trials[-DRAWN:]]


def _without_line(trial: FrozenTrial) -> FrozenTrial:
    found = copy.copy(trial)
    found.intermediate_values = {}
    return found
