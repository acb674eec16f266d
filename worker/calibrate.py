"""Calibration: one pass over text that yields the covariances of every target.

Per target y = W x: the second moment `C = E[x x']` of its inputs (one for all targets that are fed the very same
tensor, such as q, k and v) and `G = E[g g']` of `g = dL/dy`, where L is the summed negative log-likelihood of the
text itself. Parameters never require a gradient, so no weight gradient exists at any time; only activations are
differentiated.

Both are sums over tokens in fp32. C is divided by the tokens the target saw and G by all tokens of the text, so that
`tr(G D C D')` is in nats per token for a target that sees every token and for an expert that sees a few.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ranksearch.search.errors import NumericalError
from ranksearch.search.targets import Target
from ranksearch.worker.covariance import Moments
from ranksearch.worker.readout import Readout

Progress = Callable[[float], None]

#: Bytes of covariances that a CUDA device holds at once, at most: the cost of another pass is small by then.
MOST_ON_DEVICE = 4 << 30

#: Bytes of logits, and of their gradient, that the backward pass may hold at once.
LOGIT_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Covariances of the features of a model on a text.

    Attributes:
        inputs: Leader target -> `n x n` mean of x x', fp32, on the CPU.
        leader: Target -> the target under whose name its inputs are kept.
        gradients: Target -> `m x m` mean of g g'; empty without gradients.
        tokens: Target -> feature vectors seen.
        total_tokens: Tokens of the text.
    """

    inputs: Mapping[str, Tensor]
    leader: Mapping[str, str]
    gradients: Mapping[str, Tensor]
    tokens: Mapping[str, int]
    total_tokens: int

    def input(self, name: str) -> Tensor:
        """`n x n` second moment of a target's inputs."""
        return self.inputs[self.leader[name]]

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file."""
        facts = {"leader": dict(self.leader), "tokens": dict(self.tokens), "total_tokens": self.total_tokens}
        tensors = {
            f"{part}/{name}": tensor.contiguous()
            for part in ("inputs", "gradients")
            for name, tensor in getattr(self, part).items()
        }
        save_file(tensors, str(path), metadata={"calibration": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Reads what `save` wrote; tensors stay memory-mapped."""
        parts: dict[str, dict[str, Tensor]] = {"inputs": {}, "gradients": {}}
        with safe_open(str(path), framework="pt") as file:
            facts = json.loads(file.metadata()["calibration"])
            for key in file.keys():  # noqa: SIM118 - the file is no mapping
                part, name = key.split("/", 1)
                parts[part][name] = file.get_tensor(key)
        return cls(**parts, leader=facts["leader"], tokens=facts["tokens"], total_tokens=facts["total_tokens"])


def calibrate(
    model: nn.Module,
    targets: Sequence[Target],
    blocks: Tensor,
    *,
    gradients: bool,
    batch_tokens: int = 4096,
    memory_limit: int | None = None,
    progress: Progress = lambda fraction: None,
) -> Calibration:
    """Streams text through the model and accumulates covariances.

    Args:
        model: A causal language model; it comes back as it was.
        targets: What to observe.
        blocks: Token ids, `sequences x length`.
        gradients: Also run the backward pass and accumulate G.
        batch_tokens: Tokens per forward (and backward) pass, at least one sequence; halved when a device's memory does
            not suffice.
        memory_limit: Bytes of covariances to hold on the device at once; more passes are made when they do not fit.
            None is half of what a CUDA device has free, `MOST_ON_DEVICE` at most, and no limit elsewhere.
        progress: Told the fraction done.

    Raises:
        NumericalError: A target's inputs or output gradients hold NaN or Inf; names it.
        torch.OutOfMemoryError: The device has too little memory even for one sequence.
    """
    readout = Readout(model, blocks)
    groups = _shared_inputs(model, targets, readout, blocks)
    if memory_limit is None and readout.device.type == "cuda":
        memory_limit = min(torch.cuda.mem_get_info(readout.device)[0] // 2, MOST_ON_DEVICE)
    passes = _split(groups, gradients=gradients, limit=memory_limit)
    total = blocks.numel()
    found: dict[str, dict[str, Any]] = {"inputs": {}, "gradients": {}, "tokens": {}}
    rows = max(1, batch_tokens // blocks.shape[1])
    waiting = list(passes)
    while waiting:
        observer = _Observer(model, waiting[0], gradients=gradients)
        try:
            with observer, _frozen(model), _repeatable(readout.device):
                for done in _batches(readout, blocks, observer, gradients=gradients, rows=rows):
                    progress((len(passes) - len(waiting) + done) / len(passes))
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            rows //= 2
            del observer  # before another one is made
            continue
        # off the device before the next pass needs its memory, and never there twice
        while observer.inputs:
            name, moments = observer.inputs.popitem()
            found["inputs"][name], found["tokens"][name] = moments.take_mean().cpu(), moments.tokens
        while observer.outputs:
            name, moments = observer.outputs.popitem()
            found["gradients"][name] = moments.take_mean(total).cpu()
        del waiting[0], moments
    leader = {target.name: group[0].name for group in groups for target in group}
    found["tokens"] = {name: found["tokens"][lead] for name, lead in leader.items()}
    return Calibration(leader=leader, total_tokens=total, **found)


class _Observer:
    """Hooks that feed moments, for the targets of one pass."""

    def __init__(self, model: nn.Module, groups: Sequence[Sequence[Target]], *, gradients: bool) -> None:
        self._model, self._groups, self._gradients = model, groups, gradients
        self._hooks: list[Any] = []
        device = next(model.parameters()).device
        self.inputs = {g[0].name: Moments(g[0].in_features, device=device) for g in groups}
        self.outputs = {t.name: Moments(t.out_features, device=device) for g in groups for t in g} if gradients else {}

    def __enter__(self) -> _Observer:
        for group in self._groups:
            module = self._model.get_submodule(group[0].name)
            self._hooks.append(module.register_forward_pre_hook(partial(self._see_input, group[0].name)))
            for target in group if self._gradients else ():
                module = self._model.get_submodule(target.name)
                self._hooks.append(module.register_forward_hook(partial(self._see_output, target.name)))
        return self

    def __exit__(self, *exc: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _see_input(self, name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        with torch.no_grad():
            self.inputs[name].add(args[0])

    def _see_output(self, name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(self._see_gradient, name))

    def _see_gradient(self, name: str, gradient: Tensor) -> None:
        with torch.no_grad():
            self.outputs[name].add(gradient)

    def check(self) -> None:
        """Raises NumericalError naming the first target, in the order of the model, whose moments are not finite."""
        for what, moments in (("inputs", self.inputs), ("output gradients", self.outputs)):
            for name, moment in moments.items():
                if not moment.finite:
                    raise NumericalError(
                        f"The {what} of {name} hold NaN or infinite values during calibration; "
                        "load the model in float32 or bfloat16, or look at the weights before it.",
                        target=name,
                    )


def _batches(readout: Readout, blocks: Tensor, observer: _Observer, *, gradients: bool, rows: int) -> Iterator[float]:
    """One run over the text, `rows` sequences at once; yields the fraction done after each batch."""
    done = 0
    for batch in blocks.split(rows):
        ids = batch.to(readout.device)
        with torch.set_grad_enabled(gradients):
            hidden = readout.hidden(ids)
            if gradients:
                hidden.backward(_nll_gradient(readout, hidden.detach(), ids))
        observer.check()
        done += len(batch)
        yield done / len(blocks)


@contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """On CUDA, attention whose backward pass adds up in a fixed order; the fused kernels use atomic additions."""
    if device.type != "cuda":
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


def _nll_gradient(readout: Readout, hidden: Tensor, ids: Tensor) -> Tensor:
    """Gradient `batch x length x d` of the summed negative log-likelihood of `ids` at the final hidden states."""
    leaves = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    labels = ids[:, 1:].reshape(-1)
    # three fp32 copies of a chunk's logits live at the same time
    chunk = max(1, LOGIT_BYTES // (12 * readout.vocabulary))
    parts = []
    for h, y in zip(leaves.split(chunk), labels.split(chunk), strict=True):
        leaf = h.detach().requires_grad_()
        nll = F.cross_entropy(readout.logits(leaf).float(), y, reduction="sum")
        (part,) = torch.autograd.grad(nll, leaf)
        parts.append(part)
    gradient = torch.zeros_like(hidden)
    gradient[:, :-1] = torch.cat(parts).view(*hidden[:, :-1].shape)
    return gradient


@torch.no_grad()
def _shared_inputs(model: nn.Module, targets: Sequence[Target], readout: Readout, blocks: Tensor) -> list[list[Target]]:
    """Groups targets that were fed the very same tensor objects in a short forward pass."""
    seen: dict[str, list[Tensor]] = {target.name: [] for target in targets}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda module, args, calls=calls: calls.append(args[0]))
        for name, calls in seen.items()
    ]
    try:
        # the tensors are kept until the grouping is done: an id is unique only while its object lives
        readout.hidden(blocks[:1, :16])
    finally:
        for hook in hooks:
            hook.remove()
    groups: dict[tuple[object, ...], list[Target]] = {}
    for target in targets:
        calls = seen[target.name]
        key = tuple(id(x) for x in calls) or (target.name,)
        groups.setdefault((*key, target.in_features), []).append(target)
    return list(groups.values())


def _split(groups: list[list[Target]], *, gradients: bool, limit: int | None) -> list[list[list[Target]]]:
    """Cuts the groups into runs whose fp32 covariances fit in `limit` bytes (or hold a single group)."""
    runs: list[list[list[Target]]] = [[]]
    used = 0
    for group in groups:
        size = 4 * (group[0].in_features ** 2 + (sum(t.out_features**2 for t in group) if gradients else 0))
        if runs[-1] and limit is not None and used + size > limit:
            runs.append([])
            used = 0
        runs[-1].append(group)
        used += size
    return runs


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode, no parameter asks for a gradient, and the embedding's output does, so that activations are
    differentiated."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = model.training
    model.eval()
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    # the copy is no leaf, so a model may scale its embeddings in place
    hook = embedding.register_forward_hook(
        lambda module, args, output: output.requires_grad_().clone() if torch.is_grad_enabled() else output
    )
    try:
        yield
    finally:
        hook.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        model.train(training)
