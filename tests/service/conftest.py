"""Fixtures of the service: the stores, the application in this process, and a real server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine
from typer.testing import CliRunner

from ranksearch.search.spec import JobSpec
from ranksearch.service.app import create_app
from ranksearch.service.cli import app
from ranksearch.service.context import Context
from ranksearch.service.store.database import open_database
from ranksearch.service.store.jobs import Jobs
from ranksearch.service.store.settings import Settings

from .models import write_model

URL = "http://127.0.0.1:8000"


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    engine = open_database(settings)
    yield engine
    engine.dispose()


@pytest.fixture
def jobs(engine: Engine) -> Jobs:
    return Jobs(engine)


@pytest.fixture
def spec() -> JobSpec:
    return JobSpec.model_validate({"model": {"source": "someone/some-model"}, "budget": {"kept": [0.5]}})


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    """The application in this process, as seen from this machine, without tokens."""
    with TestClient(create_app(settings), base_url=URL, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def context(client: TestClient) -> Context:
    context: Context = client.app.state.context  # type: ignore[attr-defined]
    return context


@pytest.fixture
def model(allowed: Path) -> Path:
    """A tiny model folder that specs may name."""
    return write_model(allowed / "model")


@pytest.fixture
def body(model: Path, allowed: Path) -> dict[str, Any]:
    """A good spec over local files."""
    text = allowed / "text.txt"
    text.write_text("some words\n")
    return {
        "model": {"source": str(model)},
        "calibration": {"dataset": {"path": "text", "data_files": str(text)}},
        "evaluation": {"test": []},
        "budget": {"kept": [0.5]},
    }


@pytest.fixture
def url(serve: Callable[[Settings], str], settings: Settings, monkeypatch: pytest.MonkeyPatch) -> str:
    address = serve(settings)
    monkeypatch.setenv("RANKSEARCH_URL", address)
    return address


@pytest.fixture
def run() -> Callable[..., Any]:
    """Run one command; bugs show as what they are."""
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
