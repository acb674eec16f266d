"""Where a calibration's sums go as they are completed: to a file, or to memory on the CPU.

Each tensor is named `part/target`; the parts are the fields of `Calibration`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ranksearch.search.targets import Target
from ranksearch.worker.covariance import MeanAbsolute, PooledCovariance, Seen
from ranksearch.worker.metrics import Needs
from ranksearch.worker.observe import Observer
from ranksearch.worker.tensor_file import TensorFile
from ranksearch.worker.weight_gradients import SquaredWeightGradient, WeightGradient

Shapes = dict[str, tuple[int, ...]]


def shapes_of(group: Sequence[Target], needs: Needs) -> Shapes:
    """Name -> shape of what is collected for targets that share their inputs; all of it is fp32."""
    name, n = group[0].name, group[0].in_features
    if needs.only == "absolute":
        return {f"absolute/{name}": (n,)}
    if needs.only == "fisher":
        return {f"fisher/{t.name}": (n,) for t in group}
    if needs.only == "weight_gradient":
        return {f"weight_gradients/{t.name}": (t.out_features, n) for t in group}
    shapes: Shapes = {f"inputs/{name}": (n, n)}
    shapes |= {f"means/{name}": (n,)} if needs.pool is not None else {}
    return shapes | {f"gradients/{t.name}": (t.out_features, t.out_features) for t in group if needs.gradients}


def bytes_of(group: Sequence[Target], needs: Needs) -> int:
    """Bytes that are held while it is collected for targets that share their inputs."""
    pool = group[0].in_features ** 2 if needs.pool is not None else 0  # the open one, beside the average
    return 4 * (pool + sum(torch.Size(shape).numel() for shape in shapes_of(group, needs).values()))


class CalibrationWriter:
    """Takes over what observers have summed.

    Attributes:
        tensors: What was written, without a file.
    """

    def __init__(
        self, groups: Sequence[Sequence[Target]], needs: Needs, blocks: Tensor, file: str | Path | None
    ) -> None:
        """Lays the file out.

        Args:
            groups: Targets that share their inputs, together.
            needs: What is collected.
            blocks: Token ids of the text, `sequences x length`.
            file: Replaced if it exists; None for memory.
        """
        self.tensors: dict[str, Tensor] = {}
        self._blocks = blocks
        self._leader = {target.name: group[0].name for group in groups for target in group}
        self._tokens: dict[str, int] = {}
        self._similarity: dict[str, float] = {}
        self._written: list[str] = []
        self._file = None
        if file is not None:
            shapes = {name: shape for group in groups for name, shape in shapes_of(group, needs).items()}
            # names three times, two numbers each, quoted once more in the header
            room = 6 * len(json.dumps(self._leader)) + 64 * len(self._leader) + 256
            self._file = TensorFile(file, {name: (shape, torch.float32) for name, shape in shapes.items()}, room=room)

    def take(self, observer: Observer) -> None:
        """Takes the means over; nothing of them is left on the device."""
        names = set(observer.inputs)
        self._similarity |= {
            name: observer.stream.similarity(name) for name, leader in self._leader.items() if leader in names
        }
        while observer.inputs:
            name, inputs = observer.inputs.popitem()
            if not isinstance(inputs, Seen):
                part = "absolute" if isinstance(inputs, MeanAbsolute) else "inputs"
                self._write(f"{part}/{name}", inputs.take_mean())
            if isinstance(inputs, PooledCovariance):
                self._write(f"means/{name}", inputs.mean)
            self._tokens[name] = inputs.tokens  # complete after the mean was taken
        sequences, predicted = len(self._blocks), self._blocks[:, 1:].numel()
        while observer.gradients:
            name, gradients = observer.gradients.popitem()
            if isinstance(gradients, SquaredWeightGradient):
                self._write(f"fisher/{name}", gradients.take_mean(sequences))
            elif isinstance(gradients, WeightGradient):
                self._write(f"weight_gradients/{name}", gradients.take_mean(predicted))
            else:
                self._write(f"gradients/{name}", gradients.take_mean(self._blocks.numel()))

    def _write(self, name: str, mean: Tensor) -> None:
        self._written.append(name)
        if self._file is None:
            self.tensors[name] = mean.cpu()
        else:
            self._file.write(name, mean)

    def part(self, names: Collection[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and facts of some targets, complete with all that share their inputs, before the rest is there."""
        read = self.tensors.__getitem__ if self._file is None else self._file.read
        return {key: read(key) for key in self._written if key.split("/", 1)[1] in names}, self._facts(names)

    @property
    def facts(self) -> dict[str, Any]:
        """Fields of the calibration that are no tensors."""
        return self._facts(self._leader)

    def _facts(self, names: Collection[str]) -> dict[str, Any]:
        leader = {name: lead for name, lead in self._leader.items() if name in names}
        return {
            "leader": leader,
            "tokens": {name: self._tokens[lead] for name, lead in leader.items()},
            "total_tokens": self._blocks.numel(),
            "similarity": {name: value for name, value in self._similarity.items() if name in names},
        }

    def __enter__(self) -> CalibrationWriter:
        """Returns itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        """Closes the file."""
        if self._file is not None:
            if kind is None:
                self._file.describe({"calibration": json.dumps(self.facts)})
            self._file.__exit__(kind, *rest)
