"""A job in a worker's hands: what its stages share, how they ask the device, and how they say how far they are."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from ranksearch.search.errors import JobNotFound, UnsafeModel
from ranksearch.service.store.artifacts import ArtifactStore
from ranksearch.service.store.checkpoints import Checkpoints
from ranksearch.service.store.jobs import Job, Jobs, Stage
from ranksearch.service.store.paths import check_dataset, local_model
from ranksearch.service.store.settings import Settings
from ranksearch.worker.device_client import DeviceClient, DeviceDied

log = logging.getLogger("ranksearch.worker.job")
T = TypeVar("T")

LOOK_SECONDS: Final = 0.5  # how often a running job looks whether it should stop
TELL_SECONDS: Final = 0.5  # how often it may write its progress
DEVICE_DEATHS: Final = 3  # in a row, at the same request

#: Where each stage lies on the job's scale from 0 to 1.
SHARES: Final[Mapping[Stage, tuple[float, float]]] = {
    "prepare": (0.0, 0.05),
    "calibrate": (0.05, 0.15),
    "factor": (0.15, 0.25),
    "search": (0.25, 0.85),
    "finish": (0.85, 0.99),
    "publish": (0.99, 1.0),
}


class JobCancelled(Exception):  # not an error: what was asked for
    """Somebody asked for the job's end."""


class JobLost(Exception):  # not an error of this job: another worker goes on with it
    """The job is no longer this worker's."""


@dataclass(kw_only=True)
class WorkerState:
    """What one worker process shares among its threads."""

    identity: str
    settings: Settings
    jobs: Jobs
    artifacts: ArtifactStore
    checkpoints: Checkpoints
    device: DeviceClient
    stopping: threading.Event = field(default_factory=threading.Event)
    job_id: str | None = None
    trial: int | None = None

    @property
    def cache_dir(self) -> Path:
        """Downloaded datasets and token ids, kept between jobs."""
        return self.settings.data_dir / "cache"

    @property
    def refine_folder(self) -> Path:
        """What the steps after a search have come to, kept until the job is over: it may have taken hours."""
        return self.cache_dir / "refine"

    def forget_refinements(self) -> None:
        """Remove what is kept there of jobs that are over."""
        for path in self.refine_folder.glob("*"):
            try:
                over = self.jobs.get(path.name.partition("-")[0]).over
            except JobNotFound:
                over = True
            if over:
                path.unlink(missing_ok=True)

    def park(self) -> None:
        """Never return when the worker is stopping: the process is about to end, and the job goes on elsewhere."""
        while self.stopping.is_set():
            time.sleep(60)


def work_folder(settings: Settings, identity: str) -> Path:
    """Where a worker keeps files on their way into the artifact store."""
    return settings.data_dir / "work" / identity.replace(":", "-")


class RunningJob:
    """One job while this worker has it."""

    def __init__(self, worker: WorkerState, job: Job) -> None:
        """Take the job as it was read when the worker got it."""
        self.worker, self.id = worker, job.id
        self.spec = job.parsed()
        self.spec_json = job.spec
        self.stage: Stage = "prepare"
        self.known: dict[str, str] = {}  # from earlier stages, see `known_of`
        self.folder = work_folder(worker.settings, worker.identity) / job.id
        self.source = ""  # of the model, once a stage has found all paths good
        self.trial_seconds: list[float] = []  # of all budgets so far
        self._place, self._parts = 0, 1  # of the budget among those that pass through the stage
        self._entered = (0.0, 0)  # when, and with which budget, this worker entered the stage
        self._looked = self._told = 0.0

    def enter(self, stage: Stage, kept: float | None = None) -> None:
        """Begin a stage, or one budget's part of it.

        Raises:
            PathNotAllowed: The spec names a path that this worker may not read.
            UnsafeModel: The model needs its own code, and the server forbids that.
        """
        self.check(now=True)
        budgets = self.spec.budget.kept
        self._place, self._parts = (0, 1) if kept is None else (budgets.index(kept), len(budgets))
        if stage != self.stage:
            self._entered = (time.monotonic(), self._place)
        self.stage = stage
        facts = {} if kept is None else {"kept": kept}
        self.keep(self.worker.jobs.set_stage(self.id, stage, worker=self.worker.identity, **facts))
        self.progress(0.0, now=True)
        self.source = self._allowed_source()

    def progress(self, fraction: float, eta_seconds: float | None = None, *, now: bool = False) -> None:
        """Say how much of the stage, or of the budget's part of it, is done.

        The time left, unless it is given, follows from the budgets that are through with the stage.
        """
        if now or time.monotonic() - self._told >= TELL_SECONDS:
            self._told = time.monotonic()
            low, high = SHARES[self.stage]
            done = self._place + fraction
            share, eta = low + (high - low) * done / self._parts, eta_seconds
            begun, first = self._entered
            if eta is None and self._place > first:
                eta = (time.monotonic() - begun) / (done - first) * (self._parts - done)
            self.keep(self.worker.jobs.set_progress(self.id, share, eta, worker=self.worker.identity))

    def tell(self, kind: str, **data: Any) -> None:
        """Append an event."""
        self.keep(self.worker.jobs.add_event(self.id, kind, data, worker=self.worker.identity))

    def told_trials(self, kept: float) -> set[int]:
        """Numbers of the trials of a budget that have an event."""
        told, last = set(), 0
        while page := self.worker.jobs.events(self.id, after=last):
            last = page[-1].id
            told |= {e.data["number"] for e in page if e.kind == "trial" and e.data["kept"] == kept}
        return told

    def set_best(self, kept: float, score: float, trial: int) -> None:
        """Record the best trial of a budget."""
        self.keep(self.worker.jobs.set_best(self.id, kept, score, trial, worker=self.worker.identity))

    def check(self, *, now: bool = False) -> None:
        """Stop here when the worker stops or the job should.

        Raises:
            JobCancelled: Somebody asked for it, or deleted the job.
            JobLost: Another worker has the job.
        """
        self.worker.park()
        if not now and time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        if self.worker.jobs.cancel_requested(self.id):
            raise JobCancelled(self.id)

    def ask(self, operation: str, **arguments: Any) -> Any:
        """Ask the device, whose process is replaced when it dies; not for requests that build on earlier ones."""
        return self.surviving(lambda: self.ask_once(operation, **arguments))

    def ask_once(self, operation: str, **arguments: Any) -> Any:
        """Ask the device.

        Raises:
            DeviceDied: Its process ended; a new one is started by the next request.
        """
        self.check()
        progress = arguments.pop("progress", self.progress)
        try:
            return self.worker.device.ask(
                operation, job=self.context(), progress=progress, check=self.check, **arguments
            )
        except DeviceDied:
            self.worker.park()  # it was ended on purpose
            raise

    def surviving(self, do: Callable[[], T]) -> T:
        """Do something again when the device process dies.

        Raises:
            DeviceDied: It died several times in a row.
        """
        for death in range(1, DEVICE_DEATHS + 1):
            try:
                return do()
            except DeviceDied as error:
                log.warning("%s", error.message, extra={"job": self.id})
                if death == DEVICE_DEATHS:
                    message = f"{error.message} That was the {death}th time in a row in stage {self.stage}; giving up."
                    raise DeviceDied(message, **error.data) from error
                self.tell("warning", message=f"{error.message} Starting it again.", worker=self.worker.identity)
        raise AssertionError

    def context(self) -> dict[str, Any]:
        """What the device process must know to join at any point."""
        return {
            "id": self.id,
            "spec": self.spec_json,
            "source": self.source,
            "trust_remote_code": self.spec.model.trust_remote_code,
            "cache_dir": str(self.worker.cache_dir),
            **self.known,
        }

    def _allowed_source(self) -> str:
        """The model's folder or hub id; once per stage, for it looks at every file that the spec may mean."""
        settings, spec = self.worker.settings, self.spec
        if spec.model.trust_remote_code and not settings.trust_remote_code:
            raise UnsafeModel(
                "model.trust_remote_code is off on this worker; its owner can set RANKSEARCH_TRUST_REMOTE_CODE."
            )
        folder = local_model(spec.model.source, settings)
        for dataset in (spec.calibration.dataset, spec.evaluation.dataset, *spec.evaluation.test):
            if dataset is not None:
                check_dataset(dataset, settings)
        return str(folder or spec.model.source)

    def fresh_folder(self, name: str) -> Path:
        """An empty folder for files on their way into the artifact store."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def put_away(self) -> None:
        """Remove what lies around, here and in the device process."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(SQLAlchemyError):  # the next worker to start looks again
            self.worker.forget_refinements()
        if self.worker.device.pid is not None:
            try:
                self.worker.device.ask("close", job={}, check=self.worker.park)
            except DeviceDied:
                self.worker.park()

    def keep(self, mine: bool) -> None:
        """Stop here unless a change of the job was accepted as this worker's.

        Raises:
            JobCancelled: The job is over.
            JobLost: Another worker has the job.
        """
        if not mine:
            self.check(now=True)
            raise JobLost(self.id)
