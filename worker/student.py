"""The student of a trained refinement: a compressed model in the dense model's own modules, and its loss.

Per predicted token, with p the dense distribution, q the student's and y the text's next token,

    L = KL(p || q) - c log q_y,        dL/dz = (1 + c) q - p - c e_y        (z the student's logits)

Logits exist for a small chunk of tokens only: the gradient is formed chunk by chunk at the final hidden states and goes
on from there. It is summed over tokens and divided in fp32 at the end, so that half precision does not round it to
zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ranksearch.search.errors import InvalidInput
from ranksearch.worker.frozen import frozen
from ranksearch.worker.placement import fetched
from ranksearch.worker.readout import Readout

Product = Callable[[Tensor], Tensor | None]
"""What the student puts in the place of W x, `... x n` to `... x m`, without the bias; None to run dense."""

#: Bytes that the logits of a chunk, and what is made of them, may take.
LOGIT_BYTES = 128 << 20

#: Activations of one pass, in bytes, above which blocks are run again in the backward pass instead of remembered.
ACTIVATION_BYTES = 4 << 30

#: Tokens per forward and backward pass, at most (or one sequence).
PASS_TOKENS = 8192


class StudentLinear(nn.Module):
    """A linear layer that runs dense for the teacher and through a product for the student."""

    def __init__(self, dense: nn.Linear, product: Product) -> None:
        """Shares everything it is given.

        Args:
            dense: The original layer.
            product: What is trained in the place of its weight.
        """
        super().__init__()
        self.dense = dense
        self.teaching = False
        self._product = product

    @property
    def weight(self) -> Tensor:
        """The dense weight: some models look at a projection's dtype or device."""
        return self.dense.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias, the same for both."""
        return self.dense.bias

    def forward(self, x: Tensor) -> Tensor:
        """`... x n` to `... x m`."""
        y = None if self.teaching else self._product(x)
        if y is None:
            return F.linear(x, self.dense.weight, self.dense.bias)
        return y if self.dense.bias is None else y + self.dense.bias


class Student:
    """A model that computes with products in the place of its targets, and can be its own dense teacher.

    While it is open, the model's parameters ask for no gradient and blocks forget their activations where a pass would
    keep more than `ACTIVATION_BYTES` of them, or where blocks are fetched. On the CPU the model computes in fp32,
    elsewhere in its own dtype: not every CPU multiplies half precision quickly.

    Attributes:
        model: The model, its targets replaced.
        readout: Its hidden states and logits.
    """

    def __init__(self, model: nn.Module, products: Mapping[str, Product], blocks: Tensor) -> None:
        """Prepares; `with` opens it and puts everything back.

        Args:
            model: The dense model in eval mode.
            products: Target -> what runs in its place.
            blocks: Token ids, `sequences x length`, of the length to train on.
        """
        if blocks.ndim != 2 or blocks.shape[0] < 1 or blocks.shape[1] < 2:
            raise InvalidInput(f"Training needs sequences of at least two tokens; got shape {tuple(blocks.shape)}.")
        self.model, self._products, self._blocks = model, products, blocks
        self._rows = max(1, PASS_TOKENS // blocks.shape[1])
        self._modules: list[StudentLinear] = []
        self._stack = ExitStack()

    def __enter__(self) -> Student:
        """Opens."""
        with ExitStack() as stack:
            stack.enter_context(frozen(self.model))
            stack.enter_context(_computing(self.model, compute_dtype(self.model)))
            kept = _activations(self.model, self._products, self._rows * self._blocks.shape[1])
            # a graph would hold on to the copies of all blocks at once
            if fetched(self.model) or kept > ACTIVATION_BYTES:
                stack.enter_context(_forgetful(self.model, self._products))
            for name, product in self._products.items():
                dense = self.model.get_submodule(name)
                assert isinstance(dense, nn.Linear)
                self._modules.append(StudentLinear(dense, product))
                self.model.set_submodule(name, self._modules[-1])
                stack.callback(self.model.set_submodule, name, dense)
            stack.callback(self._modules.clear)
            with self.teaching():
                self.readout = Readout(self.model, self._blocks)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        """Puts the model back as it was."""
        self._stack.close()

    @contextmanager
    def teaching(self) -> Iterator[None]:
        """The model runs dense."""
        for module in self._modules:
            module.teaching = True
        try:
            yield
        finally:
            for module in self._modules:
                module.teaching = False

    def learn(self, ids: Tensor, leaves: Sequence[Tensor], *, ce_weight: float = 0.0) -> float:
        """Puts the gradient of the mean loss of a batch into `leaf.grad` of every leaf.

        Args:
            ids: Token ids, `sequences x length`.
            leaves: What is trained.
            ce_weight: Weight c of the text's own cross-entropy.

        Returns:
            Mean KL per predicted token, nats; perhaps not finite.

        Raises:
            torch.OutOfMemoryError: The device has too little memory even for one sequence.
        """
        while True:
            for leaf in leaves:
                leaf.grad = None
            try:
                sums = [self._pass(part, ce_weight) for part in ids.split(self._rows)]
                break
            except torch.OutOfMemoryError:
                if self._rows == 1:
                    raise
                self._rows = max(1, min(self._rows, len(ids)) // 2)
        tokens = ids.shape[0] * (ids.shape[1] - 1)
        for leaf in leaves:
            leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.div_(tokens)
        return float(torch.stack(sums).sum()) / tokens

    def _pass(self, ids: Tensor, ce_weight: float) -> Tensor:
        ids = ids.to(self.readout.device)
        with torch.no_grad(), self.teaching():
            dense = self.readout.hidden(ids)
        hidden = self.readout.hidden(ids)
        gradient, kl = loss_gradient(self.readout, hidden.detach(), dense, ids, ce_weight=ce_weight)
        del dense
        hidden.backward(gradient)
        return kl


def loss_gradient(
    readout: Readout, hidden: Tensor, dense: Tensor, ids: Tensor, *, ce_weight: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Gradient of the loss, summed over predicted tokens, at the student's final hidden states.

    Args:
        readout: Makes the logits of both.
        hidden: The student's, `batch x length x d`.
        dense: The teacher's, likewise.
        ids: Token ids, `batch x length`.
        ce_weight: Weight c of the cross-entropy.

    Returns:
        The gradient, `batch x length x d`, and the summed KL, fp32, a scalar.
    """
    width = hidden.shape[-1]
    chunk = max(1, LOGIT_BYTES // (24 * readout.vocabulary))
    parts, total = [], torch.zeros((), device=hidden.device)
    flat = [hidden[:, :-1].reshape(-1, width), dense[:, :-1].reshape(-1, width), ids[:, 1:].reshape(-1)]
    for h, t, y in zip(*(each.split(chunk) for each in flat), strict=True):
        leaf = h.detach().requires_grad_()
        with torch.enable_grad():
            logits = readout.logits(leaf)
        with torch.no_grad():
            slope, kl = _slope(logits.float(), readout.logits(t).float(), y, ce_weight)
        parts.append(torch.autograd.grad(logits, leaf, slope.to(logits.dtype))[0])
        total += kl
    gradient = torch.zeros_like(hidden)
    gradient[:, :-1] = torch.cat(parts).view(*hidden[:, :-1].shape)
    return gradient, total


def _slope(logits: Tensor, dense: Tensor, labels: Tensor, ce_weight: float) -> tuple[Tensor, Tensor]:
    """dL/dz, `tokens x vocabulary`, and the summed KL of a chunk of fp32 logits."""
    log_q, log_p = logits.log_softmax(-1), dense.log_softmax(-1)
    p = log_p.exp()
    kl = (p * (log_p - log_q)).sum()
    slope = log_q.exp_().mul_(1 + ce_weight).sub_(p)
    if ce_weight:
        slope[torch.arange(len(labels), device=labels.device), labels] -= ce_weight
    return slope, kl


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The dtype a student computes in: fp32 on the CPU, the model's own elsewhere."""
    parameter = next(model.parameters())
    return torch.float32 if parameter.device.type == "cpu" else parameter.dtype


@contextmanager
def _computing(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Parameters and buffers of the model's dtype in another one; the very same values come back afterwards."""
    own = next(model.parameters()).dtype
    # buffers in another precision than the model's are so on purpose
    originals = [(t, t.data) for t in (*model.parameters(), *model.buffers()) if t.dtype == own]
    for tensor, data in originals if own != dtype else ():
        tensor.data = data.to(dtype)
    try:
        yield
    finally:
        for tensor, data in originals:
            tensor.data = data


@contextmanager
def _forgetful(model: nn.Module, names: Mapping[str, Any]) -> Iterator[None]:
    """Blocks keep only their inputs and run again in the backward pass.

    The models' own switch for it works in training mode only, where dropout would set the student apart from its
    teacher.
    """
    with ExitStack() as stack:
        for path in dict.fromkeys(_block_of(model, name) for name in names):
            block: Any = model.get_submodule(path)
            stack.callback(_put_back, block, vars(block).get("forward"))
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        yield


def _put_back(block: Any, own: Any) -> None:
    """Gives a block the `forward` of its own that it had (as `fetch_blocks` installs one), or that of its class."""
    del block.forward
    if own is not None:
        block.forward = own


def _block_of(model: nn.Module, name: str) -> str:
    """Path of the decoder block that a target lies in."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:depth])), nn.ModuleList):
            return ".".join(parts[: depth + 1])
    return name


def _activations(model: nn.Module, names: Mapping[str, Any], tokens: int) -> int:
    """Bytes a backward pass over so many tokens keeps, roughly: what goes into and out of each target, and again."""
    modules = [model.get_submodule(name) for name in names]
    features = sum(m.in_features + m.out_features for m in modules if isinstance(m, nn.Linear))
    return 2 * features * tokens * compute_dtype(model).itemsize
