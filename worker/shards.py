"""Writing and counting safetensors folders, one shard in memory at a time."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ranksearch.search.errors import NumericalError, StorageFull
from ranksearch.worker.models import INDEX
from ranksearch.worker.tensor_file import DTYPES


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor to write.

    Attributes:
        shape: Its shape.
        dtype: Its dtype in the file.
        load: Gives the values, on any device and in any floating dtype; called once, when its shard is written.
        target: The target it belongs to, for error messages.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    target: str | None = None


def write_shards(folder: Path, tensors: Mapping[str, Stored], max_shard_bytes: int) -> None:
    """Write tensors as `model.safetensors`, or as numbered shards and an index.

    Args:
        folder: An existing folder.
        tensors: What to write, by name.
        max_shard_bytes: Largest size of a shard (a larger tensor gets a shard of its own).

    Raises:
        NumericalError: A value is not finite, or too large for its dtype.
    """
    plan = split_torch_state_dict_into_shards(
        {name: torch.empty(stored.shape, dtype=stored.dtype, device="meta") for name, stored in tensors.items()},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for file, names in plan.filename_to_tensors.items():
        shard = {name: _values(name, tensors[name]) for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": dict(sorted(plan.tensor_to_filename.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _values(name: str, stored: Stored) -> Tensor:
    source = stored.load().detach()
    values = source.to(device="cpu", dtype=stored.dtype).contiguous()
    if values.is_floating_point() and not torch.isfinite(values).all():
        what = f"Target {stored.target}" if stored.target else f"Tensor {name}"
        if torch.isfinite(source).all():
            largest = source.abs().max().item()
            raise NumericalError(
                f"{what} holds {largest:.3g}, too large for {stored.dtype}; set export.dtype to bfloat16 or float32.",
                target=stored.target,
                tensor=name,
            )
        raise NumericalError(
            f"{what} holds values that are not finite; nothing was written.", target=stored.target, tensor=name
        )
    return values


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name, whole, when the block ends well, and vanishes otherwise.

    Raises:
        StorageFull: The disk is full.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        draft.chmod(0o755)
        yield draft
        if folder.exists():
            old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
            os.replace(folder, old)
            os.replace(draft, folder)
            shutil.rmtree(old)
        else:
            os.replace(draft, folder)
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error):
            raise StorageFull(f"The disk is full at {folder.parent}; free space and try again.") from error
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def headers(files: Iterable[Path]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor in safetensors files, from their headers alone."""
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
                part = tensors.get_slice(name)
                found[name] = (tuple(part.get_shape()), DTYPES[part.get_dtype()])
    return found
