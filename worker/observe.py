"""Hooks that feed what passes a model's targets to the sums that a calibration collects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.search.errors import NumericalError
from ranksearch.search.targets import Target
from ranksearch.worker.covariance import MeanAbsolute, Moments, PooledCovariance, Seen
from ranksearch.worker.metrics import Needs
from ranksearch.worker.residual_stream import ResidualStream
from ranksearch.worker.spread import device_of
from ranksearch.worker.targets import block_of
from ranksearch.worker.weight_gradients import SquaredWeightGradient, WeightGradient

Inputs = Moments | PooledCovariance | MeanAbsolute | Seen
Gradients = Moments | WeightGradient | SquaredWeightGradient


class Observer:
    """Sums over the text for the targets of one pass.

    Attributes:
        inputs: Leader target -> what is summed over the inputs of its group.
        gradients: Target -> what is summed over its gradients; empty without a backward pass.
        stream: Follows the residual stream through the targets' blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Sequence[Target]],
        needs: Needs,
        *,
        backward: bool,
        neighbours: Mapping[str, Sequence[Target]],
    ) -> None:
        """Allocates the sums.

        Args:
            model: A causal language model.
            groups: Targets to observe, those that share their inputs together.
            needs: What to sum.
            backward: Whether gradients will come.
            neighbours: Path of a block -> all targets in it.
        """
        self._model, self._groups, self._needs = model, groups, needs
        self._hooks: list[Any] = []
        place = partial(device_of, model)  # sums lie where what is summed comes from
        targets = [target for group in groups for target in group]
        self.inputs: dict[str, Inputs] = {g[0].name: _of_inputs(needs, g[0], place(g[0].name)) for g in groups}
        self.gradients: dict[str, Gradients] = {
            t.name: _of_gradients(needs, t, place(t.name)) for t in targets if backward
        }
        blocks = dict.fromkeys(block_of(model, target) for target in targets)
        self.stream = ResidualStream(model, [target for block in blocks for target in neighbours[block]])

    def __enter__(self) -> Observer:
        """Returns itself."""
        self.stream.__enter__()
        for group in self._groups:
            module = self._model.get_submodule(group[0].name)
            self._hooks.append(module.register_forward_pre_hook(partial(self._see_input, group[0].name)))
            for target in group if self.gradients else ():
                module = self._model.get_submodule(target.name)
                self._hooks.append(module.register_forward_hook(partial(self._see_output, target.name)))
        return self

    def __exit__(self, *exc: object) -> None:
        """Removes the hooks."""
        self.stream.__exit__(*exc)
        for hook in self._hooks:
            hook.remove()

    def _see_input(self, name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        with torch.no_grad():
            self.inputs[name].add(args[0])

    def _see_output(self, name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            gradients = self.gradients[name]
            if isinstance(gradients, Moments):
                output.register_hook(torch.no_grad()(gradients.add))
            else:
                # the input is kept until its gradient comes: autograd itself does not need it
                gradients.expect()
                output.register_hook(torch.no_grad()(partial(gradients.add, args[0].detach())))

    def close_batch(self, sequences: int) -> None:
        """Ends a batch.

        Args:
            sequences: Read since the beginning, this batch included.

        Raises:
            NumericalError: Names the first target, in the order of the model, whose sums are not finite.
        """
        for gradients in self.gradients.values():
            if not isinstance(gradients, Moments):
                gradients.close_batch()
        self._check()
        for inputs in self.inputs.values():
            if isinstance(inputs, PooledCovariance) and self._needs.pool and sequences % self._needs.pool == 0:
                inputs.close_pool()

    def _check(self) -> None:
        for what, sums in (("inputs", self.inputs), ("output gradients", self.gradients)):
            for name, each in sums.items():
                if not each.finite:
                    raise NumericalError(
                        f"The {what} of {name} hold NaN or infinite values during calibration; "
                        "load the model in float32 or bfloat16, or look at the weights before it.",
                        target=name,
                    )


def _of_inputs(needs: Needs, target: Target, device: torch.device) -> Inputs:
    if needs.only == "absolute":
        return MeanAbsolute(target.in_features, device=device)
    if needs.only is not None:
        return Seen()
    collect = Moments if needs.pool is None else PooledCovariance
    return collect(target.in_features, device=device)


def _of_gradients(needs: Needs, target: Target, device: torch.device) -> Gradients:
    if needs.only == "fisher":
        return SquaredWeightGradient(target.in_features, device=device)
    if needs.only == "weight_gradient":
        return WeightGradient(target.out_features, target.in_features, device=device)
    return Moments(target.out_features, device=device)
