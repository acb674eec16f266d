"""A model whose decoder blocks lie on the CPU and are on the device only while they run.

On the CPU nothing has to be placed: a loaded model's weights are views of its mapped safetensors files, whose pages the
system reads when they are touched and may drop at any time. From there blocks are copied to the device one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ranksearch.worker.targets import block_stack


def fetch_blocks(model: nn.Module, device: torch.device | str) -> None:
    """Moves all but a model's blocks to a device, and has each block copied there whenever it runs.

    What is differentiated keeps a block's copy alive until its backward pass is over. A module that says it
    `fetches_itself` is left alone, with all below it.

    Args:
        model: A causal language model on the CPU, without gradients of its parameters.
        device: Where it computes.

    Raises:
        UnsupportedModel: It has no one stack of blocks.
    """
    blocks = [model.get_submodule(path) for path in block_stack(model)]
    inside = {module for block in blocks for module in block.modules()}
    for module in model.modules():
        if module not in inside:
            _move(module, torch.device(device))
    for block in blocks:
        _Fetched(block, torch.device(device))


def fetched(model: nn.Module) -> bool:
    """Whether `fetch_blocks` was done to a model."""
    return any(_fetcher(module) for module in model.modules())


@contextmanager
def held(model: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """Keeps blocks on the device, for runs that follow each other; nothing to do where they are there anyway.

    Args:
        model: The model.
        paths: Module paths of blocks.
    """
    with ExitStack() as stack:
        for block in map(model.get_submodule, paths):
            if (fetcher := _fetcher(block)) is not None:
                stack.enter_context(fetcher.there())
        yield


class _Fetched:
    """One block and the original tensors of its modules, on the CPU."""

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        self._device, self._users = device, 0
        self._block = block
        self._away: list[tuple[dict[str, Any], str, Any]] = []
        run = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with self.there():
                return run(*args, **kwargs)

        block.forward, block.fetcher = forward, self  # type: ignore[assignment]

    @contextmanager
    def there(self) -> Iterator[None]:
        if self._users == 0:
            self._fetch()
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if self._users == 0:
                self._drop()

    def _fetch(self) -> None:
        # looked up at each fetch: modules may have been swapped in the meantime
        for module in _modules(self._block):
            held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for tensors in held:
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    self._away.append((tensors, name, tensor))
                    # another object, not other data of the same one: a graph holds on to the copy it was made with
                    copy = tensor.detach().to(self._device, copy=True)
                    tensors[name] = nn.Parameter(copy, False) if isinstance(tensor, nn.Parameter) else copy

    def _drop(self) -> None:
        while self._away:
            tensors, name, tensor = self._away.pop()
            tensors[name] = tensor


def _fetcher(module: nn.Module) -> _Fetched | None:
    return vars(module).get("fetcher")


def _modules(root: nn.Module) -> Iterator[nn.Module]:
    if not getattr(root, "fetches_itself", False):
        yield root
        for child in root.children():
            yield from _modules(child)


def _move(module: nn.Module, device: torch.device) -> None:
    """Moves a module's own tensors, not those of its children."""
    for parameter in module._parameters.values():
        if parameter is not None:
            parameter.data = parameter.data.to(device)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = buffer.to(device)
