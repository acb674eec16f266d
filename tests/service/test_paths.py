from __future__ import annotations

from pathlib import Path

import pytest

from ranksearch.search.errors import DatasetError, PathNotAllowed, RanksearchError
from ranksearch.search.spec import Dataset
from ranksearch.service.store.paths import check_dataset, is_local, local_model, resolve_allowed
from ranksearch.service.store.settings import Settings, load_settings


@pytest.fixture
def settings(tmp_path: Path, allowed: Path) -> Settings:
    return load_settings(data_dir=tmp_path, allowed_paths=(allowed,))


def test_what_lies_inside_is_resolved(settings: Settings, allowed: Path) -> None:
    assert resolve_allowed(allowed / "a" / ".." / "b", settings) == allowed / "b"
    (allowed / "link").symlink_to(allowed / "b")
    assert resolve_allowed(allowed / "link", settings) == allowed / "b"
    assert resolve_allowed(allowed, settings) == allowed


def test_what_climbs_out_is_refused(settings: Settings, allowed: Path, tmp_path: Path) -> None:
    (allowed / "out").symlink_to(tmp_path)
    (allowed / "loop").symlink_to(allowed / "loop")
    (tmp_path / "allowed-not").mkdir()
    for path in (
        *("/etc/passwd", "/", f"{allowed}/../secret", f"{allowed}-not", f"{allowed}/out/x", f"{allowed}/loop/x"),
        *("~nobody-of-this-name/x", "relative", f"{allowed}/\0x", "../" * 30 + "etc/passwd"),
    ):
        with pytest.raises(PathNotAllowed):
            resolve_allowed(path, settings)


def test_by_default_nothing_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(PathNotAllowed, match="RANKSEARCH_ALLOWED_PATHS"):
        resolve_allowed(tmp_path, load_settings(data_dir=tmp_path))


def test_hub_ids_and_paths_are_told_apart(
    settings: Settings, allowed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "here").mkdir()
    assert [is_local(name) for name in ("gpt2", "org/model-1.5_b", "org/here", "./x", "~/x", "a/b/c", "/x", "..")] == [
        *(False, False, True, True, True, True, True, True)
    ]
    assert local_model("org/model", settings) is None
    assert local_model(str(allowed / "m"), settings) == allowed / "m"
    with pytest.raises(PathNotAllowed):
        local_model("org/here", settings)


def check(settings: Settings, **dataset: object) -> type[RanksearchError] | None:
    try:
        check_dataset(Dataset.model_validate(dataset), settings)
    except RanksearchError as error:
        return type(error)
    return None


def test_datasets_read_allowed_files_only(settings: Settings, allowed: Path, tmp_path: Path) -> None:
    (allowed / "a.txt").touch()
    (tmp_path / "secret.txt").touch()
    (allowed / "link.txt").symlink_to(tmp_path / "secret.txt")
    assert check(settings, path="text", data_files=f"{allowed}/a.txt") is None
    assert check(settings, path="json", data_files=[f"{allowed}/a*", f"{allowed}/b.json"]) is None
    assert check(settings, path="org/corpus", name="en", data_files="en/*.json.gz") is None
    assert check(settings, path=str(allowed)) is None
    refused = [
        {"path": "text", "data_files": "/etc/passwd"},
        {"path": "text", "data_files": [f"{allowed}/a.txt", f"{allowed}/../secret.txt"]},
        {"path": "text", "data_files": f"{allowed}/*.txt"},
        {"path": "text", "data_files": f"{allowed}/**/../../secret.txt"},
        {"path": "text", "data_files": "relative.txt"},
        {"path": "/etc"},
        {"path": str(allowed), "data_files": "../secret.txt"},
        {"path": "org/corpus", "data_files": "/etc/passwd"},
        {"path": "org/corpus", "data_files": "../x"},
    ]
    assert [check(settings, **dataset) for dataset in refused] == [PathNotAllowed] * len(refused)


def test_datasets_fetch_no_urls(settings: Settings) -> None:
    for name in (
        "http://169.254.169.254/x",
        "file:///etc/passwd",
        "zip://x::http://y",
        "s3://b/k",
        "hf://datasets/o/c",
    ):
        assert check(settings, path="text", data_files=name) is DatasetError
    assert check(settings, path="text") is DatasetError
    assert check(settings, path="json", data_files=[]) is DatasetError
