"""Decoder blocks run one after the other over a whole text, the hidden states between them kept outside the model.

So a step that needs a block's inputs as they are at that moment - after the blocks before it have changed - costs that
block alone, not a pass through the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ranksearch.search.errors import UnsupportedModel
from ranksearch.worker.readout import base_path, last_hidden
from ranksearch.worker.targets import block_stack

T = TypeVar("T")


class _Reached(Exception):  # a way out of a forward pass, not an error
    """The pass came to the place it was run for."""


@dataclass(frozen=True, kw_only=True)
class _Call:
    """How the model calls a block, apart from the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    keyword: str | None  # the hidden states' name, where they are not the first argument
    outputs: int | None = None  # how many things the block returns in a tuple; None for hidden states alone

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        if self.keyword is None:
            return output_of(block(hidden, *self.args, **self.kwargs))
        return output_of(block(*self.args, **{self.keyword: hidden}, **self.kwargs))


class BlockStream:
    """The blocks of a causal language model, to be run one at a time.

    Attributes:
        paths: Module path of each block.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, ids: Tensor, *, rows: int) -> None:
        """Looks how the model calls its blocks.

        Args:
            model: A causal language model in eval mode.
            ids: Token ids, `sequences x length`.
            rows: Sequences per batch.

        Raises:
            UnsupportedModel: A block's output is not the next one's input, or what a block is given beside the hidden
                states depends on the tokens.
        """
        self._model = model
        self._batches = ids.split(rows)
        self.paths = block_stack(model)
        # what else a block is given (masks, position embeddings) depends on a batch's shape alone: nothing is padded
        sizes = {len(batch): batch for batch in (self._batches[0], self._batches[-1])}
        self._refuse_dependence_on_tokens(ids[:1, :16])
        self._calls = {size: self._look(batch) for size, batch in sizes.items()}

    def _refuse_dependence_on_tokens(self, ids: Tensor) -> None:
        one, other = self._look(ids), self._look(ids.flip(1))
        if not all(_same(a.args, b.args) and _same(a.kwargs, b.kwargs) for a, b in zip(one, other, strict=True)):
            raise UnsupportedModel(
                f"The blocks of {type(self._model).__name__} are given more of the tokens than their hidden states, so "
                "they cannot be run one at a time."
            )

    def embed(self) -> Iterator[Tensor]:
        """Hidden states `rows x length x d` before the first block, batch by batch."""
        for batch in self._batches:
            with _first_call(self._block(0)) as seen:
                self._run_model(batch)
            yield hidden_of(*seen[0])[0]

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """What block `index` makes of hidden states `rows x length x d`."""
        return self._calls[len(hidden)][index](self._block(index), hidden)

    def final(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """The model's final hidden states from what the last block made of the batch `ids`; no block is run."""
        with ExitStack() as stack:
            for index, call in enumerate(self._calls[len(hidden)]):
                stack.enter_context(
                    _skipped(self._block(index), call, hidden if index == len(self.paths) - 1 else None)
                )
            return last_hidden(self._run_model(ids))

    def run_and_see(self, index: int, hidden: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """What reaches a module inside block `index`, and what the block makes of the hidden states."""
        seen: list[Tensor] = []
        handle = self._model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            output = self.run(index, hidden)
        finally:
            handle.remove()
        return seen[0], output

    def input_of(self, index: int, hidden: Tensor, name: str) -> Tensor:
        """What reaches a module inside block `index`, `rows x length x n`; the block is run up to there.

        An expert is reached by `tokens x n`, none if no token is sent to it.
        """
        with _first_call(self._model.get_submodule(name)) as seen:
            self.run(index, hidden)
        if not seen:
            weight: Any = self._model.get_submodule(name).weight
            return hidden.new_zeros(0, weight.shape[-1])
        args, _ = seen[0]
        reached: Tensor = args[0]
        return reached

    def in_order(self, index: int, hidden: Tensor, named: Mapping[str, T]) -> list[T]:
        """The values of module names, in the order in which block `index` calls the modules; never called come last."""
        called: dict[str, None] = {}
        hooks = [
            self._model.get_submodule(name).register_forward_pre_hook(
                lambda module, args, name=name: called.setdefault(name)
            )
            for name in named
        ]
        try:
            self.run(index, hidden)
        finally:
            for hook in hooks:
                hook.remove()
        return [named[name] for name in dict.fromkeys([*called, *named])]

    def _block(self, index: int) -> nn.Module:
        return self._model.get_submodule(self.paths[index])

    def _run_model(self, batch: Tensor) -> Any:
        base = self._model.get_submodule(base_path(self._model))
        return base(input_ids=batch.to(next(self._model.parameters()).device), use_cache=False)

    def _look(self, batch: Tensor) -> list[_Call]:
        calls: list[_Call] = []
        last: list[Tensor] = []
        hooks: list[Any] = []

        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, keyword = hidden_of(args, kwargs)
            # values that are not finite are for others to report: here they count as equal
            if last and not torch.equal(last[-1].nan_to_num(), hidden.nan_to_num()):
                raise UnsupportedModel(f"The blocks of {type(self._model).__name__} do not follow each other directly.")
            rest = {key: value for key, value in kwargs.items() if key != keyword}
            calls.append(_Call(args=args if keyword else args[1:], kwargs=rest, keyword=keyword))

        def after(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            last[:] = [output_of(output)]
            if isinstance(output, tuple):
                calls[-1] = replace(calls[-1], outputs=len(output))

        for path in self.paths:
            block = self._model.get_submodule(path)
            hooks.append(block.register_forward_pre_hook(before, with_kwargs=True))
            hooks.append(block.register_forward_hook(after, with_kwargs=True))
        try:
            self._run_model(batch)
        finally:
            for hook in hooks:
                hook.remove()
        if len(calls) != len(self.paths):
            raise UnsupportedModel(f"The blocks of {type(self._model).__name__} are not each run once.")
        return calls


def hidden_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, str | None]:
    """The hidden states that a block is called with, and their name where they are not the first argument.

    Raises:
        UnsupportedModel: There are none.
    """
    if args and isinstance(args[0], Tensor):
        return args[0], None
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point():
            return value, name
    raise UnsupportedModel("A block is called without hidden states.")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return True  # anything else cannot be told apart, or is no number that a block computes with


def output_of(output: Any) -> Tensor:
    """The hidden states that a block or a part of it returns, alone or before other things."""
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def _skipped(block: nn.Module, call: _Call, given: Tensor | None) -> Iterator[None]:
    """Have a block return the given hidden states, or those it is called with."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = hidden_of(args, kwargs)[0] if given is None else given
        return hidden if call.outputs is None else (hidden, *[None] * (call.outputs - 1))

    own = vars(block).get("forward")
    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if own is not None:
            block.forward = own


@contextmanager
def _first_call(module: nn.Module) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Catch the arguments of a module's next call; the pass that makes it ends there."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Reached

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with suppress(_Reached):
            yield seen
    finally:
        handle.remove()
