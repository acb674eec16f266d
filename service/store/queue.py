"""The job queue: DBOS workflows in the same database as the jobs.

The API process only holds a `JobQueue`, which writes and reads rows; workflows run in worker processes
(`ranksearch.worker`). A job's workflow carries the job's id, so putting a job into the queue twice is the same as once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Final

from dbos import DBOS, DBOSClient, DBOSConfig, DBOSPortableJSONSerializer, EnqueueOptions

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.orm import Session

APPLICATION: Final = "ranksearch"
#: Raise it when new code could not continue a job that old code began: such jobs then wait for old workers.
VERSION: Final = "1"
JOBS: Final = "jobs"
RUN_JOB: Final = "run_job"
SCHEMA: Final = "dbos"  # PostgreSQL only; SQLite keeps the tables beside ours, no name is used twice
POLL_SECONDS: Final = 0.5
#: PostgreSQL ends a session that holds a transaction open and does nothing for so long: a frozen process, or a machine
#: that has lost its network, must not keep its locks. Less than the time after which a silent worker counts as dead.
IDLE_TRANSACTION_SECONDS: Final = 15.0


def migrate_queue(database_url: str) -> None:
    """Create or upgrade the engine's own tables."""
    DBOS.migrate(database_url, schema=SCHEMA)


def engine_config(database_url: str, executor: str) -> DBOSConfig:
    """The configuration of a process that runs workflows."""
    return {
        "name": APPLICATION,
        "system_database_url": database_url,
        "dbos_system_schema": SCHEMA,
        "application_version": VERSION,
        "executor_id": executor,
        "serializer": DBOSPortableJSONSerializer(),
        "run_migrations": False,
        "sys_db_idle_transaction_timeout_sec": IDLE_TRANSACTION_SECONDS,
        "log_level": "WARNING",
    }


class JobQueue:
    """Puts jobs into the queue and takes them out; connects on first use."""

    def __init__(self, database_url: str) -> None:
        """Keep the database's SQLAlchemy URL, password included."""
        self._client = DBOSClient(
            system_database_url=database_url,
            dbos_system_schema=SCHEMA,
            serializer=DBOSPortableJSONSerializer(),
            application_name=APPLICATION,
            sys_db_idle_transaction_timeout_sec=IDLE_TRANSACTION_SECONDS,
            lazy=True,
        )

    def enqueue_job(self, transaction: Connection | Session, job_id: str) -> None:
        """Queue a job inside the caller's transaction: job row and place in the queue are committed together."""
        options: EnqueueOptions = {
            "workflow_name": RUN_JOB,
            "queue_name": JOBS,
            "workflow_id": job_id,
            "app_version": VERSION,
        }
        self._client.enqueue_in_transaction(transaction, options, job_id)

    def cancel_job(self, job_id: str) -> bool:
        """Take a waiting job out of the queue; False when a worker has it, who watches the cancel flag, or it ended."""
        waiting = [w for w in self._client.list_workflows(workflow_ids=[job_id]) if w.status in ("ENQUEUED", "DELAYED")]
        if waiting:
            self._client.cancel_workflow(job_id)
        return bool(waiting)

    def states(self, job_ids: Sequence[str]) -> dict[str, str]:
        """Job -> state of its workflow, in the engine's words; jobs without one are left out."""
        if not job_ids:
            return {}
        found = self._client.list_workflows(workflow_ids=list(job_ids), load_input=False, load_output=False)
        return {workflow.workflow_id: workflow.status for workflow in found}

    def delete_job(self, job_id: str) -> None:
        """Forget a job's workflow and the results of its steps."""
        self._client.delete_workflows([job_id])

    def requeue_jobs_of(self, executor: str) -> list[str]:
        """Put what an executor was running back into the queue; returns the jobs. It must have ended, or be ending."""
        held = self._held()
        return [job_id for job_id, _ in self._requeue(pair for pair in held if pair[1] == executor)]

    def requeue_lost(self, alive: Callable[[], Collection[str]], *, job_id: str | None = None) -> list[tuple[str, str]]:
        """Put what dead executors were running back into the queue; returns pairs of job and executor.

        Args:
            alive: Asked after the running jobs are read: a worker that is new in between has none of them.
            job_id: Only this job.
        """
        held = self._held(job_id)
        living = alive()
        return self._requeue(pair for pair in held if pair[1] not in living)

    def _held(self, job_id: str | None = None) -> list[tuple[str, str]]:
        running = self._client.list_workflows(
            workflow_ids=None if job_id is None else [job_id],
            status="PENDING",
            queue_name=JOBS,
            load_input=False,
            load_output=False,
        )
        return [(workflow.workflow_id, workflow.executor_id or "") for workflow in running]

    def _requeue(self, held: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        # Private, and why DBOS's minor version is pinned: the public call would also take a job from an executor that
        # got it a moment ago.
        requeue = self._client._sys_db.reenqueue_for_recovery
        return [(job_id, executor) for job_id, executor in held if requeue(job_id, [executor], JOBS)]

    def close(self) -> None:
        """Close the connections."""
        self._client.destroy()
