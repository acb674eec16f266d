"""Looks after what dead workers leave behind. Every worker does it; whoever comes first does it for all."""

from __future__ import annotations

import logging
import time
from typing import Final

from ranksearch.search.errors import RanksearchError
from ranksearch.service.store.database import writing
from ranksearch.service.store.jobs import Jobs
from ranksearch.service.store.queue import JobQueue
from ranksearch.service.store.workers import Workers

log = logging.getLogger("ranksearch.worker")

RECONCILE_SECONDS: Final = 60.0
FORGET_SECONDS: Final = 24 * 3600.0  # a worker that was silent for so long is gone for good


class Reaper:
    """Puts lost jobs back into the queue."""

    def __init__(self, jobs: Jobs, workers: Workers, queue: JobQueue) -> None:
        """Use these stores; the workers' own time to live decides who is dead."""
        self._jobs, self._workers, self._queue = jobs, workers, queue
        self._reconciled = time.monotonic()

    def sweep(self) -> None:
        """Requeue the jobs of silent workers; now and then, compare jobs and queue as well."""
        for job_id, dead in self._queue.requeue_lost(self._workers.alive):
            log.warning("worker %s is silent; job %s goes on elsewhere", dead, job_id, extra={"job": job_id})
            self._jobs.release(job_id, dead, f"worker {dead} fell silent; the job goes on with another")
        if time.monotonic() - self._reconciled >= RECONCILE_SECONDS:
            self._reconciled = time.monotonic()
            self.reconcile()

    def reconcile(self) -> None:
        """End jobs whose workflow has ended without telling them, and queue jobs that have none."""
        unfinished = [job.id for job in self._jobs.unfinished()]
        states = self._queue.states(unfinished)
        for job_id in unfinished:
            if job_id not in states:
                log.warning("job %s was in no queue", job_id, extra={"job": job_id})
                with writing(self._jobs.engine) as connection:
                    self._queue.enqueue_job(connection, job_id)
            elif states[job_id] not in ("ENQUEUED", "DELAYED", "PENDING"):
                message = f"The engine ended this job ({states[job_id]}) without a result; see the workers' logs."
                if self._jobs.fail(job_id, RanksearchError(message)):
                    log.error("job %s: %s", job_id, message, extra={"job": job_id})

    def forget(self) -> None:
        """Remove workers that will not come back."""
        for gone in Workers(self._workers.engine, FORGET_SECONDS).stale():
            self._workers.remove(gone.id, pid=gone.pid)
