"""Running a text through a model section by section: forward, and backward from the last section to the first.

Between two sections the hidden states, and then their gradients, lie in a file. A section is run again from its stored
input when its turn comes in the backward direction, so only one section's activations, and whatever its caller collects
there, exist at a time. That costs one more forward pass through all sections but the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ranksearch.worker.placement import held
from ranksearch.worker.readout import Readout
from ranksearch.worker.spill import Spill


class Stream(Protocol):
    """What a sweep runs: parts that follow each other."""

    paths: list[str]

    def embed(self) -> Iterator[Tensor]:
        """The first part's input, batch by batch."""

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """What part `index` makes of its input."""

    def final(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Final hidden states of a batch from what the last part made."""


class WholeModel:
    """A model as one part, which reads token ids."""

    def __init__(self, readout: Readout, ids: Tensor, *, rows: int) -> None:
        """Takes a text.

        Args:
            readout: Of the model.
            ids: Token ids, `sequences x length`.
            rows: Sequences per batch.
        """
        self.paths = [""]
        self._readout, self._batches = readout, ids.split(rows)

    def embed(self) -> Iterator[Tensor]:
        """Token ids, batch by batch."""
        yield from self._batches

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """Final hidden states of token ids."""
        return self._readout.hidden(hidden)

    def final(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """What `run` gave."""
        return hidden


#: Gradient of the loss at the final hidden states, from those and the batch's token ids.
LossGradient = Callable[[Tensor, Tensor], Tensor]


class Sweep:
    """One text on its way through the sections of a model.

    Parameters must not require gradients.

    Attributes:
        sequences: Of the text.
    """

    def __init__(
        self,
        model: nn.Module,
        stream: Stream,
        sections: Sequence[range],
        blocks: Tensor,
        *,
        rows: int,
        scratch: str | Path | None,
    ) -> None:
        """Cuts the text into batches.

        Args:
            model: The model.
            stream: How it is run.
            sections: Consecutive parts of the stream, all of them.
            blocks: Token ids, `sequences x length`.
            rows: Sequences per batch; the stream's.
            scratch: Folder on a disk for what lies between sections; the system's own when None.
        """
        self._model, self._stream, self._sections = model, stream, list(sections)
        self._batches = blocks.split(rows)
        self.sequences = len(blocks)
        self._device = next(model.parameters()).device
        self._scratch = scratch
        self._hidden: list[Spill | None] = []  # inputs of the sections reached so far
        self._gradient: Spill | None = None  # at the output of the section whose turn is next

    def forward(
        self, number: int, *, keep: bool, seen: Callable[[Tensor], None] = lambda hidden: None
    ) -> Iterator[int]:
        """Runs a section without gradients, and stores what the next one reads; yields the sequences of each batch.

        Args:
            number: Of the section; those before it have been run.
            keep: Whether the section will be run again.
            seen: Told its output, `rows x length x d`.
        """
        if number == 0:
            self._hidden = [None]
        made = Spill(self._scratch) if number + 1 < len(self._sections) else None
        with held(self._model, self._paths(number)):
            for hidden in self._inputs(number):
                with torch.no_grad():
                    hidden = self._run(number, hidden)
                    seen(hidden)
                if made is not None:
                    made.append([hidden])
                yield len(hidden)
        self._hidden[number + 1 :] = [made]
        if not keep:
            self._hidden[number] = None

    def backward(self, number: int, loss_gradient: LossGradient, *, keep: bool) -> Iterator[int]:
        """Runs a section, and the loss' gradient back through it; yields the sequences of each batch.

        Args:
            number: Of the section; those after it have had their turn, and those before it were run forward.
            loss_gradient: Where the gradient comes from, at the last section.
            keep: Whether the section will be run again, before the one in front of it has its turn.
        """
        last, made = number == len(self._sections) - 1, Spill(self._scratch)
        with held(self._model, self._paths(number)):
            for index, (hidden, ids) in enumerate(zip(self._inputs(number), self._batches, strict=True)):
                with torch.enable_grad():
                    leaf = hidden.requires_grad_() if hidden.is_floating_point() else hidden
                    # not the leaf itself, so that a block may change its input in place
                    output = self._run(number, leaf.clone())
                    if last:
                        ids = ids.to(self._device)
                        output = self._stream.final(ids, output)
                        gradient = loss_gradient(output.detach(), ids)
                    else:
                        assert self._gradient is not None
                        gradient = self._gradient[index][0].to(output.device)
                    output.backward(gradient)
                if not keep and number > 0 and leaf.grad is not None:
                    made.append([leaf.grad])
                yield len(hidden)
        if not keep:
            self._gradient = made
            del self._hidden[number:]

    def _paths(self, number: int) -> list[str]:
        return [self._stream.paths[index] for index in self._sections[number]]

    @torch.no_grad()
    def _inputs(self, number: int) -> Iterator[Tensor]:
        stored = self._hidden[number] if number else None
        if stored is None:
            yield from (hidden.to(self._device) for hidden in self._stream.embed())
        else:
            yield from (stored[index][0].to(self._device) for index in range(len(stored)))

    def _run(self, number: int, hidden: Tensor) -> Tensor:
        for index in self._sections[number]:
            hidden = self._stream.run(index, hidden)
        return hidden
