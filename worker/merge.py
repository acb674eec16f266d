"""Multiplying a checkpoint's factors out again, tensor by tensor; no model is built.

python -m ranksearch.worker.merge CHECKPOINT OUT_DIR
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ranksearch.search.errors import UnsupportedModel
from ranksearch.worker.checkpoint import write_json
from ranksearch.worker.loading import METHOD
from ranksearch.worker.models import INDEX, weight_files
from ranksearch.worker.shards import Stored, appearing, headers, write_shards

_NOT_COPIED = ("config.json", INDEX, "README.md", "ranksearch.json")


def merge_to_dense(folder: str | Path, out: str | Path, *, max_shard_bytes: int = 5_000_000_000) -> None:
    """Multiply the factors of a checkpoint out again, for programs that know nothing of ranksearch.

    The result is an ordinary model folder, as large as the original and with the compressed model's quality.

    Args:
        folder: A checkpoint.
        out: The new folder; replaced if it exists.
        max_shard_bytes: Largest size of a weights file.

    Raises:
        UnsupportedModel: The folder is no ranksearch checkpoint.
    """
    folder, out = Path(folder), Path(out)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    method = config.pop("quantization_config", None) or {}
    if method.get("quant_method") != METHOD:
        raise UnsupportedModel(f"{folder} is no ranksearch checkpoint, so there is nothing to multiply out.")
    tensors = {
        name: Stored(shape=shape, dtype=dtype, load=_from_file(file, name))
        for file in weight_files(folder)
        for name, (shape, dtype) in headers([file]).items()
    }
    with appearing(out) as draft:
        write_shards(draft, _as_stored(_merged(tensors), method["targets"]), max_shard_bytes)
        for path in folder.iterdir():
            if path.suffix != ".safetensors" and path.name not in _NOT_COPIED:
                shutil.copyfile(path, draft / path.name)
        write_json(draft / "config.json", config)


def _from_file(file: Path, name: str) -> Callable[[], Tensor]:
    def load() -> Tensor:
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name)  # type: ignore[no-any-return]

    return load


def _merged(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    merged: dict[str, Stored] = {}
    for name, stored in tensors.items():
        target, _, part = name.rpartition(".left.")
        right = tensors.get(f"{target}.right.weight")
        if name.endswith(".right.weight") and name.removesuffix("right.weight") + "left.weight" in tensors:
            continue
        if not target or right is None:
            merged[name] = stored
        elif part == "bias":
            merged[f"{target}.bias"] = stored
        else:
            shape = (stored.shape[0], right.shape[1])
            merged[f"{target}.weight"] = Stored(
                shape=shape, dtype=stored.dtype, load=_product(stored.load, right.load), target=target
            )
    return merged


def _as_stored(merged: Mapping[str, Stored], targets: Mapping[str, Mapping[str, Any]]) -> dict[str, Stored]:
    """Puts the matrices that were multiplied out in the shape in which the model has them."""
    tensors = dict(merged)
    experts: dict[str, list[Stored]] = {}
    for name, entry in targets.items():
        stored = tensors.get(f"{name}.weight")
        if stored is None:
            continue  # an expert of a tensor that was left in one piece
        # one by itself was never turned where it is dense
        if entry.get("transposed") and (entry.get("fused") or entry["form"] != "dense"):
            stored = replace(stored, shape=stored.shape[::-1], load=_turned(stored.load))
        if entry.get("fused"):
            del tensors[f"{name}.weight"]
            experts.setdefault(name.rpartition(".")[0], []).append(stored)
        else:
            tensors[f"{name}.weight"] = stored
    for name, parts in experts.items():
        shape = (len(parts), *parts[0].shape)
        tensors[name] = Stored(shape=shape, dtype=parts[0].dtype, load=_stacked([part.load for part in parts]))
    return tensors


def _turned(load: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: load().mT


def _stacked(loads: Sequence[Callable[[], Tensor]]) -> Callable[[], Tensor]:
    return lambda: torch.stack([load() for load in loads])


def _product(left: Callable[[], Tensor], right: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: left().float() @ right().float()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write a checkpoint as an ordinary dense model folder.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    merge_to_dense(options.checkpoint, options.out)


if __name__ == "__main__":
    main()
