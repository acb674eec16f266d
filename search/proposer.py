"""What a study tries next: first vectors, probes, a closed form, or a sampler's proposal.

A proposal depends on the seed, the trial number and the trials told so far, and on nothing in this process: the sampler
is built afresh for each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from ranksearch.search.allocate import Allocator
from ranksearch.search.baselines import baseline
from ranksearch.search.draw import ATTEMPTS, Draw, taken
from ranksearch.search.gradients import measured
from ranksearch.search.presets import PRESETS, PROBE
from ranksearch.search.probes import Probes, planned_trials
from ranksearch.search.published import closed_form
from ranksearch.search.siblings import EARLIER, Sibling, read_earlier, trials_in
from ranksearch.search.space import Floats, Ranks, uniform
from ranksearch.search.spec import Search
from ranksearch.search.trials import RESULT, scored, study_name

if TYPE_CHECKING:
    from ranksearch.search.sampler import RankSampler


STOPPING = ("ranksearch", "random", "tpe", "evolutionary", "swaps")
"""Samplers that lose nothing with a stopped trial: they learn from what it has shown, or from the best one alone. The
others model scores, and most of what they draw would have none."""


class Proposer:
    """Chooses the next vector of one job and budget.

    Attributes:
        other_budgets: Budgets of the same job whose trials inform this search, the nearest first.
        stops_trials: Whether a trial may be stopped when it is clearly worse than the best one.
    """

    def __init__(
        self,
        *,
        storage: BaseStorage,
        job_id: str,
        kept: float,
        allocator: Allocator,
        spectra: Mapping[str, Floats],
        spec: Search,
        dense_score: float,
        siblings: Sequence[float],
        preset: str,
        similarity: Mapping[str, float],
    ) -> None:
        """Set what proposals depend on besides the trials; see `RankStudy`.

        Args:
            storage: Where the studies that inform this one are.
            job_id: The job.
            kept: The budget.
            allocator: Space and spectra.
            spectra: Target name -> singular values, descending.
            spec: The `search` part of the job spec.
            dense_score: Score of the dense model.
            siblings: The job's budgets.
            preset: The method that chooses, a key of `PRESETS`.
            similarity: Target name -> mean cosine of its sublayer, or nothing.

        Raises:
            ImpossibleBudget: No vector meets the budget in the sampler's own space.
        """
        self._storage, self._job_id, self._kept = storage, job_id, kept
        self._allocator, self._space, self._spectra, self._similarity = allocator, allocator.space, spectra, similarity
        self._spec, self._dense_score = spec, dense_score
        self._preset_name, self._preset = preset, PRESETS[preset]
        sampler = self._preset.sampler or spec.sampler
        other = self._preset.ranks == "search" and sampler != "ranksearch"
        self.stops_trials = sampler in STOPPING
        self._baseline = baseline(sampler, allocator, kept, spec.seed) if other else None
        nearest = sorted(siblings, key=lambda other: abs(other - kept))
        self.other_budgets = [other for other in nearest if other != kept]

    @cached_property
    def planned(self) -> int:
        """How many trials there will be, unless the space runs out of vectors."""
        return planned_trials(self._preset_name, self._spec.trials, self._space, self._kept)

    @property
    def required(self) -> int:
        """How many of them are run in any case, whatever time they take."""
        return min(self.planned, len(self._firsts())) if self._preset.ranks == "search" else self.planned

    def propose(self, trials: Sequence[FrozenTrial]) -> tuple[Draw | None, str]:
        """The vector to evaluate after these trials and its origin; no vector where the space has run out of them.

        Raises:
            InvalidInput: The preset lacks what it chooses by.
        """
        trials = scored(trials, self._dense_score)
        if self._preset.ranks == "closed form":
            return Draw(ranks=self._closed_form()), self._preset_name
        if self._preset.ranks == "probes":
            return self._probed(trials)
        seen, firsts = taken(trials), self._firsts()
        if len(trials) < len(firsts):
            origin = list(firsts)[len(trials)]
            ranks = firsts[origin]()
            if self._space.pack(ranks) not in seen:
                return Draw(ranks=ranks), origin
        if self._baseline is None:
            drawn = Draw(ranks=self.rank_sampler(trials).propose(trials, len(trials)))
        else:
            drawn = self._baseline.propose(trials, len(trials))
        return self._unseen(drawn, seen, len(trials)), "search"

    @property
    def uses_gradients(self) -> bool:
        """Whether the next vectors depend on component gradients of earlier ones."""
        return self._preset.ranks == "search" and self._baseline is None

    def rank_sampler(self, trials: Sequence[FrozenTrial] = ()) -> RankSampler:
        """The default sampler, with what the gradients of these trials say, and the other studies by now."""
        # torch and BoTorch load here, so that reading a study needs neither
        from ranksearch.search.sampler import RankSampler

        return RankSampler(
            allocator=self._allocator,
            kept=self._kept,
            seed=self._spec.seed,
            objective=self._spec.objective,
            dense_score=self._dense_score,
            siblings=[*self._budgets_of_this_job(), *self.earlier],
            measured=measured(self._allocator, trials),
        )

    @cached_property
    def earlier(self) -> list[Sibling]:
        """Studies of earlier jobs, as far as this study may read them; the study must exist."""
        study_id = self._storage.get_study_id_from_name(study_name(self._job_id, self._kept))
        return read_earlier(self._storage, self._storage.get_study_system_attrs(study_id).get(EARLIER, {}))

    def _budgets_of_this_job(self) -> list[Sibling]:
        names = (study_name(self._job_id, other) for other in self.other_budgets)
        begun = [scored(trials, self._dense_score) for name in names if (trials := trials_in(self._storage, name))]
        return [
            Sibling(trials=trials, space=self._space, objective=self._spec.objective, dense_score=self._dense_score)
            for trials in begun
        ]

    def _firsts(self) -> dict[str, Callable[[], Ranks]]:
        """What a search starts from, by origin."""
        prior = {"prior": lambda: self._allocator.prior(self._kept)} if self._preset.needs_prior else {}
        return {**prior, "uniform": lambda: uniform(self._space, self._kept)}

    def _closed_form(self) -> Ranks:
        return closed_form(self._preset_name, self._allocator, self._kept, self._spectra, self._similarity)

    def _probed(self, trials: Sequence[FrozenTrial]) -> tuple[Draw, str]:
        probes = self._probes
        if len(trials) < len(probes):
            return Draw(ranks=probes.vector(len(trials))), PROBE
        scores = {
            t.number: t.user_attrs[RESULT]["scores"].get(probes.score, t.value)
            for t in trials
            if t.state == TrialState.COMPLETE
        }
        return Draw(ranks=probes.choose(self._allocator, scores)), self._preset_name

    @cached_property
    def _probes(self) -> Probes:
        return Probes(self._preset_name, self._space, self._kept)

    def _unseen(self, drawn: Draw, seen: set[Any], number: int) -> Draw | None:
        """The vector, or one nearby that no trial has; None when an ever wider search finds none."""
        rng = np.random.default_rng([self._spec.seed, number])
        z = self._allocator.tilts(drawn.ranks)
        for attempt in range(ATTEMPTS):
            if self._space.pack(drawn.ranks) not in seen:
                return drawn
            noise = 0.02 * 1.3**attempt * rng.standard_normal(len(z))
            drawn = Draw(ranks=self._allocator.waterfill(self._kept, z + noise))
        return None
