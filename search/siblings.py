"""Other studies of the same targets, whose trials inform a search: sensitivities do not depend on the budget.

Those of the same job are read as they stand. What an earlier job contributes is fixed when the search begins, so that a
resumed search proposes what an undisturbed one does: the study keeps how many trials of each it may read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from ranksearch.search.errors import InvalidInput
from ranksearch.search.space import RankSpace
from ranksearch.search.trials import DENSE, scored, space_of_study

EARLIER = "ranksearch:earlier"
"""The study's system attribute with the names of earlier studies it learns from, and how many trials of each."""


@dataclass(frozen=True, kw_only=True)
class Sibling:
    """Trials of one study, and how to read them.

    Attributes:
        trials: In the order of their numbers.
        space: Unpacks their vectors; the targets are those of the search, ranks and form may be others.
        objective: What a trial's value is; of a study of both, e1 + e2 (see `objective`).
        dense_score: Perplexity of the dense model, or 0 for `kl`.
    """

    trials: Sequence[FrozenTrial]
    space: RankSpace
    objective: str
    dense_score: float


def trials_in(storage: BaseStorage, name: str) -> list[FrozenTrial]:
    """The trials of a study by its name; none where there is no such study."""
    study_id = _study_id(storage, name)
    return [] if study_id is None else storage.get_all_trials(study_id, deepcopy=False)


def check_targets(storage: BaseStorage, names: Sequence[str], space: RankSpace) -> None:
    """Refuse to learn from studies of another model.

    Args:
        storage: Where the studies are.
        names: Their names; those that do not exist are passed over.
        space: Of the search.

    Raises:
        InvalidInput: A study has other targets; `data` holds its name.
    """
    for name in names:
        study_id = _study_id(storage, name)
        other = None if study_id is None else space_of_study(storage, study_id)
        if other is not None and _shapes(other) != _shapes(space):
            raise InvalidInput(
                f"search.learn_from: study {name} has other targets than this model; "
                f"leave job {name.partition('/')[0]} out.",
                study=name,
            )


def finished_at_first(storage: BaseStorage, names: Sequence[str]) -> dict[str, int]:
    """How many trials each study has up to the first one that is not finished; by name, in their order."""
    found = {name: trials_in(storage, name) for name in names}
    return {name: sum(1 for _ in takewhile(lambda t: t.state.is_finished(), found[name])) for name in found}


def read_earlier(storage: BaseStorage, counts: Mapping[str, int]) -> list[Sibling]:
    """The first trials of earlier studies, so many of each; those of deleted jobs are passed over."""
    found = []
    for name, count in counts.items():
        study_id = _study_id(storage, name)
        space = None if study_id is None else space_of_study(storage, study_id)
        if study_id is None or space is None:
            continue
        facts = storage.get_study_user_attrs(study_id)
        trials = scored(storage.get_all_trials(study_id, deepcopy=False)[:count], facts[DENSE])
        found.append(Sibling(trials=trials, space=space, objective=facts["objective"], dense_score=facts[DENSE]))
    return found


def _study_id(storage: BaseStorage, name: str) -> int | None:
    try:
        return storage.get_study_id_from_name(name)
    except KeyError:
        return None


def _shapes(space: RankSpace) -> list[tuple[str, int, int]]:
    return [(target.name, target.out_features, target.in_features) for target in space.targets]
