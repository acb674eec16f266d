"""The one database: opening it, and bringing its schema up to date."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import optuna
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text

from ranksearch.search.errors import InvalidSettings
from ranksearch.service.store.queue import IDLE_TRANSACTION_SECONDS, migrate_queue
from ranksearch.service.store.settings import Settings

VERSION_TABLE: Final = "ranksearch_version"
BUSY_SECONDS: Final = 60.0
_MIGRATION_LOCK: Final = 0x72616E6B  # key of PostgreSQL's advisory lock
_WRITE: Final = "ranksearch_write"


def open_database(settings: Settings) -> Engine:
    """The engine for our tables; creates the data folder, not the tables (`migrate` does)."""
    url = make_url(settings.database)
    if url.get_backend_name() == "sqlite":
        if not url.database or url.database == ":memory:":
            raise InvalidSettings("RANKSEARCH_DATABASE_URL: SQLite needs a file; several processes share it")
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS}, json_serializer=to_json)
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    engine = create_engine(url, pool_pre_ping=True, pool_size=10, max_overflow=30, json_serializer=to_json)
    event.listen(engine, "connect", _prepare_postgres)
    return engine


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # we begin transactions ourselves, see `_begin_sqlite`
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA foreign_keys=ON")


def _prepare_postgres(connection: Any, _record: object) -> None:
    connection.execute(f"SET idle_in_transaction_session_timeout = {int(IDLE_TRANSACTION_SECONDS * 1000)}")
    connection.commit()  # or the rollback with which a connection goes back to the pool takes the setting along


def _begin_sqlite(connection: Connection) -> None:
    # A deferred transaction that reads first and writes later fails at once when another process wrote in between; one
    # that takes the write lock at its beginning waits its turn.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get(_WRITE) else "BEGIN")


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A short transaction that only reads."""
    with engine.connect() as connection:
        yield connection


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A short transaction that writes; committed at the end, rolled back by an exception."""
    with engine.connect().execution_options(**{_WRITE: True}) as connection, connection.begin():
        yield connection


def to_json(value: Any) -> str:
    """JSON that every database reads: what is not finite becomes null."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def database_url(engine: Engine) -> str:
    """The engine's URL, password included."""
    return engine.url.render_as_string(hide_password=False)


def optuna_storage(settings: Settings) -> optuna.storages.RDBStorage:
    """The studies' storage, on the migrated database."""
    return _storage(settings.database, skip_table_creation=True)


def _storage(url: str, **options: Any) -> optuna.storages.RDBStorage:
    sqlite = make_url(url).get_backend_name() == "sqlite"
    engine_kwargs: dict[str, Any] = {"connect_args": {"timeout": BUSY_SECONDS}} if sqlite else {"pool_pre_ping": True}
    storage = optuna.storages.RDBStorage(url, engine_kwargs=engine_kwargs, **options)
    if not sqlite:
        event.listen(storage.engine, "connect", _prepare_postgres)
        storage.engine.dispose()  # the connection with which it looked at the schema
    return storage


def migrate(engine: Engine) -> None:
    """Create or upgrade our tables, Optuna's and the queue's; safe when several processes start at once."""
    with _only_one(engine):
        with writing(engine) as connection:
            config = alembic_config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
        storage = _storage(database_url(engine), skip_compatibility_check=True)
        if storage.get_current_version() != storage.get_head_version():
            storage.upgrade()
        storage.engine.dispose()
        migrate_queue(database_url(engine))


def is_current(engine: Engine) -> bool:
    """Whether the schema is the one this code was written for."""
    head = ScriptDirectory.from_config(alembic_config()).get_current_head()
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        return context.get_current_revision() == head


def alembic_config() -> Config:
    """Alembic's configuration; there is no ini file."""
    logging.getLogger("alembic").setLevel(logging.WARNING)
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


@contextmanager
def _only_one(engine: Engine) -> Iterator[None]:
    if engine.dialect.name == "sqlite":
        with open(f"{engine.url.database}.migrate-lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        return
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        # Whoever waits inside a statement holds a snapshot, and the queue's migration, which builds an index
        # concurrently, waits for all snapshots to end: so nobody waits inside a statement.
        while not connection.execute(text("SELECT pg_try_advisory_lock(:key)"), {"key": _MIGRATION_LOCK}).scalar():
            time.sleep(0.1)
        try:
            yield
        finally:
            connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": _MIGRATION_LOCK})
