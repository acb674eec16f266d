"""What the routes share: settings, and one of each store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import optuna
from fastapi import Depends, Request
from sqlalchemy import Engine

from ranksearch.service.shown import Shown
from ranksearch.service.store.artifacts import ArtifactStore
from ranksearch.service.store.checkpoints import Checkpoints
from ranksearch.service.store.database import migrate, open_database, optuna_storage
from ranksearch.service.store.jobs import Jobs
from ranksearch.service.store.queue import JobQueue
from ranksearch.service.store.settings import Settings
from ranksearch.service.store.workers import Workers


@dataclass(frozen=True, kw_only=True)
class Context:
    """One per application."""

    settings: Settings
    engine: Engine
    jobs: Jobs
    workers: Workers
    checkpoints: Checkpoints
    artifacts: ArtifactStore
    queue: JobQueue
    studies: optuna.storages.RDBStorage
    shown: Shown

    def close(self) -> None:
        """Close every connection."""
        self.queue.close()
        self.studies.engine.dispose()
        self.engine.dispose()


def open_context(settings: Settings) -> Context:
    """Bring the database up to date and open everything."""
    engine = open_database(settings)
    migrate(engine)
    studies = optuna_storage(settings)
    return Context(
        settings=settings,
        engine=engine,
        jobs=Jobs(engine),
        workers=Workers(engine, settings.worker_ttl_seconds),
        checkpoints=Checkpoints(engine),
        artifacts=ArtifactStore.of(settings, engine),
        queue=JobQueue(settings.database),
        studies=studies,
        shown=Shown(studies),
    )


def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


Ctx = Annotated[Context, Depends(_context)]
