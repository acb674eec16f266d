from __future__ import annotations

from pathlib import Path

import pytest

from ranksearch.search.errors import DatasetError, PathNotAllowed, RanksearchError
from ranksearch.search.spec import Dataset
from ranksearch.service.store import paths
from ranksearch.service.store.paths import check_dataset, is_local, local_model, resolve_allowed, resolve_tree
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


def test_a_folder_is_checked_with_all_it_holds(settings: Settings, allowed: Path, tmp_path: Path) -> None:
    outside, model, shared = tmp_path / "outside", allowed / "model", allowed / "shared"
    for folder in (outside, model / "deep", shared):
        folder.mkdir(parents=True)
    (model / "deep" / "weights").symlink_to(shared / "weights")
    (model / "again").symlink_to(model)
    (model / "other").symlink_to(shared)
    assert resolve_tree(model, settings) == model
    assert local_model(str(model), settings) == model
    for link, target in (
        (model / "tokenizer.json", outside / "secret"),
        (model / "deep" / "tokenizer.json", outside / "secret"),
        (shared / "tokenizer.json", outside / "secret"),
        (shared / "texts", outside),
    ):
        link.symlink_to(target)
        with pytest.raises(PathNotAllowed, match=link.name):
            local_model(str(model), settings)
        link.unlink()


def test_a_folder_too_large_to_check_is_refused(
    settings: Settings, allowed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "MAX_ENTRIES", 4)
    monkeypatch.setattr(paths, "MAX_MATCHES", 4)
    for name in "abc":
        (allowed / name).touch()
    assert resolve_tree(allowed, settings) == allowed
    assert check(settings, path="text", data_files=f"{allowed}/*") is None
    (allowed / "more").mkdir()
    for name in "de":
        (allowed / "more" / name).touch()
    with pytest.raises(PathNotAllowed, match="more than 4"):
        resolve_tree(allowed, settings)
    files = [f"{allowed}/*", f"{allowed}/more/*"]
    assert check(settings, path="text", data_files=files) is DatasetError
    assert check(settings, path="text", data_files=f"{allowed}/**/*.txt") is PathNotAllowed
    assert check(settings, path="text", data_files=[f"{allowed}/{number}*" for number in range(101)]) is DatasetError


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
    (allowed / "folder").mkdir()
    (allowed / "folder" / "b.txt").touch()
    assert check(settings, path=str(allowed)) is None
    assert check(settings, path="text", data_files=f"{allowed}/**/*.txt") is None
    (allowed / "link.txt").symlink_to(tmp_path / "secret.txt")
    assert check(settings, path="text", data_files=f"{allowed}/a.txt") is None
    assert check(settings, path="json", data_files=[f"{allowed}/a*", f"{allowed}/a.txt"]) is None
    assert check(settings, path="text", data_files=f"{allowed}/missing.txt") is DatasetError
    assert check(settings, path="text", data_files=f"{allowed}/folder") is DatasetError
    assert check(settings, path="org/corpus", name="en", data_files="en/*.json.gz") is None
    assert check(settings, path=str(allowed / "folder"), data_files=["*.txt", "b.txt"]) is None
    refused = [
        {"path": str(allowed)},
        {"path": "text", "data_files": "/etc/passwd"},
        {"path": "text", "data_files": [f"{allowed}/a.txt", f"{allowed}/../secret.txt"]},
        {"path": "text", "data_files": f"{allowed}/*.txt"},
        {"path": "text", "data_files": f"{allowed}/**/*.txt"},
        {"path": "text", "data_files": f"{allowed}/**/../../secret.txt"},
        {"path": "text", "data_files": "relative.txt"},
        {"path": "/etc"},
        {"path": str(allowed), "data_files": "../secret.txt"},
        {"path": "org/corpus", "data_files": "/etc/passwd"},
        {"path": "org/corpus", "data_files": "../x"},
    ]
    assert [check(settings, **dataset) for dataset in refused] == [PathNotAllowed] * len(refused)


def test_no_builder_reads_the_working_directory(settings: Settings) -> None:
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    assert {"text", "pandas"} <= set(_PACKAGED_DATASETS_MODULES)
    for builder in _PACKAGED_DATASETS_MODULES:
        assert check(settings, path=builder) is DatasetError, builder
        assert check(settings, path=builder, data_files="x") in (DatasetError, PathNotAllowed), builder


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
