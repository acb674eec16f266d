"""Exporting a checkpoint: a Hugging Face folder whose targets are stored dense, as two factors, or in form `pivoted`.

`worker/loading.py` says how, and reads it. The model is never copied: tensors are written one shard at a time, factors
straight from the views they are given as, pivot rows as they are chosen.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.search.errors import BrokenWeights, UnsupportedModel
from ranksearch.search.targets import Form, Target
from ranksearch.worker.fused import FusedExperts, layout
from ranksearch.worker.loading import METHOD, VERSION
from ranksearch.worker.models import PROCESSOR_FILES, TOKENIZER_FILES, weight_files
from ranksearch.worker.pivot import pivot
from ranksearch.worker.shards import Stored, appearing, headers, write_shards

Pairs = Callable[[str, int], tuple[Tensor, Tensor]]
Biases = Callable[[str, int], Tensor]
_MATRICES = ("weight", "right.weight", "left.weight", "pivot.weight", "rest.weight")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a model folder holds.

    Attributes:
        targets: Parameters of the targets' matrices (neither biases nor the indices of form `pivoted` are counted).
        model: Parameters of the whole model, shared tensors once, without the indices.
        disk: Bytes of the weights files.
        loaded: Bytes of all tensors.
    """

    targets: int
    model: int
    disk: int
    loaded: int


def export(
    folder: str | Path,
    *,
    model: Any,
    tokenizer: Any,
    pairs: Pairs,
    ranks: Mapping[str, int],
    targets: Iterable[Target],
    biases: Biases | None = None,
    form: Form = "factored",
    dtype: str | torch.dtype = "auto",
    max_shard_bytes: int = 5_000_000_000,
) -> Sizes:
    """Write a checkpoint; it appears whole or not at all.

    Args:
        folder: Where it goes; replaced if it exists.
        model: The dense model, its targets plain `nn.Linear` modules.
        tokenizer: Its tokenizer.
        pairs: `(name, rank)` to left `m x r` and right `r x n`; views are fine.
        ranks: Rank of each target; full rank, or no entry, means stored dense.
        targets: All targets of the model.
        biases: `(name, rank)` to the bias `m` of a target below full rank; each one's own when None.
        form: How targets below full rank are stored.
        dtype: Dtype of the floating tensors; `auto` keeps each tensor's own.
        max_shard_bytes: Largest size of a weights file.

    Returns:
        What was written, counted from the files.

    Raises:
        NumericalError: A factor is not finite or too large for the dtype; names the target.
        StorageFull: The disk is full.
    """
    folder, targets = Path(folder), tuple(targets)
    wanted = None if dtype == "auto" else getattr(torch, dtype) if isinstance(dtype, str) else dtype
    below = {t.name: ranks[t.name] for t in targets if ranks.get(t.name, t.full_rank) < t.full_rank}
    tensors = _tensors(model, {t.name: t for t in targets}, below, pairs, biases, form, wanted)
    with appearing(folder) as draft:
        write_shards(draft, tensors, max_shard_bytes)
        _write_rest(draft, model, tokenizer, targets, below, form, wanted, biased=biases is not None)
        return count(draft, targets)


def _tensors(
    model: nn.Module,
    targets: Mapping[str, Target],
    below: Mapping[str, int],
    pairs: Pairs,
    biases: Biases | None,
    form: Form,
    wanted: torch.dtype | None,
) -> dict[str, Stored]:
    for name in targets:
        module = model.get_submodule(name)
        if not isinstance(module, nn.Linear):
            raise UnsupportedModel(
                f"Target {name} is a {type(module).__name__} at export; put the model's own linear layers back first."
            )
    stored: dict[str, Stored] = {}
    for key, tensor in _unshared(model).items():
        dtype = wanted if wanted is not None and tensor.is_floating_point() else tensor.dtype
        target, _, part = key.rpartition(".")
        if target not in below:
            owner = target if target in targets else None
            stored[key] = Stored(shape=tuple(tensor.shape), dtype=dtype, load=_constant(tensor), target=owner)
        elif part == "weight":
            make = _pivoted if form == "pivoted" else _factored
            stored |= make(pairs, targets[target], below[target], dtype)
            if biases is not None:
                bias = partial(biases, target, below[target])
                shape = (targets[target].out_features,)
                stored[_bias_name(target, form)] = Stored(shape=shape, dtype=dtype, load=bias, target=target)
        elif biases is None:
            name = _bias_name(target, form)
            stored[name] = Stored(shape=tuple(tensor.shape), dtype=dtype, load=_constant(tensor), target=target)
    return _fuse_dense(model, stored, below)


def _bias_name(target: str, form: Form) -> str:
    return f"{target}.bias" if form == "pivoted" else f"{target}.left.bias"


def _fuse_dense(model: nn.Module, stored: dict[str, Stored], below: Mapping[str, int]) -> dict[str, Stored]:
    """Expert tensors of which every expert is dense go back into one piece, as the model has them."""
    for path, module in model.named_modules():
        if not isinstance(module, FusedExperts):
            continue
        names = [f"{path}.{index}" for index in range(len(module))]
        if not any(name in below for name in names):
            parts = [stored.pop(f"{name}.weight") for name in names]
            stored[path] = Stored(shape=module.shape, dtype=parts[0].dtype, load=module.fused)
    return stored


def _constant(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def _factored(pairs: Pairs, target: Target, rank: int, dtype: torch.dtype) -> dict[str, Stored]:
    name, m, n = target.name, target.out_features, target.in_features
    return {
        f"{name}.{side}.weight": Stored(
            shape=shape, dtype=dtype, load=_factor(pairs, name, rank, side, shape), target=name
        )
        for side, shape in (("right", (rank, n)), ("left", (m, rank)))
    }


def _pivoted(pairs: Pairs, target: Target, rank: int, dtype: torch.dtype) -> dict[str, Stored]:
    name, m, n = target.name, target.out_features, target.in_features
    waiting: dict[str, Tensor] = {}

    def load(part: str) -> Tensor:
        if not waiting:
            # all parts come from one choice of rows, wherever shards begin and end
            found = pivot(*pairs(name, rank), dtype, name=name)
            waiting.update({"pivot.weight": found.pivot, "rest.weight": found.rest, "order": found.order})
        return waiting.pop(part)

    parts = (("pivot.weight", (rank, n), dtype), ("rest.weight", (m - rank, rank), dtype), ("order", (m,), torch.int32))
    return {
        f"{name}.{part}": Stored(shape=shape, dtype=kind, load=partial(load, part), target=name)
        for part, shape, kind in parts
    }


def _factor(pairs: Pairs, name: str, rank: int, side: str, shape: tuple[int, int]) -> Callable[[], Tensor]:
    def load() -> Tensor:
        left, right = pairs(name, rank)
        factor = left if side == "left" else right
        if tuple(factor.shape) != shape:
            raise ValueError(f"the {side} factor of {name} has shape {tuple(factor.shape)}, expected {shape}")
        return factor

    return load


def _unshared(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the names that `from_pretrained` ties to another tensor by itself."""
    state: dict[str, Tensor] = model.state_dict()
    declared = getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ()
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    places: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in state.items():
        places.setdefault((tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()), []).append(name)
    kept: dict[str, Tensor] = {}
    for name, tensor in state.items():
        names = places[tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()]
        shared = len(names) > 1 and tensor.numel() > 0
        if name in ignored or (shared and _tied(name, declared) and not all(_tied(other, declared) for other in names)):
            continue
        kept[name] = tensor.clone() if shared and names[0] != name else tensor
    return kept


def _tied(name: str, declared: Iterable[str]) -> bool:
    return any(name == pattern or re.search(pattern, name) for pattern in declared)


def _write_rest(
    folder: Path,
    model: Any,
    tokenizer: Any,
    targets: tuple[Target, ...],
    below: Mapping[str, int],
    form: Form,
    wanted: torch.dtype | None,
    *,
    biased: bool,
) -> None:
    """Config, generation config, tokenizer and code files: as they came where the model was loaded from a folder."""
    source = Path(getattr(model.config, "_name_or_path", "") or "")
    config = _original_config(source, model)
    if config is None:
        config = model.config.to_dict()
        config["architectures"] = [type(model).__name__]
        tokenizer.save_pretrained(folder)
        if getattr(model, "generation_config", None) is not None and model.can_generate():
            # not `save_pretrained`, which refuses sampling settings that many published models carry
            model.generation_config.to_json_file(folder / "generation_config.json")
    else:
        code = ("*.py",) if _own_code(model) else ()
        patterns = ("generation_config.json", *TOKENIZER_FILES, *PROCESSOR_FILES, *code)
        for path in sorted({path for pattern in patterns for path in source.glob(pattern)}):
            shutil.copyfile(path, folder / path.name)
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(wanted or model.dtype).removeprefix("torch.")
    config["quantization_config"] = {
        "quant_method": METHOD,
        "version": VERSION,
        "targets": {
            target.name: {
                "form": form if target.name in below else "dense",
                "rank": below.get(target.name, target.full_rank),
                **_bias_entry(model.get_submodule(target.name), given=biased and target.name in below),
                **layout(model, target.name),
            }
            for target in targets
        },
    }
    write_json(folder / "config.json", config)
    _name_tokenizer(folder / "tokenizer_config.json")


def _bias_entry(module: nn.Module, *, given: bool) -> dict[str, bool]:
    """Whether a target is stored with a bias, and whether the model itself has no place for it."""
    own = module.bias is not None
    return {"bias": own or given, **({"bias_added": True} if given and not own else {})}


def _original_config(source: Path, model: Any) -> dict[str, Any] | None:
    """The config file that the model was loaded from, if it describes this very model class.

    Keeping it word for word lets an older transformers than ours load the checkpoint whenever it can load the original.
    """
    try:
        config = json.loads((source / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    same = config.get("model_type") == model.config.model_type and config.get("architectures") == [type(model).__name__]
    return config if same else None


def _own_code(model: Any) -> bool:
    return type(model).__module__.startswith("transformers_modules.")


def _name_tokenizer(path: Path) -> None:
    # transformers 5 writes a class name that 4 does not know; both know this one
    if path.is_file():
        settings = json.loads(path.read_text("utf-8"))
        if settings.get("tokenizer_class") == "TokenizersBackend":
            inputs = {"model_input_names": ["input_ids", "attention_mask"]}
            write_json(path, inputs | settings | {"tokenizer_class": "PreTrainedTokenizerFast"})


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document, readable and in stable order."""
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", "utf-8")


def count(folder: str | Path, targets: Iterable[Target]) -> Sizes:
    """Count a folder's parameters and bytes from its safetensors headers.

    Raises:
        BrokenWeights: A target's tensors are not in the files.
    """
    folder = Path(folder)
    stored = headers(weight_files(folder))
    sizes = {name: torch.Size(shape).numel() for name, (shape, _) in stored.items()}
    total = indices = 0
    for target in targets:
        found = [f"{target.name}.{part}" for part in _MATRICES]
        fused = target.name.rpartition(".")[0]
        if not any(name in sizes for name in (*found, fused)):
            raise BrokenWeights(f"{folder} holds no tensor of target {target.name}.", target=target.name)
        total += sum(sizes.get(name, 0) for name in found) if fused not in sizes else target.parameters
        indices += sizes.get(f"{target.name}.order", 0)
    return Sizes(
        targets=total,
        model=sum(sizes.values()) - indices,
        disk=sum(file.stat().st_size for file in weight_files(folder)),
        loaded=sum(sizes[name] * dtype.itemsize for name, (_, dtype) in stored.items()),
    )


def dense_sizes(model: nn.Module, targets: Iterable[Target], folder: str | Path | None = None) -> Sizes:
    """The same figures for the model before compression: parameters from the modules, disk from its folder if given."""
    parameters = {(p.device, p.data_ptr(), p.shape): p for p in model.parameters()}.values()
    loaded = sum(p.numel() * p.element_size() for p in parameters)
    return Sizes(
        targets=sum(target.parameters for target in targets),
        model=sum(p.numel() for p in parameters),
        disk=sum(file.stat().st_size for file in weight_files(Path(folder))) if folder is not None else loaded,
        loaded=loaded,
    )


def as_report(compressed: Sizes, dense: Sizes) -> dict[str, dict[str, int]]:
    """`parameters` and `bytes` of the report."""
    small, large = asdict(compressed), asdict(dense)
    return {
        part: {key: value for name in names for key, value in ((name, small[name]), (f"{name}_dense", large[name]))}
        for part, names in (("parameters", ("targets", "model")), ("bytes", ("disk", "loaded")))
    }
