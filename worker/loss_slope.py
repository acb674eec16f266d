"""Where a backward pass begins: the gradient of the loss at the final hidden states, with few logits at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ranksearch.worker.readout import Readout

#: Bytes of logits, and of their gradient, that the backward pass may hold at once.
LOGIT_BYTES = 64 << 20


class SlopeOfLoss:
    """Gradient of the summed negative log-likelihood of a batch's next tokens at its final hidden states."""

    def __init__(self, readout: Readout, *, drawn: bool) -> None:
        """Takes a readout of the model.

        Args:
            readout: Makes the logits.
            drawn: Whether next tokens are drawn from the model, with a fixed seed, instead of the text's own.
        """
        self._readout = readout
        self._generator = torch.Generator(readout.device).manual_seed(0) if drawn else None

    def __call__(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """`batch x length x d`, from hidden states of that shape and token ids `batch x length`."""
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
