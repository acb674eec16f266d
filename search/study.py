"""The Optuna study of one job and budget: the single truth about its trials.

A trial is created in one transaction (state RUNNING, its named tilts, and the packed rank vector as one user
attribute) and finished in two, or three where the pruner needs its losses. Nothing about a trial is kept anywhere else,
so a process may die at any point: a trial it left RUNNING is offered again, with the same vector, before anything new
is proposed.

Proposals depend on the seed, the trial number and the trials told so far, and on nothing in this process: the sampler
is built afresh for each of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from ranksearch.search.allocate import Allocator
from ranksearch.search.baselines import baseline
from ranksearch.search.coordinates import BOUND, RANKS, Coordinates
from ranksearch.search.draw import ATTEMPTS, POINT, Draw, stable, taken
from ranksearch.search.presets import PRESETS, PROBE
from ranksearch.search.prices import as_document
from ranksearch.search.probes import Probes, planned_trials
from ranksearch.search.pruner import LOSSES, is_worse, pack_losses, unpack_losses
from ranksearch.search.published import closed_form
from ranksearch.search.siblings import EARLIER, Sibling, check_targets, finished_at_first, read_earlier, trials_in
from ranksearch.search.space import Floats, Ranks, RankSpace, uniform
from ranksearch.search.spec import Search
from ranksearch.search.trials import RESULT, SPACE, best_trial, picture_attribute, row, space_of, study_name, trials_of

if TYPE_CHECKING:
    from ranksearch.search.sampler import RankSampler

__all__ = ["Proposal", "RankStudy", "space_of", "study_name", "trials_of"]

CONSTRAINTS = "constraints"
"""Optuna's system attribute of a trial with its constraints, which are met up to zero."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A rank vector to evaluate.

    Attributes:
        number: Trial number in the study.
        ranks: `(targets,)`.
        origin: `prior`, `uniform`, `search`, `probe`, or the name of the preset whose rule gave it.
        scores: All scores by name, where another budget of the job has measured this probe; else None.
    """

    number: int
    ranks: Ranks
    origin: str
    scores: Mapping[str, float] | None = None


class RankStudy:
    """Asks for rank vectors and takes their scores, for one job and budget.

    Example:
        >>> study = RankStudy(storage=storage, job_id="job_a", kept=0.5, space=space, spectra=spectra, spec=Search(),
        ...                   dense_score=25.0)
        >>> while (proposal := study.ask()) is not None:
        ...     study.tell(proposal.number, score=evaluate(proposal.ranks), scores={}, seconds=1.0, worker="here")
    """

    def __init__(
        self,
        *,
        storage: BaseStorage | str,
        job_id: str,
        kept: float,
        space: RankSpace,
        spectra: Mapping[str, Floats],
        spec: Search,
        dense_score: float,
        siblings: Sequence[float] = (),
        learn_from: Sequence[str] = (),
        model: str = "",
        preset: str = "ranksearch",
        similarity: Mapping[str, float] | None = None,
    ) -> None:
        """Open the study, or create it.

        Args:
            storage: An Optuna storage or its URL.
            job_id: The job.
            kept: The budget.
            space: The rank space.
            spectra: Target name -> singular values, descending, in the metric of the factor bank.
            spec: The `search` part of the job spec.
            dense_score: Score of the dense model on the evaluation set: its perplexity, or 0 for objective `kl`.
            siblings: Other budgets of the same job whose trials inform this search.
            learn_from: Names of studies of earlier jobs whose trials do so too, the most telling first. What they have
                when this study is created counts, and nothing that comes later; ones that do not exist do not count.
            model: Where the model comes from, for the dashboard.
            preset: The method that chooses, a key of `PRESETS`.
            similarity: Target name -> mean cosine between the hidden states before and after its sublayer, for the
                preset that asks for it.

        Raises:
            ImpossibleBudget: No vector meets the budget.
            InvalidInput: An earlier study has other targets.
        """
        space.check_budget(kept)
        self._preset_name, self._preset = preset, PRESETS[preset]
        self._spectra, self._similarity = spectra, similarity or {}
        self.kept, self.space, self.spec, self.dense_score = kept, space, spec, dense_score
        self.allocator = Allocator(space, spectra)
        self.coordinates = Coordinates(space.targets)
        sampler = self._preset.sampler or spec.sampler
        other = self._preset.ranks == "search" and sampler != "ranksearch"
        self._baseline = baseline(sampler, self.allocator, kept, spec.seed) if other else None
        self._storage = optuna.storages.get_storage(storage)
        nearest = sorted(siblings, key=lambda other: abs(other - kept))
        self._job_id, self._other_budgets = job_id, [other for other in nearest if other != kept]
        check_targets(self._storage, learn_from, space)
        self._offered: set[int] = set()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            study_name=study_name(job_id, kept),
            storage=self._storage,
            sampler=optuna.samplers.RandomSampler(seed=spec.seed),
            direction="minimize",
            load_if_exists=True,
        )
        self._study_id = self._storage.get_study_id_from_name(self._study.study_name)
        self._describe(job_id, model, learn_from)
        self._losses: dict[int, list[float]] = {}

    @cached_property
    def planned(self) -> int:
        """How many trials there will be, unless the space runs out of vectors."""
        return planned_trials(self._preset_name, self.spec.trials, self.space, self.kept)

    @property
    def required(self) -> int:
        """How many of them are run in any case, whatever time they take."""
        return min(self.planned, len(self._firsts())) if self._preset.ranks == "search" else self.planned

    @property
    def finished(self) -> int:
        """How many trials are complete, pruned or failed."""
        return sum(trial.state.is_finished() for trial in self._trials())

    @property
    def best(self) -> Proposal | None:
        """The complete trial with the smallest score, the first one on ties; None before the first. Never a probe."""
        best = best_trial(self._storage, self._study_id)
        return self._proposal(best) if best is not None else None

    def history(self) -> list[dict[str, Any]]:
        """The trials as rows; see `trials_of`."""
        return [row(trial) for trial in self._trials()]

    def ask(self) -> Proposal | None:
        """The next vector to evaluate; None when all trials are given out or no new vector exists.

        A search starts from the prior and uniform, a published one from uniform. A trial that another process left
        RUNNING comes before anything new.

        Raises:
            InvalidInput: The preset lacks what it chooses by.
        """
        trials = self._trials()
        for trial in trials:
            if trial.state == TrialState.RUNNING and trial.number not in self._offered:
                self._offered.add(trial.number)
                return self._proposal(trial)
        if len(trials) >= self.planned:
            return None
        drawn, origin = self._propose(trials)
        if drawn is None:
            return None
        trial_id = self._storage.create_new_trial(self._study_id, template_trial=self._template(drawn, origin))
        trial = self._storage.get_trial(trial_id)
        self._offered.add(trial.number)
        return self._proposal(trial)

    def tell(self, number: int, *, score: float, scores: Mapping[str, float], seconds: float, worker: str) -> None:
        """Finish a trial. Telling a finished trial again changes nothing.

        Args:
            number: Trial number.
            score: The objective: perplexity, or mean KL in nats per token. A trial whose score is not finite failed.
            scores: All scores by name.
            seconds: Duration of the evaluation, s.
            worker: Who evaluated it.
        """
        if not math.isfinite(score):
            self.tell_failed(number, f"The score is {score}.")
            return
        result = {"scores": dict(scores), "seconds": round(seconds, 3), "worker": worker}
        self._finish(number, TrialState.COMPLETE, result, [float(score)])

    def tell_pruned(self, number: int, *, seconds: float | None = None, worker: str | None = None) -> None:
        """Finish a trial that `report` said to stop."""
        self._finish(number, TrialState.PRUNED, {"seconds": seconds, "worker": worker})

    def tell_failed(self, number: int, reason: str) -> None:
        """Finish a trial that has no score. Its vector is not proposed again."""
        self._finish(number, TrialState.FAIL, {"error": reason[:1000]})

    def report(self, number: int, step: int, losses: Sequence[float]) -> bool:
        """Record the losses of one chunk of the evaluation set.

        Args:
            number: Trial number.
            step: Chunk index, from 0 on; the same text for every trial.
            losses: Mean loss of each of its sequences in nats per token: negative log-likelihood, or KL for objective
                `kl`.

        Returns:
            Whether to stop: the trial is worse than the best one over the sequences both have (`is_worse`). Only
            vectors of a search are stopped.
        """
        trial = self._storage.get_trial(self._trial_id(number))
        if trial.state.is_finished():
            return False
        self._storage.set_trial_intermediate_value(trial._trial_id, step, float(np.mean(losses)))
        origin = trial.user_attrs.get("origin")
        if self.spec.pruner == "none" or origin == PROBE:
            return False
        known = self._losses.get(number, []) if step else []
        self._losses[number] = [*known, *losses]
        best = best_trial(self._storage, self._study_id) if origin == "search" else None
        packed = best.system_attrs.get(LOSSES) if best is not None else None
        return packed is not None and is_worse(self._losses[number], unpack_losses(packed))

    def _propose(self, trials: Sequence[FrozenTrial]) -> tuple[Draw | None, str]:
        if self._preset.ranks == "closed form":
            return Draw(ranks=self._closed_form()), self._preset_name
        if self._preset.ranks == "probes":
            return self._probed(trials)
        seen, firsts = taken(trials), self._firsts()
        if len(trials) < len(firsts):
            origin = list(firsts)[len(trials)]
            ranks = firsts[origin]()
            if self.space.pack(ranks) not in seen:
                return Draw(ranks=ranks), origin
        if self._baseline is None:
            drawn = Draw(ranks=self._rank_sampler().propose(trials, len(trials)))
        else:
            drawn = self._baseline.propose(trials, len(trials))
        return self._unseen(drawn, seen, len(trials)), "search"

    def _probed(self, trials: Sequence[FrozenTrial]) -> tuple[Draw, str]:
        probes = self._probes
        if len(trials) < len(probes):
            return Draw(ranks=probes.vector(len(trials))), PROBE
        scores = {
            t.number: t.user_attrs[RESULT]["scores"].get(probes.score, t.value)
            for t in trials
            if t.state == TrialState.COMPLETE
        }
        return Draw(ranks=probes.choose(self.allocator, scores)), self._preset_name

    @cached_property
    def _probes(self) -> Probes:
        return Probes(self._preset_name, self.space, self.kept)

    def _firsts(self) -> dict[str, Callable[[], Ranks]]:
        """What a search starts from, by origin."""
        prior = {"prior": lambda: self.allocator.prior(self.kept)} if self._preset.needs_prior else {}
        return {**prior, "uniform": lambda: uniform(self.space, self.kept)}

    def _closed_form(self) -> Ranks:
        return closed_form(self._preset_name, self.allocator, self.kept, self._spectra, self._similarity)

    def _unseen(self, drawn: Draw, seen: set[Any], number: int) -> Draw | None:
        """The vector, or one nearby that no trial has; None when an ever wider search finds none."""
        rng = np.random.default_rng([self.spec.seed, number])
        z = self.allocator.tilts(drawn.ranks)
        for attempt in range(ATTEMPTS):
            if self.space.pack(drawn.ranks) not in seen:
                return drawn
            noise = 0.02 * 1.3**attempt * rng.standard_normal(len(z))
            drawn = Draw(ranks=self.allocator.waterfill(self.kept, z + noise))
        return None

    def _rank_sampler(self) -> RankSampler:
        # torch and BoTorch load here, so that reading a study needs neither
        from ranksearch.search.sampler import RankSampler

        return RankSampler(
            allocator=self.allocator,
            kept=self.kept,
            seed=self.spec.seed,
            objective=self.spec.objective,
            dense_score=self.dense_score,
            siblings=[*self._budgets_of_this_job(), *self._earlier],
        )

    def _budgets_of_this_job(self) -> list[Sibling]:
        names = (study_name(self._job_id, other) for other in self._other_budgets)
        begun = [trials for name in names if (trials := trials_in(self._storage, name))]
        return [
            Sibling(trials=trials, space=self.space, objective=self.spec.objective, dense_score=self.dense_score)
            for trials in begun
        ]

    @cached_property
    def _earlier(self) -> list[Sibling]:
        return read_earlier(self._storage, self._storage.get_study_system_attrs(self._study_id).get(EARLIER, {}))

    def _template(self, drawn: Draw, origin: str) -> FrozenTrial:
        ranks = drawn.ranks
        attributes = {
            RANKS: self.space.pack(ranks),
            "origin": origin,
            "kept": self.space.kept(ranks),
            "dense targets": int(np.sum(ranks == self.space.full_ranks)),
            "predicted loss": self.allocator.loss(ranks),
            **({} if drawn.point is None else {POINT: drawn.point}),
        }
        return create_trial(
            state=TrialState.RUNNING,
            params=self.coordinates.project(self.allocator.tilts(ranks)),
            distributions=self._distributions(),
            user_attrs=attributes,
            # a violated constraint keeps a probe, which is off the budget, from being the best one in Optuna's eyes
            system_attrs={CONSTRAINTS: [float(origin == PROBE)]} if self._preset.ranks == "probes" else None,
        )

    def _distributions(self) -> dict[str, BaseDistribution]:
        return {name: FloatDistribution(-BOUND, BOUND) for name in self.coordinates.names}

    def _proposal(self, trial: FrozenTrial) -> Proposal:
        packed, origin = trial.user_attrs[RANKS], trial.user_attrs["origin"]
        scores = self._measured_before.get(packed) if origin == PROBE else None
        return Proposal(number=trial.number, ranks=self.space.unpack(packed), origin=origin, scores=scores)

    @cached_property
    def _measured_before(self) -> dict[str, dict[str, float]]:
        """Packed vector -> scores, of all that the job's other budgets have measured so far."""
        rows = (row for kept in self._other_budgets for row in trials_of(self._storage, self._job_id, kept))
        return {row["ranks"]: row["scores"] for row in rows if row["state"] == "COMPLETE"}

    def _trials(self) -> list[FrozenTrial]:
        return self._storage.get_all_trials(self._study_id, deepcopy=False)

    def _trial_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)

    def _finish(
        self, number: int, state: TrialState, result: dict[str, Any], values: Sequence[float] | None = None
    ) -> None:
        trial_id = self._trial_id(number)
        if self._storage.get_trial(trial_id).state.is_finished():
            return
        try:
            self._storage.set_trial_user_attr(trial_id, RESULT, result)
            if (losses := self._losses.pop(number, None)) is not None and state == TrialState.COMPLETE:
                self._storage.set_trial_system_attr(trial_id, LOSSES, pack_losses(losses))
            self._storage.set_trial_state_values(trial_id, state, values)
        except optuna.exceptions.UpdateFinishedTrialError:
            # another worker finished it between the two lines above; the first result stands
            return

    def _describe(self, job_id: str, model: str, learn_from: Sequence[str]) -> None:
        """What the dashboard shows about the study, and the table that unpacks its vectors; written once."""
        if SPACE in self._storage.get_study_system_attrs(self._study_id):
            return
        with stable():
            self._study.set_metric_names([self.spec.objective])
        facts = {"job": job_id, "model": model, "kept": self.kept, "targets": len(self.space.targets)}
        for key, value in {**facts, "objective": self.spec.objective, "dense score": self.dense_score}.items():
            self._storage.set_study_user_attr(self._study_id, key, value)
        self._storage.set_study_system_attr(self._study_id, *picture_attribute(self._study_id))
        if learn_from:
            counts = finished_at_first(self._storage, learn_from)
            self._storage.set_study_system_attr(self._study_id, EARLIER, counts)
        rows = [list(asdict(target).values()) for target in self.space.targets]
        table = {
            "columns": list(asdict(self.space.targets[0])),
            "targets": rows,
            "rank_multiple": self.space.rank_multiple,
            "keep_dense": list(self.space.keep_dense),
            "form": self.space.form,
        }
        if self.space.prices is not None:
            table["prices"] = as_document([target.name for target in self.space.targets], self.space.prices)
        self._storage.set_study_system_attr(self._study_id, SPACE, json.loads(json.dumps(table)))
