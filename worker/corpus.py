"""The text of a dataset: what `datasets` finds under a name, joined into one string. Nothing of it is ever run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ranksearch.search.errors import DatasetError, RanksearchError
from ranksearch.worker.known_errors import as_known_error

BUILDERS = ("text", "json", "csv", "parquet", "arrow", "xml", "pandas")
LOCAL_FILES = '{"path": "text", "data_files": "/data/corpus.txt", "split": "train"}'


def read_text(dataset: Mapping[str, Any], *, cache_dir: str | Path) -> str:
    r"""The whole text of a dataset: the column's texts joined by "\n\n"; text files as they are.

    Args:
        dataset: `path`, `name`, `split`, `column`, `revision`, `data_files`, as in the job spec.
        cache_dir: Folder for what `datasets` downloads and converts.

    Raises:
        DatasetError: No such dataset, config, split, column or file; no text; the hub is out of reach.
    """
    path, column = dataset["path"], dataset.get("column") or "text"
    files = dataset.get("data_files")
    if path in BUILDERS and not files:
        # `datasets` would read whatever lies in the working directory
        raise DatasetError(f"The builder {path!r} needs data_files, for example {LOCAL_FILES}.")
    options: dict[str, Any] = {
        "data_files": files,
        "revision": dataset.get("revision"),
        "split": dataset.get("split") or "train",
    }
    if path == "text":
        options["sample_by"] = "document"
    rows = _load(path, dataset.get("name"), options, Path(cache_dir))
    if column not in rows.column_names:
        raise DatasetError(
            f"Dataset {path} has no column {column!r}; its columns are {', '.join(rows.column_names)}.",
            column=column,
            columns=rows.column_names,
        )
    texts = rows[column][:]
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise DatasetError(
                f"Column {column!r} of dataset {path} must hold text, but row {row} holds {type(text).__name__}; "
                f"its columns are {', '.join(rows.column_names)}.",
                column=column,
                row=row,
            )
    joined = "\n\n".join(texts)
    if not joined.strip():
        raise DatasetError(f"Dataset {path} holds no text in column {column!r}.", column=column)
    return joined


def _load(path: str, name: str | None, options: dict[str, Any], cache_dir: Path) -> Any:
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    hub_logging.set_verbosity_error()
    where = f"Dataset {path}" + (f" ({name})" if name else "")
    try:
        return datasets.load_dataset(path, name, cache_dir=str(cache_dir / "datasets"), **options)
    except RanksearchError:
        raise
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise DatasetError(
            f"{where} is not in the local cache and the hub has no answer: {_reason(error)}. "
            f"Check the name and the network (a gated dataset needs HF_TOKEN), or name local files: {LOCAL_FILES}."
        ) from error
    except FileNotFoundError as error:
        raise DatasetError(f"{where} names files that are not there: {_reason(error)}.") from error
    except Exception as error:
        known = as_known_error(error, "reading a dataset")
        raise known or DatasetError(f"{where} cannot be read: {_reason(error)}.") from error


def _reason(error: BaseException) -> str:
    """What went wrong, in one line; the inner cause where `datasets` hides it behind a general sentence."""
    inner = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    if isinstance(inner, UnicodeDecodeError):
        return "a file is not valid UTF-8 text"
    return " ".join(str(inner).split()).rstrip(".")[:400] or type(inner).__name__


def fingerprint(text: str) -> str:
    """sha256 of a text in UTF-8."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def label(dataset: Mapping[str, Any]) -> str:
    """A short name for reports: `test.txt` for files, `wikitext-2-raw-v1/test` for a config and split."""
    files = dataset.get("data_files")
    if files:
        more = 0 if isinstance(files, str) else len(files) - 1
        return Path(first_file(files)).name + (f" and {more} more" if more else "")
    return f"{dataset.get('name') or dataset['path']}/{dataset.get('split') or 'train'}"


def first_file(files: str | Sequence[str]) -> str:
    """The first of a dataset's `data_files`."""
    return files if isinstance(files, str) else files[0]
