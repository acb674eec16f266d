"""The search stage: ask the study for a rank vector, have the device score it, tell the study, until the study is done.

All state lies in the study. A worker that takes over a search finds the finished trials there, and the one that was
interrupted is offered first.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import optuna

from ranksearch.search.errors import JobNotFound, NumericalError, RanksearchError
from ranksearch.search.objective import METRICS
from ranksearch.search.study import Proposal, RankStudy, study_name
from ranksearch.search.trials import may_be_best
from ranksearch.service.store.database import optuna_storage
from ranksearch.worker.running_job import RunningJob
from ranksearch.worker.stages import Ground


def search(run: RunningJob, ground: Ground, kept: float) -> dict[str, Any]:
    """Search one budget.

    Args:
        run: The job.
        ground: Rank space and spectra.
        kept: The budget.

    Returns:
        `dense` scores, and the `best` trial: number, score and packed ranks.

    Raises:
        NumericalError: No trial could be scored.
    """
    storage = optuna_storage(run.worker.settings)
    try:
        dense = run.ask("dense", progress=_silent)
        study = open_study(run, ground, kept, dense, storage)
        _Search(run, study).run()
        best = study.best
        if best is None:
            raise NumericalError(
                f"None of the {study.finished} trials at kept {kept:g} gave a finite score.", kept=kept
            )
        score = next(row["score"] for row in study.history() if row["number"] == best.number)
        return {"dense": dense, "best": {"number": best.number, "score": score, "ranks": ground.space.pack(best.ranks)}}
    finally:
        storage.engine.dispose()


def open_study(
    run: RunningJob,
    ground: Ground,
    kept: float,
    dense: Mapping[str, float],
    storage: optuna.storages.BaseStorage,
) -> RankStudy:
    """The study of a job and budget."""
    spec = run.spec
    return RankStudy(
        storage=storage,
        job_id=run.id,
        kept=kept,
        space=ground.space,
        spectra=ground.spectra,
        spec=spec.search,
        dense_score=0.0 if spec.search.objective == "kl" else dense["perplexity"],
        siblings=spec.budget.kept,
        learn_from=earlier_studies(run, kept),
        model=spec.model.source,
        preset=spec.method.preset,
        similarity=ground.similarity,
    )


def earlier_studies(run: RunningJob, kept: float) -> list[str]:
    """Names of the studies of `search.learn_from`, job by job, the nearest budget first; events tell of lost jobs."""
    names = []
    for job_id in run.spec.search.learn_from:
        try:
            budgets = run.worker.jobs.get(job_id).spec["budget"]["kept"]
        except JobNotFound:
            told = f"search.learn_from: job {job_id} was deleted; the search at kept {kept:g} goes on without it."
            run.tell("warning", message=told)
            continue
        names += [study_name(job_id, other) for other in sorted(budgets, key=lambda other: abs(other - kept))]
    return names


class _Search:
    """One budget's loop; trials are told to the job as they finish."""

    def __init__(self, run: RunningJob, study: RankStudy) -> None:
        self._run, self._study = run, study
        self._spec = run.spec.search
        self._seconds = [row["seconds"] for row in study.history() if row["seconds"]]
        kept = run.spec.budget.kept
        self._budgets, self._index = len(kept), kept.index(study.kept)

    def run(self) -> None:
        run, study = self._run, self._study
        self._announce_missed()
        self._say_progress()
        while (proposal := self._next()) is not None:
            run.worker.trial = proposal.number
            run.check()
            begun = time.monotonic()
            try:
                scores = run.surviving(lambda p=proposal: self._evaluate(p))  # type: ignore[misc]
                if scores is not None:
                    self._measure(proposal)
            except NumericalError as error:
                seconds = time.monotonic() - begun
                study.tell_failed(proposal.number, error.message, seconds=seconds, worker=run.worker.identity)
            else:
                self._tell(proposal, scores, time.monotonic() - begun)
            self._seconds.append(time.monotonic() - begun)
            run.trial_seconds.append(self._seconds[-1])
            self._announce(proposal.number)
        run.worker.trial = None

    def _next(self) -> Proposal | None:
        """The next vector; a warning tells why a search ends before all its trials."""
        if self._out_of_time():
            proposal, why = None, f"its {self._spec.timeout_seconds:g} s (search.timeout_seconds) are used up."
        else:  # a budget near the smallest or dense has few vectors
            proposal, why = self._study.ask(), "it finds no further rank vector that meets the budget."
        if proposal is not None:
            return proposal
        done, planned = self._study.finished, self._study.planned
        if done < planned:
            told = f"The search at kept {self._study.kept:g} ends after {done} of {planned} trials: {why}"
            self._run.tell("warning", message=told)
        return None

    def _evaluate(self, proposal: Proposal) -> dict[str, float] | None:
        """Score a vector part by part, unless its scores are known; None when it cannot become the best."""
        if proposal.scores is not None:
            return dict(proposal.scores)
        ranks = self._study.space.as_dict(proposal.ranks)
        step = 0
        while True:
            reply = self._run.ask_once("chunk", number=proposal.number, ranks=ranks, index=step, progress=_silent)
            if "total" in reply:
                total: dict[str, float] = reply["total"]
                return total
            if self._study.report(proposal.number, step, reply["losses"]):
                return None
            step += 1

    def _measure(self, proposal: Proposal) -> None:
        """Have gradients measured where they inform the search; without them it goes by scores alone."""
        if (edges := self._study.bands(proposal.number)) is None:
            return
        ranks = self._study.space.as_dict(proposal.ranks)
        try:
            found = self._run.ask_once("gradients", ranks=ranks, edges=edges, progress=_silent)
        except RanksearchError as error:  # a search can do without
            self._study.go_without_gradients(error.message)
            told = f"The search at kept {self._study.kept:g} goes on by scores alone, without gradients: "
            told += error.message
            self._run.tell("warning", message=told)
            return
        self._study.tell_gradients(proposal.number, found["gradients"], evaluations=found["evaluations"])

    def _tell(self, proposal: Proposal, scores: Mapping[str, float] | None, seconds: float) -> None:
        worker = self._run.worker.identity
        if scores is None:
            self._study.tell_pruned(proposal.number, seconds=seconds, worker=worker)
            return
        score = [scores[name] for name in METRICS[self._spec.objective]]
        evaluations = 1 if proposal.scores is None else 0
        self._study.tell(
            proposal.number, score=score, scores=scores, seconds=seconds, worker=worker, evaluations=evaluations
        )

    def _announce_missed(self) -> None:
        """Tell of trials that a worker finished and then died before it said so."""
        done = [row["number"] for row in self._study.history() if row["state"] not in ("RUNNING", "WAITING")]
        if done:
            told = self._run.told_trials(self._study.kept)
            for number in done:
                if number not in told:
                    self._announce(number)

    def _announce(self, number: int) -> None:
        run, study = self._run, self._study
        rows = study.history()
        row = next(row for row in rows if row["number"] == number)
        shown = {
            key: row[key]
            for key in ("number", "state", "origin", "score", "seconds", "worker", "error")
            if row[key] is not None
        }
        run.tell("trial", **{"kept": study.kept, "planned": study.planned, **shown, "scores": row["scores"]})
        able = [row for row in rows if may_be_best(row["state"], row["origin"])]
        if able:
            best = min(able, key=lambda row: (row["score"], row["number"]))
            run.set_best(study.kept, best["score"], best["number"])
        self._say_progress()

    def _say_progress(self) -> None:
        trials, done = self._study.planned, self._study.finished
        left = max(0, trials - done) + trials * (self._budgets - 1 - self._index)
        recent = (self._run.trial_seconds or self._seconds)[-20:]  # before its own first trial, those of other budgets
        eta = left * sum(recent) / len(recent) if recent else None
        if eta is not None and self._spec.timeout_seconds is not None:
            eta = min(eta, self._spec.timeout_seconds * (self._budgets - self._index))
        self._run.progress(min(1.0, done / trials), eta, now=True)

    def _out_of_time(self) -> bool:
        """Whether the study's time is used up; the trials that it cannot do without always run.

        The time is that of its trials, so it goes on counting where a dead worker left off.
        """
        limit = self._spec.timeout_seconds
        return limit is not None and self._study.finished >= self._study.required and sum(self._seconds) >= limit


def _silent(_: float) -> None:
    return None
