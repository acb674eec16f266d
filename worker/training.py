"""Training that can be taken up again: leaves, AdamW on them, their batches, and all of it in one file."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ranksearch.search.errors import NumericalError
from ranksearch.worker.fingerprints import content_hash

#: Steps in a row whose loss or gradient is not finite before the training gives up.
MOST_FAILURES = 5

#: Largest norm of the gradient of all leaves together.
CLIP = 1.0

_BETAS = (0.9, 0.99)


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


def content_of(tensor: Tensor) -> str:
    """sha256 of a tensor's values."""
    return content_hash(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
