"""The last step of a language model, from final hidden states to logits, apart from the blocks that come before.

Whoever needs logits takes them in small token chunks from here, so that `tokens x vocabulary` never exists at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ranksearch.search.errors import UnsupportedModel
from ranksearch.worker.compare import same_but_for_rounding
from ranksearch.worker.targets import embedding_of


class Readout:
    """Splits a causal language model into `hidden` (embedding and blocks) and `logits` (everything after).

    Some families do more than one matrix product after the blocks: they cap, scale or shift logits. Construction
    compares, on a few tokens, the product alone with the model's own logits; where they differ the model's own code
    runs on given hidden states (`linear` is then False): correct and a little slower.

    Attributes:
        head: The output projection when `linear`, None otherwise.
        device: The model's main device: token ids go there, and hidden states come from there.
        vocabulary: Number of logits per token.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        """Looks at how the model makes logits.

        Args:
            model: A causal language model in eval mode.
            ids: Token ids, `1 x tokens` or more; the first few are used for the comparison.

        Raises:
            UnsupportedModel: The model's logits cannot be had from its final hidden states.
        """
        self._model = cast(Any, model)
        self._path = base_path(model)
        self.head: nn.Linear | None = None
        self.device = next(model.parameters()).device
        ids = ids[:1, :8].to(self.device)
        expected = self._model(input_ids=ids, use_cache=False).logits
        hidden = self.hidden(ids)
        self.vocabulary = int(expected.shape[-1])
        head = self._model.get_output_embeddings()
        if isinstance(head, nn.Linear) and _equal(head(hidden), expected):
            self.head = head
        elif not same_but_for_rounding(self._own(hidden), expected):
            raise UnsupportedModel(f"The logits of {type(model).__name__} do not follow from its final hidden states.")

    @property
    def linear(self) -> bool:
        """Whether logits are exactly `head(hidden)`."""
        return self.head is not None

    def hidden(self, ids: Tensor) -> Tensor:
        """Final hidden states, `batch x tokens x d`, of token ids `batch x tokens`."""
        output = getattr(self._model, self._path)(input_ids=ids.to(self.device), use_cache=False)
        return last_hidden(output).to(self.device)  # the last block may be elsewhere

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `tokens x vocabulary`, in the model's dtype, of hidden states `tokens x d`."""
        if self.head is not None:
            logits: Tensor = self.head(hidden)
            return logits
        return self._own(hidden.unsqueeze(0)).squeeze(0)

    def _own(self, hidden: Tensor) -> Tensor:
        with _replaced(self._model, self._path, _Given(hidden)):
            ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits
        return logits


def base_path(model: nn.Module) -> str:
    """Name of the part of a causal language model that holds all but its output head.

    Raises:
        UnsupportedModel: There is no such part.
    """
    named = getattr(model, "base_model_prefix", "") or ""
    if isinstance(getattr(model, named or " ", None), nn.Module):
        return str(named)
    embedding = embedding_of(model)
    for name, child in model.named_children():
        if child is not embedding and embedding is not None and any(module is embedding for module in child.modules()):
            return name
    raise UnsupportedModel(f"{type(model).__name__} has no base model under its output head.")


class _Given(nn.Module):
    """Stands in for the base model and returns hidden states that were computed before."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self._hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=self._hidden)


@contextmanager
def _replaced(model: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    original = getattr(model, name)
    setattr(model, name, module)
    try:
        yield
    finally:
        setattr(model, name, original)


def last_hidden(output: Any) -> Tensor:
    """Final hidden states, `batch x tokens x d`, in what a base model returns."""
    hidden: Tensor = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
    return hidden


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether every value is the same up to its last bit: where they are small, a soft cap changes little more."""
    if a.shape != b.shape:
        return False
    a, b, eps = a.float().nan_to_num(), b.float().nan_to_num(), torch.finfo(b.dtype).eps
    return torch.allclose(a, b, rtol=eps, atol=0.0)
