"""What a sampler of rank vectors is: a function of the trials so far, which keeps nothing between two proposals."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from ranksearch.search.coordinates import RANKS
from ranksearch.search.space import Ranks, RankSpace

POINT = "point"
"""The trial's user attribute with the sampler's own point."""
MOST = 256
"""A Gaussian process of a published search learns from the latest so many trials: its time grows with their cube."""
ATTEMPTS = 24
"""Draws after which a sampler gives up looking for a vector that no trial has."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """A proposed vector.

    Attributes:
        ranks: `(targets,)`; it uses the budget exactly.
        point: What stands for it in the sampler's own space, as JSON for the trial to keep; None where there is none.
    """

    ranks: Ranks
    point: Any = None


class Sampler(Protocol):
    """Proposes vectors; the same ones whenever seed, trial number and trials told are the same."""

    def propose(self, trials: Sequence[FrozenTrial], number: int) -> Draw:
        """The vector to evaluate as trial `number`, after these trials."""
        ...


def best_ranks(space: RankSpace, trials: Sequence[FrozenTrial]) -> Ranks | None:
    """The vector of the complete trial with the smallest score, the first one on ties; None before the first."""
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    return space.unpack(min(complete, key=lambda t: (t.value, t.number)).user_attrs[RANKS]) if complete else None


def taken(trials: Sequence[FrozenTrial]) -> set[Any]:
    """The vectors that trials have, packed."""
    return {trial.user_attrs.get(RANKS) for trial in trials}


def draw_seed(seed: int, number: int) -> int:
    """A seed for one proposal, below 2^32."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


@contextmanager
def stable() -> Iterator[None]:
    """Parts of Optuna that we rely on are marked experimental; users of this project need not hear of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
