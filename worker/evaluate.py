"""Scores of a compressed model against its dense self: perplexity and mean KL divergence per predicted token.

With z = H h + c the logits of a token, p the dense distribution and q the compressed one,

    KL(p || q) = sum_v p_v (z^p_v - z^q_v) - lse(z^p) + lse(z^q)
               = (lse(z^q) - h_q' e) - (lse(z^p) - h_p' e),        e = H' p

so all that has to be kept of the dense model is one vector e and one number per token, and the KL costs a trial one
dot product instead of a second pass over the vocabulary. Where logits are not linear in h (soft-capping) the dense h
is kept and p formed again for each chunk. Logits exist in fp32 for a small chunk of tokens only, and what is kept lies
in a file that is read batch by batch, so memory does not grow with the text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ranksearch.search.errors import InvalidInput, NumericalError
from ranksearch.worker.readout import Readout
from ranksearch.worker.spill import Spill
from ranksearch.worker.spread import devices_of

#: Tokens per forward pass or logits chunk, at most: more gains no speed.
MAX_TOKENS = 16384

#: Partial scores of a trial, for the pruner; a forward pass is never longer than one of them.
PARTS = 8


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What an evaluation says.

    Attributes:
        perplexity: exp of the mean negative log-likelihood over all predicted tokens.
        kl: Mean KL(dense || model) over the same tokens, nats.
        nll: Mean negative log-likelihood per predicted token of each sequence, nats.
        divergence: Mean KL per predicted token of each sequence, nats.
        tokens: Predicted tokens.
    """

    perplexity: float
    kl: float
    nll: list[float]
    divergence: list[float]
    tokens: int

    @classmethod
    def union(cls, parts: Sequence[Scores]) -> Scores:
        """Scores of all sequences together; every sequence is of the same length."""
        nll, divergence = ([value for part in parts for value in getattr(part, name)] for name in ("nll", "divergence"))
        tokens = sum(part.tokens for part in parts)
        return cls(perplexity=_perplexity(nll), kl=_mean(divergence), nll=nll, divergence=divergence, tokens=tokens)


class Evaluation:
    """A fixed set of sequences and the dense model's distributions on them.

    Attributes:
        dense: Scores of the model it was made with.
        batch_tokens: Tokens per forward pass.
        chunk_tokens: Tokens whose logits exist at once.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: nn.Module,
        blocks: Tensor,
        *,
        batch_tokens: int | None = None,
        chunk_tokens: int | None = None,
        scratch: str | Path | None = None,
    ) -> None:
        """Runs the dense model once.

        Args:
            model: The dense model in eval mode.
            blocks: Token ids, `sequences x length`.
            batch_tokens: Tokens per forward pass, at least one sequence; when None, as many as keep the activations
                below half of the model's own size, or of its share of one device.
            chunk_tokens: Tokens whose logits exist at once; likewise.
            scratch: Folder on a disk for what is kept of the dense distributions; the system's own when None. Nothing
                of it is left there, whatever becomes of the process.

        Raises:
            InvalidInput: There is no predicted token.
            NumericalError: The dense model's scores are not finite.
        """
        if blocks.ndim != 2 or blocks.shape[0] < 1 or blocks.shape[1] < 2:
            raise InvalidInput(
                f"An evaluation needs sequences of at least two tokens; got shape {tuple(blocks.shape)}."
            )
        self._blocks = blocks
        self._model = model
        self._readout = readout = Readout(model, blocks)
        budget = sum(p.nbytes for p in model.parameters()) // (2 * len(devices_of(model)))
        rows = (batch_tokens or min(MAX_TOKENS, budget // _bytes_per_token(model, readout))) // blocks.shape[1]
        self._rows = max(1, min(rows, -(-len(blocks) // PARTS)))
        self.batch_tokens = self._rows * blocks.shape[1]
        # logits in the model's dtype, in fp32, and their logarithmic softmax live at once
        self.chunk_tokens = chunk_tokens or min(MAX_TOKENS, max(16, budget // (12 * readout.vocabulary)))
        self._reference = Spill(scratch)
        nll: list[float] = []
        for ids in blocks.split(self._rows):
            found, *kept = self._dense(ids)
            self._reference.append(kept)
            nll += found.tolist()
        self.dense = self._scores(nll, [0.0] * len(nll))

    def score(self, model: nn.Module) -> Scores:
        """Scores a model: the one given at construction at whatever ranks it runs now, or another with the same head.

        The other's head may be rounded to another dtype; its KL is then exact up to that rounding.

        Raises:
            NumericalError: A score is not finite.
        """
        return Scores.union(list(self.score_chunks(model, 1)))

    def score_chunks(self, model: nn.Module, chunks: int = PARTS) -> Iterator[Scores]:
        """Scores consecutive parts of the sequences, for a caller who may stop early; their union equals `score`
        exactly.

        Args:
            model: As in `score`.
            chunks: Parts to yield at most; a part is made of whole forward batches.

        Raises:
            NumericalError: A score is not finite.
        """
        readout = self._readout_of(model)
        batches = list(zip(self._blocks.split(self._rows), range(len(self._reference)), strict=True))
        edges = [round(i * len(batches) / min(chunks, len(batches))) for i in range(min(chunks, len(batches)) + 1)]
        for start, stop in pairwise(edges):
            # inference mode must not leak into the caller between two parts
            with torch.inference_mode():
                parts = [self._score_batch(readout, ids, self._reference[i]) for ids, i in batches[start:stop]]
                nll, kl = (torch.cat(values).tolist() for values in zip(*parts, strict=True))
            yield self._scores(nll, kl)

    def _scores(self, nll: list[float], kl: list[float]) -> Scores:
        if not all(map(math.isfinite, nll + kl)):
            raise NumericalError("The scores are not finite: the model's logits hold NaN or infinite values.")
        tokens = len(nll) * (self._blocks.shape[1] - 1)
        return Scores(perplexity=_perplexity(nll), kl=_mean(kl), nll=nll, divergence=kl, tokens=tokens)

    def _readout_of(self, model: nn.Module) -> Readout:
        if model is self._model:
            return self._readout
        readout = Readout(model, self._blocks)
        if self._readout.head is not None and not _rounded(self._readout.head, readout.head):
            raise InvalidInput("The model has another output head than the one this evaluation was made with.")
        return readout

    def _score_batch(self, readout: Readout, ids: Tensor, reference: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean NLL and KL of each sequence, `batch` each, fp32."""
        ids = ids.to(readout.device)
        hidden = readout.hidden(ids)[:, :-1].flatten(0, 1)
        labels = ids[:, 1:].flatten()
        kept = [part.to(readout.device) for part in reference]
        nll, kl = [], []
        for h, y, *known in zip(*(t.split(self.chunk_tokens) for t in (hidden, labels, *kept)), strict=True):
            logits = readout.logits(h).float()
            nll_of_chunk, lse = _nll_and_lse(logits, y)
            nll.append(nll_of_chunk)
            if self._readout.linear:
                anchor, offset = known
                kl.append(lse - _dot(h, anchor) - offset)
            else:
                dense = self._readout.logits(known[0]).float()
                kl.append(
                    F.kl_div(logits.log_softmax(-1), dense.log_softmax(-1), reduction="none", log_target=True).sum(-1)
                )
        return tuple(torch.cat(values).view(len(ids), -1).mean(1) for values in (nll, kl))  # type: ignore[return-value]

    def _dense(self, ids: Tensor) -> tuple[Tensor, ...]:
        """Mean NLL of each sequence of a batch, `batch`, and what is kept of the dense distributions of its tokens:
        `e` and `lse - h'e`, or `h` where logits are not linear."""
        ids = ids.to(self._readout.device)
        hidden = self._readout.hidden(ids)[:, :-1].flatten(0, 1)
        head = self._readout.head
        nll, anchors, offsets = [], [], []
        for h, y in zip(hidden.split(self.chunk_tokens), ids[:, 1:].flatten().split(self.chunk_tokens), strict=True):
            logits = self._readout.logits(h).float()
            nll_of_chunk, lse = _nll_and_lse(logits, y)
            nll.append(nll_of_chunk)
            if head is not None:
                e = logits.sub_(lse.unsqueeze(-1)).exp_().to(head.weight.dtype) @ head.weight
                anchors.append(e)
                # from the rounded e, so that the KL of the dense model is zero
                offsets.append(lse - _dot(h, e))
        kept = (hidden,) if head is None else (torch.cat(anchors), torch.cat(offsets))
        return (torch.cat(nll).view(len(ids), -1).mean(1), *kept)


def _rounded(ours: nn.Linear, theirs: nn.Linear | None) -> bool:
    """Whether two heads have the same weights, up to the rounding of ours to the dtype of the other."""
    if theirs is None or ours.weight.shape != theirs.weight.shape:
        return False
    return torch.equal(ours.weight.to(theirs.weight.dtype), theirs.weight)


def _nll_and_lse(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of the labels and log-sum-exp of fp32 logits `tokens x vocabulary`, `tokens` each."""
    nll = F.cross_entropy(logits, labels, reduction="none")
    return nll, nll + logits.gather(1, labels.unsqueeze(1)).squeeze(1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise inner products in fp32: `tokens x d` twice to `tokens`."""
    return (a.float() * b.float()).sum(-1)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _perplexity(nll: Sequence[float]) -> float:
    mean = _mean(nll)
    return math.exp(mean) if mean < 700 else math.inf


def _bytes_per_token(model: nn.Module, readout: Readout) -> int:
    """Activations of one block for one token, roughly: the widest layer a few times and the hidden state many times."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not readout.head]
    widest = max((m.out_features for m in linears), default=1)
    hidden = max((m.in_features for m in linears[:1]), default=1)
    return next(model.parameters()).element_size() * (3 * widest + 5 * hidden)
