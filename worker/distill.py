"""Recovery: the factors of a compressed model, trained so that it predicts what its dense self predicts.

Ranks stay as they are, and so do norms, biases, embeddings and head. Every factor is trained by AdamW on `KL(dense ||
compressed)` plus a little of the text's own cross-entropy [3LEVEL]_, with the dense weights of the same model as the
teacher; `worker/student.py` has the loss.

Adam moves every entry of a factor F by about its learning rate, so a step of rate h may turn F by h sqrt(numel) in
spectral norm. Each factor's rate is the one that makes this the same share of its own size everywhere:

    h(F) = learning_rate * |F|_2 / sqrt(numel F)

[MUP2023]_ has the argument. One number serves every width: 0.04, the best of 0.02, 0.04 and 0.08 on a model of 192
features, gives rates near 1e-3 there, and by arithmetic about 5e-5 at 4096 features where the largest singular value
of a weight is near 10; 2e-5 to 1e-4 is published for such models.

Memory: 16 bytes per factor parameter on the device (value, gradient, two moments, in fp32) and 4 on the CPU, beside the
dense model.

.. [3LEVEL] Per-Matrix Optimality Is Not Enough, 2026: end-to-end training of the factors, AdamW at 2e-5 for 7B.
.. [MUP2023] A Spectral Condition for Feature Learning, https://arxiv.org/abs/2310.17813
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ranksearch.search.errors import InvalidInput, NumericalError
from ranksearch.search.objective import Objective, objective_of
from ranksearch.worker.evaluate import Evaluation, Scores
from ranksearch.worker.spread import device_of
from ranksearch.worker.student import Product, Student
from ranksearch.worker.training import Training, batch, content_of, schedule

Pairs = Mapping[str, tuple[Tensor, Tensor]]

#: Spectral size of a step, about, as a share of the factor's own.
LEARNING_RATE = 0.04

#: Weight of the text's own cross-entropy beside the KL.
CE_WEIGHT = 0.1

#: Optimizer steps that the tokens are divided into, when there are enough of them.
STEPS = 1000

#: Evaluations, beside the one before the first step.
CHECKS = 8

#: Evaluations in a row that are worse than the best one, after which training ends.
PATIENCE = 3


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """Trained factors: those of the best evaluation.

    Attributes:
        pairs: Target -> left `m x r` and right `r x n`, in the dtype and on the device they came in.
        history: One entry per evaluation, the first before any step: `tokens` trained on, `kl` to the dense model,
            `perplexity`, and for objective `both` that.
    """

    pairs: dict[str, tuple[Tensor, Tensor]]
    history: list[dict[str, float]]


def distill(
    model: nn.Module,
    pairs: Pairs,
    *,
    blocks: Tensor,
    evaluation: Tensor,
    tokens: int,
    objective: Objective = "kl",
    seed: int = 0,
    learning_rate: float = LEARNING_RATE,
    ce_weight: float = CE_WEIGHT,
    state: Path | None = None,
    save_seconds: float = 120.0,
    scratch: str | Path | None = None,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Distilled:
    """Trains the factors of a compressed model; never returns worse ones than it was given.

    Args:
        model: The dense model in eval mode; it comes back as it was.
        pairs: Target -> left `m x r` and right `r x n`; other targets stay dense.
        blocks: Token ids to train on, `sequences x length`, taken in a seeded order, more than once if need be.
        evaluation: Token ids that choose the best factors, `sequences x length`.
        tokens: Tokens to train on.
        objective: By which score the best factors are chosen; they are always trained by the KL.
        seed: Of the order of the text.
        learning_rate: Spectral size of a step as a share of the factor's own.
        ce_weight: Weight of the text's own cross-entropy.
        state: File to keep the state in and to go on from; None for neither. It is left for the caller to delete.
        save_seconds: Between two writings of it.
        scratch: Folder on a disk for the dense model's distributions; the system's own when None.
        progress: Told the fraction done.

    Returns:
        The factors of the best evaluation. A resumed run returns bitwise what an uninterrupted one does, on the CPU.

    Raises:
        InvalidInput: There are no factors or no text.
        NumericalError: A factor or an evaluation is not finite, or several steps in a row gave no finite loss.
    """
    if not pairs:
        raise InvalidInput("There are no factors to train: every target is dense.")
    rows, steps = divide(tokens, blocks)
    leaves = _leaves(model, pairs)
    training = Training(
        leaves,
        {name: step_size(factor, learning_rate) for name, factor in leaves.items()},
        identity={
            "method": "distill",
            "factors": _content(pairs),
            "text": [content_of(blocks), content_of(evaluation)],
            "settings": [rows, steps, seed, learning_rate, ce_weight, objective],
        },
        path=state,
        save_seconds=save_seconds,
    )
    products = {name: _product(leaves[f"left/{name}"], leaves[f"right/{name}"]) for name in pairs}
    with Student(model, products, blocks) as student:
        with student.teaching():
            text = Evaluation(model, evaluation, scratch=scratch)
        best = _Best(training, objective, text.dense.perplexity)
        if not best.history:
            best.consider(0, lambda: text.score(model))
        checks = {round(i * steps / CHECKS) for i in range(1, CHECKS + 1)}
        while training.step < steps and not best.stale:
            ids = batch(blocks, training.step, rows, seed)
            kl = student.learn(ids, list(leaves.values()), ce_weight=ce_weight)
            training.update(kl, schedule(training.step, steps))
            if training.step in checks:
                best.consider(training.step * ids.numel(), lambda: text.score(model))
            training.save(now=training.step == steps or best.stale)
            progress(training.step / steps)
    found = training.tensors
    return Distilled(
        pairs={
            name: (found[f"left/{name}"].to(left), found[f"right/{name}"].to(right))
            for name, (left, right) in pairs.items()
        },
        history=best.history,
    )


def divide(tokens: int, blocks: Tensor) -> tuple[int, int]:
    """Sequences per step, and steps, for a budget of tokens."""
    length = blocks.shape[-1]
    rows = max(1, round(tokens / (STEPS * length)))
    return rows, max(1, round(tokens / (rows * length)))


def step_size(factor: Tensor, learning_rate: float) -> float:
    """Adam's learning rate for one factor, fp32.

    Raises:
        NumericalError: The factor is not finite.
    """
    small = factor.detach() if factor.shape[0] <= factor.shape[1] else factor.detach().mT
    if not bool(small.isfinite().all()):
        raise NumericalError("A factor to train holds NaN or infinite values.")
    largest = torch.linalg.eigvalsh((small @ small.mT).double())[-1].clamp(min=0).sqrt()
    return float(learning_rate * largest / factor.numel() ** 0.5)


class _Best:
    """The factors of the best evaluation so far, as a part of the training's state."""

    def __init__(self, training: Training, objective: Objective, dense_perplexity: float) -> None:
        self._training, self._objective, self._dense_perplexity = training, objective, dense_perplexity
        self.history: list[dict[str, float]] = training.facts.setdefault("history", [])

    def consider(self, tokens: int, score: Callable[[], Scores]) -> None:
        try:
            scores = score()
        except NumericalError:
            if not self.history:
                raise  # what came in is broken
            self.history.append({"tokens": tokens, "kl": math.inf, "perplexity": math.inf, self._objective: math.inf})
            return
        found = {"tokens": tokens, "kl": scores.kl, "perplexity": scores.perplexity}
        found[self._objective] = objective_of(found, self._objective, self._dense_perplexity)
        if all(found[self._objective] < entry[self._objective] for entry in self.history):
            self._training.tensors = {name: leaf.detach().cpu().clone() for name, leaf in self._training.leaves.items()}
        self.history.append(found)

    @property
    def stale(self) -> bool:
        """Whether the last evaluations were all worse than the best one."""
        losses = [entry[self._objective] for entry in self.history]
        return len(losses) - 1 - losses.index(min(losses)) >= PATIENCE


def _leaves(model: nn.Module, pairs: Pairs) -> dict[str, Tensor]:
    """The factors, fp32, by side and target, where each target computes."""
    return {
        f"{side}/{name}": factor.detach().to(device_of(model, name), torch.float32, copy=True).contiguous()
        for name, pair in pairs.items()
        for side, factor in zip(("left", "right"), pair, strict=True)
    }


def _content(pairs: Pairs) -> str:
    digest = hashlib.sha256()
    for name, pair in pairs.items():
        digest.update("".join([name, *map(content_of, pair)]).encode())
    return digest.hexdigest()


def _product(left: Tensor, right: Tensor) -> Product:
    def product(x: Tensor) -> Tensor:
        return F.linear(F.linear(x, right.to(x.dtype)), left.to(x.dtype))

    return product
