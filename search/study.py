"""The Optuna study of one job and budget: the single truth about its trials.

A trial is created in one transaction (state RUNNING, its named tilts, and the packed rank vector as one user
attribute) and finished in two, or three where the pruner needs its losses. Nothing about a trial is kept anywhere else,
so a process may die at any point: a trial it left RUNNING is offered again, with the same vector, before anything new
is proposed. What is proposed is the `Proposer`'s matter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from ranksearch.search.allocate import Allocator
from ranksearch.search.coordinates import BOUND, RANKS, Coordinates
from ranksearch.search.draw import POINT, Draw, stable
from ranksearch.search.gradients import COST, GRADIENTS, MEASURED, OFF, bands, pack_gradients
from ranksearch.search.objective import METRICS
from ranksearch.search.presets import PRESETS, PROBE
from ranksearch.search.prices import as_document
from ranksearch.search.proposer import Proposer
from ranksearch.search.pruner import LOSSES, is_worse, pack_losses, unpack_losses
from ranksearch.search.siblings import EARLIER, check_targets, finished_at_first
from ranksearch.search.space import Floats, Ranks, RankSpace
from ranksearch.search.spec import Search
from ranksearch.search.trials import (
    DENSE,
    RESULT,
    SPACE,
    best_of,
    picture_attribute,
    row,
    space_of,
    study_name,
    trials_of,
)

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
            dense_score: Perplexity of the dense model on the evaluation set, or 0 for objective `kl`.
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
        self.kept, self.space, self.spec, self.dense_score = kept, space, spec, dense_score
        self.allocator = Allocator(space, spectra)
        self.coordinates = Coordinates(space.targets)
        self._storage, self._job_id, self._preset = optuna.storages.get_storage(storage), job_id, PRESETS[preset]
        self.proposer = Proposer(
            storage=self._storage,
            job_id=job_id,
            kept=kept,
            allocator=self.allocator,
            spectra=spectra,
            spec=spec,
            dense_score=dense_score,
            siblings=siblings,
            preset=preset,
            similarity=similarity or {},
        )
        check_targets(self._storage, learn_from, space)
        self._offered: set[int] = set()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            study_name=study_name(job_id, kept),
            storage=self._storage,
            sampler=optuna.samplers.RandomSampler(seed=spec.seed),
            directions=["minimize"] * len(METRICS[spec.objective]),
            load_if_exists=True,
        )
        self._study_id = self._storage.get_study_id_from_name(self._study.study_name)
        self._describe(job_id, model, learn_from)
        self._losses: dict[int, list[float]] = {}

    @property
    def planned(self) -> int:
        """How many trials there will be, unless the space runs out of vectors."""
        return self.proposer.planned

    @property
    def required(self) -> int:
        """How many of them are run in any case, whatever time they take."""
        return self.proposer.required

    @property
    def finished(self) -> int:
        """How many trials are complete, pruned or failed."""
        return sum(trial.state.is_finished() for trial in self._trials())

    @property
    def best(self) -> Proposal | None:
        """The complete trial with the smallest score, the first one on ties; None before the first. Never a probe."""
        best = self._best_trial()
        return self._proposal(best) if best is not None else None

    def history(self) -> list[dict[str, Any]]:
        """The trials as rows; see `trials_of`."""
        return [row(trial, self.dense_score) for trial in self._trials()]

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
        drawn, origin = self.proposer.propose(trials)
        if drawn is None:
            return None
        trial_id = self._storage.create_new_trial(self._study_id, template_trial=self._template(drawn, origin))
        trial = self._storage.get_trial(trial_id)
        self._offered.add(trial.number)
        return self._proposal(trial)

    def bands(self, number: int) -> dict[str, list[int]] | None:
        """The components whose gradients at a trial's vector would inform the search; None where none would.

        The default sampler asks for those of its first vectors.

        Returns:
            Target -> `low`, `rank` and `high` of `Bands`.
        """
        if not self.proposer.uses_gradients or OFF in self._storage.get_study_system_attrs(self._study_id):
            return None
        trials = self._trials()
        trial, known = trials[number], sum(GRADIENTS in each.system_attrs for each in trials)
        wanted = trial.user_attrs["origin"] in ("prior", "search") and GRADIENTS not in trial.system_attrs
        if not wanted or known >= MEASURED or number + 1 >= self.planned:
            return None
        return bands(self.space, self.space.unpack(trial.user_attrs[RANKS])).edges(self.space) or None

    def go_without_gradients(self, reason: str) -> None:
        """Ask for no gradients any more, whoever goes on with the study."""
        self._storage.set_study_system_attr(self._study_id, OFF, reason[:1000])

    def tell_gradients(self, number: int, gradients: Mapping[str, Sequence[float]], *, evaluations: int = 0) -> None:
        """Record the gradients of a trial that is not finished.

        Args:
            number: Trial number.
            gradients: Target -> gradient of the negative log-likelihood, whatever the objective, by gates on its
                components, nats per token, summed over `low` to `rank` of `bands` and over `rank` to `high`.
            evaluations: As how many they count beside the trial's own.
        """
        trial_id = self._trial_id(number)
        self._storage.set_trial_system_attr(trial_id, COST, evaluations)
        self._storage.set_trial_system_attr(trial_id, GRADIENTS, pack_gradients(self.space, gradients))

    def tell(
        self,
        number: int,
        *,
        score: float | Sequence[float],
        scores: Mapping[str, float],
        seconds: float,
        worker: str,
        evaluations: int = 1,
    ) -> None:
        """Finish a trial. Telling a finished trial again changes nothing.

        Args:
            number: Trial number.
            score: The objective: perplexity, or mean KL in nats per token, or the two. A trial whose score is not
                finite failed.
            scores: All scores by name.
            seconds: Duration of the evaluation, s.
            worker: Who evaluated it.
            evaluations: What that took; none where the scores were known.
        """
        values = np.atleast_1d(score).tolist()
        if not all(map(math.isfinite, values)):
            self.tell_failed(number, f"The score is {', '.join(map(str, values))}.", seconds=seconds, worker=worker)
            return
        result = {"scores": dict(scores), "seconds": round(seconds, 3), "worker": worker, "evaluations": evaluations}
        self._finish(number, TrialState.COMPLETE, result, values)

    def tell_pruned(self, number: int, *, seconds: float | None = None, worker: str | None = None) -> None:
        """Finish a trial that `report` said to stop."""
        self._finish(number, TrialState.PRUNED, {"seconds": seconds, "worker": worker})

    def tell_failed(self, number: int, reason: str, *, seconds: float | None = None, worker: str | None = None) -> None:
        """Finish a trial that has no score. Its vector is not proposed again."""
        self._finish(number, TrialState.FAIL, {"error": reason[:1000], "seconds": seconds, "worker": worker})

    def report(self, number: int, step: int, losses: Sequence[float]) -> bool:
        """Record the losses of one chunk of the evaluation set.

        Args:
            number: Trial number.
            step: Chunk index, from 0 on; the same text for every trial.
            losses: Mean loss of each of its sequences in nats per token: negative log-likelihood, or KL for objective
                `kl`, or the sum of the two for `both`.

        Returns:
            Whether to stop: the trial is worse than the best one over the sequences both have (`is_worse`). Only
            vectors of a search are stopped, and only where its sampler can do with that.
        """
        trial = self._storage.get_trial(self._trial_id(number))
        if trial.state.is_finished():
            return False
        self._storage.set_trial_intermediate_value(trial._trial_id, step, float(np.mean(losses)))
        origin = trial.user_attrs.get("origin")
        if self.spec.pruner == "none" or origin == PROBE or not self.proposer.stops_trials:
            return False
        known = self._losses.get(number, []) if step else []
        self._losses[number] = [*known, *losses]
        best = self._best_trial() if origin == "search" else None
        packed = best.system_attrs.get(LOSSES) if best is not None else None
        return packed is not None and is_worse(self._losses[number], unpack_losses(packed))

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
        rows = (row for kept in self.proposer.other_budgets for row in trials_of(self._storage, self._job_id, kept))
        return {row["ranks"]: row["scores"] for row in rows if row["state"] == "COMPLETE"}

    def _best_trial(self) -> FrozenTrial | None:
        complete = self._storage.get_all_trials(self._study_id, deepcopy=False, states=(TrialState.COMPLETE,))
        return best_of(complete, self.dense_score)

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
            self._study.set_metric_names(list(METRICS[self.spec.objective]))
        facts = {"job": job_id, "model": model, "kept": self.kept, "targets": len(self.space.targets)}
        for key, value in {**facts, "objective": self.spec.objective, DENSE: self.dense_score}.items():
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
