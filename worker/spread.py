"""A model laid over several devices: each decoder block on one of them, everything else on the first, the main one.

One block runs after the other, so several devices hold a larger model than one and are no faster. accelerate's hooks
take what a block is called with to its device; outside of blocks nothing has to know.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import nn

from ranksearch.worker.targets import block_stack

#: Steps in which the part of each device that is filled grows until the blocks fit.
STEPS = 50


def spread_blocks(model: nn.Module, devices: Sequence[torch.device], rooms: Sequence[float]) -> bool:
    """Moves a model to several devices, consecutive blocks together, in proportion to the room there is.

    Args:
        model: A causal language model on the CPU, plain already, without gradients of its parameters.
        devices: The first one takes all but the blocks as well.
        rooms: Bytes that weights may take on each.

    Returns:
        Whether it was done; nothing has changed if the weights do not fit, or blocks share some.

    Raises:
        UnsupportedModel: It has no one stack of blocks.
    """
    from accelerate import dispatch_model
    from accelerate.utils import set_module_tensor_to_device

    paths = block_stack(model)
    inside = [parameter for path in paths for parameter in model.get_submodule(path).parameters()]
    if len(set(inside)) < len(inside):
        return False
    sizes = [sum(parameter.nbytes for parameter in model.get_submodule(path).parameters()) for path in paths]
    places = lay(sizes, rooms, beside=sum(parameter.nbytes for parameter in model.parameters()) - sum(sizes))
    if places is None:
        return False
    outside = list(_outside(model, "", set(paths)))
    where = dict.fromkeys(outside, devices[0]) | dict(zip(paths, (devices[place] for place in places), strict=True))
    modules = {path for path, _ in model.named_modules()}
    for tensor in set(outside) - modules:
        set_module_tensor_to_device(model, tensor, devices[0])
    # a cache holds tensors of every block's device, and each block its own
    skip = getattr(model, "_skip_keys_device_placement", None)
    dispatch_model(model, where, main_device=devices[0], skip_keys=skip)
    return True


def lay(sizes: Sequence[int], rooms: Sequence[float], *, beside: int) -> list[int] | None:
    """Which room each of the consecutive blocks goes to, all filled to about the same share; None if they do not fit.

    Args:
        sizes: Bytes of each block.
        rooms: Bytes of each room.
        beside: Bytes that the first room holds as well.
    """
    for step in range(1, STEPS + 1):
        filled = [room * step / STEPS for room in rooms]
        places = _fill(sizes, [filled[0] - beside, *filled[1:]])
        if places is not None and beside <= rooms[0]:
            return places
    return None


def device_of(model: nn.Module, path: str) -> torch.device:
    """Where a module of a model computes: beside its weights, or, where those are fetched, on the main device."""
    own = next(model.get_submodule(path).parameters()).device
    return next(model.parameters()).device if own.type == "cpu" else own


def devices_of(model: nn.Module) -> list[torch.device]:
    """All devices that a model computes on, the main one first."""
    main, *others = dict.fromkeys(parameter.device for parameter in model.parameters())
    return [main, *(device for device in others if device.type != "cpu")]


def _fill(sizes: Sequence[int], rooms: Sequence[float]) -> list[int] | None:
    places, place, left = list[int](), 0, rooms[0]
    for size in sizes:
        while size > left:
            place += 1
            if place == len(rooms):
                return None
            left = rooms[place]
        left -= size
        places.append(place)
    return places


def _outside(model: nn.Module, path: str, blocks: Collection[str]) -> Iterator[str]:
    """Paths of the largest modules that hold no block, and of the tensors of those around them."""
    module = model.get_submodule(path)
    prefix = f"{path}." if path else ""
    tensors = {**module._parameters, **module._buffers}
    yield from (f"{prefix}{name}" for name, tensor in tensors.items() if tensor is not None)
    for name, _ in module.named_children():
        below = f"{prefix}{name}"
        if any(block.startswith(f"{below}.") for block in blocks):
            yield from _outside(model, below, blocks)
        elif below not in blocks:
            yield below
