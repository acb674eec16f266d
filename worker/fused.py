"""Linear layers that a model stores in another shape: transposed, or as slices of one tensor for all experts.

Both are given a module of their own here, on a view of the model's tensor, so that whoever looks for linear layers
finds them and may put another module in their place. Needs torch and transformers only, as the loader does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

_PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)


class TransposedLinear(nn.Linear):
    """A linear layer on the weight of a `Conv1D`: `weight` is a view of it; a state dict holds it as ever, `n x m`."""

    def __init__(self, original: Conv1D) -> None:
        """Shares the tensors of the original layer."""
        super().__init__(original.nx, original.nf, device="meta")
        self.weight = nn.Parameter(original.weight.detach().mT, requires_grad=original.weight.requires_grad)
        self.bias = original.bias
        self.train(original.training)

    def original(self) -> Conv1D:
        """The layer as the model has it, on the same tensors."""
        return as_conv1d(self)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"].mT

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        key = f"{prefix}weight"
        turned = {**state_dict, key: state_dict[key].mT} if key in state_dict else state_dict
        super()._load_from_state_dict(turned, prefix, *args)


#: Layers that compute `W x + b` and nothing else.
PLAIN = (nn.Linear, TransposedLinear)


def as_conv1d(linear: nn.Linear) -> Conv1D:
    """A linear layer in the form that stores its weight transposed, on the same tensors."""
    with torch.device("meta"):
        layer = Conv1D(linear.out_features, linear.in_features)
    layer.weight = nn.Parameter(linear.weight.detach().mT, requires_grad=linear.weight.requires_grad)
    layer.bias = linear.bias
    return layer.train(linear.training)


class FusedExperts(nn.Module):
    """Stands in for a parameter that holds one matrix per expert: a linear layer for each, on a slice of the tensor.

    The model's own code goes on as before: where it multiplies by `experts[index]`, the layer of that index runs.

    Attributes:
        transposed: Whether the slices of the tensor are `n x m`, to be multiplied from the right.
    """

    def __init__(self, tensor: Tensor, *, transposed: bool) -> None:
        """Shares the tensor.

        Args:
            tensor: `experts x m x n`, or `experts x n x m` if transposed.
            transposed: Which of the two.
        """
        super().__init__()
        self.transposed = transposed
        for index, matrix in enumerate(tensor.detach()):
            weight = matrix.mT if transposed else matrix
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(weight, requires_grad=tensor.requires_grad)
            self.add_module(str(index), layer)

    def __getitem__(self, index: int | Tensor) -> _Slice:
        """What the model multiplies by."""
        return _Slice(self.get_submodule(str(int(index))), self.transposed)

    def __len__(self) -> int:
        """Number of experts."""
        return len(self._modules)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the model's own tensor."""
        first: Any = self.get_submodule("0")
        sizes = (first.in_features, first.out_features)
        return (len(self), *(sizes if self.transposed else sizes[::-1]))

    def fused(self) -> Tensor:
        """A copy of the model's own tensor, as long as every expert is dense."""
        weights: list[Tensor] = [layer.get_parameter("weight").detach() for layer in self.children()]
        return torch.stack([weight.mT if self.transposed else weight for weight in weights])


class _Slice:
    """One expert's matrix, as the model's code multiplies by it: the product is what its layer makes of the input."""

    def __init__(self, layer: nn.Module, transposed: bool) -> None:
        self.layer, self.transposed = layer, transposed

    def __rmatmul__(self, features: Tensor) -> Any:
        return self.layer(features) if self.transposed else NotImplemented

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        features, matrix, *rest = args
        if not isinstance(matrix, cls) or function not in (_PRODUCTS if matrix.transposed else (F.linear,)):
            return NotImplemented
        bias = rest[0] if rest else (kwargs or {}).get("bias")
        product = matrix.layer(features)
        return product if bias is None else product + bias


def unfuse(model: nn.Module, path: str, *, transposed: bool) -> None:
    """Put `FusedExperts` in the place of a parameter.

    Args:
        model: Changed in place; it must run its experts one by one (`run_eagerly`).
        path: The parameter's, `experts x m x n`.
        transposed: As in `FusedExperts`.
    """
    place, _, name = path.rpartition(".")
    owner = model.get_submodule(place)
    experts = FusedExperts(owner.get_parameter(name), transposed=transposed).train(owner.training)
    delattr(owner, name)
    setattr(owner, name, experts)
    # transformers would fill the parameter that is no longer there with random numbers
    owner._is_hf_initialized = True  # type: ignore[assignment]


def fuse(model: nn.Module, path: str) -> None:
    """Put the parameter back that `unfuse` took, if every expert is dense and without a bias of its own."""
    place, _, name = path.rpartition(".")
    owner, experts = model.get_submodule(place), model.get_submodule(path)
    plain = all(type(layer) is nn.Linear and layer.bias is None for layer in experts.children())
    if isinstance(experts, FusedExperts) and plain:
        trained = any(parameter.requires_grad for parameter in experts.parameters())
        tensor = nn.Parameter(experts.fused(), requires_grad=trained)
        delattr(owner, name)
        setattr(owner, name, tensor)


def run_eagerly(model: Any) -> None:
    """Have the model multiply by one expert after the other; transformers 5 has kernels that read the whole tensor."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")


def layout(model: nn.Module, name: str) -> dict[str, bool]:
    """How the model stores a target's matrix, where that is not `m x n`: `transposed`, or `fused` with others."""
    owner = model.get_submodule(name.rpartition(".")[0])
    fused = isinstance(owner, FusedExperts)
    alone = isinstance(model.get_submodule(name), TransposedLinear)
    transposed = owner.transposed if isinstance(owner, FusedExperts) else alone
    return {key: True for key, value in (("fused", fused), ("transposed", transposed)) if value}
