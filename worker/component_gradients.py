"""What a compressed model's loss says about single components: its gradient by a gate on each of them.

With a gate s_j on component j of a target, y = left' (s * (right x)), 1 on those that run and 0 on the others,

    dL/ds_j = sum over tokens of (right_j x) (left_j' dL/dy)

with x less its mean where a bias makes up for the mean of what is left out. So one backward pass of the model as it
runs tells it for all components of all targets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.search.gradients import GRADIENT_TOKENS
from ranksearch.worker.backward import sweep_text
from ranksearch.worker.loss_slope import SlopeOfLoss
from ranksearch.worker.prefix import PrefixLinear, PrefixModel
from ranksearch.worker.readout import Readout
from ranksearch.worker.sections import Section, plan_sections
from ranksearch.worker.sweep import Sweep

Edges = Sequence[int]
"""Component numbers, ascending: neighbouring ones are the ends of a band."""


def component_gradients(
    prefix: PrefixModel,
    edges: Mapping[str, Edges],
    blocks: Tensor,
    *,
    batch_tokens: int = 4096,
    scratch: str | Path | None = None,
) -> dict[str, list[float]]:
    """The loss' gradient by the gates of components, summed over bands of them.

    Args:
        prefix: The model at the ranks it runs.
        edges: Target -> edges of its bands, in components of the bank.
        blocks: Token ids, `sequences x length`.
        batch_tokens: Tokens per forward and backward pass, at least one sequence; halved when a device's memory does
            not suffice. Where it does not for one sequence either, blocks are run one at a time.
        scratch: Folder on a disk for what lies between sections; the system's own when None.

    Returns:
        Target -> one number per band, in nats per token: the mean over the text's predicted tokens.

    Raises:
        UnsupportedModel: The model cannot be run section by section, and has to be.
        torch.OutOfMemoryError: The device has too little memory even for one sequence.
    """
    model = prefix.model
    readout = Readout(model, blocks)
    slope, found = SlopeOfLoss(readout, drawn=False), dict[str, list[float]]()
    rows = max(1, batch_tokens // blocks.shape[1])

    def run(sweep: Sweep) -> None:
        with _Gates(prefix, edges) as gates:
            _sweep(sweep, len(sections), slope)
        tokens = blocks.shape[0] * (blocks.shape[1] - 1)
        found.update({name: (total / tokens).tolist() for name, total in gates.totals.items()})

    for blockwise in (False, True):
        sections = _plan(prefix, blocks, blockwise=blockwise)
        try:
            sweep_text(model, readout, sections, blocks, rows=rows, scratch=scratch, run=run)
            break
        except torch.OutOfMemoryError:
            if blockwise:
                raise
    return found


def gradient_text(calibration: Tensor, evaluated: int) -> Tensor:
    """The calibration sequences that a search measures gradients on: the first ones.

    Args:
        calibration: Token ids, `sequences x length`.
        evaluated: Predicted tokens of the evaluation, which are matched where `GRADIENT_TOKENS` are fewer.
    """
    return calibration[: -(-max(evaluated, GRADIENT_TOKENS) // calibration.shape[1])]


def evaluations_of(text: Tensor, evaluated: int) -> int:
    """As how many evaluations gradients on a text count: a pass and its backward pass take up to three times a pass.

    Args:
        text: Token ids, `sequences x length`.
        evaluated: Predicted tokens of an evaluation.
    """
    return math.ceil(3 * text[:, 1:].numel() / evaluated)


def _plan(prefix: PrefixModel, blocks: Tensor, *, blockwise: bool) -> list[Section]:
    """All blocks together unless their weights have to be fetched, or each by itself."""
    groups = [[target] for target in prefix.targets]
    if blockwise:
        return plan_sections(prefix.model, groups, blocks, bytes_of=len, limit=0)
    return plan_sections(prefix.model, groups, blocks, bytes_of=lambda group: 0)


def _sweep(sweep: Sweep, sections: int, slope: SlopeOfLoss) -> None:
    for number in range(sections - 1):
        for _ in sweep.forward(number, keep=True):
            pass
    for number in reversed(range(sections)):
        for _ in sweep.backward(number, slope, keep=False):
            pass


class _Gates:
    """Hooks that sum what the gates' gradients come to.

    Attributes:
        totals: Target -> one sum per band, fp64 on the CPU.
    """

    def __init__(self, prefix: PrefixModel, edges: Mapping[str, Edges]) -> None:
        self.totals = {name: torch.zeros(len(ends) - 1, dtype=torch.float64) for name, ends in edges.items()}
        self._model, self._edges = prefix.model, edges
        self._hooks: list[Any] = []

    def __enter__(self) -> _Gates:
        for name in self._edges:
            module = self._model.get_submodule(name)
            self._hooks.append(module.register_forward_hook(partial(self._see, name)))
        return self

    def __exit__(self, *exc: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _see(self, name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            assert isinstance(module, PrefixLinear)
            output.register_hook(partial(self._add, name, module, args[0].detach()))

    @torch.no_grad()
    def _add(self, name: str, module: PrefixLinear, x: Tensor, gradient: Tensor) -> None:
        low, *edges = self._edges[name]
        x, gradient = module.passed(x).flatten(0, -2), gradient.flatten(0, -2)
        for index, high in enumerate(edges):
            if high > low:
                left, right = module.components(low, high)
                product = (x @ right.to(x).mT).float() * (gradient @ left.to(gradient).mT).float()
                self.totals[name][index] += product.sum(dtype=torch.float64).cpu()
            low = high
