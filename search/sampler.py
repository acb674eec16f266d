"""The default sampler: learn how the prior errs, then water-fill exactly.

Every proposal is a vector of a pool of water-filled candidates, so it is feasible and uses the budget exactly:

    greedy     the mode of the log sensitivities z, and the same stretched and shrunk
    draws      water-filled draws of z from its posterior (Thompson), and half-way between mode and draw
    swaps      the best trial so far with a few targets pushed up or down

Two of three proposals are the greedy vector, which is hard to beat while the model still learns. The third, and any
other when the greedy vector is known already, is the pool member of the largest log expected improvement under
sensitivities plus residual. A vector that some trial has is never proposed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
import torch
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from ranksearch.search.allocate import Allocator
from ranksearch.search.coordinates import BOUND, RANKS, Coordinates
from ranksearch.search.objective import Objective
from ranksearch.search.residual import inputs, log_improvement, residual_process
from ranksearch.search.siblings import Sibling
from ranksearch.search.space import Floats, Ranks
from ranksearch.search.surrogate import Observations, SensitivityModel
from ranksearch.search.threads import one_thread
from ranksearch.search.trials import scored

_STRETCH = (1.0, 0.7, 1.3, 0.4, 1.7)
_DRAWS = 20
_SWAPS = 12
_EXPLORE_EVERY = 3
_MOST_TRIALS = 320
_PARTIAL_SPREAD = 2.0
_SIBLING_SPREAD = 2.0
_FAINT = 0.01
"""Below this share of the search's own smallest excess, one of another study is mostly noise, which a log magnifies."""


@dataclass(frozen=True, kw_only=True)
class _Told:
    """A trial that has a score: its vector, excess loss in nats, spread and study (see `Observations`)."""

    number: int
    ranks: Ranks
    excess: float
    spread: float
    group: int


class RankSampler(optuna.samplers.BaseSampler):
    """Proposes rank vectors from learned sensitivities.

    It stands for a vector by its named tilts and leaves the vector itself, packed, in the trial's user attribute
    `ranks`.
    """

    def __init__(
        self,
        *,
        allocator: Allocator,
        kept: float,
        seed: int,
        dense_score: float,
        objective: Objective = "perplexity",
        siblings: Sequence[Sibling] = (),
        measured: Floats | None = None,
    ) -> None:
        """Set what a proposal depends on besides the trials.

        Args:
            allocator: Space and spectra.
            kept: The budget.
            seed: A proposal is a function of the seed, the trial number and the trials told.
            dense_score: Score of the dense model: perplexity, or 0 for `kl`.
            objective: What a trial's value is; for `both`, e1 + e2 (see `scored`).
            siblings: Other studies of the same targets, those that tell most first; the sensitivities are shared.
            measured: Log sensitivities by gradients, `(d,)`; what is learned from scores is how these err.
        """
        self._allocator, self._space, self._kept, self._seed = allocator, allocator.space, kept, seed
        self._dense_score, self._objective, self._siblings = dense_score, objective, siblings
        self._coordinates = Coordinates(allocator.space.targets)
        self._measured = np.zeros(len(self._space.targets)) if measured is None else measured

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All tilts, always together."""
        return {name: FloatDistribution(-BOUND, BOUND) for name in self._coordinates.names}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The tilts of the proposed vector; the vector goes into the user attribute."""
        trials = scored(study.get_trials(deepcopy=False), self._dense_score)
        ranks = self.propose([t for t in trials if t.number != trial.number], trial.number)
        study._storage.set_trial_user_attr(trial._trial_id, RANKS, self._space.pack(ranks))
        return self._coordinates.project(self._allocator.tilts(ranks))

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Zero, the prior's tilt: a parameter that is not a tilt cannot be told anything."""
        return param_distribution.to_external_repr(0.0)

    def propose(self, trials: Sequence[FrozenTrial], number: int) -> Ranks:
        """The vector to evaluate as trial `number`, `(d,)`; one that a trial has only if the whole pool is taken."""
        rng = np.random.default_rng([self._seed, number])
        told = self._told(trials)
        packed = {trial.user_attrs.get(RANKS) for trial in trials}
        if self._measured.any() and self._space.pack(first := self._waterfill()) not in packed:
            return first
        if not any(t.group == 0 for t in told):
            return self._blind(rng, packed)
        with one_thread():
            return self._learned(trials, told, packed, number)

    def _learned(self, trials: Sequence[FrozenTrial], told: list[_Told], taken: set[Any], number: int) -> Ranks:
        state = np.random.SeedSequence([self._seed, number]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(state))
        seen = self._observations(told)
        model = SensitivityModel(self._coordinates, seen)
        mode = model.z.numpy()
        draws = model.draw(_DRAWS, generator).numpy()
        pool = self._pool(mode, draws, self._best(told), np.random.default_rng([self._seed, number, 1]))
        fresh = [ranks for ranks in pool if self._space.pack(ranks) not in taken]
        if not fresh:
            return pool[0]
        if number % _EXPLORE_EVERY and self._space.pack(pool[0]) not in taken:
            return pool[0]
        pending = [self._space.unpack(t.user_attrs[RANKS]) for t in trials if t.state == TrialState.RUNNING]
        improvement = self._improvement(model, seen, told, pending, fresh)
        return fresh[int(improvement.argmax())]

    def _improvement(
        self, model: SensitivityModel, seen: Observations, told: list[_Told], pending: list[Ranks], pool: list[Ranks]
    ) -> Tensor:
        """Log expected improvement of the pool; pending trials count as told what the model expects of them."""
        tails = self._tails([*pending, *pool])
        mean, features = model.features(tails)
        others = inputs(mean, features, self._summary([*pending, *pool]))
        train = inputs(*model.features(seen.tails, seen.group), self._summary([t.ranks for t in told]))
        expected = model.predict(tails[: len(pending)])
        waiting = len(pending)
        process = residual_process(
            torch.cat([train, others[:waiting]]),
            torch.cat([seen.values, expected]),
            model.noise * torch.cat([seen.spread, torch.ones(waiting, dtype=torch.float64)]),
            width=len(self._coordinates.names),
        )
        complete = (seen.group == 0) & (seen.spread == 1.0)
        own = seen.values[complete] if bool(complete.any()) else seen.values[seen.group == 0]
        return log_improvement(process, others[waiting:], float(own.min()))

    def _pool(self, mode: Floats, draws: Floats, best: Ranks, rng: np.random.Generator) -> list[Ranks]:
        """Different candidates, the greedy one first."""
        weights = [stretch * mode for stretch in _STRETCH]
        weights += list(draws) + [(mode + draw) / 2 for draw in draws[: _DRAWS // 2]]
        near = self._allocator.tilts(best) - self._measured
        for _ in range(_SWAPS):
            push = np.zeros(len(mode))
            chosen = rng.choice(len(mode), size=min(4, len(mode)), replace=False)
            push[chosen] = 0.5 * rng.standard_normal(len(chosen))
            weights.append(near + push)
        vectors = [self._waterfill(z) for z in weights]
        return list({self._space.pack(ranks): ranks for ranks in vectors}.values())

    def _blind(self, rng: np.random.Generator, taken: set[Any]) -> Ranks:
        """A random kind-wise tilt of the prior, for a study in which nothing has been told yet."""
        for _ in range(_DRAWS):
            tilts = {name: 0.3 * rng.standard_normal() for name in self._coordinates.names}
            ranks = self._waterfill(self._coordinates.log_weights(tilts))
            if self._space.pack(ranks) not in taken:
                break
        return ranks

    def _waterfill(self, log_weights: Floats | float = 0.0) -> Ranks:
        """The best vector if what was measured errs by these log weights."""
        return self._allocator.waterfill(self._kept, self._measured + log_weights)

    def _tails(self, vectors: Sequence[Ranks]) -> Tensor:
        """E, `m x d`, with what was measured."""
        return torch.as_tensor(np.exp(self._measured) * self._allocator.tail_loss(np.stack(vectors)))

    def _summary(self, vectors: Sequence[Ranks]) -> Tensor:
        """x, the tilts of each vector, `m x k`."""
        rows = [self._coordinates.nearest(self._allocator.tilts(ranks)) for ranks in vectors]
        return torch.as_tensor(np.stack(rows))

    def _best(self, told: list[_Told]) -> Ranks:
        own = [t for t in told if t.group == 0]
        complete = [t for t in own if t.spread == 1.0]
        return min(complete or own, key=lambda t: (t.excess, t.number)).ranks

    def _observations(self, told: list[_Told]) -> Observations:
        """y = log(excess + c), with c > 0 only where some excess is not positive."""
        excess = torch.tensor([t.excess for t in told], dtype=torch.float64)
        if float(excess.min()) <= 0:
            excess = excess - excess.min() + 0.1 * (excess.max() - excess.min()) + 1e-6
        return Observations(
            tails=self._tails([t.ranks for t in told]),
            values=excess.log(),
            spread=torch.tensor([t.spread for t in told], dtype=torch.float64),
            group=torch.tensor([t.group for t in told]),
        )

    def _told(self, trials: Sequence[FrozenTrial]) -> list[_Told]:
        """Scores of this study and then its siblings but for faint ones, as many as there is room for; of more than
        that in a study, the best half and the latest half."""
        told: list[_Told] = []
        own = Sibling(trials=trials, space=self._space, objective=self._objective, dense_score=self._dense_score)
        for group, study in enumerate([own, *self._siblings]):
            reference = _excesses(study.trials, study.objective, study.dense_score)
            spread = 1.0 if group == 0 else _SIBLING_SPREAD
            smallest = min((t.excess for t in told if t.group == 0), default=0.0)
            least = max(0.0, _FAINT * smallest) if group else -math.inf
            found = [
                _Told(
                    number=trial.number,
                    ranks=study.space.unpack(trial.user_attrs[RANKS]),
                    excess=reference[trial.number],
                    spread=spread * (1.0 if trial.state == TrialState.COMPLETE else _PARTIAL_SPREAD),
                    group=group,
                )
                for trial in study.trials
                if reference.get(trial.number, -math.inf) > least
            ]
            room = _MOST_TRIALS - len(told)
            if len(found) > room:
                best = sorted(found, key=lambda t: (t.excess, t.number))[: room // 2]
                numbers = {t.number for t in [*best, *found[len(found) - room // 2 :]]}
                found = [t for t in found if t.number in numbers]
            told += found
        return told


def _excesses(trials: Sequence[FrozenTrial], objective: str, dense_score: float) -> dict[int, float]:
    """Trial number -> excess loss over the dense model, nats per token.

    A pruned trial saw only some chunks; its excess is that of the first complete trial that has them all, plus the mean
    difference over them.
    """
    found = {}
    complete = [t for t in trials if t.state == TrialState.COMPLETE and t.value is not None]
    for trial in complete:
        assert trial.value is not None
        found[trial.number] = math.log(trial.value / dense_score) if objective == "perplexity" else trial.value
    for trial in trials:
        steps = trial.intermediate_values
        if trial.state != TrialState.PRUNED or not steps:
            continue
        for other in complete:
            if steps.keys() <= other.intermediate_values.keys():
                gap = np.mean([steps[s] - other.intermediate_values[s] for s in steps])
                if np.isfinite(gap):
                    found[trial.number] = found[other.number] + float(gap)
                break
    return found
