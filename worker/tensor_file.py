"""A safetensors file that is written one tensor at a time, so that nothing has to hold all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

#: Names of dtypes in the format.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorFile:
    """Places for tensors of known shapes, filled in any order; the facts come last.

    The header stands before the tensors, so room for the facts is reserved; what is left of it is blank, as the format
    allows.

    Example:
        with TensorFile(path, {"a": ((2, 3), torch.float32)}, room=100) as file:
            file.write("a", torch.zeros(2, 3))
            file.describe({"what": "zeros"})
    """

    def __init__(
        self, path: str | Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], *, room: int
    ) -> None:
        """Lays the file out.

        Args:
            path: The file; replaced if it exists.
            tensors: Name -> shape and dtype.
            room: Bytes for the facts, written as JSON, at least.
        """
        self._entries: dict[str, dict[str, Any]] = {}
        end = 0
        # wide numbers first, as readers map the file and want every tensor aligned
        for name, (shape, dtype) in sorted(tensors.items(), key=lambda item: -item[1][1].itemsize):
            start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
            self._entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        self._room = -(-(len(json.dumps(self._entries)) + room + 64) // 8) * 8
        self._missing = set(tensors)
        self._facts: dict[str, str] = {}
        self._path, self._size = Path(path), 8 + self._room + end
        self._mapped: Tensor | None = None
        self._file = self._path.open("wb")
        self._file.truncate(self._size)

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor, from any device.

        Raises:
            OSError: The disk is full.
            ValueError: Its shape or dtype is not the one announced.
        """
        entry = self._entries[name]
        if list(tensor.shape) != entry["shape"] or _NAMES[tensor.dtype] != entry["dtype"]:
            raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, announced as {entry}")
        self._file.seek(8 + self._room + entry["data_offsets"][0])
        self._file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        self._file.flush()  # for who reads before the file is closed
        self._missing.discard(name)

    def read(self, name: str) -> Tensor:
        """A tensor that was written, mapped from the file; it outlives this object and the file's name."""
        if self._mapped is None:
            self._mapped = torch.from_file(str(self._path), size=self._size, dtype=torch.uint8)
        entry = self._entries[name]
        start, end = (8 + self._room + offset for offset in entry["data_offsets"])
        return self._mapped[start:end].view(DTYPES[entry["dtype"]]).view(entry["shape"])

    def describe(self, facts: Mapping[str, str]) -> None:
        """Sets the metadata of the file."""
        self._facts = dict(facts)

    def close(self) -> None:
        """Writes the header.

        Raises:
            ValueError: A tensor was never written, or the facts need more than the room reserved.
        """
        if self._missing:
            raise ValueError(f"{len(self._missing)} tensors were never written, one of them {min(self._missing)}")
        header = json.dumps({"__metadata__": self._facts, **self._entries}).encode()
        if len(header) > self._room:
            raise ValueError(f"a header of {len(header)} bytes in a room of {self._room}")
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._file.close()

    def __enter__(self) -> TensorFile:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes; after an error the file is left without a header, which no reader takes for a whole one."""
        if error is None:
            self.close()
        else:
            self._file.close()
