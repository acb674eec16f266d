"""Small rank spaces and spectra for the tests of `search`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from ranksearch.search.prices import Curve
from ranksearch.search.space import RankSpace
from ranksearch.search.targets import Target


def target(name: str, m: int, n: int, kind: str = "linear", depth: int = 0) -> Target:
    return Target(name=name, out_features=m, in_features=n, kind=kind, depth=depth)


@st.composite
def curves(draw: st.DrawFn, full_rank: int) -> Curve:
    """Any measured curve of a matrix: cheap or dear beside dense, flat, with jumps."""
    ranks = sorted(draw(st.sets(st.integers(1, full_rank), min_size=1, max_size=6)))
    steps = draw(st.lists(st.integers(0, 400), min_size=len(ranks), max_size=len(ranks)))
    times = np.cumsum(steps).tolist()
    return Curve(ranks=tuple(ranks), times=tuple(times), dense=draw(st.integers(1, 2 * times[-1] + 100)))


@st.composite
def priced(draw: st.DrawFn, space: RankSpace) -> RankSpace:
    """The same space with a random price for each target, or as it is."""
    if draw(st.booleans()):
        return space
    return replace(space, prices=tuple(draw(curves(t.full_rank)) for t in space.targets))


def llama_space(blocks: int = 6, width: int = 64, hidden: int = 172, kv: int = 32, **options: Any) -> RankSpace:
    """The targets of a LLaMA-shaped model: seven matrices a block."""
    shapes = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (hidden, width),
        "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
    }
    targets = tuple(
        target(f"model.layers.{depth}.{kind}", m, n, kind, depth)
        for depth in range(blocks)
        for kind, (m, n) in shapes.items()
    )
    return RankSpace(targets=targets, **options)


def power_spectra(space: RankSpace, seed: int = 0, scale: float = 0.5) -> dict[str, np.ndarray]:
    """Singular values with sigma^2 = s j^-a, random s and a per target."""
    rng = np.random.default_rng(seed)
    return {
        t.name: np.sqrt(np.exp(scale * rng.standard_normal()) * np.arange(1, t.full_rank + 1) ** -rng.uniform(0.6, 2.0))
        for t in space.targets
    }


def steep_spectra(space: RankSpace, seed: int = 0) -> dict[str, np.ndarray]:
    """Singular values that fall so fast that dense is never worth its price at small budgets."""
    rng = np.random.default_rng(seed)
    return {t.name: np.exp(-rng.uniform(5, 8) * np.arange(t.full_rank) / t.full_rank) for t in space.targets}
