"""Samplers to compare the default one with: Optuna's own over the named tilts, and CMA-ES over one tilt per target.

References:
    CMA-ES      N. Hansen, The CMA Evolution Strategy: A Tutorial, arXiv 1604.00772
    sep-CMA-ES  Ros, Hansen, A Simple Modification in CMA-ES Achieving Linear Time and Space Complexity, PPSN 2008
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from ranksearch.search.allocate import Allocator
from ranksearch.search.bolaco import Bolaco
from ranksearch.search.coordinates import BOUND, Coordinates
from ranksearch.search.draw import MOST, POINT, Draw, Sampler, draw_seed, stable
from ranksearch.search.evolution import Evolution, Swaps
from ranksearch.search.space import Floats

_SAMPLERS = {
    "random": optuna.samplers.RandomSampler,
    "tpe": optuna.samplers.TPESampler,
    "gp": optuna.samplers.GPSampler,
}
_WIDTH = BOUND / 3
"""CMA-ES' first standard deviation, a sixth of the range of a tilt as in Optuna."""
SEPARABLE = 300
"""Targets from which on CMA-ES learns a variance of each alone: a whole covariance takes their cube per proposal, and
more trials than a search has."""


def baseline(name: str, allocator: Allocator, kept: float, seed: int) -> Sampler:
    """The sampler of this name.

    Raises:
        ImpossibleBudget: No vector meets the budget in the sampler's own space.
    """
    space = allocator.space
    if name == "turbo":
        # torch and BoTorch load here, so that reading a study needs neither
        from ranksearch.search.turbo import Turbo

        return Turbo(space, kept, seed)
    if name == "botorch":
        from ranksearch.search.vanilla import BoTorch

        return BoTorch(space, kept, seed)
    if name in ("bolaco", "bolaco-20"):
        return Bolaco(space, kept, seed, groups=4 if name == "bolaco-20" else 1)
    if name == "cmaes":
        return CmaEs(allocator, kept, seed)
    if name == "swaps":
        return Swaps(allocator, kept, seed)
    return Evolution(space, kept, seed) if name == "evolutionary" else Tilted(name, allocator, kept, seed)


class Tilted:
    """One of Optuna's samplers over the named tilts: one per matrix kind, and one for depth."""

    def __init__(self, name: str, allocator: Allocator, kept: float, seed: int) -> None:
        """Args: `name` is `random`, `tpe` or `gp`."""
        self._make, self._allocator, self._kept, self._seed = _SAMPLERS[name], allocator, kept, seed
        self._coordinates = Coordinates(allocator.space.targets)

    def propose(self, trials: Sequence[FrozenTrial], number: int) -> Draw:
        """Ask on a copy of the study in memory, which costs no transaction and leaves no trace."""
        with stable():
            sampler = self._make(seed=draw_seed(self._seed, number))
        shadow = optuna.create_study(sampler=sampler, direction="minimize")
        shadow.add_trials(trials if self._make is not optuna.samplers.GPSampler else trials[-MOST:])
        tilts = shadow.ask({name: FloatDistribution(-BOUND, BOUND) for name in self._coordinates.names}).params
        return Draw(ranks=self._allocator.waterfill(self._kept, self._coordinates.log_weights(tilts)))


class CmaEs:
    """CMA-ES over z, one log weight per target on the prior; the optimizer that Optuna's CmaEsSampler runs.

    With `SEPARABLE` targets or more its covariance is diagonal. It is re-built from the points of the trials, so it
    needs no state of its own.
    """

    def __init__(self, allocator: Allocator, kept: float, seed: int) -> None:
        """Set what a proposal depends on besides the trials."""
        self._allocator, self._kept, self._seed = allocator, kept, seed

    def propose(self, trials: Sequence[FrozenTrial], number: int) -> Draw:
        """Tell the finished generations, then ask. A trial that was stopped or failed ranks last in its own."""
        from cmaes import CMA, SepCMA  # reading a study does not need it

        d = len(self._allocator.space.targets)
        cma = (CMA if d < SEPARABLE else SepCMA)(mean=np.zeros(d), sigma=_WIDTH, seed=draw_seed(self._seed, 0))
        told = [(_unpack(t.user_attrs[POINT]), _score(t)) for t in trials if t.state.is_finished() and _has_point(t)]
        for start in range(0, len(told) - cma.population_size + 1, cma.population_size):
            cma.tell(told[start : start + cma.population_size])
        cma.reseed_rng(draw_seed(self._seed, number))
        point = _pack(cma.ask())
        return Draw(ranks=self._allocator.waterfill(self._kept, _unpack(point)), point=point)


def _score(trial: FrozenTrial) -> float:
    return float(trial.value) if trial.state == TrialState.COMPLETE and trial.value is not None else np.inf


def _has_point(trial: FrozenTrial) -> bool:
    return trial.user_attrs.get(POINT) is not None


def _pack(z: Floats) -> str:
    """Base64 of little-endian half floats, as long as a packed rank vector; what was rounded is what is evaluated."""
    return base64.b64encode(np.asarray(z).astype("<f2").tobytes()).decode("ascii")


def _unpack(packed: Any) -> Floats:
    return np.frombuffer(base64.b64decode(packed), dtype="<f2").astype(np.float64)
