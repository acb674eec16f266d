"""Finds the matrices that may be compressed, by the structure of a model and never by its family's name.

A decoder keeps its repeated blocks in an `nn.ModuleList`. The outermost such lists that hold an `nn.Linear` are the
blocks; every `nn.Linear` beneath them is a target. Embeddings and the output head are not, nor are the towers that a
model has for anything but text: the text's blocks are those nearest to the embedding of its tokens.
"""

from __future__ import annotations

import torch
from torch import nn

from ranksearch.search.errors import BrokenWeights, UnsupportedModel
from ranksearch.search.targets import Target
from ranksearch.worker.fused import PLAIN, FusedExperts
from ranksearch.worker.plain import generic


def find_targets(model: nn.Module) -> tuple[Target, ...]:
    """Lists the targets of a model in the order of its modules.

    A matrix for which not even rank 1 saves a parameter (a gate with one output, say) is left out: it can only be
    dense.

    Args:
        model: Any causal language model, made plain (`make_plain`) if its weights are transposed or fused.

    Returns:
        One `Target` for each matrix; `kind` is the path below the block, with the places of experts and in inner lists
        left out.

    Raises:
        UnsupportedModel: No target exists, or the weights are quantized or factored already.
    """
    family = type(model).__name__
    if getattr(getattr(model, "config", None), "quantization_config", None):
        raise UnsupportedModel(f"{family} is already quantized or compressed; submit the original checkpoint.")
    excluded, uncalled = _embeddings(model), getattr(model, "uncalled", ())
    stacks = _stacks(model)
    targets = []
    for path, stack in stacks.items():
        prefix = f"{path}." if len(stacks) > 1 else ""
        for depth, block in enumerate(stack):
            for below, module in block.named_modules():
                if not isinstance(module, nn.Linear) or id(module) in excluded:
                    continue
                name = f"{path}.{depth}.{below}" if below else f"{path}.{depth}"
                _check_unquantized(name, module)
                # the output of a router, say, is not the product alone
                if type(module) not in PLAIN or generic(name) in uncalled:
                    continue
                target = Target(
                    name=name,
                    out_features=module.out_features,
                    in_features=module.in_features,
                    kind=prefix + _kind(block, below),
                    depth=depth,
                )
                if target.break_even >= 1:
                    targets.append(target)
    if not targets:
        raise UnsupportedModel(
            f"{family} has no linear layer in a list of repeated blocks, so there is nothing to compress.",
            model=family,
        )
    return tuple(targets)


def block_stack(model: nn.Module) -> list[str]:
    """Module paths of the decoder blocks of a model with one stack of them, in order.

    Raises:
        UnsupportedModel: There is no such stack, or more than one.
    """
    stacks = _stacks(model)
    if len(stacks) != 1:
        raise UnsupportedModel(f"{type(model).__name__} has {len(stacks)} stacks of blocks; one is needed here.")
    ((path, stack),) = stacks.items()
    return [f"{path}.{depth}" for depth in range(len(stack))]


def block_of(model: nn.Module, target: Target) -> str:
    """Module path of the decoder block that holds a target."""
    parts = target.name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        # the outermost list of modules on the way down is the stack of blocks
        if isinstance(model.get_submodule(path.rpartition(".")[0]), nn.ModuleList):
            return path
    raise ValueError(f"{target.name} lies in no list of blocks")


def check_weights(model: nn.Module) -> None:
    """Refuses a model with NaN or infinite parameters.

    Raises:
        BrokenWeights: Names the first tensor that is not finite (`data["tensor"]`).
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        # min and max carry NaN and Inf through and, unlike isfinite(), allocate nothing
        if parameter.numel() and not bool(torch.stack(torch.aminmax(parameter.detach())).isfinite().all()):
            raise BrokenWeights(
                f"The weight {name} holds NaN or infinite values; download the checkpoint again or repair it.",
                tensor=name,
            )


def _stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists of blocks that read text: under the smallest module that holds the token embedding and such a list,
    those that lie least deep."""
    stacks = _all_stacks(model)
    path = next((path for path, module in model.named_modules() if module is embedding_of(model)), "")
    while path:
        path = path.rpartition(".")[0]
        depths = {name: name.count(".") for name in stacks if name.startswith(f"{path}." if path else "")}
        if depths:
            return {name: stacks[name] for name, depth in depths.items() if depth == min(depths.values())}
    return stacks


def _all_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    stacks: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in stacks)
        if isinstance(module, nn.ModuleList) and not inside and any(isinstance(m, nn.Linear) for m in module.modules()):
            stacks[path] = module
    return stacks


def embedding_of(model: nn.Module, getter: str = "get_input_embeddings") -> nn.Module | None:
    """The table of token embeddings of a model, or what another of its getters finds; None where there is none."""
    try:
        module: nn.Module | None = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None
    return module


def _embeddings(model: nn.Module) -> set[int]:
    found = (embedding_of(model, getter) for getter in ("get_input_embeddings", "get_output_embeddings"))
    return {id(module) for module in found if module is not None}


def _check_unquantized(name: str, module: nn.Linear) -> None:
    if type(module.weight.data) is not torch.Tensor or not module.weight.is_floating_point():
        raise UnsupportedModel(
            f"{name} is a {type(module).__name__} with {module.weight.dtype} weights; "
            "submit the original, unquantized checkpoint.",
            target=name,
        )


def _kind(block: nn.Module, below: str) -> str:
    parts, module = [], block
    for part in below.split(".") if below else []:
        if not isinstance(module, (nn.ModuleList, FusedExperts)):
            parts.append(part)
        module = module.get_submodule(part)
    return ".".join(parts) or type(block).__name__
