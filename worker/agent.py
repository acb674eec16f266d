"""The agent: one worker process. It takes jobs from the queue, keeps a device process, and says that it is alive.

It also looks after the others: when a worker falls silent, whoever notices first puts its job back into the queue.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Final, NoReturn

from dbos import DBOS
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from ranksearch.service.store.artifacts import ArtifactStore
from ranksearch.service.store.checkpoints import Checkpoints
from ranksearch.service.store.database import database_url, migrate, open_database, reading
from ranksearch.service.store.jobs import Jobs
from ranksearch.service.store.queue import JOBS, POLL_SECONDS, JobQueue, engine_config
from ranksearch.service.store.settings import Settings
from ranksearch.service.store.workers import Workers
from ranksearch.worker.attempts import RELEASED
from ranksearch.worker.device_client import DeviceClient
from ranksearch.worker.identity import process_facts, refuse_twins, worker_id
from ranksearch.worker.reaper import Reaper
from ranksearch.worker.running_job import WorkerState, work_folder
from ranksearch.worker.workflow import JobWorkflow

log = logging.getLogger("ranksearch.worker")

BEAT_SECONDS: Final = 5.0  # at most; a quarter of the time after which a silent worker counts as dead, if that is less

GOODBYE_SECONDS: Final = 10.0  # what handing the job back may take, should the database hang


class Agent:
    """One worker process from start to stop."""

    def __init__(self, settings: Settings, device: str, name: str | None = None) -> None:
        """Keep what was asked for; `run` does the rest.

        Args:
            settings: Database, artifacts, and what may be read.
            device: A torch device, several with commas between, or `auto`.
            name: Stands for the host's name in the worker's id.
        """
        self._settings, self._device_name, self._name = settings, device, name
        self._stop = threading.Event()
        self._beat_seconds = min(BEAT_SECONDS, settings.worker_ttl_seconds / 4)

    def run(self) -> None:
        """Work until SIGTERM or SIGINT.

        Raises:
            Conflict: A live worker has this id.
            InvalidInput: This machine has no such device.
            DeviceDied: The device cannot be used.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        engine = open_database(self._settings)
        migrate(engine)
        workers = Workers(engine, self._settings.worker_ttl_seconds)
        if self._device_name != "auto":
            refuse_twins(workers, worker_id(self._device_name, self._name))  # before the device is loaded once more
        device = DeviceClient(self._device_name)
        facts = device.start(self._check_start)
        identity = worker_id(facts["device"], self._name)
        try:
            refuse_twins(workers, identity)
        except BaseException:
            device.kill()
            raise
        self._workers, self._engine = workers, engine
        self._queue = JobQueue(database_url(engine))
        self._state = WorkerState(
            identity=identity,
            settings=self._settings,
            jobs=Jobs(engine),
            artifacts=ArtifactStore.of(self._settings, engine),
            checkpoints=Checkpoints(engine),
            device=device,
        )
        self._reaper = Reaper(self._state.jobs, workers, self._queue)
        self._register(facts)
        threading.Thread(target=self._keep_alive, name="heartbeat", daemon=True).start()
        self._launch()
        log.info("worker %s is ready (%s)", identity, facts["name"], extra={"worker": identity})
        self._stop.wait()
        self._shut_down()

    def _check_start(self) -> None:
        if self._stop.is_set():
            raise SystemExit(0)

    def _register(self, facts: dict[str, object]) -> None:
        self._workers.register(
            self._state.identity,
            host=socket.gethostname(),
            device=str(facts["device"])[:64],  # the store's width; all of more than nine GPUs are in `facts`
            pid=os.getpid(),
            memory_bytes=int(str(facts["memory_bytes"])),
            flops=float(str(facts["flops"])),
            facts={**facts, **process_facts()},
        )
        self._reaper.forget()
        shutil.rmtree(work_folder(self._settings, self._state.identity), ignore_errors=True)
        self._state.forget_refinements()
        self._state.artifacts.sweep()

    def _launch(self) -> None:
        """Start the engine: from here on jobs come in, first the one this worker left behind."""
        DBOS(config=engine_config(database_url(self._engine), self._state.identity))
        logging.getLogger("dbos").setLevel(logging.ERROR)  # that a job was taken over is told by us
        JobWorkflow(self._state, self._start_afresh)
        DBOS.listen_queues([JOBS])
        DBOS.launch()
        DBOS.register_queue(JOBS, worker_concurrency=1, polling_interval_sec=POLL_SECONDS, on_conflict="always_update")

    # alive

    def _keep_alive(self) -> None:
        """Beat, and look for workers that do not."""
        state, ttl = self._state, self._settings.worker_ttl_seconds
        beaten = _awake_or_asleep()
        while not state.stopping.wait(self._beat_seconds):
            try:
                mine = self._workers.heartbeat(state.identity, pid=os.getpid(), job_id=state.job_id, trial=state.trial)
                silence, beaten = _awake_or_asleep() - beaten, _awake_or_asleep()
                if not mine or silence > ttl:
                    # others took this worker for dead and may have its job: what it does now is void
                    why = f"silent for {silence:.0f} s" if mine else "its place was taken"
                    self._start_afresh(why, blameless=True)
                self._reaper.sweep()
            except DBAPIError as error:
                log.warning("no heartbeat: %s", error.orig)
            except Exception as error:  # a worker without a heartbeat would go on with a job that others take over
                self._start_afresh(f"its heartbeat failed: {type(error).__name__}: {error}")

    # the end

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stop.is_set():
            os._exit(1)
        self._stop.set()

    def _shut_down(self) -> NoReturn:
        """Give the job back and end; the next worker has all trials but the one under way."""
        state = self._state
        state.stopping.set()
        state.device.kill()
        limit = threading.Timer(GOODBYE_SECONDS, os._exit, (0,))
        limit.daemon = True
        limit.start()
        try:
            DBOS.destroy(workflow_completion_timeout_sec=0)
            self._say_released()
            if state.job_id is not None:
                reason = f"worker {state.identity} was stopped; the job goes on with the next one"
                state.jobs.release(state.job_id, state.identity, reason)
            self._queue.requeue_jobs_of(state.identity)
            self._workers.remove(state.identity, pid=os.getpid())
            log.info("worker %s has stopped", state.identity)
        except Exception as error:
            log.warning("worker %s stops without a word; others will miss its heartbeat: %s", state.identity, error)
        finally:
            logging.shutdown()
            os._exit(0)  # the thread that had the job is parked for ever

    def _start_afresh(self, why: str, *, blameless: bool = False) -> NoReturn:
        """Become a new process, which first takes up what this one left behind.

        Args:
            why: For the log.
            blameless: The job has nothing to do with it, so it does not count as one that kills its workers.
        """
        log.error("worker %s starts afresh: %s", self._state.identity, why)
        self._state.stopping.set()
        self._state.device.kill()
        while not self._database_answers():
            blameless = True
            time.sleep(2.0)
        if blameless:
            with suppress(SQLAlchemyError):
                self._say_released()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

    def _say_released(self) -> None:
        state = self._state
        if state.job_id is not None:
            state.jobs.add_event(state.job_id, RELEASED, {"worker": state.identity}, worker=state.identity)

    def _database_answers(self) -> bool:
        try:
            with reading(self._engine) as connection:
                connection.exec_driver_sql("SELECT 1")
        except SQLAlchemyError:
            return self._stop.is_set()
        return True


def _awake_or_asleep() -> float:
    """Seconds since boot, those of a suspended machine included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
