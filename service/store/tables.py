"""The tables, in the singular; Optuna's in the same database are in the plural, the queue's have names of their own."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
)

from ranksearch.service.store.clock import UtcDateTime

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    }
)

#: SQLite numbers rows by itself only in a column of type INTEGER.
_Number = BigInteger().with_variant(Integer, "sqlite")
_Id = String(64)
_Sha = String(64)


def _time(name: str, *, nullable: bool = False) -> Column[object]:
    return Column(name, UtcDateTime, nullable=nullable)


job = Table(
    "job",
    metadata,
    Column("number", _Number, primary_key=True, autoincrement=True),
    Column("id", _Id, nullable=False, unique=True),
    Column("name", String(200)),
    Column("spec", JSON, nullable=False),
    Column("status", String(16), nullable=False),
    Column("stage", String(16)),
    Column("progress", Double, nullable=False),
    Column("eta_seconds", Double),
    Column("best", JSON, nullable=False),
    Column("error", JSON),
    Column("worker", String(255)),
    Column("cancel_requested", Boolean, nullable=False),
    _time("created"),
    _time("started", nullable=True),
    _time("finished", nullable=True),
    _time("updated"),
    CheckConstraint("status IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name="status"),
    CheckConstraint("progress BETWEEN 0 AND 1", name="progress"),
    Index(None, "status"),
    sqlite_autoincrement=True,
)

event = Table(
    "event",
    metadata,
    Column("id", _Number, primary_key=True, autoincrement=True),
    Column("job_id", _Id, ForeignKey(job.c.id, ondelete="CASCADE"), nullable=False),
    _time("time"),
    Column("kind", String(32), nullable=False),
    Column("data", JSON, nullable=False),
    Index(None, "job_id", "id"),
    sqlite_autoincrement=True,
)

report = Table(
    "report",
    metadata,
    Column("job_id", _Id, ForeignKey(job.c.id, ondelete="CASCADE"), primary_key=True),
    Column("document", JSON, nullable=False),
    _time("created"),
)

checkpoint = Table(
    "checkpoint",
    metadata,
    Column("job_id", _Id, ForeignKey(job.c.id, ondelete="CASCADE"), primary_key=True),
    Column("kept", String(32), primary_key=True),
    Column("facts", JSON, nullable=False),
    _time("created"),
)

checkpoint_file = Table(
    "checkpoint_file",
    metadata,
    Column("job_id", _Id, primary_key=True),
    Column("kept", String(32), primary_key=True),
    Column("path", String(512), primary_key=True),
    Column("size", BigInteger, nullable=False),
    Column("sha256", _Sha, nullable=False),
    ForeignKeyConstraint(["job_id", "kept"], [checkpoint.c.job_id, checkpoint.c.kept], ondelete="CASCADE"),
)

artifact = Table(
    "artifact",
    metadata,
    Column("kind", String(32), primary_key=True),
    Column("fingerprint", String(128), primary_key=True),
    Column("sha256", _Sha, nullable=False),
    Column("size", BigInteger, nullable=False),
    _time("created"),
    Index(None, "sha256"),
)

blob_use = Table(
    "blob_use",
    metadata,
    Column("sha256", _Sha, primary_key=True),
    Column("job_id", _Id, ForeignKey(job.c.id, ondelete="CASCADE"), primary_key=True),
    Index(None, "job_id"),
)

worker = Table(
    "worker",
    metadata,
    Column("id", String(255), primary_key=True),
    Column("host", String(255), nullable=False),
    Column("device", String(64), nullable=False),
    Column("memory_bytes", BigInteger),
    Column("flops", Double),
    Column("pid", Integer, nullable=False),
    Column("facts", JSON, nullable=False),
    Column("job_id", _Id),
    Column("trial", Integer),
    _time("started"),
    _time("heartbeat"),
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("owner", String(64), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("body_sha256", _Sha, nullable=False),
    Column("job_id", _Id, nullable=False),
    Column("answer", JSON, nullable=False),
    _time("created"),
)
