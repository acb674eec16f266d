"""Running a model at any rank vector without building it: each target runs a prefix of its factors in the bank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType

from torch import Tensor, nn
from torch.nn import functional as F

from ranksearch.search.errors import InvalidInput
from ranksearch.search.targets import Target
from ranksearch.worker.bank import FactorBank
from ranksearch.worker.centred_bias import CentredBias

Pair = tuple[Tensor, Tensor]
"""The factors of one target: `left` `m x r` and `right` `r x n`."""


class PrefixLinear(nn.Module):
    """A linear layer that runs dense or through the first `rank` components of its factors.

    y = left' (right x) + b, with left `r x m` and right `r x n`: both are contiguous row slices. What runs is taken to
    the input's device if it is elsewhere, that prefix and no more.
    """

    #: Why `fetch_blocks` leaves this layer alone.
    fetches_itself = True

    def __init__(self, dense: nn.Linear, left: Tensor, right: Tensor, mean: Tensor | None = None) -> None:
        """Shares everything it is given; nothing is copied.

        Args:
            dense: The original layer.
            left: `k x m`, transposed left factor.
            right: `k x n`.
            mean: `n`, mean of the inputs, if a prefix needs `CentredBias`.
        """
        super().__init__()
        self.dense = dense
        self._factors = (left, right)
        self._prefix: Pair | None = None
        self._centred = None if mean is None else CentredBias(dense, mean)
        self._shifted: Tensor | None = None  # the bias of the prefix, if it has one of its own

    @property
    def weight(self) -> Tensor:
        """The dense weight: some models look at a projection's dtype or device."""
        return self.dense.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias that runs: the dense one at any rank, unless the factors are centred."""
        return self.dense.bias if self._shifted is None else self._shifted

    @property
    def stored(self) -> int:
        """Components in the bank."""
        return self._factors[1].shape[0]

    def components(self, low: int, high: int) -> Pair:
        """Components `low` to `high` of the factors, whether they run or not: left `k x m` and right `k x n`."""
        left, right = self._factors
        return left[low:high], right[low:high]

    def passed(self, x: Tensor) -> Tensor:
        """The part of the inputs `... x n` that goes through the components; the bias sees to the rest of it."""
        return x if self._centred is None else x - self._centred.mean.to(x)

    def set_rank(self, rank: int | None) -> None:
        """Chooses the first `rank` components, or the dense weight for None."""
        left, right = self._factors
        self._prefix = None if rank is None else (left[:rank].mT, right[:rank])
        self._shifted = self._centred(*self._prefix) if self._centred and self._prefix else None

    def set_pair(self, pair: Pair | None) -> None:
        """Runs through other factors, `left` `m x r` and `right` `r x n`, or dense for None."""
        self._prefix, self._shifted = pair, None

    def forward(self, x: Tensor) -> Tensor:
        """`... x n` to `... x m`."""
        bias = None if self.bias is None else self.bias.to(x.device)
        if self._prefix is None:
            return F.linear(x, self.dense.weight.to(x.device), bias)
        left, right = self._prefix
        return F.linear(F.linear(x, right.to(x.device)), left.to(x.device), bias)


class PrefixModel:
    """Swaps the targets of a model for `PrefixLinear`; the model itself stays the caller's.

    Example:
        with PrefixModel(model, bank, targets) as prefix:
            prefix.set_ranks({"model.layers.0.mlp.down_proj": 32})
            model(input_ids=ids)
    """

    def __init__(self, model: nn.Module, bank: FactorBank, targets: Sequence[Target]) -> None:
        """Swaps the modules; every target runs dense until `set_ranks`.

        Args:
            model: The dense model; inference only while its targets are swapped.
            bank: Its factors, in the model's dtype, or they are copied once. Those on the CPU beside a model elsewhere
                stay there, and are taken over slice by slice whenever they run.
            targets: The targets in the bank.
        """
        self.model = model
        self._targets = {target.name: target for target in targets}
        self._modules: dict[str, PrefixLinear] = {}
        for name in self._targets:
            dense = model.get_submodule(name)
            assert isinstance(dense, nn.Linear)
            left, right = (side[name].to(dense.weight.dtype) for side in (bank.left, bank.right))
            module = PrefixLinear(dense, left, right, bank.means.get(name))
            self._modules[name] = module.train(dense.training)
        for name, module in self._modules.items():
            model.set_submodule(name, module)

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets that are swapped."""
        return tuple(self._targets.values())

    def set_ranks(self, ranks: Mapping[str, int]) -> None:
        """Chooses a rank for each target; allocates and copies nothing but the biases of centred factors.

        Args:
            ranks: Target -> rank; its full rank, or leaving it out, means dense.

        Raises:
            InvalidInput: A name is no target, or a rank is not in the bank. Nothing has changed then.
        """
        for name, rank in ranks.items():
            if name not in self._modules:
                raise InvalidInput(f"{name} is not a target of this model.", target=name)
            stored = self._modules[name].stored
            if rank != self._targets[name].full_rank and not 1 <= rank <= stored:
                raise InvalidInput(
                    f"Rank {rank} of {name} is neither dense ({self._targets[name].full_rank}) "
                    f"nor in the bank (1 to {stored}).",
                    target=name,
                    rank=rank,
                )
        for name, module in self._modules.items():
            rank = ranks.get(name, self._targets[name].full_rank)
            module.set_rank(None if rank == self._targets[name].full_rank else rank)

    def set_pairs(self, pairs: Mapping[str, Pair]) -> None:
        """Runs the named targets through the given factors and all others dense.

        Args:
            pairs: Target -> `left` `m x r` and `right` `r x n`, where the target computes and in the model's dtype.
        """
        for name, module in self._modules.items():
            module.set_pair(pairs.get(name))

    def dense_weight(self, name: str) -> Tensor:
        """The original weight of a target, `m x n`."""
        return self._modules[name].weight.detach()

    def set_dense(self) -> None:
        """Runs every target dense."""
        self.set_ranks({})

    def close(self) -> None:
        """Puts the original modules back."""
        for name, module in self._modules.items():
            self.model.set_submodule(name, module.dense)
        self._modules = {}

    def __enter__(self) -> PrefixModel:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes."""
        self.close()
