"""Which local paths a spec may name. API and workers ask the same questions, so that neither is fooled by the other.

A source is local when it looks like a path, or when such a folder exists here: then it must lie under an allowed folder
after `..` and links are resolved.
"""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from typing import Final

from ranksearch.search.errors import DatasetError, PathNotAllowed
from ranksearch.search.spec import Dataset
from ranksearch.service.store.settings import Settings

_HUB_ID: Final = re.compile(r"[A-Za-z0-9_][\w.\-]{0,95}(/[A-Za-z0-9_][\w.\-]{0,95})?", re.ASCII)
#: Builders that `datasets` carries itself; they read the files they are given.
_BUILDERS: Final = frozenset({"text", "json", "csv", "parquet", "arrow"})


def resolve_allowed(path: str | Path, settings: Settings) -> Path:
    """The real path behind `path`.

    Raises:
        PathNotAllowed: It lies outside the allowed folders, also through `..` or a link.
    """
    if "\0" in str(path):
        raise PathNotAllowed("a path holds no NUL character")
    try:
        real = Path(path).expanduser().resolve()
    except (OSError, RuntimeError):  # a loop of links, an unknown user
        raise PathNotAllowed(f"{path} cannot be resolved", path=str(path)) from None
    if not any(real.is_relative_to(folder) for folder in settings.allowed_paths):
        raise PathNotAllowed(
            f"{path} lies outside the folders this server may read; "
            "its owner can add the folder to RANKSEARCH_ALLOWED_PATHS",
            path=str(path),
        )
    return real


def is_local(source: str) -> bool:
    """Whether a model or dataset name means a path on this machine rather than a hub id."""
    return _HUB_ID.fullmatch(source) is None or os.path.exists(source)


def local_model(source: str, settings: Settings) -> Path | None:
    """The folder of a local model, checked; None for a hub id.

    Raises:
        PathNotAllowed: The folder lies outside the allowed folders.
    """
    return resolve_allowed(source, settings) if is_local(source) else None


def check_dataset(dataset: Dataset, settings: Settings) -> None:
    """Check every file a dataset may read on this machine.

    Raises:
        PathNotAllowed: A path lies outside the allowed folders.
        DatasetError: A file is named by a URL, or a file builder is given no files.
    """
    builder = dataset.path in _BUILDERS
    files = [dataset.data_files] if isinstance(dataset.data_files, str) else dataset.data_files or []
    for name in files:
        if "://" in name or "::" in name:
            raise DatasetError(
                f"data_files must be paths, not URLs such as {name}; name a hub dataset by its id", file=name
            )
    if builder:
        if not files:
            raise DatasetError(f"builder {dataset.path!r} reads the files it is given: data_files is missing")
        for name in files:
            _check_pattern(name, settings)
    elif is_local(dataset.path):
        folder = resolve_allowed(dataset.path, settings)
        for name in files:
            _check_pattern(str(folder / name), settings)
    else:
        for name in files:
            if os.path.isabs(name) or ".." in Path(name).parts:
                raise PathNotAllowed(f"{name}: files of a hub dataset are named relative to it", path=name)


def _check_pattern(pattern: str, settings: Settings) -> None:
    """A pattern is checked by its fixed part and by everything it matches now."""
    fixed = Path(*_fixed_parts(Path(pattern)))
    resolve_allowed(fixed, settings)
    if glob.has_magic(pattern):
        if ".." in Path(pattern).parts:
            raise PathNotAllowed(f"{pattern}: a pattern may not climb", path=pattern)
        for match in glob.iglob(pattern, recursive=True):
            resolve_allowed(match, settings)


def _fixed_parts(path: Path) -> list[str]:
    parts: list[str] = []
    for part in path.parts:
        if glob.has_magic(part):
            break
        parts.append(part)
    return parts
