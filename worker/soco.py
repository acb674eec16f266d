"""SoCo: components chosen by learned scores instead of by the order of their singular values [SOCO2025]_.

Component j of a target gets a score s_j >= 0 beside its two vectors, and only scores are trained:

    y = left' (s * (right x)),        s = 1 on all components: the dense matrix

Loss per step, with p = m + n the parameters of a component and N those of all targets together, dense:

    KL(dense || scored) + price * sum_j p_j phi(s_j) / N,        phi(s) = s (1 + a) / (s + a)

The price is steered so that `kept(s) = sum_j p_j phi(s_j) / N`, a target counted as no more than its dense matrix,
follows a plan; scores stay within [0, 1] as long as there is a price. phi rises from 0 to 1 and is steep near 0 and
flat near 1, so a score that has begun to fall falls to 0, the one worth least per parameter first, and few are left
between. Three stages in one run:

1. *exploration*: the price follows a plan that takes `kept(s)` from where it starts down to the budget;
2. *refinement*: the plan stays at the budget; the price swings about the value that holds it there, and components
   that were let go too early come back;
3. *decision*: the components whose scores were highest on average over stage 2 and meet the budget exactly are kept
   and learn their scale freely (s may exceed 1); the scores of the others fall to 0 in a straight line.

The paper's abstract and reviews give the scores, the loss's ingredients and the three stages. The form of the penalty,
the steering of its price, the lengths of the stages and all constants are a reconstruction; its unexplained deviation
term is left out.

Few tokens per step are enough: what is chosen does not become better, but worse, when the gradients are cleaner, since
then fewer scores are driven to either end. On a model of 3 M parameters at kept 0.25, after 100 steps of 1,024, 3,072
and 10,240 tokens, from all components, perplexity on held-out text of 40.1, 52 (other text) and 67.6; the prior, 42.6.

.. [SOCO2025] SoCo, https://arxiv.org/abs/2502.15092
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ranksearch.search.allocate import Allocator
from ranksearch.search.errors import InvalidInput
from ranksearch.search.space import Ranks, RankSpace
from ranksearch.search.targets import Target
from ranksearch.worker.bank import FactorBank
from ranksearch.worker.fingerprints import content_hash
from ranksearch.worker.spread import device_of
from ranksearch.worker.student import Product, Student, compute_dtype
from ranksearch.worker.training import Training, batch, content_of

#: Largest change of a score per step, about: from all components, and from given ranks, whose order is worth something.
LEARNING_RATE, REFINING_RATE = 0.05, 0.01

#: Score at the start of a component that the starting ranks do not keep; it counts for 0.3 of its parameters.
DROPPED = 0.125

#: Optimizer steps that the tokens are divided into, when there are enough of them.
STEPS = 100

#: Shares of the steps at which stage 1 and stage 2 end.
STAGES = (0.5, 0.75)

# The price starts at so many nats for all parameters and changes by at most a tenth per step: by that much when `kept`
# is a tenth off the plan. The bend is a of phi: 0.2 and 0.05 choose worse (45 and 58, see above).
_PRICE = 0.1
_PACE = 0.1
_BEND = 0.5


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Components chosen by their scores.

    Attributes:
        ranks: Target -> rank; its full rank means dense.
        pairs: Target -> left `m x r` and right `r x n` of the targets that are not dense, scores multiplied in, in the
            dtype and on the device of the bank.
        scores: Target -> learned scores of all components, `k`, fp32, 0 for those not kept; none for a target that may
            not be factored.
        history: One entry per tenth of the steps: `step`, `kl` of the batch, `price`, and `kept(s)`.
    """

    ranks: dict[str, int]
    pairs: dict[str, tuple[Tensor, Tensor]]
    scores: dict[str, Tensor]
    history: list[dict[str, float]]


def soco(
    model: nn.Module,
    bank: FactorBank,
    space: RankSpace,
    kept: float,
    *,
    blocks: Tensor,
    tokens: int,
    start: Mapping[str, int] | None = None,
    seed: int = 0,
    learning_rate: float | None = None,
    state: Path | None = None,
    save_seconds: float = 120.0,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Chosen:
    """Learns which components to keep.

    Args:
        model: The dense model in eval mode; it comes back as it was.
        bank: All its targets factored, with all components (`build_bank(full=True)`). Those on the CPU beside a model
            elsewhere stay there, and are taken over target by target whenever they run.
        space: The rank space.
        kept: The budget, met exactly from below; 1 takes no training.
        blocks: Token ids to train on, `sequences x length`, taken in a seeded order, more than once if need be.
        tokens: Tokens to train on.
        start: Ranks to start from; all components when None.
        seed: Of the order of the text.
        learning_rate: Of the scores; `LEARNING_RATE`, or `REFINING_RATE` from given ranks, when None.
        state: File to keep the state in and to go on from; None for neither. It is left for the caller to delete.
        save_seconds: Between two writings of it.
        progress: Told the fraction done.

    Raises:
        ImpossibleBudget: No vector meets the budget.
        InvalidInput: The bank does not hold all components of a target, or there is no text.
        NumericalError: Several steps in a row gave no finite loss.
    """
    space.check_budget(kept)
    if space.budget(kept) == space.parameters:
        # nothing has to go, and where no target may be factored no other budget can be met
        return Chosen(ranks={t.name: t.full_rank for t in space.targets}, pairs={}, scores={}, history=[])
    _check(bank, space)
    rows = max(1, round(tokens / (STEPS * blocks.shape[-1])))
    steps = max(4, round(tokens / (rows * blocks.shape[-1])))
    scores = _start(model, space, start)
    if learning_rate is None:
        learning_rate = LEARNING_RATE if start is None else REFINING_RATE
    training = Training(
        scores,
        dict.fromkeys(scores, learning_rate),
        identity={
            "method": "soco",
            "start": [kept, dict(start) if start is not None else None],
            "bank": content_hash(b"".join(np.ascontiguousarray(s).tobytes() for s in bank.spectra.values())),
            "text": content_of(blocks),
            "settings": [rows, steps, seed, learning_rate],
        },
        path=state,
        save_seconds=save_seconds,
    )
    run = _Run(space, training, kept, steps)
    products = {name: _product(model, bank, name, run) for name in scores}
    with Student(model, products, blocks) as student:
        while training.step < steps:
            ids = batch(blocks, training.step, rows, seed)
            run.advance(lambda ids=ids: student.learn(ids, list(scores.values())))  # type: ignore[misc]
            training.save(now=training.step == steps)
            progress(training.step / steps)
    ranks = training.facts["ranks"]
    final = {name: s.detach() for name, s in scores.items()}
    pairs = {
        t.name: pack(bank, t.name, final[t.name], top(final[t.name], ranks[t.name]))
        for t in space.targets
        if ranks[t.name] < t.full_rank
    }
    return Chosen(ranks=ranks, pairs=pairs, scores=final, history=training.facts["history"])


def best_ranks(space: RankSpace, scores: Mapping[str, Tensor], kept: float) -> Ranks:
    """Ranks of the components with the highest scores that meet the budget exactly from below.

    A component counts for s / (1 - s) per parameter, so that full scores stand out. Dense is one more option of every
    target, which keeps all of its components for m n parameters.
    """
    spectra = {}
    for target in space.targets:
        if target.name not in scores:
            spectra[target.name] = np.zeros(0)
            continue
        s = np.sort(scores[target.name].detach().double().cpu().numpy())[::-1]
        spectra[target.name] = np.sqrt(target.marginal * s / (1 - np.minimum(s, 0.95)))
    return Allocator(space, spectra).prior(kept)


class _Run:
    """The three stages. What they have to remember lies in the training's state."""

    def __init__(self, space: RankSpace, training: Training, kept: float, steps: int) -> None:
        self._space, self._training, self._kept, self._steps = space, training, kept, steps
        self._first, self._second = (round(share * steps) for share in STAGES)
        self._prices = {t.name: t.marginal / space.parameters for t in _free(space)}
        self.scores = training.leaves
        self.dense: frozenset[str] = frozenset()
        if not training.facts:
            training.facts = {"price": _PRICE, "from": self._count(), "ranks": None, "history": []}
        elif training.facts["ranks"] is not None:
            self._settle()

    def advance(self, learn: Callable[[], float]) -> None:
        """One step; `learn` gives the KL of a batch and puts its gradient into the scores."""
        step, facts = self._training.step, self._training.facts
        if step >= self._second and facts["ranks"] is None:
            facts["ranks"] = self._space.as_dict(best_ranks(self._space, self._training.tensors, self._kept))
            self._settle()
            with torch.no_grad():
                for name, s in self.scores.items():
                    s.copy_(self._before[name])
        kl = learn()
        if facts["ranks"] is None:
            self._explore(kl, step)
        else:
            self._decide(kl, (step + 1 - self._second) / (self._steps - self._second))
        if (step + 1) * 10 // self._steps > step * 10 // self._steps:
            facts["history"].append({"step": step + 1, "kl": kl, "price": facts["price"], "kept": self._count()})

    def _explore(self, kl: float, step: int) -> None:
        """Stages 1 and 2: a score pays below 1; the price follows what is kept."""
        facts = self._training.facts
        for name, s in self.scores.items():
            assert s.grad is not None
            s.grad.add_(_slope(s.detach()), alpha=facts["price"] * self._prices[name])
        self._training.update(kl, 1.0)
        means = self._training.tensors
        with torch.no_grad():
            for name, s in self.scores.items():
                # one matrix growing while the next one shrinks would look cheaper and change nothing
                s.clamp_(0, 1)
                if step == self._first:
                    means[name] = s.detach().clone()
                elif step > self._first:
                    means[name].lerp_(s.to(means[name].device), 1 / (step + 1 - self._first))
        done = min(1.0, (step + 1) / self._first)
        plan = facts["from"] ** (1 - done) * self._kept**done
        facts["price"] *= math.exp(_PACE * max(-1.0, min(1.0, 10 * (self._count() / plan - 1))))

    @torch.no_grad()
    def _decide(self, kl: float, done: float) -> None:
        """Stage 3: what is kept learns on, the rest falls to zero in a straight line."""
        self._training.update(kl, 1 - done)
        for name, s in self.scores.items():
            s.copy_(torch.where(self._dropped[name], self._before[name] * (1 - done), s.clamp(min=0)))

    def _settle(self) -> None:
        """Which components fall and which targets are dense, from the state."""
        ranks = self._training.facts["ranks"]
        self.dense = frozenset(t.name for t in self._space.targets if ranks[t.name] == t.full_rank)
        self._before = {name: self._training.tensors[name].to(s.device) for name, s in self.scores.items()}
        self._dropped = {name: torch.ones_like(s, dtype=torch.bool) for name, s in self._before.items()}
        for name, s in self._before.items():
            self._dropped[name][top(s, ranks[name])] = False

    @torch.no_grad()
    def _count(self) -> float:
        """`kept(s)`: the parameters of all components, each as far as it counts."""
        targets = _free(self._space)
        device = self.scores[targets[0].name].device  # scores of other blocks may be elsewhere
        sums = torch.stack([_counted(self.scores[t.name]).sum().to(device) for t in targets]).tolist()
        costs = [min(t.parameters, t.marginal * total) for t, total in zip(targets, sums, strict=True)]
        fixed = self._space.parameters - sum(t.parameters for t in targets)
        return float((fixed + sum(costs)) / self._space.parameters)


def _counted(scores: Tensor) -> Tensor:
    """phi(s), as far as each component counts."""
    s = scores.clamp(0, 1)
    return s * (1 + _BEND) / (s + _BEND)


def _slope(scores: Tensor) -> Tensor:
    """phi'(s), and nothing above 1."""
    return _BEND * (1 + _BEND) / (scores + _BEND).square() * (scores <= 1)


def top(scores: Tensor, rank: int) -> Tensor:
    """Indices of the highest `rank` scores, ascending; the first ones on ties."""
    return scores.sort(descending=True, stable=True).indices[:rank].sort().values


def _check(bank: FactorBank, space: RankSpace) -> None:
    for target in _free(space):
        stored = bank.right[target.name].shape[0]
        if stored < target.full_rank:
            raise InvalidInput(
                f"The bank holds {stored} of {target.full_rank} components of {target.name}; "
                "build it with all of them (full=True).",
                target=target.name,
            )


def _start(model: nn.Module, space: RankSpace, ranks: Mapping[str, int] | None) -> dict[str, Tensor]:
    scores = {t.name: torch.ones(t.full_rank, device=device_of(model, t.name)) for t in _free(space)}
    if ranks is not None:
        for name, s in scores.items():
            s[ranks[name] :] = DROPPED
    return scores


def _free(space: RankSpace) -> tuple[Target, ...]:
    """The targets that may be factored."""
    return tuple(t for t, low in zip(space.targets, space.low_ranks, strict=True) if low < t.full_rank)


def _product(model: nn.Module, bank: FactorBank, name: str, run: _Run) -> Product:
    scores, dtype = run.scores[name], compute_dtype(model)
    left, right = bank.left[name], bank.right[name]
    there = right.device == scores.device
    if there:
        left, right = left.to(dtype), right.to(dtype)

    def scored(x: Tensor) -> Tensor:
        return F.linear(F.linear(x, right.to(x)) * scores.to(x.dtype), left.to(x).mT)

    def product(x: Tensor) -> Tensor | None:
        if name in run.dense:
            return None
        if there:
            return scored(x)
        # what is taken over for one product is not kept for its backward pass, but taken over again
        found: Tensor = checkpoint(scored, x, use_reentrant=False, preserve_rng_state=False)
        return found

    return product


def pack(bank: FactorBank, name: str, scores: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous factors left `m x r` and right `r x n` of some components, the root of each score in either."""
    kept = kept.to(bank.right[name].device)
    root = scores.to(kept.device)[kept].sqrt().unsqueeze(1)
    left, right = ((side[name][kept].float() * root).to(side[name].dtype) for side in (bank.left, bank.right))
    return left.mT.contiguous(), right
