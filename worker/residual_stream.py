"""How little each sublayer of a decoder block turns the residual stream [MGAA2025]_.

A sublayer is the direct child of a block that holds a target (attention, MLP, mixture of experts); targets that are
children themselves are one sublayer, whose output is that of the one that runs last. The stream is the block's input,
then plus each sublayer's output in the order in which they run. Where it does not end at the block's own output -
architectures that normalise or scale what they add - every sublayer counts as the whole block.

.. [MGAA2025] MGAA, https://arxiv.org/abs/2507.03294
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ranksearch.search.errors import UnsupportedModel
from ranksearch.search.targets import Target
from ranksearch.worker.compare import same_but_for_rounding
from ranksearch.worker.fused import FusedExperts
from ranksearch.worker.stream import hidden_of, output_of
from ranksearch.worker.targets import block_of

#: Modules that only hold others and are never called.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, FusedExperts)


class ResidualStream:
    """Follows the stream through blocks while the model reads a text.

    Example:
        with ResidualStream(model, targets) as stream:
            model(input_ids=ids)
        stream.similarity(targets[0].name)
    """

    def __init__(self, model: nn.Module, targets: Iterable[Target]) -> None:
        """Looks up the sublayers.

        Args:
            model: A causal language model.
            targets: All targets of the blocks to follow.
        """
        self._model = model
        self._blocks: dict[str, _Block] = {}
        self._sublayers: dict[str, tuple[_Block, str]] = {}  # of each target
        self._called: dict[str, tuple[_Block, str]] = {}  # modules whose outputs the sublayers' are
        self._hooks: list[Any] = []
        for target in targets:
            path = block_of(model, target)
            block = self._blocks.setdefault(path, _Block())
            module = _called_module(model, path, target.name)
            # targets that are children of the block share its name
            self._sublayers[target.name] = self._called[module] = block, path if module == target.name else module

    def __enter__(self) -> ResidualStream:
        """Returns itself."""
        for path, block in self._blocks.items():
            module = self._model.get_submodule(path)
            self._hooks.append(module.register_forward_pre_hook(block.begin, with_kwargs=True))
        for name, (block, sublayer) in self._called.items():
            module = self._model.get_submodule(name)
            self._hooks.append(module.register_forward_hook(partial(block.add, sublayer)))
        for path, block in self._blocks.items():
            self._hooks.append(self._model.get_submodule(path).register_forward_hook(block.end))
        return self

    def __exit__(self, *exc: object) -> None:
        """Removes the hooks."""
        for hook in self._hooks:
            hook.remove()

    def similarity(self, name: str) -> float:
        """Mean over tokens of the cosine between the stream before and after a target's sublayer; 0 if it never ran."""
        block, sublayer = self._sublayers[name]
        return block.similarity(sublayer)


class _Block:
    """Sums of cosines over the tokens that one block has read."""

    def __init__(self) -> None:
        self._tokens = 0
        self._followed: bool | None = None
        self._sums: dict[str | None, Tensor] = {}  # None: the whole block
        self._input: Tensor | None = None
        self._outputs: dict[str, Tensor] = {}

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._outputs = {}
        try:
            # copies here and below: a block may change its tensors in place
            self._input = hidden_of(args, kwargs)[0].detach().clone()
        except UnsupportedModel:
            self._input = None

    def add(self, sublayer: str, module: nn.Module, args: Any, output: Any) -> None:
        self._outputs.pop(sublayer, None)  # the last one, in its place
        self._outputs[sublayer] = output_of(output).detach().clone()

    @torch.no_grad()
    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        before, self._input = self._input, None
        outputs, self._outputs = self._outputs, {}
        end = output_of(output)
        if before is None or not outputs or end.shape != before.shape:
            return  # blocks are also called without being run
        before = before.to(end.device)  # the block before this one may be elsewhere
        self._tokens += before[..., 0].numel()
        self._count(None, before, end)
        for sublayer, part in outputs.items() if self._followed in (None, True) else ():
            if part.numel() != before.numel():
                self._followed = False
                return
            after = before + part.view_as(before)
            self._count(sublayer, before, after)
            before = after
        if self._followed is None:
            self._followed = same_but_for_rounding(before, end)

    def _count(self, sublayer: str | None, before: Tensor, after: Tensor) -> None:
        total = F.cosine_similarity(before.float(), after.float(), dim=-1).sum(dtype=torch.float64)
        self._sums[sublayer] = self._sums[sublayer] + total if sublayer in self._sums else total

    def similarity(self, sublayer: str) -> float:
        total = self._sums.get(sublayer if self._followed else None)
        return 0.0 if total is None else max(-1.0, min(1.0, float(total) / self._tokens))


def by_block(model: nn.Module, targets: Iterable[Target]) -> dict[str, list[Target]]:
    """Path of each block -> the targets in it."""
    found: dict[str, list[Target]] = {}
    for target in targets:
        found.setdefault(block_of(model, target), []).append(target)
    return found


def _called_module(model: nn.Module, block: str, name: str) -> str:
    """Path of the outermost module between a block and its target that is called, or of the target itself."""
    path = block
    if name == block:
        return path
    for part in name.removeprefix(f"{block}.").split("."):
        path = f"{path}.{part}"
        if not isinstance(model.get_submodule(path), _CONTAINERS):
            break
    return path
