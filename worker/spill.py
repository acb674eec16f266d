"""Tensors that wait on disk: written once, read back one group at a time."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


class Spill:
    """A file without a name, so that nothing is left of it whatever becomes of the process.

    Reading costs memory for one group only; the file's pages are the system's to drop.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        """Opens the file.

        Args:
            folder: A folder on a disk, made if it is not there; the system's own for temporary files when None.
        """
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open as long as this object lives
        weakref.finalize(self, self._file.close)
        self._groups: list[tuple[int, list[tuple[torch.Size, torch.dtype]]]] = []

    def __len__(self) -> int:
        return len(self._groups)

    def append(self, tensors: Sequence[Tensor]) -> None:
        """Writes a group of tensors.

        Raises:
            OSError: The disk is full.
        """
        self._groups.append((self._file.seek(0, 2), [(tensor.shape, tensor.dtype) for tensor in tensors]))
        for tensor in tensors:
            self._file.write(_bytes(tensor.cpu().contiguous()))
        self._file.flush()

    def __getitem__(self, index: int) -> list[Tensor]:
        """A group, on the CPU."""
        start, kinds = self._groups[index]
        self._file.seek(start)
        tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in kinds]
        for tensor in tensors:
            self._file.readinto(_bytes(tensor))
        return tensors


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data  # numpy has no bfloat16
