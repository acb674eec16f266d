from __future__ import annotations

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, select, text

from ranksearch.search.errors import InvalidSettings
from ranksearch.service.store import tables
from ranksearch.service.store.clock import now
from ranksearch.service.store.database import (
    VERSION_TABLE,
    alembic_config,
    database_url,
    is_current,
    migrate,
    open_database,
    optuna_storage,
    reading,
    to_json,
    writing,
)
from ranksearch.service.store.jobs import Jobs
from ranksearch.service.store.settings import Settings, load_settings

ASSETS = Path(__file__).parent / "assets"


def test_migrations_make_exactly_the_tables_of_the_code(settings: Settings) -> None:
    engine = open_database(settings)
    with engine.connect() as connection:
        options = {
            "version_table": VERSION_TABLE,
            "compare_type": True,
            "include_name": lambda name, kind, _parents: kind != "table" or name in tables.metadata.tables,
        }
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, tables.metadata) == []
    assert set(tables.metadata.tables) < set(inspect(engine).get_table_names())


def test_our_tables_optunas_and_the_queues_share_the_database(settings: Settings) -> None:
    engine = open_database(settings)
    names = inspect(engine).get_table_names()
    assert {"job", "trials", "studies", VERSION_TABLE, "alembic_version"} <= set(names)
    queue = names if engine.dialect.name == "sqlite" else inspect(engine).get_table_names(schema="dbos")
    assert "workflow_status" in queue
    optuna_storage(settings).get_all_studies()


def test_migrating_again_changes_nothing(settings: Settings) -> None:
    engine = open_database(settings)
    before = inspect(engine).get_table_names()
    migrate(engine)
    assert is_current(engine)
    assert inspect(engine).get_table_names() == before


def test_several_may_migrate_at_once(empty_database_url: str, tmp_path: Path) -> None:
    """Each with connections and locks of its own, as if they were processes."""
    settings = load_settings(database_url=empty_database_url, data_dir=tmp_path)
    gate = threading.Barrier(4)

    def run() -> bool:
        engine = open_database(settings)
        gate.wait()
        migrate(engine)
        current = is_current(engine)
        engine.dispose()
        return current

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(run) for _ in range(4)]
        assert [each.result(timeout=120) for each in running] == [True] * 4


def test_every_schema_version_has_a_database_to_upgrade() -> None:
    """A new migration needs `write_asset(ASSETS / "schema_<revision>.db")`, run with the code of that revision."""
    revisions = {script.revision for script in ScriptDirectory.from_config(alembic_config()).walk_revisions()}
    assert {path.stem.removeprefix("schema_") for path in ASSETS.glob("schema_*.db")} == revisions


@pytest.mark.parametrize("asset", sorted(ASSETS.glob("schema_*.db")), ids=lambda path: path.stem)
def test_an_old_database_is_upgraded_and_keeps_its_jobs(asset: Path, tmp_path: Path) -> None:
    settings = load_settings(data_dir=tmp_path)
    (tmp_path / "ranksearch.db").write_bytes(asset.read_bytes())
    engine = open_database(settings)
    migrate(engine)
    assert is_current(engine)
    jobs = Jobs(engine)
    job = jobs.get("job_asset")
    assert (job.name, job.status, job.best) == ("kept", "succeeded", {"0.5": {"score": 12.5, "trial": 3}})
    assert job.parsed().budget.kept == [0.5]
    assert [event.kind for event in jobs.events("job_asset")] == ["status", "status", "best", "status"]
    assert optuna_storage(settings).get_all_studies() == []


def write_asset(path: Path) -> None:
    """Write a small SQLite file with our tables at the newest revision and one finished job."""
    from alembic import command

    from ranksearch.search.spec import JobSpec

    engine = open_database(load_settings(database_url=f"sqlite:///{path}"))
    with writing(engine) as connection:
        config = alembic_config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
    jobs = Jobs(engine)
    spec = {"name": "kept", "model": {"source": "someone/model"}, "budget": {"kept": [0.5]}}
    job = jobs.create(JobSpec.model_validate(spec))
    jobs.set_running(job.id, "worker")
    jobs.set_best(job.id, 0.5, 12.5, 3)
    jobs.succeed(job.id)
    engine.dispose()
    with sqlite3.connect(path, isolation_level=None) as plain:
        plain.execute("UPDATE job SET id = 'job_asset'")
        plain.execute("UPDATE event SET job_id = 'job_asset'")
        for statement in ("PRAGMA journal_mode=DELETE", "PRAGMA page_size=512", "VACUUM"):
            plain.execute(statement)


def test_sqlite_is_opened_for_several_processes(tmp_path: Path) -> None:
    engine = open_database(load_settings(data_dir=tmp_path / "new" / "folder"))
    with engine.connect() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(text("PRAGMA foreign_keys")).scalar() == 1
        assert connection.execute(text("PRAGMA busy_timeout")).scalar() == 60_000


def test_sqlite_in_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="needs a file"):
        open_database(load_settings(database_url="sqlite:///:memory:", data_dir=tmp_path))


def test_a_failed_transaction_leaves_nothing(settings: Settings) -> None:
    engine = open_database(settings)
    table = tables.idempotency
    values = {"owner": "", "key": "k", "body_sha256": "0", "job_id": "j", "answer": {}}

    def write_and_fail() -> None:
        with writing(engine) as connection:
            connection.execute(table.insert().values(**values, created=now()))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_and_fail()
    with reading(engine) as connection:
        assert connection.execute(select(table)).all() == []


def test_json_knows_no_nan() -> None:
    assert to_json({"a": [float("nan"), 1.5, float("inf")]}) == '{"a": [null, 1.5, null]}'


def test_the_url_keeps_the_password(tmp_path: Path) -> None:
    settings = load_settings(database_url="postgresql://me:p%40ss@host/db", data_dir=tmp_path)
    assert database_url(open_database(settings)) == "postgresql+psycopg://me:p%40ss@host/db"
