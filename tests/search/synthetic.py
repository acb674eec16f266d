"""A made-up model whose loss is known in closed form: what the search must find out about a prior that errs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ranksearch.search.allocate import Allocator
from ranksearch.search.gradients import bands
from ranksearch.search.space import RankSpace

from .cases import llama_space

DENSE = 10.0


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Power-law spectra as the prior sees them, and hidden log sensitivities, interactions and a convex link.

    log(score / dense) = scale * (S + chi * sum over neighbouring blocks of sqrt(S_block S_next)) ^ power,
    S = sum_i exp(hidden_i) E_i(r_i).
    """

    space: RankSpace
    allocator: Allocator
    hidden: np.ndarray
    spectra: dict[str, np.ndarray]
    unit: float
    interaction: float = 0.15
    power: float = 1.25

    def score(self, ranks: np.ndarray) -> float:
        return float(np.exp(self._log_score(ranks)))

    def _log_score(self, ranks: np.ndarray, at: int = 0, by: float = 0.0) -> float:
        """Log of the score if one target's loss were larger by so much."""
        loss = np.exp(self.hidden) * self.allocator.tail_loss(ranks) / self.unit
        loss[at] += by
        depth = np.array([t.depth for t in self.space.targets])
        blocks = np.bincount(depth, weights=loss)
        total = loss.sum() + self.interaction * np.sqrt(blocks[1:] * blocks[:-1]).sum()
        return float(np.log(DENSE) + 0.3 * total**self.power)

    def gradients(self, ranks: np.ndarray) -> dict[str, list[float]]:
        """What gates on the components around a vector (see `gradients.bands`) would say if each component cost
        D (1 - s)^2 of its target's loss: nothing at s = 1, and -2 D at s = 0."""
        around = bands(self.space, ranks)
        step = 1e-6
        own = np.exp(self.hidden) / self.unit
        base = np.log(self.score(ranks))
        next_loss = own * (self.allocator.tail_loss(around.rank) - self.allocator.tail_loss(around.high))
        slopes = [(self._log_score(ranks, at=i, by=step) - base) / step for i in range(len(ranks))]
        sums = -2 * np.array(slopes) * next_loss
        return {t.name: [0.0, float(more)] for t, more in zip(self.space.targets, sums, strict=True)}

    def oracle(self, kept: float) -> float:
        """The score of the best vector if interactions are left out of the account."""
        return self.score(self.allocator.waterfill(kept, self.hidden))

    def gain(self, best: float, kept: float) -> float:
        """Share of the way from the prior's log excess to the oracle's."""
        prior, oracle = self.score(self.allocator.prior(kept)), self.oracle(kept)
        return float(np.log(prior / best) / np.log(prior / oracle))


def problem(seed: int, blocks: int = 6, error: float = 0.7, kept: float = 0.4, **sizes: int) -> Problem:
    """Spectra with random exponents and heavy-tailed scales; a prior wrong by log-normal factors, half of it shared."""
    rng = np.random.default_rng(seed)
    space = llama_space(blocks=blocks, **sizes)
    scales = 0.5 * rng.standard_t(3, size=len(space.targets))
    spectra = {
        t.name: np.sqrt(np.exp(scale) * t.marginal * np.arange(1, t.full_rank + 1) ** -rng.uniform(1.0, 2.5))
        for t, scale in zip(space.targets, scales, strict=True)
    }
    kinds = sorted({t.kind for t in space.targets})
    by_kind = dict(zip(kinds, rng.standard_normal(len(kinds)), strict=True))
    phase = rng.uniform(0, 2 * np.pi)
    wave = {depth: np.sqrt(2) * np.sin(phase + 2 * np.pi * depth / blocks / 1.5) for depth in range(blocks)}
    shared = np.array([0.5 * by_kind[t.kind] + 0.5 * wave[t.depth] for t in space.targets])
    hidden = error * (shared + np.sqrt(0.5) * rng.standard_normal(len(space.targets)))
    allocator = Allocator(space, spectra)
    unit = allocator.loss(allocator.prior(kept), hidden)
    return Problem(space=space, allocator=allocator, hidden=hidden, spectra=spectra, unit=unit)
