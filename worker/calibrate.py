"""Calibration: one pass over text that yields what the metric must know of every target, as a rule its covariances.

Per target y = W x: the second moment `C = E[x x']` of its inputs (one for all targets that are fed the very same
tensor, such as q, k and v) and `G = E[g g']` of `g = dL/dy`, where L is the summed negative log-likelihood of the
text itself or of tokens drawn from the model. Parameters never require a gradient, so no weight gradient exists at any
time; only activations are differentiated.

Covariances of a whole model are several times its size. So they are collected section by section, a few blocks at a
time, and may go straight to a file; the numbers do not depend on the sections.

Both are sums over tokens in fp32; C may be asked for centred within pools of sequences. C is divided by the tokens the
target saw and G by all tokens of the text, so that `tr(G D C D')` is in nats per token for a target that sees every
token and for an expert that sees a few.

Some metrics need less, or other things, in their place (`Needs.only`): the mean of |x|, or a sum over the gradients of
the weights, which are made one matrix at a time from x and g. What each target's sublayer does to the residual stream
is noted along the way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ranksearch.search.targets import Target
from ranksearch.worker.backward import sweep_text
from ranksearch.worker.calibration_file import CalibrationWriter, bytes_of
from ranksearch.worker.loss_slope import SlopeOfLoss
from ranksearch.worker.metrics import Needs, Only
from ranksearch.worker.observe import Observer
from ranksearch.worker.readout import Readout
from ranksearch.worker.residual_stream import by_block
from ranksearch.worker.sections import Groups, Section, plan_sections
from ranksearch.worker.sweep import Sweep

Progress = Callable[[float], None]
Complete = Callable[["Calibration"], None]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a text has shown of a model's targets; all tensors are fp32, on the CPU, and empty if not collected.

    Attributes:
        inputs: Leader target -> `n x n` mean of x x'.
        leader: Target -> the target under whose name its inputs are kept.
        gradients: Target -> `m x m` mean of g g'.
        tokens: Target -> feature vectors seen.
        total_tokens: Tokens of the text.
        means: Leader target -> `n` mean of x, if its covariance is centred.
        absolute: Leader target -> `n` mean of |x|.
        fisher: Target -> `n` squared gradients of a sequence's summed loss with respect to the weight, summed over the
            rows, mean over the sequences.
        weight_gradients: Target -> `m x n` gradient of the mean loss with respect to the weight.
        similarity: Target -> mean cosine of the residual stream before and after its sublayer; see `ResidualStream`.
    """

    inputs: Mapping[str, Tensor]
    leader: Mapping[str, str]
    gradients: Mapping[str, Tensor]
    tokens: Mapping[str, int]
    total_tokens: int
    means: Mapping[str, Tensor] = field(default_factory=dict)
    absolute: Mapping[str, Tensor] = field(default_factory=dict)
    fisher: Mapping[str, Tensor] = field(default_factory=dict)
    weight_gradients: Mapping[str, Tensor] = field(default_factory=dict)
    similarity: Mapping[str, float] = field(default_factory=dict)

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
        parts: dict[str, Any] = {"inputs": {}, "gradients": {}}
        for key, tensor in tensors.items():
            part, name = key.split("/", 1)
            parts.setdefault(part, {})[name] = tensor
        return cls(**parts, **facts)


def calibrate(
    model: nn.Module,
    targets: Sequence[Target],
    blocks: Tensor,
    *,
    gradients: bool = False,
    labels: Literal["text", "model"] = "text",
    pool: int | None = None,
    only: Only | None = None,
    batch_tokens: int = 4096,
    memory_limit: int | None = None,
    file: str | Path | None = None,
    scratch: str | Path | None = None,
    progress: Progress = lambda fraction: None,
    complete: Complete = lambda part: None,
) -> Calibration:
    """Streams text through the model and accumulates covariances, or what a metric needs in their place.

    Args:
        model: A causal language model; it comes back as it was.
        targets: What to observe.
        blocks: Token ids, `sequences x length`.
        gradients: Also run the backward pass and accumulate G.
        labels: Whose next tokens the gradients are of: the text's own, or, for the Fisher information itself, ones
            drawn from the model's predictions, with a fixed seed.
        pool: Sequences per pool, if covariances are to be centred within pools; uncentred when None.
        only: What is collected instead of covariances: `absolute`, `fisher` or `weight_gradient`; see `Calibration`.
        batch_tokens: Tokens per forward (and backward) pass, at least one sequence, and no more than one for `fisher`;
            halved when a device's memory does not suffice.
        memory_limit: Bytes of covariances, and of weights that have to be fetched, to hold on the device at once; the
            model is run in sections when they do not fit; see `plan_sections` for None.
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
    needs = Needs(gradients=gradients, pool=pool, only=only)
    readout = Readout(model, blocks)
    groups = _shared_inputs(model, targets, readout, blocks)
    sections = plan_sections(model, groups, blocks, bytes_of=partial(bytes_of, needs=needs), limit=memory_limit)
    rows = 1 if only == "fisher" else max(1, batch_tokens // blocks.shape[1])
    with CalibrationWriter(groups, needs, blocks, file) as writer:

        def collect(sweep: Sweep) -> None:
            slope = SlopeOfLoss(readout, drawn=labels == "model")  # draws the same labels each time
            _collect(model, sections, sweep, slope, writer, needs=needs, progress=progress, complete=complete)

        sweep_text(model, readout, sections, blocks, rows=rows, pool=pool, scratch=scratch, run=collect)
    return Calibration._of(writer.tensors, writer.facts) if file is None else Calibration.load(file)


def _collect(
    model: nn.Module,
    sections: Sequence[Section],
    sweep: Sweep,
    slope: SlopeOfLoss,
    writer: CalibrationWriter,
    *,
    needs: Needs,
    progress: Progress,
    complete: Complete,
) -> None:
    """Runs the sweep through all sections and keeps what each one's sums come to as soon as they are complete."""
    runs = sum(len(section.passes) for section in sections) + (len(sections) - 1 if needs.backward else 0)
    neighbours = by_block(model, [t for section in sections for groups in section.passes for g in groups for t in g])
    done = 0

    def count(batches: Iterator[int], observer: Observer | None = None) -> None:
        nonlocal done
        sequences = 0
        for rows in batches:
            sequences += rows
            if observer is not None:
                observer.close_batch(sequences)
            done += rows
            progress(done / (runs * sweep.sequences))

    def observe(number: int, groups: Groups, *, keep: bool, backward: bool) -> None:
        with Observer(model, groups, needs, backward=backward, neighbours=neighbours) as observer:
            run = sweep.backward(number, slope, keep=keep) if backward else sweep.forward(number, keep=keep)
            count(run, observer)
        if backward == needs.backward:
            writer.take(observer)

    numbers = range(len(sections))
    for number in numbers[:-1] if needs.backward else ():
        finite: list[Tensor] = []
        count(sweep.forward(number, keep=True, seen=partial(_look_for_nan, finite)))
        if not all(finite):
            # the first target with broken inputs is to be named, and the backward direction would come to the last one
            for groups in sections[number].passes:
                observe(number, groups, keep=True, backward=False)
    for number in reversed(numbers) if needs.backward else numbers:
        for index, groups in enumerate(sections[number].passes, start=1):
            observe(number, groups, keep=index < len(sections[number].passes), backward=needs.backward)
        if len(sections) > 1:
            names = {t.name for groups in sections[number].passes for group in groups for t in group}
            complete(Calibration._of(*writer.part(names)))


def _look_for_nan(finite: list[Tensor], hidden: Tensor) -> None:
    finite.append(hidden.isfinite().all())


def leaders(model: nn.Module, targets: Sequence[Target], blocks: Tensor) -> dict[str, str]:
    """Target -> the first of the targets that share its input."""
    groups = _shared_inputs(model, targets, Readout(model, blocks), blocks)
    return {target.name: group[0].name for group in groups for target in group}


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
