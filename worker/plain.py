"""Giving every weight matrix of a loaded model a plain linear layer of its own, without copying a weight.

Transposed layers become views; a tensor that holds the matrices of all experts becomes one layer per expert. Whether
the model's own code runs on with those is tried on a few tokens, tensor by tensor: nothing depends on a model's name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ranksearch.worker.compare import same_but_for_rounding
from ranksearch.worker.fused import PLAIN, FusedExperts, TransposedLinear, fuse, run_eagerly, unfuse

PROBE_TOKENS = 8
PROBE_SCALES = (1e-3, 1.0, 1e3)

log = logging.getLogger("ranksearch.worker")

_Call = tuple[tuple[Any, ...], dict[str, Any]]


@torch.no_grad()
def make_plain(model: Any) -> None:
    """Replace transposed layers and fused expert tensors by plain linear layers on views of their weights.

    So is a linear layer of the model's own class, if it computes what a plain one does. What does something else - a
    router, or an expert tensor that is not used expert by expert - stays as it is and is no target, and neither is a
    layer that is never called but whose weight the model reads (`uncalled`).

    Args:
        model: A causal language model in evaluation mode, changed in place; it computes what it did before.
    """
    for path, module in list(model.named_modules()):
        if type(module) is Conv1D:
            model.set_submodule(path, TransposedLinear(module))
        elif isinstance(module, nn.Linear) and type(module) not in PLAIN and _is_linear(module):
            model.set_submodule(path, _plain(module))
    tensors = _expert_tensors(model)
    if tensors:
        _take_apart(model, tensors)
    linears = {path: path for path, module in model.named_modules() if type(module) in PLAIN}
    called = {generic(path) for path in _calls(model, linears)}
    model.uncalled = frozenset(generic(path) for path in linears) - called


def generic(path: str) -> str:
    """A module path without the indices in it, the same for every layer and expert."""
    return ".".join(part for part in path.split(".") if not part.isdecimal())


def _take_apart(model: Any, tensors: Mapping[str, list[str]]) -> None:
    run_eagerly(model)
    calls = _calls(model, tensors)
    for owner, names in tensors.items():
        paths = [f"{owner}.{name}" if owner else name for name in names]
        if owner not in calls or not _unfused(model, owner, paths, calls[owner]):
            log.warning("No use of %s expert by expert was seen, so no target is made of it", " and ".join(paths))
    if not any(isinstance(module, FusedExperts) for module in model.modules()):
        _run_by_default(model)


@contextmanager
def as_loaded(model: Any) -> Iterator[None]:
    """Undo `make_plain` for a while, for what must see the model as its users run it; one expert tensor is copied at a
    time."""
    undone = restore(model)
    try:
        yield
    finally:
        if undone:
            run_eagerly(model)
        for path, transposed in undone.items():
            unfuse(model, path, transposed=transposed)
        for path, module in list(model.named_modules()):
            if type(module) is Conv1D:
                model.set_submodule(path, TransposedLinear(module))


@torch.no_grad()
def restore(model: Any) -> dict[str, bool]:
    """Undo `make_plain` wherever every matrix is dense.

    Returns:
        The path of each expert tensor that was put back, and whether its slices are transposed.
    """
    undone: dict[str, bool] = {}
    for path, module in list(model.named_modules()):
        if type(module) is TransposedLinear:
            model.set_submodule(path, module.original())
        elif isinstance(module, FusedExperts):
            fuse(model, path)
            undone |= {path: module.transposed}
    left = {path for path, module in model.named_modules() if isinstance(module, FusedExperts)}
    if undone and not left:
        _run_by_default(model)
    return {path: transposed for path, transposed in undone.items() if path not in left}


def _is_linear(module: nn.Linear) -> bool:
    weight = module.weight
    if type(weight.data) is not Tensor or not weight.is_floating_point():
        return False
    width, bias = weight.shape[1], module.bias
    if not _multiplies(module, torch.eye(min(width, PROBE_TOKENS), width).to(weight).unsqueeze(0)):
        return False
    # large or small values may be changed first; beside a bias small ones would not be seen
    features = torch.randn(1, PROBE_TOKENS, width, generator=torch.Generator().manual_seed(0))
    if bias is not None:
        module.bias = nn.Parameter(torch.zeros_like(bias), requires_grad=False)
    try:
        return all(_multiplies(module, (features * scale).to(weight)) for scale in PROBE_SCALES)
    finally:
        module.bias = bias


def _multiplies(module: nn.Linear, features: Tensor) -> bool:
    try:
        output = module(features)
    except (TypeError, ValueError, RuntimeError):
        return False
    return isinstance(output, Tensor) and _same([output], [F.linear(features, module.weight, module.bias)])


def _plain(module: nn.Linear) -> nn.Linear:
    linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    linear.weight, linear.bias = module.weight, module.bias
    return linear.train(module.training)


def _run_by_default(model: Any) -> None:
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(None)


def _expert_tensors(model: nn.Module) -> dict[str, list[str]]:
    """Module path -> names of its parameters that hold equally many matrices each."""
    found: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        cubes = {
            name: tensor
            for name, tensor in module.named_parameters(recurse=False)
            if tensor.ndim == 3 and tensor.is_floating_point() and min(tensor.shape) > 1
        }
        # a layer of torch itself, a convolution, uses its weight as a whole
        if cubes and not type(module).__module__.startswith("torch.") and len({len(t) for t in cubes.values()}) == 1:
            found[path] = list(cubes)
    return found


def _calls(model: Any, owners: Mapping[str, Any]) -> dict[str, _Call]:
    """How each of the modules is called first when the model reads a few tokens."""
    calls: dict[str, _Call] = {}
    hooks = []
    for path in owners:

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
            calls.setdefault(path, (args, kwargs))

        hooks.append(model.get_submodule(path).register_forward_pre_hook(see, with_kwargs=True))
    embedding = model.get_input_embeddings().weight
    ids = torch.arange(1, PROBE_TOKENS + 1, device=embedding.device) % embedding.shape[0]
    try:
        model(input_ids=ids.unsqueeze(0), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _unfused(model: nn.Module, owner: str, paths: list[str], call: _Call) -> bool:
    """Try to take the tensors of one module apart; they are as before where it does not compute the same."""
    module = model.get_submodule(owner)
    args, kwargs = call
    expected = _tensors(module(*args, **kwargs))
    kept = {path: model.get_parameter(path) for path in paths}
    for transposed in (False, True):
        for path in paths:
            unfuse(model, path, transposed=transposed)
        try:
            if _same(_tensors(module(*args, **kwargs)), expected):
                return True
        except (TypeError, AttributeError, IndexError, KeyError, ValueError, RuntimeError) as error:
            log.debug("%s cannot be taken apart, transposed %s: %s", owner, transposed, error)
        for path, parameter in kept.items():
            name = path.rpartition(".")[2]
            delattr(module, name)
            setattr(module, name, parameter)
    return False


def _tensors(output: Any) -> list[Tensor]:
    return [part for part in (output if isinstance(output, tuple) else (output,)) if isinstance(part, Tensor)]


def _same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(
        a.shape == b.shape and (not b.is_floating_point() or same_but_for_rounding(a, b))
        for a, b in zip(ours, theirs, strict=True)
    )
