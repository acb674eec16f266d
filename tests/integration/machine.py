"""A machine with a database, a folder of artifacts, and worker processes to be started, stopped and killed."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import Engine

from ranksearch.search.spec import JobSpec
from ranksearch.search.study import trials_of
from ranksearch.service.store.artifacts import ArtifactStore
from ranksearch.service.store.checkpoints import Checkpoints
from ranksearch.service.store.database import database_url, open_database, optuna_storage
from ranksearch.service.store.jobs import Event, Job, Jobs
from ranksearch.service.store.queue import JobQueue
from ranksearch.service.store.settings import Settings
from ranksearch.service.store.workers import Worker, Workers

ROOT = Path(__file__).parents[2]


class Machine:
    """Everything the tests on one database need; workers are ended by `close`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.engine: Engine = open_database(settings)
        self.jobs = Jobs(self.engine)
        self.workers = Workers(self.engine, settings.worker_ttl_seconds)
        self.checkpoints = Checkpoints(self.engine)
        self.artifacts = ArtifactStore.of(settings, self.engine)
        self.queue = JobQueue(database_url(self.engine))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str = "one") -> subprocess.Popen[bytes]:
        """Start a worker; it is not ready yet."""
        log = open(self.settings.data_dir / f"{name}.log", "ab")  # noqa: SIM115
        command = [sys.executable, "-P", "-m", "ranksearch.worker", "--device", "cpu", "--name", name]
        self.processes[name] = subprocess.Popen(command, env=self._environment(), stdout=log, stderr=log)
        log.close()
        return self.processes[name]

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": str(ROOT / ".ns"),
            "OMP_NUM_THREADS": "1",
            "RANKSEARCH_DATA_DIR": str(self.settings.data_dir),
            "RANKSEARCH_DATABASE_URL": self.settings.database,
            "RANKSEARCH_ALLOWED_PATHS": os.pathsep.join(map(str, self.settings.allowed_paths)),
            "RANKSEARCH_WORKER_TTL_SECONDS": str(self.settings.worker_ttl_seconds),
            "RANKSEARCH_SPEED_SECONDS": "0.02",
        }

    def ready(self, name: str) -> Worker:
        """Wait until a worker has announced itself."""
        process = self.processes[name]

        def announced() -> Worker | None:
            assert process.poll() is None, f"worker {name} ended: {self.log(name)}"
            worker = self.workers.get(f"{name}:cpu")
            return worker if worker is not None and worker.alive and worker.pid == process.pid else None

        return self.wait(announced, 60, f"worker {name}")

    def log(self, name: str) -> str:
        """What a worker has said."""
        return (self.settings.data_dir / f"{name}.log").read_text()

    def device_of(self, name: str) -> psutil.Process | None:
        """The device process of a worker."""
        children = psutil.Process(self.processes[name].pid).children()
        alive = (child for child in children if child.status() != psutil.STATUS_ZOMBIE)
        return next((child for child in alive if "ranksearch.worker.device" in child.cmdline()), None)

    def kill(self, name: str) -> None:
        """`kill -9`, and wait until it is gone."""
        self.processes[name].kill()
        self.processes[name].wait(10)

    def freeze(self, name: str) -> None:
        """SIGSTOP, but not in the middle of a write: SQLite has one writer, and a frozen one holds up everybody."""
        process = self.processes[name]
        while True:
            process.send_signal(signal.SIGSTOP)
            self.wait(lambda: _stopped(process.pid) or None, 30, f"{name} to freeze")
            if self._writable():
                return
            process.send_signal(signal.SIGCONT)
            time.sleep(0.02)

    def _writable(self) -> bool:
        if self.engine.dialect.name != "sqlite":
            return True
        with contextlib.closing(sqlite3.connect(str(self.engine.url.database), timeout=1)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return False
        return True

    def submit(self, spec: JobSpec) -> str:
        """Put a job into the queue."""
        return self.jobs.create(spec, enqueue=self.queue.enqueue_job).id

    def finished(self, job_id: str, seconds: float = 90) -> Job:
        """Wait for the end of a job."""

        def over() -> Job | None:
            job = self.jobs.get(job_id)
            return job if job.over else None

        return self.wait(over, seconds, f"the end of {job_id}")

    def succeeded(self, job_id: str, seconds: float = 90) -> Job:
        """Wait for the end of a job, which must be a good one."""
        job = self.finished(job_id, seconds)
        assert job.status == "succeeded", (job.error, {name: self.log(name)[-3000:] for name in self.processes})
        return job

    def events(self, job_id: str, kind: str) -> list[Event]:
        """The events of one kind."""
        return [event for event in self.jobs.events(job_id) if event.kind == kind]

    def trials(self, job_id: str, kept: float) -> list[dict[str, Any]]:
        """The rows of a study."""
        storage = optuna_storage(self.settings)
        try:
            return trials_of(storage, job_id, kept)
        finally:
            storage.engine.dispose()

    def wait_for_trials(self, job_id: str, count: int) -> str:
        """Wait until so many trials are told; returns the name of the worker that has the job."""
        self.wait(lambda: len(self.events(job_id, "trial")) >= count or None, 60, f"{count} trials")
        worker = self.jobs.get(job_id).worker
        assert worker is not None
        return worker.partition(":")[0]

    def wait(self, look: Callable[[], Any], seconds: float, what: str) -> Any:
        """Look again and again until there is something to see."""
        deadline = time.monotonic() + seconds
        while (seen := look()) is None:
            logs = {name: self.log(name)[-3000:] for name in self.processes}
            assert time.monotonic() < deadline, f"waited {seconds} s for {what}; {logs}"
            time.sleep(0.02)
        return seen

    def close(self) -> None:
        """Kill what still runs."""
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait(10)
        self.queue.close()
        self.engine.dispose()


def _stopped(pid: int) -> bool:
    """Whether every thread of a process has come to a halt, which takes a moment after the signal."""
    states = [path.read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return set(states) == {"T"}
