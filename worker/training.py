"""What trained refinements share: a student in the dense model's own modules, its loss, and a resumable optimizer.

Per predicted token, with p the dense distribution, q the student's and y the text's next token,

    L = KL(p || q) - c log q_y,        dL/dz = (1 + c) q - p - c e_y        (z the student's logits)

Logits exist for a small chunk of tokens only: the gradient is formed chunk by chunk at the final hidden states and goes
on from there. It is summed over tokens and divided in fp32 at the end, so that half precision does not round it to
zero.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ranksearch.search.errors import InvalidInput, NumericalError
from ranksearch.worker.fingerprints import content_hash
from ranksearch.worker.readout import Readout

Product = Callable[[Tensor], Tensor]
"""What the student puts in the place of W x, `... x n` to `... x m`, without the bias."""

#: Bytes that the logits of a chunk, and what is made of them, may take.
LOGIT_BYTES = 128 << 20

#: Activations of one pass, in bytes, above which blocks are run again in the backward pass instead of remembered.
ACTIVATION_BYTES = 4 << 30

#: Tokens per forward and backward pass, at most (or one sequence).
PASS_TOKENS = 8192

#: Steps in a row whose loss or gradient is not finite before the training gives up.
MOST_FAILURES = 5

#: Largest norm of the gradient of all leaves together.
CLIP = 1.0

_BETAS = (0.9, 0.99)


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
        if self.teaching:
            return F.linear(x, self.dense.weight, self.dense.bias)
        y = self._product(x)
        return y if self.dense.bias is None else y + self.dense.bias


class Student:
    """A model that computes with products in the place of its targets, and can be its own dense teacher.

    While it is open, the model's parameters ask for no gradient and blocks forget their activations where a pass would
    keep more than `ACTIVATION_BYTES` of them. On the CPU the model computes in fp32, elsewhere in its own dtype: not
    every CPU multiplies half precision quickly.

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
            stack.enter_context(_frozen(self.model))
            stack.enter_context(_computing(self.model, compute_dtype(self.model)))
            if _activations(self.model, self._products, self._rows * self._blocks.shape[1]) > ACTIVATION_BYTES:
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


class Training:
    """Leaves, AdamW on them, and how far they have come, in a file that a later process goes on from.

    A resumed training does the very same steps: batches depend on the seed and the step's number alone.

    Attributes:
        leaves: What is trained, fp32.
        step: Steps done.
        facts: JSON that belongs to the state; the caller's.
        tensors: Tensors that belong to the state; the caller's.
    """

    def __init__(
        self,
        leaves: Mapping[str, Tensor],
        rates: Mapping[str, float],
        *,
        identity: Mapping[str, Any],
        path: Path | None,
        save_seconds: float,
    ) -> None:
        """Goes on from the file, if there is one of this very training.

        Args:
            leaves: What to train, by name.
            rates: Learning rate of each, at its highest.
            identity: JSON that tells this training from others; the file of another one is overwritten.
            path: The file; None to keep nothing.
            save_seconds: Between two writings of it.
        """
        self.leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
        self._rates = [rates[name] for name in leaves]
        groups = [{"params": [leaf], "lr": rates[name]} for name, leaf in self.leaves.items()]
        self._adam = torch.optim.AdamW(groups, betas=_BETAS, weight_decay=0.0)
        self._identity = json.loads(json.dumps(identity))
        self._path, self._save_seconds, self._saved = path, save_seconds, time.monotonic()
        self.step, self._failures = 0, 0
        self.facts: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        if path is not None:
            self._resume(path)

    def update(self, loss: float, factor: float) -> bool:
        """One step along the leaves' gradients, clipped; left out when the loss or a gradient is not finite.

        Args:
            loss: Of the batch.
            factor: Of the learning rates, from the schedule.

        Returns:
            Whether the leaves have moved.

        Raises:
            NumericalError: `MOST_FAILURES` steps in a row could not be made.
        """
        norm = torch.nn.utils.clip_grad_norm_(list(self.leaves.values()), CLIP)
        self.step += 1
        if not (math.isfinite(loss) and bool(norm.isfinite())):
            self._failures += 1
            if self._failures >= MOST_FAILURES:
                raise NumericalError(
                    f"The loss or its gradient was not finite {MOST_FAILURES} steps in a row, up to step {self.step}; "
                    "load the model in bfloat16 or float32, lower the learning rate, or leave this refinement out.",
                    step=self.step,
                )
            return False
        self._failures = 0
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._adam.step()
        return True

    def save(self, *, now: bool = False) -> None:
        """Writes the state, whole or not at all, if it is time.

        Raises:
            OSError: The disk is full.
        """
        if self._path is None or not (now or time.monotonic() - self._saved >= self._save_seconds):
            return
        tensors = {f"leaf/{name}": leaf.detach() for name, leaf in self.leaves.items()}
        for name, leaf in self.leaves.items():
            tensors |= {f"adam/{key}/{name}": value for key, value in self._adam.state[leaf].items()}
        tensors |= {f"more/{name}": tensor for name, tensor in self.tensors.items()}
        facts = {"identity": self._identity, "step": self.step, "failures": self._failures, "facts": self.facts}
        draft = self._path.with_name(f".{self._path.name}.draft")
        try:
            contiguous = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
            save_file(contiguous, draft, metadata={"training": json.dumps(facts)})
            with draft.open("rb") as file:
                os.fsync(file.fileno())
            draft.replace(self._path)
        finally:
            draft.unlink(missing_ok=True)
        self._saved = time.monotonic()

    def _resume(self, path: Path) -> None:
        try:
            with safe_open(str(path), framework="pt") as file:
                facts = json.loads((file.metadata() or {}).get("training", "{}"))
                if facts.get("identity") != self._identity:
                    return
                stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the file is no mapping
        except (FileNotFoundError, SafetensorError):
            return
        self.step, self._failures, self.facts = facts["step"], facts["failures"], facts["facts"]
        for key, tensor in stored.items():
            part, _, name = key.partition("/")
            if part == "leaf":
                self.leaves[name].data.copy_(tensor)
            elif part == "adam":
                entry, _, name = name.partition("/")
                leaf = self.leaves[name]
                self._adam.state[leaf][entry] = tensor.clone() if entry == "step" else tensor.to(leaf.device)
            else:
                self.tensors[name] = tensor.clone()


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rates at a step: a linear rise over the first twentieth, then a cosine down to zero."""
    warm = max(1, steps // 20)
    return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))


def batch(blocks: Tensor, step: int, rows: int, seed: int) -> Tensor:
    """The sequences of one step, `rows x length`: consecutive ones of a permutation, a new one for every epoch."""
    places = range(step * rows, (step + 1) * rows)
    return blocks[[_order(len(blocks), seed, i // len(blocks))[i % len(blocks)] for i in places]]


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The dtype a student computes in: fp32 on the CPU, the model's own elsewhere."""
    parameter = next(model.parameters())
    return torch.float32 if parameter.device.type == "cpu" else parameter.dtype


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


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
            own = block.__dict__.get("forward")
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
            stack.callback(block.__dict__.pop, "forward")
            if own is not None:
                stack.callback(setattr, block, "forward", own)
        yield


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


def content_of(tensor: Tensor) -> str:
    """sha256 of a tensor's values."""
    return content_hash(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
