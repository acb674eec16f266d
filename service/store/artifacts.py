"""Artifacts: files named by their content, shared by the jobs that use them.

A blob lies at `blobs/sha256/<aa>/<sha256>`. Table `blob_use` says which jobs need it; table `artifact` finds
calibrations and factor banks by fingerprint. A use is written before the store looks whether the blob is there, and a
blob is removed under a lock on the uses, so a blob in use is never removed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from sqlalchemy import Connection, Engine, delete, insert, select, text

from ranksearch.search.errors import Conflict, JobNotFound, StorageFull
from ranksearch.service.store import tables
from ranksearch.service.store.clock import now
from ranksearch.service.store.database import reading, writing
from ranksearch.service.store.jobs import OVER
from ranksearch.service.store.settings import Settings

_CHUNK: Final = 1 << 20  # bytes
_ABANDONED_SECONDS: Final = 24 * 3600.0  # nobody has written to a temporary file for so long: its writer was killed


@dataclass(frozen=True, kw_only=True)
class Blob:
    """A stored file: content hash and bytes."""

    sha256: str
    size: int


class ArtifactStore:
    """Files of jobs in one folder that server and workers share."""

    def __init__(self, root: Path, engine: Engine) -> None:
        """Keep files under `root`, and who uses them in the database."""
        self.root = root
        self.engine = engine

    @classmethod
    def of(cls, settings: Settings, engine: Engine) -> ArtifactStore:
        """The store that the settings name."""
        return cls(settings.artifacts_dir, engine)

    def path(self, sha256: str) -> Path:
        """Where a blob lies."""
        return self.root / "blobs" / "sha256" / sha256[:2] / sha256

    def put_file(self, source: Path, *, job_id: str) -> Blob:
        """Move a file into the store for a job: a factor bank may be too large to lie on the disk twice.

        Raises:
            StorageFull: The disk is full.
            JobNotFound: The job has been deleted.
        """
        with open(source, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            blob = Blob(sha256=digest, size=os.fstat(stream.fileno()).st_size)
            os.fsync(stream.fileno())
            self._use(blob, job_id)
            try:
                self._place(source, blob)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                stream.seek(0)  # the store is on another filesystem
                self.put(iter(lambda: stream.read(_CHUNK), b""), job_id=job_id)
        source.unlink(missing_ok=True)
        return blob

    def put(self, chunks: Iterable[bytes], *, job_id: str) -> Blob:
        """Store what the chunks add up to, hashing while writing; see `put_file`."""
        with self._temporary() as (stream, temporary):
            digest, size = hashlib.sha256(), 0
            for chunk in chunks:
                stream.write(chunk)
                digest.update(chunk)
                size += len(chunk)
            stream.flush()
            os.fsync(stream.fileno())
            blob = Blob(sha256=digest.hexdigest(), size=size)
            self._use(blob, job_id)
            self._place(temporary, blob)
        return blob

    def save(self, kind: str, fingerprint: str, source: Path, *, job_id: str) -> Path:
        """Store a file under a fingerprint, for later jobs to `find`; returns where it lies now."""
        blob = self.put_file(source, job_id=job_id)
        table = tables.artifact
        key = {"kind": kind, "fingerprint": fingerprint}
        with writing(self.engine) as connection:
            _lock_uses(connection)  # so that of two jobs with the same fingerprint one comes after the other
            connection.execute(delete(table).filter_by(**key))
            values = {**key, "sha256": blob.sha256, "size": blob.size, "created": now()}
            connection.execute(insert(table).values(values))
        return self.path(blob.sha256)

    def find(self, kind: str, fingerprint: str, *, job_id: str) -> Path | None:
        """The file stored under a fingerprint, from now on used by this job too; None when there is none."""
        table = tables.artifact
        with writing(self.engine) as connection:
            _lock_uses(connection)
            row = connection.execute(select(table).filter_by(kind=kind, fingerprint=fingerprint)).one_or_none()
            if row is None or not _complete(self.path(row.sha256), row.size):
                return None
            _insert_use(connection, row.sha256, job_id)
        return self.path(row.sha256)

    def delete_job(self, job_id: str) -> int:
        """Delete a finished job and every blob that no other job uses; returns the bytes freed.

        Raises:
            JobNotFound: There is no such job.
            Conflict: The job is not over; cancel it first.
        """
        uses, job = tables.blob_use, tables.job
        with writing(self.engine) as connection:
            _lock_uses(connection)
            status = connection.execute(select(job.c.status).where(job.c.id == job_id).with_for_update()).scalar()
            if status is None:
                raise JobNotFound(f"there is no job {job_id[:64]!r}", job=job_id[:64])
            if status not in OVER:
                raise Conflict(f"the job is {status}; cancel it first", status=status)
            mine = set(connection.execute(select(uses.c.sha256).where(uses.c.job_id == job_id)).scalars())
            connection.execute(delete(tables.idempotency).where(tables.idempotency.c.job_id == job_id))
            connection.execute(delete(job).where(job.c.id == job_id))  # the rest of its rows go with it
            kept = set(connection.execute(select(uses.c.sha256).where(uses.c.sha256.in_(mine))).scalars())
            connection.execute(delete(tables.artifact).where(tables.artifact.c.sha256.in_(mine - kept)))
            return sum(_unlink(self.path(sha256)) for sha256 in mine - kept)

    def used_by(self, job_id: str) -> set[str]:
        """The hashes of the blobs a job uses."""
        uses = tables.blob_use
        with reading(self.engine) as connection:
            return set(connection.execute(select(uses.c.sha256).where(uses.c.job_id == job_id)).scalars())

    def sweep(self) -> None:
        """Remove what killed processes were writing."""
        for path in (self.root / "incoming").glob("*"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    path.unlink()

    def _place(self, path: Path, blob: Blob) -> None:
        target = self.path(blob.sha256)
        if not _complete(target, blob.size):
            target.parent.mkdir(parents=True, exist_ok=True)
            os.chmod(path, 0o644)
            os.replace(path, target)
            _fsync_folder(target.parent)

    def _use(self, blob: Blob, job_id: str) -> None:
        with writing(self.engine) as connection:
            _lock_uses(connection)
            _insert_use(connection, blob.sha256, job_id)

    @contextmanager
    def _temporary(self) -> Iterator[tuple[IO[bytes], Path]]:
        folder = self.root / "incoming"
        path = folder / secrets.token_hex(16)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(path, "xb") as stream:
                yield stream, path
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFull(
                    f"The disk of {self.root} is full; free space and submit the job again: the calibration and the "
                    "factor bank that it has stored are used again."
                ) from error
            raise
        finally:
            path.unlink(missing_ok=True)


def _lock_uses(connection: Connection) -> None:
    # On SQLite a writing transaction holds the whole database already.
    if connection.dialect.name == "postgresql":
        connection.execute(text("LOCK TABLE blob_use IN SHARE ROW EXCLUSIVE MODE"))


def _insert_use(connection: Connection, sha256: str, job_id: str) -> None:
    uses, job = tables.blob_use, tables.job
    known = select(uses.c.sha256).where(uses.c.sha256 == sha256, uses.c.job_id == job_id)
    if connection.execute(select(job.c.id).where(job.c.id == job_id)).one_or_none() is None:
        raise JobNotFound(f"there is no job {job_id!r}", job=job_id)
    if connection.execute(known).one_or_none() is None:
        connection.execute(insert(uses).values(sha256=sha256, job_id=job_id))


def _complete(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def _unlink(path: Path) -> int:
    try:
        size = path.stat().st_size
        path.unlink()
    except FileNotFoundError:
        return 0
    return size


def _fsync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
