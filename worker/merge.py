"""Multiplying a checkpoint's targets out again, tensor by tensor; no model is built.

python -m ranksearch.worker.merge CHECKPOINT OUT_DIR
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ranksearch.search.errors import UnsupportedModel
from ranksearch.worker.checkpoint import write_json
from ranksearch.worker.loading import METHOD
from ranksearch.worker.models import INDEX, weight_files
from ranksearch.worker.modules import FactoredLinear, PivotedLinear
from ranksearch.worker.shards import Stored, appearing, headers, write_shards

_NOT_COPIED = ("config.json", INDEX, "README.md", "ranksearch.json")


def merge_to_dense(folder: str | Path, out: str | Path, *, max_shard_bytes: int = 5_000_000_000) -> None:
    """Multiply the targets of a checkpoint out again, for programs that know nothing of ranksearch.

    The result is an ordinary model folder, as large as the original and with the compressed model's quality.

    Args:
        folder: A checkpoint.
        out: The new folder; replaced if it exists.
        max_shard_bytes: Largest size of a weights file.

    Raises:
        UnsupportedModel: The folder is no ranksearch checkpoint, or has biases for which the model has no place.
    """
    folder, out = Path(folder), Path(out)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    method = config.pop("quantization_config", None) or {}
    if method.get("quant_method") != METHOD:
        raise UnsupportedModel(f"{folder} is no ranksearch checkpoint, so there is nothing to multiply out.")
    added = next((name for name, entry in method["targets"].items() if entry.get("bias_added")), None)
    if added is not None:
        raise UnsupportedModel(
            f"{added} was given a bias for which the model itself has no place, so no ordinary dense folder can hold "
            "it; load the checkpoint with ranksearch.worker.loading.",
            target=added,
        )
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
        target, part = _split(name)
        left, right = tensors.get(f"{target}.left.weight"), tensors.get(f"{target}.right.weight")
        rows, rest = tensors.get(f"{target}.pivot.weight"), tensors.get(f"{target}.rest.weight")
        order = tensors.get(f"{target}.order")
        if left and right and part == "left.bias":
            merged[f"{target}.bias"] = stored
        elif left and right and part in FactoredLinear.tensor_names(False):
            load = partial(_product, left.load, right.load)
            merged[f"{target}.weight"] = _weight(target, stored.dtype, left.shape[0], right.shape[1], load)
        elif rows and rest and order and part in PivotedLinear.tensor_names(False):
            load = partial(_ordered, rows.load, rest.load, order.load)
            merged[f"{target}.weight"] = _weight(target, rows.dtype, order.shape[0], rows.shape[1], load)
        else:
            merged[name] = stored
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


def _split(name: str) -> tuple[str, str]:
    """Path of the target and name of the part, if this is a part of a compressed target."""
    for part in (*FactoredLinear.tensor_names(True), *PivotedLinear.tensor_names(False)):
        if name.endswith(f".{part}"):
            return name.removesuffix(f".{part}"), part
    return name, ""


def _weight(target: str, dtype: torch.dtype, m: int, n: int, load: Callable[[], Tensor]) -> Stored:
    return Stored(shape=(m, n), dtype=dtype, load=load, target=target)


def _product(left: Callable[[], Tensor], right: Callable[[], Tensor]) -> Tensor:
    return left().float() @ right().float()


def _ordered(pivot: Callable[[], Tensor], rest: Callable[[], Tensor], order: Callable[[], Tensor]) -> Tensor:
    rows = pivot().float()
    return torch.cat([rows, rest().float() @ rows]).index_select(0, order())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write a checkpoint as an ordinary dense model folder.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    merge_to_dense(options.checkpoint, options.out)


if __name__ == "__main__":
    main()
