"""SoCo: components chosen by learned scores instead of by the order of their singular values [SOCO2025]_.

Component j of a target gets a score s_j >= 0 beside its two vectors, and only scores are trained:

    y = left' (s * (right x)),        s = 1 on all components: the dense matrix

Loss per step, with p = m + n the parameters of a component and N those of all targets together, dense:

    KL(dense || scored) + price * sum_j p_j min(s_j, 1) / N

For a small price, 1 - s_j is the price per loss that the component saves, so scores order the components of all targets
by what they are worth per parameter. `kept(s)` counts the components with s > 1/2 as kept, a target's as no more than
its dense matrix. Three stages in one run:

1. *exploration*: the price follows a plan that takes `kept(s)` from where it starts down to the budget;
2. *refinement*: the plan stays at the budget; the price swings about the value that holds it there, and components
   that were let go too early come back;
3. *decision*: the components with the highest scores that meet the budget exactly are kept and learn their scale
   freely (s may exceed 1); the scores of the others fall to 0 in a straight line.

The paper's abstract and reviews give the scores, the loss's ingredients and the three stages. The form of the penalty,
the steering of its price, the lengths of the stages and all constants are a reconstruction; its unexplained deviation
term is left out.

.. [SOCO2025] SoCo, https://arxiv.org/abs/2502.15092
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ranksearch.search.allocate import Allocator
from ranksearch.search.errors import InvalidInput
from ranksearch.search.space import Ranks, RankSpace
from ranksearch.worker.bank import FactorBank
from ranksearch.worker.fingerprints import content_hash
from ranksearch.worker.training import Product, Student, Training, batch, compute_dtype

#: Largest change of a score per step, about.
LEARNING_RATE = 0.03

#: Score at the start of a component that the starting ranks do not keep.
DROPPED = 0.3

#: Optimizer steps that the tokens are divided into, when there are enough of them.
STEPS = 400

#: Shares of the steps at which stage 1 and stage 2 end.
STAGES = (0.5, 0.75)

# The price starts at so many nats per share of the parameters and changes by at most a tenth per step, at full pace when
# `kept` is off the plan by a tenth.
_PRICE = 0.1
_PACE = 0.1


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Components chosen by their scores.

    Attributes:
        ranks: Target -> rank; its full rank means dense.
        pairs: Target -> left `m x r` and right `r x n` of the targets that are not dense, scores multiplied in, in the
            dtype and on the device of the bank.
        scores: Target -> learned scores of all components, `k`, fp32, 0 for those not kept.
        history: One entry per tenth of the steps: `step`, `kl` of the batch, `price`, and `kept` by scores above 1/2.
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
    learning_rate: float = LEARNING_RATE,
    state: Path | None = None,
    save_seconds: float = 120.0,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Chosen:
    """Learns which components to keep.

    Args:
        model: The dense model in eval mode; it comes back as it was.
        bank: All its targets factored, with all components (`build_bank(full=True)`).
        space: The rank space.
        kept: The budget, met exactly from below.
        blocks: Token ids to train on, `sequences x length`, taken in a seeded order, more than once if need be.
        tokens: Tokens to train on.
        start: Ranks to start from; all components when None.
        seed: Of the order of the text.
        learning_rate: Of the scores.
        state: File to keep the state in and to go on from; None for neither. It is left for the caller to delete.
        save_seconds: Between two writings of it.
        progress: Told the fraction done.

    Raises:
        ImpossibleBudget: No vector meets the budget.
        InvalidInput: The bank does not hold all components of a target, or there is no text.
        NumericalError: Several steps in a row gave no finite loss.
    """
    space.check_budget(kept)
    _check(bank, space)
    rows = max(1, round(tokens / (STEPS * blocks.shape[-1])))
    steps = max(4, round(tokens / (rows * blocks.shape[-1])))
    scores = _start(model, space, start)
    training = Training(
        scores,
        dict.fromkeys(scores, learning_rate),
        identity={
            "method": "soco",
            "kept": kept,
            "start": dict(start) if start is not None else None,
            "text": content_hash(blocks.contiguous().numpy().tobytes()),
            "bank": content_hash(b"".join(np.ascontiguousarray(s).tobytes() for s in bank.spectra.values())),
            "steps": [steps, rows, seed, learning_rate],
        },
        path=state,
        save_seconds=save_seconds,
    )
    facts = training.facts or {"price": _PRICE, "from": _soft_kept(space, scores), "ranks": None, "history": []}
    training.facts = facts
    prices = {t.name: t.marginal / space.parameters for t in space.targets}
    first, second = (round(share * steps) for share in STAGES)
    dtype, fixed = compute_dtype(model), _Choice(space)
    if facts["ranks"] is not None:
        fixed.choose(facts["ranks"], {name: training.tensors[name] for name in scores})
    products = {t.name: _product(model, bank, t.name, scores[t.name], fixed, dtype) for t in space.targets}
    with Student(model, products, blocks) as student:
        while training.step < steps:
            step = training.step
            if step >= second and facts["ranks"] is None:
                ranks = best_ranks(space, {name: s.detach() for name, s in scores.items()}, kept)
                facts["ranks"] = space.as_dict(ranks)
                training.tensors = {name: s.detach().clone() for name, s in scores.items()}
                fixed.choose(facts["ranks"], training.tensors)
            kl = student.learn(batch(blocks, step, rows, seed), list(scores.values()))
            if facts["ranks"] is None:
                _charge(scores, prices, facts["price"])
            training.update(kl, 1.0 if step < second else 1 - (step - second) / (steps - second))
            if facts["ranks"] is None:
                with torch.no_grad():
                    for s in scores.values():
                        s.clamp_(min=0)
                now = _soft_kept(space, scores)
                plan = _plan(facts["from"], kept, min(1.0, (step + 1) / max(1, first)))
                facts["price"] *= math.exp(_PACE * max(-1.0, min(1.0, 10 * (now / plan - 1))))
            else:
                fixed.settle(scores, (step + 1 - second) / (steps - second))
                now = _soft_kept(space, scores)
            if training.step == steps or training.step * 10 // steps > step * 10 // steps:
                facts["history"].append({"step": training.step, "kl": kl, "price": facts["price"], "kept": now})
            training.save(now=training.step == steps)
            progress(training.step / steps)
    return _packed(bank, space, scores, facts["ranks"], facts["history"])


def best_ranks(space: RankSpace, scores: Mapping[str, Tensor], kept: float) -> Ranks:
    """Ranks of the components with the highest scores that meet the budget exactly from below.

    Scores are values per parameter; a target's components count in the order of their scores, and dense is one more
    option, which saves what all its components are worth.
    """
    spectra = {
        t.name: np.sqrt(np.sort(scores[t.name].double().cpu().numpy())[::-1] * t.marginal) for t in space.targets
    }
    return Allocator(space, spectra).prior(kept)


class _Choice:
    """What stage 3 knows: which components stay, which targets are dense, and where the scores came from."""

    def __init__(self, space: RankSpace) -> None:
        self._full = {t.name: t.full_rank for t in space.targets}
        self.dense: frozenset[str] = frozenset()
        self._dropped: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}

    def choose(self, ranks: Mapping[str, int], scores: Mapping[str, Tensor]) -> None:
        self.dense = frozenset(name for name, rank in ranks.items() if rank >= self._full[name])
        self._before = dict(scores)
        for name, s in scores.items():
            self._dropped[name] = torch.ones_like(s, dtype=torch.bool)
            self._dropped[name][top(s, ranks[name])] = False

    @torch.no_grad()
    def settle(self, scores: Mapping[str, Tensor], fraction: float) -> None:
        """Scores of the components that go: on a straight line to zero."""
        for name, s in scores.items():
            falling = self._before[name].to(s.device) * (1 - fraction)
            s.copy_(torch.where(self._dropped[name].to(s.device), falling, s.clamp(min=0)))


def top(scores: Tensor, rank: int) -> Tensor:
    """Indices of the highest `rank` scores, ascending; the first ones on ties."""
    return scores.sort(descending=True, stable=True).indices[:rank].sort().values


def _check(bank: FactorBank, space: RankSpace) -> None:
    for target in space.targets:
        stored = bank.right[target.name].shape[0]
        if stored < target.full_rank:
            raise InvalidInput(
                f"The bank holds {stored} of {target.full_rank} components of {target.name}; "
                "build it with all of them (full=True).",
                target=target.name,
            )


def _start(model: nn.Module, space: RankSpace, ranks: Mapping[str, int] | None) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    scores = {t.name: torch.ones(t.full_rank, device=device) for t in space.targets}
    for name, rank in (ranks or {}).items():
        scores[name][rank:] = DROPPED
    return scores


def _product(model: nn.Module, bank: FactorBank, name: str, scores: Tensor, fixed: _Choice, dtype: torch.dtype) -> Product:
    dense = model.get_submodule(name)
    left, right = (side[name].to(scores.device, dtype) for side in (bank.left, bank.right))

    def product(x: Tensor) -> Tensor:
        if name in fixed.dense:
            return F.linear(x, dense.weight)
        return F.linear(F.linear(x, right) * scores.to(x.dtype), left.mT)

    return product


def _charge(scores: Mapping[str, Tensor], prices: Mapping[str, float], price: float) -> None:
    """Adds the gradient of the price to that of the KL: p / N below 1, nothing above."""
    for name, s in scores.items():
        assert s.grad is not None
        s.grad.add_((s.detach() <= 1).to(s.dtype), alpha=price * prices[name])


@torch.no_grad()
def _soft_kept(space: RankSpace, scores: Mapping[str, Tensor]) -> float:
    counts = torch.stack([(scores[t.name] > 0.5).sum() for t in space.targets]).tolist()
    costs = [min(t.parameters, t.marginal * count) for t, count in zip(space.targets, counts, strict=True)]
    return sum(costs) / space.parameters


def _plan(start: float, kept: float, fraction: float) -> float:
    """Where `kept(s)` should be: geometrically from the start to the budget."""
    return start ** (1 - fraction) * kept**fraction


def _packed(
    bank: FactorBank,
    space: RankSpace,
    scores: Mapping[str, Tensor],
    ranks: Mapping[str, int],
    history: list[dict[str, float]],
) -> Chosen:
    pairs = {}
    final = {name: s.detach() for name, s in scores.items()}
    for target in space.targets:
        name, rank = target.name, ranks[target.name]
        if rank < target.full_rank:
            pairs[name] = pack(bank, name, final[name], top(final[name], rank))
    return Chosen(ranks=dict(ranks), pairs=pairs, scores=final, history=history)


def pack(bank: FactorBank, name: str, scores: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous factors left `m x r` and right `r x n` of some components, the root of each score in either."""
    left, right = bank.left[name], bank.right[name]
    kept = kept.to(right.device)
    root = scores.to(right.device)[kept].sqrt().unsqueeze(1)
    return tuple((side[kept].float() * root).to(side.dtype).contiguous() for side in (left, right))  # type: ignore[return-value]
