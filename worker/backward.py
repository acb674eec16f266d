"""Running a text through a model, forward and where asked backward, in smaller batches where memory is short."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ranksearch.worker.frozen import frozen
from ranksearch.worker.readout import Readout
from ranksearch.worker.sections import Section
from ranksearch.worker.stream import BlockStream
from ranksearch.worker.sweep import Sweep, WholeModel


def sweep_text(
    model: nn.Module,
    readout: Readout,
    sections: Sequence[Section],
    blocks: Tensor,
    *,
    rows: int,
    scratch: str | Path | None,
    run: Callable[[Sweep], None],
    pool: int | None = None,
) -> None:
    """Runs a sweep over a text; after an OutOfMemoryError again from the start, with half the batch.

    Args:
        model: A causal language model; it comes back as it was.
        readout: Of the model.
        sections: What is run together.
        blocks: Token ids, `sequences x length`.
        rows: Sequences per batch, at most.
        scratch: Folder on a disk for what lies between sections; the system's own when None.
        run: Does the sweep; what it did before is void when it is called again.
        pool: Sequences of a pool, if no batch may lie in two.

    Raises:
        torch.OutOfMemoryError: The device has too little memory even for one sequence.
    """
    whole = sections[0].parts is None
    parts = [section.parts or range(1) for section in sections]
    while True:
        rows = rows if pool is None else math.gcd(rows, pool)
        try:
            stream = WholeModel(readout, blocks, rows=rows) if whole else BlockStream(model, blocks, rows=rows)
            sweep = Sweep(model, stream, parts, blocks, rows=rows, scratch=scratch)
            with _differentiable(model), _repeatable(readout.device):
                run(sweep)
            return
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            rows //= 2
            stream = sweep = None  # type: ignore[assignment]  # before others are made


@contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """On CUDA, attention whose backward pass adds up in a fixed order; the fused kernels use atomic additions."""
    if device.type != "cuda":
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


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
