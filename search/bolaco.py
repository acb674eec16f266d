"""Bolaco's search: a Gaussian process over shares that many matrices have in common.

One share per matrix type in [0.2, 1], query and key together, value dense, all layers alike; the space of the paper has
these shares once for each quarter of the depth. The published code draws until the budget is met within a tenth; here a
common factor meets it exactly. In architectures without matrices of these names each type has a share of its own.

References:
    Bolaco  Adaptive Feature-based Low-Rank Compression of Large Language Models via Bayesian Optimization,
            arXiv 2405.10616
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from ranksearch.search.coordinates import kind_names
from ranksearch.search.draw import ATTEMPTS, MOST, POINT, Draw, draw_seed, stable, taken
from ranksearch.search.plan import ATTENTION, check_sampler, has_attention, sampled_space
from ranksearch.search.space import Ranks, RankSpace, proportional

LOW, HIGH = 0.2, 1.0
_FIRST = 3
"""Random points before the process is asked, as published."""


class Bolaco:
    """Proposes one share per matrix type and depth group."""

    def __init__(self, space: RankSpace, kept: float, seed: int, *, groups: int = 1) -> None:
        """Find the variables.

        Args:
            space: The rank space.
            kept: The budget.
            seed: A proposal is a function of the seed, the trial number and the trials told.
            groups: Parts of the depth with shares of their own.

        Raises:
            ImpossibleBudget: No vector with dense value matrices meets the budget.
        """
        check_sampler(space, "bolaco", kept)
        self._space, self._kept, self._seed = sampled_space(space, "bolaco"), kept, seed
        self._variables = _variables(space, groups)
        self.names = tuple(sorted(set(self._variables) - {""}))

    def propose(self, trials: Sequence[FrozenTrial], number: int) -> Draw:
        """The process' next point; random ones instead where a trial has its vector already."""
        rng, known = np.random.default_rng([self._seed, number]), taken(trials)
        point = self._ask(trials, number)
        for _ in range(ATTEMPTS):
            ranks = self.ranks(point)
            if self._space.pack(ranks) not in known:
                break
            point = {name: float(rng.uniform(LOW, HIGH)) for name in self.names}
        return Draw(ranks=ranks, point=point)

    def ranks(self, shares: Mapping[str, float]) -> Ranks:
        """The vector at `factor * share` of each matrix' parameters, which uses the budget exactly from below."""
        return proportional(self._space, self._kept, np.array([shares.get(name, 1.0) for name in self._variables]))

    def _ask(self, trials: Sequence[FrozenTrial], number: int) -> dict[str, float]:
        with stable():
            sampler = optuna.samplers.GPSampler(seed=draw_seed(self._seed, number), n_startup_trials=_FIRST)
        shadow = optuna.create_study(sampler=sampler, direction="minimize")
        distributions = {name: FloatDistribution(LOW, HIGH) for name in self.names}
        complete = [t for t in trials if t.state == TrialState.COMPLETE and t.user_attrs.get(POINT) is not None]
        for trial in complete[-MOST:]:
            point = trial.user_attrs[POINT]
            shadow.add_trial(create_trial(params=point, distributions=dict(distributions), value=trial.value))
        return dict(shadow.ask(dict(distributions)).params)


def _variables(space: RankSpace, groups: int) -> list[str]:
    """The variable that each target's share is; empty for a target that stays dense."""
    targets, named = space.targets, has_attention(space)
    depths = sorted({t.depth for t in targets})
    found = []
    for target, kind in zip(targets, kind_names(targets), strict=True):
        last = target.kind.rpartition(".")[2]
        if named and last in ATTENTION:
            kind = "" if last == "v_proj" else "qk"
        group = groups * depths.index(target.depth) // len(depths)
        found.append(kind if groups == 1 or not kind else f"{kind} {group}")
    return found
