"""Pretend devices: tensors that lie on the CPU and insist that they are somewhere else.

Within `pretending()`, `meta:0` and `meta:1` behave as two cards do: an operation on tensors of two devices raises as
CUDA does (0-dim CPU tensors may mix), and whatever is asked for on a device comes back there. All numbers are computed
on the CPU. The type `meta` stands for them as autograd knows it and needs no driver for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CPU = torch.device("cpu")
ONE, TWO = torch.device("meta:0"), torch.device("meta:1")

#: Operations that may be given tensors of two devices; what comes back is where the first one is, or as asked.
COPIES = (aten.copy_, aten._to_copy)


class Placed(Tensor):
    """A tensor on a pretend device."""

    @staticmethod
    def __new__(cls, data: Tensor, device: torch.device | None = None, requires_grad: bool = False) -> Placed:
        if isinstance(data, Placed):
            data, device = data.on_cpu, data.device
        placed = Tensor._make_wrapper_subclass(
            cls,
            data.shape,
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            device=device,
            requires_grad=requires_grad,
        )
        placed.on_cpu = data
        return placed

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})

    # what torch does not dispatch

    def __repr__(self) -> str:
        return f"Placed({self.on_cpu!r}, {self.device})"

    def tolist(self) -> Any:
        return self.on_cpu.tolist()

    def data_ptr(self) -> int:
        return self.on_cpu.data_ptr()

    def untyped_storage(self) -> Any:
        return self.on_cpu.untyped_storage()


@contextmanager
def pretending() -> Iterator[None]:
    """The devices are there."""
    with _FromData(), _Factories():
        yield


class _FromData(TorchFunctionMode):
    """`torch.tensor` knows what to make of the device `meta` by itself: a tensor without data."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        return function(*args, **kwargs)


class _Factories(TorchDispatchMode):
    """Sees operations that no tensor on a pretend device goes into."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(map(_is_placed, _leaves((args, kwargs)))):
            return function(*args, **kwargs)
        if _composite(function):  # in inference mode nothing has taken it apart yet
            with self:
                return function.decompose(*args, **kwargs)
        return _run(function, args, kwargs)


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    device = _device(function, kwargs.get("device"), tensors)
    if function.overloadpacket is aten._fused_sdp_choice:
        return 0  # attention in single operations: the fused ones are other functions on every device
    inner, options = _map(lambda x: x.on_cpu if isinstance(x, Placed) else x, (args, kwargs))
    if options.get("device") is not None:
        options["device"] = CPU
    result = function(*inner, **options)
    given = {id(tensor.on_cpu): tensor for tensor in tensors if isinstance(tensor, Placed)}

    def placed(x: Any) -> Any:
        if not isinstance(x, Tensor) or device.type == "cpu":
            return x
        return given.get(id(x)) if id(x) in given else Placed(x, device)

    return _map(placed, result)


def _device(function: Any, asked: Any, tensors: list[Tensor]) -> torch.device:
    """Where the result lies."""
    if asked is not None:
        return torch.device(asked)
    if function.overloadpacket in COPIES:
        return tensors[0].device
    devices = {tensor.device for tensor in tensors if tensor.ndim > 0 or tensor.device != CPU}
    if len(devices) > 1:
        names = " and ".join(sorted(map(str, devices)))
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {names} in {function}")
    return devices.pop() if devices else CPU


@cache
def _composite(function: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd")


def _is_placed(leaf: Any) -> bool:
    return isinstance(leaf, Placed) or (isinstance(leaf, torch.device) and leaf in (ONE, TWO))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value


def _map(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)([_map(change, part) for part in value])
    if isinstance(value, dict):
        return {key: _map(change, part) for key, part in value.items()}
    return change(value)
