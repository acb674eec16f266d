"""Checkpoints: for every finished budget of a job, the files of a model folder, each a blob of the artifact store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Engine, delete, insert, select, update

from ranksearch.search.errors import JobNotFound
from ranksearch.search.spec import budget_label
from ranksearch.service.store import tables
from ranksearch.service.store.clock import now
from ranksearch.service.store.database import reading, writing
from ranksearch.service.store.jobs import append_event


@dataclass(frozen=True, kw_only=True)
class CheckpointFile:
    """One file: its path inside the folder, bytes, and content hash."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The folder of one budget; `facts` are small numbers worth a glance (parameters, bytes, perplexity)."""

    job_id: str
    kept: str
    facts: dict[str, Any]
    created: datetime
    files: tuple[CheckpointFile, ...]


class Checkpoints:
    """The checkpoint repository."""

    def __init__(self, engine: Engine) -> None:
        """Use this database."""
        self.engine = engine

    def add(
        self, job_id: str, kept: float, files: Sequence[CheckpointFile], *, facts: Mapping[str, Any] | None = None
    ) -> None:
        """Publish a checkpoint whose blobs are stored already; a second call replaces it without a second event."""
        key = {"job_id": job_id, "kept": budget_label(kept)}
        table, held = tables.checkpoint, tables.checkpoint_file
        with writing(self.engine) as connection:
            touched = update(tables.job).where(tables.job.c.id == job_id).values(updated=now())
            if not connection.execute(touched).rowcount:
                raise JobNotFound(f"there is no job {job_id!r}", job=job_id)
            old = connection.execute(delete(table).where(table.c.job_id == job_id, table.c.kept == key["kept"]))
            connection.execute(insert(table).values(**key, facts=dict(facts or {}), created=now()))
            rows = [{**key, "path": f.path, "size": f.size, "sha256": f.sha256} for f in files]
            connection.execute(insert(held), rows)
            if not old.rowcount:
                append_event(connection, job_id, "checkpoint", {"kept": kept, "files": len(rows)})

    def of(self, job_id: str) -> list[Checkpoint]:
        """The checkpoints of a job in the order they were published, files by path."""
        table, held = tables.checkpoint, tables.checkpoint_file
        with reading(self.engine) as connection:
            files = connection.execute(select(held).where(held.c.job_id == job_id).order_by(held.c.path)).all()
            # two may be published within a tick of SQLite's clock
            order = (table.c.created, table.c.kept.desc())
            rows = connection.execute(select(table).where(table.c.job_id == job_id).order_by(*order)).all()
        return [
            Checkpoint(
                **row._mapping,
                files=tuple(
                    CheckpointFile(path=f.path, size=f.size, sha256=f.sha256) for f in files if f.kept == row.kept
                ),
            )
            for row in rows
        ]

    def file(self, job_id: str, kept: str, path: str) -> CheckpointFile | None:
        """One file by its exact path; nothing else can be asked for."""
        held = tables.checkpoint_file
        query = select(held).where(held.c.job_id == job_id, held.c.kept == kept, held.c.path == path)
        with reading(self.engine) as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else CheckpointFile(path=row.path, size=row.size, sha256=row.sha256)
