from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from ranksearch.search.errors import InvalidSettings
from ranksearch.service.app import create_app
from ranksearch.service.store.settings import load_settings

HASH = hashlib.sha256(b"secret").hexdigest()


def test_defaults_keep_everything_in_one_folder_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    settings = load_settings()
    assert settings.data_dir == tmp_path / "ranksearch"
    assert settings.database == f"sqlite:///{tmp_path}/ranksearch/ranksearch.db"
    assert settings.artifacts_dir == tmp_path / "ranksearch" / "artifacts"
    assert (settings.allowed_paths, settings.tokens, settings.loopback) == ((), (), True)


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    values = {
        "DATABASE_URL": "postgresql://user:secret@db/ranksearch",
        "ARTIFACTS_URL": f"file://{tmp_path}/a%20b",
        "TOKENS": f"{HASH.upper()}, {'0' * 64}",
        "ALLOWED_PATHS": f"{tmp_path}/one:{tmp_path}/two/../three:",
        "LOG_FORMAT": "json",
        "PORT": "9000",
    }
    for name, value in values.items():
        monkeypatch.setenv(f"RANKSEARCH_{name}", value)
    settings = load_settings()
    assert settings.database == "postgresql+psycopg://user:secret@db/ranksearch"
    assert settings.artifacts_dir == tmp_path / "a b"
    assert settings.tokens == (HASH, "0" * 64)
    assert settings.allowed_paths == (tmp_path / "one", tmp_path / "three")
    assert (settings.log_format, settings.port) == ("json", 9000)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("TOKENS", "my-token", "sha256"),
        ("DATABASE_URL", "mysql://db/x", "postgresql://"),
        ("ARTIFACTS_URL", "s3://bucket/x", "not available yet"),
        ("PORT", "http", "RANKSEARCH_PORT"),
        ("WORKER_TTL_SECONDS", "0", "RANKSEARCH_WORKER_TTL_SECONDS"),
    ],
)
def test_a_bad_value_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str) -> None:
    monkeypatch.setenv(f"RANKSEARCH_{name}", value)
    with pytest.raises(InvalidSettings, match=says) as caught:
        load_settings()
    assert f"RANKSEARCH_{name}" in caught.value.message


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "127.0.0.1.example.org"])
def test_strangers_are_not_served_without_tokens(host: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="RANKSEARCH_TOKENS"):
        create_app(load_settings(host=host, data_dir=tmp_path))
    load_settings(host=host, tokens=[HASH]).refuse_exposure()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "::1", "[::1]"])
def test_this_machine_is_served_without_tokens(host: str) -> None:
    load_settings(host=host).refuse_exposure()
