"""Model folders as small as they get, written without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HIDDEN, INNER, VOCABULARY, BLOCKS = 8, 16, 32, 2


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """The tensors of a LLaMA-shaped model."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for block in range(BLOCKS):
        at = f"model.layers.{block}"
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (HIDDEN, INNER), f"{at}.input_layernorm.weight": (HIDDEN,)}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_model(folder: Path, tensors: Mapping[str, np.ndarray] | None = None, *, config: object = None) -> Path:
    """Write a model folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(weights() if tensors is None else tensors), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} if config is None else config))
    return folder
