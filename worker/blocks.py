"""The token blocks of a job in one file: made once, so that every later process reads the very same tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ranksearch.worker.fingerprints import content_hash
from ranksearch.worker.text import Material

CALIBRATION, EVALUATION, TRAINING, TEST = "calibration", "evaluation", "training", "test/"


def save_blocks(material: Material, path: str | Path) -> dict[str, Any]:
    """Write all blocks.

    Returns:
        For `calibration`, `evaluation`, `training` if there is one, and each `test/<label>`: label, sizes, hashes of
        text and tokens, and the ids of the blocks: their places among all blocks of the text. Those of `training` are
        left out: they are many and follow from the seed.
    """
    parts = {CALIBRATION: material.calibration, EVALUATION: material.evaluation}
    parts |= {TRAINING: material.training} if material.training else {}
    parts |= {f"{TEST}{blocks.label}": blocks for blocks in material.test}
    tensors: dict[str, Tensor] = {name: blocks.tokens.contiguous() for name, blocks in parts.items()}
    save_file(tensors, path, metadata={"order": json.dumps(list(parts))})
    return {
        name: {
            "label": blocks.label,
            "dataset": blocks.fingerprint,
            "tokens": content_hash(tensors[name].numpy().tobytes()),
            "sequences": tensors[name].shape[0],
            "sequence_length": tensors[name].shape[1],
            "ids": [] if name == TRAINING else list(blocks.ids),
        }
        for name, blocks in parts.items()
    }


def load_blocks(path: str | Path) -> Mapping[str, Tensor]:
    """Name -> token ids, `blocks x length`, in the order they were written."""
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in json.loads(file.metadata()["order"])}
