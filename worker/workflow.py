"""A job as a durable workflow: each stage is a step whose result the engine keeps, so a job continues where it was.

A stage that fails does not raise: its error is the step's result, and the job is marked failed from it. Only the loss
of the job itself leaves a step as an exception.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from dbos import DBOS
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import InterfaceError, OperationalError

from ranksearch.search.errors import JobNotFound, RanksearchError
from ranksearch.search.spec import budget_label
from ranksearch.service.store.jobs import Job, Stage
from ranksearch.service.store.queue import RUN_JOB
from ranksearch.worker import stages
from ranksearch.worker.attempts import WorkerDied, refuse_endless
from ranksearch.worker.known_errors import as_known_error
from ranksearch.worker.running_job import JobCancelled, JobLost, RunningJob, WorkerState

log = logging.getLogger("ranksearch.worker.job")
#: The database is gone or busy; a statement that it refuses is our mistake, and only this job's end.
_DATABASE_FAILURES = (OperationalError, InterfaceError, StorageInternalError)


class _Cancelled(Exception):  # a way out of the middle of a workflow, not an error
    """The job was cancelled in a stage."""


class _Failed(Exception):
    """A stage failed; `error` is what it recorded."""

    def __init__(self, error: dict[str, Any]) -> None:
        """Take it up on its way to the job."""
        super().__init__(error["message"])
        self.error = error


class JobWorkflow:
    """Runs jobs that the queue hands to this worker."""

    def __init__(self, worker: WorkerState, give_up: Callable[[str], None]) -> None:
        """Register the workflow with the engine; to be done before it is launched.

        Args:
            worker: What the worker's threads share.
            give_up: Ends this process for good or for a fresh start, when it cannot go on; does not return.
        """
        self._worker, self._give_up = worker, give_up

        @DBOS.workflow(name=RUN_JOB, max_recovery_attempts=None)
        def run_job(job_id: str) -> None:
            self._run_job(job_id)

    def _run_job(self, job_id: str) -> None:
        self._worker.park()
        try:
            if (job := self._take(job_id)) is not None:
                self._work(job)
        except _DATABASE_FAILURES as error:
            self._worker.park()
            self._worker.job_id = job_id
            self._give_up(f"the database failed: {error}")
            raise
        except JobLost:
            raise  # another worker has it
        except Exception as error:
            log.exception("job %s failed outside its stages", job_id, extra={"job": job_id})
            failure = RanksearchError(f"{type(error).__name__}: {error}")
            self._worker.jobs.fail(job_id, failure, worker=self._worker.identity)

    def _work(self, job: Job) -> None:
        worker, run = self._worker, RunningJob(self._worker, job)
        worker.job_id = job.id
        log.info("job %s begins", job.id, extra={"job": job.id})
        try:
            self._stages(run)
            log.info("job %s is done", job.id, extra={"job": job.id})
        except _Failed as failure:
            worker.jobs.fail(job.id, failure.error, worker=worker.identity)
        except _Cancelled:
            worker.jobs.cancelled(job.id, worker=worker.identity)
        finally:
            run.put_away()
            worker.job_id = worker.trial = None

    def _take(self, job_id: str) -> Job | None:
        """The job, now this worker's; None when there is nothing to do."""
        jobs, me = self._worker.jobs, self._worker.identity
        try:
            refuse_endless(jobs, job_id)
        except JobNotFound:
            return None
        except WorkerDied as error:
            log.error("job %s: %s", job_id, error.message, extra={"job": job_id})
            jobs.fail(job_id, error)
            return None
        return jobs.get(job_id) if jobs.set_running(job_id, me) else None

    def _stages(self, run: RunningJob) -> None:
        prepared = self._step(run, "prepare", lambda: stages.prepare(run))
        calibrated = self._step(run, "calibrate", lambda: stages.calibrate(run, prepared), prepared)
        factored = self._step(run, "factor", lambda: stages.factor(run, prepared, calibrated), prepared, calibrated)
        facts = (prepared, calibrated, factored)
        failed: dict[float, dict[str, Any]] = {}
        searched = self._each(run, "search", run.spec.budget.kept, partial(_search, run, prepared), facts, failed)
        finished = self._each(run, "finish", searched, partial(_finish, run, facts, searched), facts, failed)
        if not finished:
            raise _Failed(next(iter(failed.values())))
        self._step(run, "publish", lambda: _publish(run, finished, failed))

    def _each(
        self,
        run: RunningJob,
        stage: Stage,
        budgets: Iterable[float],
        do: Callable[[float], dict[str, Any]],
        facts: Sequence[Mapping[str, Any]],
        failed: dict[float, dict[str, Any]],
    ) -> dict[float, dict[str, Any]]:
        """Run a stage for each budget; one that fails goes to `failed`, and the others go on."""
        done: dict[float, dict[str, Any]] = {}
        budgets = list(budgets)
        for place, kept in enumerate(budgets):
            others = len(budgets) > place + 1 or (stage == "search" and bool(done))
            try:
                done[kept] = self._step(run, stage, partial(do, kept), *facts, kept=kept, others=others)
            except _Failed as failure:
                failed[kept] = failure.error
        return done

    def _step(
        self,
        run: RunningJob,
        stage: Stage,
        do: Callable[[], dict[str, Any]],
        *facts: Mapping[str, Any],
        kept: float | None = None,
        others: bool = False,
    ) -> dict[str, Any]:
        """Run a stage once, of one budget where each has its own; its recorded facts when it has run before.

        With `others`, a failure says that other budgets go on.

        Raises:
            _Failed: The stage failed.
            _Cancelled: The job is to end here.
        """
        name = stage if kept is None else f"{stage}/{budget_label(kept)}"
        run.known = stages.known_of(run.worker.artifacts.path, *facts)
        outcome: dict[str, Any] = DBOS.run_step({"name": name}, lambda: self._outcome(run, stage, do, kept, others))
        if "error" in outcome:
            raise _Failed(outcome["error"])
        if "cancelled" in outcome:
            raise _Cancelled
        return outcome

    def _outcome(
        self,
        run: RunningJob,
        stage: Stage,
        do: Callable[[], dict[str, Any]],
        kept: float | None = None,
        others: bool = False,
    ) -> dict[str, Any]:
        begun = time.monotonic()
        try:
            run.enter(stage, kept)
            return {**do(), "seconds": round(time.monotonic() - begun, 3)}
        except JobCancelled:
            log.info("job %s is cancelled", run.id, extra={"job": run.id})
            return {"cancelled": True}
        except JobLost:
            log.warning("job %s has gone to another worker", run.id, extra={"job": run.id})
            raise
        except _DATABASE_FAILURES as error:
            run.worker.park()
            log.exception("the database failed in stage %s", stage, extra={"job": run.id})
            self._give_up(f"the database failed: {error}")
            raise
        except Exception as error:
            run.worker.park()
            known = as_known_error(error, stage)
            if known is None:
                log.exception("stage %s failed", stage, extra={"job": run.id})
                known = RanksearchError(f"Stage {stage} failed: {type(error).__name__}: {error}")
            else:
                log.warning("job %s failed in stage %s: %s", run.id, stage, known.message, extra={"job": run.id})
            if kept is not None and len(run.spec.budget.kept) > 1:
                rest = " The other budgets go on." if others else ""
                told = {"message": f"kept {budget_label(kept)} failed: {known.message}{rest}"}
                run.worker.jobs.add_event(run.id, "warning", told, worker=run.worker.identity)
            return {"error": {"code": known.code, "message": known.message, "data": known.data, "stage": stage}}


def _search(run: RunningJob, prepared: Mapping[str, Any], kept: float) -> dict[str, Any]:
    from ranksearch.worker.search_loop import search  # brings torch and botorch, which an idle worker does without

    return search(run, stages.Ground.of(run, prepared), kept)


def _finish(
    run: RunningJob, facts: Sequence[Mapping[str, Any]], searched: Mapping[float, Mapping[str, Any]], kept: float
) -> dict[str, Any]:
    from ranksearch.worker.finish import finish

    stages_so_far = zip(("prepare", "calibrate", "factor", "search"), (*facts, searched[kept]), strict=True)
    seconds = {stage: part["seconds"] for stage, part in stages_so_far}
    return finish(run, stages.Ground.of(run, facts[0]), facts[0], searched[kept], kept, seconds)


def _publish(
    run: RunningJob, finished: Mapping[float, Mapping[str, Any]], failed: Mapping[float, Mapping[str, Any]]
) -> dict[str, Any]:
    from ranksearch.worker.finish import publish

    return publish(run, finished, failed)
