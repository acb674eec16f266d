"""Which local paths a spec may name. API and workers ask the same questions, so that neither is fooled by the other.

A source is local when it looks like a path, or when such a folder exists here: then it must lie under an allowed folder
after `..` and links are resolved.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ranksearch.search.errors import DatasetError, PathNotAllowed
from ranksearch.search.spec import Dataset
from ranksearch.service.store.settings import Settings

_HUB_ID: Final = re.compile(r"[A-Za-z0-9_][\w.\-]{0,95}(/[A-Za-z0-9_][\w.\-]{0,95})?", re.ASCII)
#: What one source may make this machine look at.
MAX_ENTRIES: Final = 100_000
MAX_PATTERNS: Final = 100
MAX_MATCHES: Final = 10_000
#: Builders that `datasets` carries itself; they read the files they are given.
_BUILDERS: Final = frozenset({"text", "json", "csv", "parquet", "arrow"})
#: Its other builders. Their names look like hub ids, but they read the working directory, some of them pickles.
_OTHER_BUILDERS: Final = frozenset(
    {
        *("audiofolder", "cache", "conll", "eval", "fasta", "fastq", "genbank", "generator", "harbor"),
        *("hdf5", "iceberg", "imagefolder", "lance", "meshfolder", "mmcif", "niftifolder", "pandas", "pdb"),
        *("pdffolder", "spark", "sql", "tsfile", "videofolder", "vortex", "webdataset", "xml"),
    }
)


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


def resolve_tree(path: str | Path, settings: Settings) -> Path:
    """The real path behind `path`, and behind everything in it: a link below an allowed folder leads nowhere else.

    Raises:
        PathNotAllowed: Something lies outside the allowed folders, cannot be listed, or there is too much of it.
    """
    real = resolve_allowed(path, settings)
    seen, pending, entries = {real}, [real] if real.is_dir() else [], 0
    while pending:
        folder = pending.pop()
        try:
            with os.scandir(folder) as listing:
                found = list(itertools.islice(listing, MAX_ENTRIES))
        except OSError as error:
            raise PathNotAllowed(f"{folder} cannot be listed: {error.strerror}", path=str(folder)) from None
        entries += len(found)
        if entries >= MAX_ENTRIES:
            raise PathNotAllowed(
                f"{path} holds more than {MAX_ENTRIES} files, too many to check; name a smaller folder", path=str(path)
            )
        for entry in found:
            target = resolve_allowed(entry.path, settings) if entry.is_symlink() else Path(entry.path)
            if entry.is_dir() and target not in seen:
                seen.add(target)
                pending.append(target)
    return real


def is_local(source: str) -> bool:
    """Whether a model or dataset name means a path on this machine rather than a hub id."""
    return _HUB_ID.fullmatch(source) is None or os.path.exists(source)


def local_model(source: str, settings: Settings) -> Path | None:
    """The folder of a local model, checked with all it holds; None for a hub id, whose cache is made of links.

    Raises:
        PathNotAllowed: The folder, or something in it, lies outside the allowed folders.
    """
    return resolve_tree(source, settings) if is_local(source) else None


def check_dataset(dataset: Dataset, settings: Settings) -> None:
    """Check every file a dataset may read on this machine.

    Raises:
        PathNotAllowed: A path lies outside the allowed folders.
        DatasetError: A file is named by a URL, a file builder is given no files, or it is one we do not serve.
    """
    builder = dataset.path in _BUILDERS
    if dataset.path in _OTHER_BUILDERS:
        raise DatasetError(f"builder {dataset.path!r} is not served; the builders are {', '.join(sorted(_BUILDERS))}")
    files = [dataset.data_files] if isinstance(dataset.data_files, str) else dataset.data_files or []
    for name in files:
        if "://" in name or "::" in name:
            raise DatasetError(
                f"data_files must be paths, not URLs such as {name}; name a hub dataset by its id", file=name
            )
    if builder:
        if not files:
            raise DatasetError(f"builder {dataset.path!r} reads the files it is given: data_files is missing")
        _check_files(files, settings)
    elif is_local(dataset.path):
        folder = resolve_tree(dataset.path, settings)
        _check_files([str(folder / name) for name in files], settings)
    else:
        for name in files:
            if os.path.isabs(name) or ".." in Path(name).parts:
                raise PathNotAllowed(f"{name}: files of a hub dataset are named relative to it", path=name)


def _check_files(names: Sequence[str], settings: Settings) -> None:
    """A pattern is checked by its fixed part and by what it may match: with `**` that is everything below."""
    patterns = [name for name in names if glob.has_magic(name)]
    if len(patterns) > MAX_PATTERNS:
        raise DatasetError(f"data_files holds {len(patterns)} patterns; {MAX_PATTERNS} are allowed")
    for name in names:
        real = resolve_allowed(_fixed_part(name), settings)
        if name not in patterns and not real.is_file():
            raise DatasetError(f"{name} is {'a folder; name its files' if real.is_dir() else 'no file'}", file=name)
        if name in patterns and ".." in Path(name).parts:
            raise PathNotAllowed(f"{name}: a pattern may not climb", path=name)
    for folder in {_fixed_part(name) for name in patterns if "**" in name}:
        resolve_tree(folder, settings)
    matches = itertools.chain.from_iterable(glob.iglob(name) for name in patterns if "**" not in name)
    for count, match in enumerate(matches):
        if count == MAX_MATCHES:
            raise DatasetError(f"data_files matches more than {MAX_MATCHES} files; name fewer, or their folder as path")
        resolve_allowed(match, settings)


def _fixed_part(pattern: str) -> Path:
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts))
