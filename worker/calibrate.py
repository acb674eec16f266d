"""Calibration: one pass over text that yields the covariances of every target.

Per target y = W x: the second moment `C = E[x x']` of its inputs (one for all targets that are fed the very same
tensor, such as q, k and v) and `G = E[g g']` of `g = dL/dy`, where L is the summed negative log-likelihood of the
text itself or of tokens drawn from the model. Parameters never require a gradient, so no weight gradient exists at any
time; only activations are differentiated.

Covariances of a whole model are several times its size. So they are collected section by section, a few blocks at a
time, and may go straight to a file; the numbers do not depend on the sections.

Both are sums over tokens in fp32; C may be asked for centred within pools of sequences. C is divided by the tokens the
target saw and G by all tokens of the text, so that `tr(G D C D')` is in nats per token for a target that sees every
token and for an expert that sees a few.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ranksearch.search.errors import NumericalError
from ranksearch.search.targets import Target
from ranksearch.worker.covariance import Moments, PooledCovariance
from ranksearch.worker.frozen import frozen
from ranksearch.worker.hardware import free_bytes
from ranksearch.worker.readout import Readout
from ranksearch.worker.sections import Groups, Section, plan_sections
from ranksearch.worker.stream import BlockStream
from ranksearch.worker.sweep import Sweep, WholeModel
from ranksearch.worker.tensor_file import TensorFile

Progress = Callable[[float], None]
Complete = Callable[["Calibration"], None]

#: Bytes of covariances that are collected at once, at most: more sections cost little by then.
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
        means: Leader target -> `n` mean of x, fp32, if its covariance is centred; empty otherwise.
    """

    inputs: Mapping[str, Tensor]
    leader: Mapping[str, str]
    gradients: Mapping[str, Tensor]
    tokens: Mapping[str, int]
    total_tokens: int
    means: Mapping[str, Tensor] = field(default_factory=dict)

    def input(self, name: str) -> Tensor:
        """`n x n` second moment of a target's inputs."""
        return self.inputs[self.leader[name]]

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Reads what `calibrate` wrote; tensors stay memory-mapped."""
        with safe_open(str(path), framework="pt") as file:
            facts = json.loads(file.metadata()["calibration"])
            # safe_open is no mapping
            return cls._of({key: file.get_tensor(key) for key in file.keys()}, facts)  # noqa: SIM118

    @classmethod
    def _of(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Calibration:
        parts: dict[str, dict[str, Tensor]] = {"inputs": {}, "gradients": {}, "means": {}}
        for key, tensor in tensors.items():
            part, name = key.split("/", 1)
            parts[part][name] = tensor
        inputs, gradients, means = parts["inputs"], parts["gradients"], parts["means"]
        return cls(inputs=inputs, gradients=gradients, means=means, **facts)


def calibrate(
    model: nn.Module,
    targets: Sequence[Target],
    blocks: Tensor,
    *,
    gradients: bool,
    labels: Literal["text", "model"] = "text",
    pool: int | None = None,
    batch_tokens: int = 4096,
    memory_limit: int | None = None,
    file: str | Path | None = None,
    scratch: str | Path | None = None,
    progress: Progress = lambda fraction: None,
    complete: Complete = lambda part: None,
) -> Calibration:
    """Streams text through the model and accumulates covariances.

    Args:
        model: A causal language model; it comes back as it was.
        targets: What to observe.
        blocks: Token ids, `sequences x length`.
        gradients: Also run the backward pass and accumulate G.
        labels: Whose next tokens the gradients are of: the text's own, or, for the Fisher information itself, ones
            drawn from the model's predictions, with a fixed seed.
        pool: Sequences per pool, if covariances are to be centred within pools; uncentred when None.
        batch_tokens: Tokens per forward (and backward) pass, at least one sequence; halved when a device's memory does
            not suffice.
        memory_limit: Bytes of covariances, and of weights that have to be fetched, to hold on the device at once; the
            model is run in sections when they do not fit. None is `MOST_ON_DEVICE`, or half of what is free if less.
        file: Where the covariances are written as they come, to be read from there; kept in memory when None.
        scratch: Folder on a disk for what lies between sections; the system's own when None.
        progress: Told the fraction done.
        complete: Given the covariances of each of several sections once they are kept, and all of them again if the
            memory does not suffice; not called when there is one section.

    Raises:
        NumericalError: A target's inputs or output gradients hold NaN or Inf; names it.
        OSError: The disk is full.
        torch.OutOfMemoryError: The device has too little memory even for one sequence.
    """
    readout = Readout(model, blocks)
    groups = _shared_inputs(model, targets, readout, blocks)
    limit = min(MOST_ON_DEVICE, free_bytes(readout.device) // 2) if memory_limit is None else memory_limit
    sections = plan_sections(model, groups, blocks, gradients=gradients, limit=limit)
    whole = sections[0].parts is None
    rows = max(1, batch_tokens // blocks.shape[1])
    slope = _SlopeOfLoss(readout, drawn=labels == "model")
    with _Kept(groups, gradients=gradients, centred=pool is not None, total_tokens=blocks.numel(), file=file) as kept:
        while True:
            rows = rows if pool is None else math.gcd(rows, pool)  # no batch in two pools
            try:
                stream = WholeModel(readout, blocks, rows=rows) if whole else BlockStream(model, blocks, rows=rows)
                parts = [section.parts or range(1) for section in sections]
                sweep = Sweep(model, stream, parts, blocks, rows=rows, scratch=scratch)
                with _differentiable(model), _repeatable(readout.device):
                    _collect(
                        model,
                        sections,
                        sweep,
                        slope,
                        kept,
                        gradients=gradients,
                        pool=pool,
                        progress=progress,
                        complete=complete,
                    )
                break
            except torch.OutOfMemoryError:
                if rows == 1:
                    raise
                rows //= 2
                stream = sweep = None  # type: ignore[assignment]  # before others are made
    return kept.calibration()


def _collect(
    model: nn.Module,
    sections: Sequence[Section],
    sweep: Sweep,
    slope: _SlopeOfLoss,
    kept: _Kept,
    *,
    gradients: bool,
    pool: int | None,
    progress: Progress,
    complete: Complete,
) -> None:
    """Runs the sweep through all sections and keeps each one's covariances as soon as they are complete."""
    runs = sum(len(section.passes) for section in sections) + (len(sections) - 1 if gradients else 0)
    done = 0

    def count(batches: Iterator[int], observer: _Observer | None = None) -> None:
        nonlocal done
        sequences = 0
        for rows in batches:
            sequences += rows
            if observer is not None:
                observer.check()
                if pool is not None and sequences % pool == 0:
                    observer.close_pools()
            done += rows
            progress(done / (runs * sweep.sequences))

    def observe(number: int, groups: Groups, *, keep: bool, backward: bool) -> None:
        with _Observer(model, groups, gradients=backward, centred=pool is not None) as observer:
            run = sweep.backward(number, slope, keep=keep) if backward else sweep.forward(number, keep=keep)
            count(run, observer)
        if backward == gradients:
            kept.take(observer)

    numbers = range(len(sections))
    for number in numbers[:-1] if gradients else ():
        finite: list[Tensor] = []
        count(sweep.forward(number, keep=True, seen=partial(_look_for_nan, finite)))
        if not all(finite):
            # the first target with broken inputs is to be named, and the backward direction would come to the last one
            for groups in sections[number].passes:
                observe(number, groups, keep=True, backward=False)
    for number in reversed(numbers) if gradients else numbers:
        for index, groups in enumerate(sections[number].passes, start=1):
            observe(number, groups, keep=index < len(sections[number].passes), backward=gradients)
        if len(sections) > 1:
            complete(kept.part(sections[number]))


def _look_for_nan(finite: list[Tensor], hidden: Tensor) -> None:
    finite.append(hidden.isfinite().all())


def leaders(model: nn.Module, targets: Sequence[Target], blocks: Tensor) -> dict[str, str]:
    """Target -> the first of the targets that share its input."""
    groups = _shared_inputs(model, targets, Readout(model, blocks), blocks)
    return {target.name: group[0].name for group in groups for target in group}


class _Kept:
    """Covariances on the CPU, in a file or in memory."""

    def __init__(
        self, groups: Groups, *, gradients: bool, centred: bool, total_tokens: int, file: str | Path | None
    ) -> None:
        self._leader = {target.name: group[0].name for group in groups for target in group}
        self._tokens: dict[str, int] = {}
        self._written: list[str] = []
        self._total = total_tokens
        self._path, self._tensors, self._file = file, dict[str, Tensor](), None
        if file is not None:
            sizes = {f"inputs/{group[0].name}": group[0].in_features for group in groups}
            sizes |= {f"gradients/{t.name}": t.out_features for group in groups for t in group if gradients}
            shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]
            shapes = {name: ((size, size), torch.float32) for name, size in sizes.items()}
            if centred:
                shapes |= {f"means/{group[0].name}": ((group[0].in_features,), torch.float32) for group in groups}
            # names twice, a number each, quoted once more in the header
            self._file = TensorFile(file, shapes, room=4 * len(json.dumps(self._leader)) + 32 * len(self._leader) + 256)

    def take(self, observer: _Observer) -> None:
        """Takes the means over; nothing of them is left on the device."""
        while observer.inputs:
            name, moments = observer.inputs.popitem()
            self._write(f"inputs/{name}", moments.take_mean())
            self._tokens[name] = moments.tokens
            if isinstance(moments, PooledCovariance):
                self._write(f"means/{name}", moments.mean)
        while observer.outputs:
            name, moments = observer.outputs.popitem()
            self._write(f"gradients/{name}", moments.take_mean(self._total))

    def _write(self, name: str, mean: Tensor) -> None:
        self._written.append(name)
        if self._file is None:
            self._tensors[name] = mean.cpu()
        else:
            self._file.write(name, mean)

    def _facts(self, leader: Mapping[str, str]) -> dict[str, Any]:
        tokens = {name: self._tokens[lead] for name, lead in leader.items()}
        return {"leader": leader, "tokens": tokens, "total_tokens": self._total}

    def part(self, section: Section) -> Calibration:
        """What was kept of a section; it can be read before the rest is there."""
        names = {target.name for groups in section.passes for group in groups for target in group}
        read = self._tensors.__getitem__ if self._file is None else self._file.read
        tensors = {key: read(key) for key in self._written if key.split("/", 1)[1] in names}
        leader = {name: lead for name, lead in self._leader.items() if name in names}
        return Calibration._of(tensors, self._facts(leader))

    def calibration(self) -> Calibration:
        """What was kept, after the file was closed."""
        facts = self._facts(self._leader)
        return Calibration._of(self._tensors, facts) if self._path is None else Calibration.load(self._path)

    def __enter__(self) -> _Kept:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if self._file is not None:
            if kind is None:
                self._file.describe({"calibration": json.dumps(self._facts(self._leader))})
            self._file.__exit__(kind, *rest)


class _Observer:
    """Hooks that feed moments, for the targets of one pass."""

    def __init__(self, model: nn.Module, groups: Sequence[Sequence[Target]], *, gradients: bool, centred: bool) -> None:
        self._model, self._groups, self._gradients = model, groups, gradients
        self._hooks: list[Any] = []
        device = next(model.parameters()).device
        collect = PooledCovariance if centred else Moments
        self.inputs = {g[0].name: collect(g[0].in_features, device=device) for g in groups}
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

    def close_pools(self) -> None:
        for moments in self.inputs.values():
            if isinstance(moments, PooledCovariance):
                moments.close_pool()

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


@contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """On CUDA, attention whose backward pass adds up in a fixed order; the fused kernels use atomic additions."""
    if device.type != "cuda":
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


class _SlopeOfLoss:
    """Gradient of the summed negative log-likelihood of a batch's next tokens at its final hidden states."""

    def __init__(self, readout: Readout, *, drawn: bool) -> None:
        self._readout = readout
        self._generator = torch.Generator(readout.device).manual_seed(0) if drawn else None

    def __call__(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """`batch x length x d` of both."""
        leaves = hidden[:, :-1].reshape(-1, hidden.shape[-1])
        labels = ids[:, 1:].reshape(-1)
        # three fp32 copies of a chunk's logits live at the same time
        chunk = max(1, LOGIT_BYTES // (12 * self._readout.vocabulary))
        parts = [self._part(h, y) for h, y in zip(leaves.split(chunk), labels.split(chunk), strict=True)]
        gradient = torch.zeros_like(hidden)
        gradient[:, :-1] = torch.cat(parts).view(*hidden[:, :-1].shape)
        return gradient

    def _part(self, hidden: Tensor, labels: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            logits = self._readout.logits(leaf).float()
            if self._generator is not None:
                labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=self._generator).squeeze(1)
            (part,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), leaf)
        return part


@torch.no_grad()
def _shared_inputs(model: nn.Module, targets: Sequence[Target], readout: Readout, blocks: Tensor) -> Groups:
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


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Eval mode, no parameter asks for a gradient, and the embedding's output does, so that activations are
    differentiated."""
    training = model.training
    model.eval()
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    # the copy is no leaf, so a model may scale its embeddings in place
    hook = embedding.register_forward_hook(
        lambda module, args, output: output.requires_grad_().clone() if torch.is_grad_enabled() else output
    )
    try:
        with frozen(model):
            yield
    finally:
        hook.remove()
        model.train(training)
