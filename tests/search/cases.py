"""Small rank spaces and spectra for the tests of `search`."""

from __future__ import annotations

import numpy as np

from ranksearch.search.space import RankSpace
from ranksearch.search.targets import Target


def target(name: str, m: int, n: int, kind: str = "linear", depth: int = 0) -> Target:
    return Target(name=name, out_features=m, in_features=n, kind=kind, depth=depth)


def llama_space(blocks: int = 6, width: int = 64, hidden: int = 172, kv: int = 32, **options: object) -> RankSpace:
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
    return RankSpace(targets=targets, **options)  # type: ignore[arg-type]


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
