"""Teaches transformers to load a ranksearch checkpoint: import this module, then call `from_pretrained` as ever.

    import ranksearch.worker.loading
    model = AutoModelForCausalLM.from_pretrained("path/to/checkpoint", dtype="auto")

The checkpoint's `config.json` names the method, so nothing else is needed and no code travels with the weights. A
target `T` in form `factored` is stored as `T.right.weight` (`r x n`), `T.left.weight` (`m x r`) and, if it has a bias,
`T.left.bias`; in form `pivoted` as `T.pivot.weight` (`r x n`), `T.rest.weight` (`(m - r) x r`), `T.order` (`m`, int32)
and `T.bias`; in form `dense` as ever, except for an expert whose tensor holds compressed ones as well, which is stored
as `T.weight`. Needs torch and transformers only (4.57 and later).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ranksearch.search.errors import BrokenWeights, UnsupportedModel
from ranksearch.worker.fused import as_conv1d, run_eagerly, unfuse
from ranksearch.worker.modules import FactoredLinear, PivotedLinear
from ranksearch.worker.plain import restore

METHOD = "ranksearch"
VERSION = 1
MODULES: dict[str, type[FactoredLinear] | type[PivotedLinear]] = {"factored": FactoredLinear, "pivoted": PivotedLinear}
FORMS = ("dense", *MODULES)


class RanksearchConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint."""

    def __init__(self, version: Any = None, targets: Mapping[str, Mapping[str, Any]] | None = None, **_: Any) -> None:
        """Check that this release can read the checkpoint.

        Args:
            version: Version of the format.
            targets: For each target its `form`, `rank` and whether it has a `bias`.

        Raises:
            UnsupportedModel: The format or a form is newer than this release.
        """
        self.quant_method = METHOD
        self.version = version
        self.targets = {name: dict(entry) for name, entry in (targets or {}).items()}
        if version != VERSION:
            raise UnsupportedModel(
                f"This checkpoint has format version {version!r}; this release of ranksearch reads version {VERSION}. "
                "Install the release that wrote it (its ranksearch.json names it) or a later one."
            )
        for name, entry in self.targets.items():
            if entry.get("form") not in FORMS:
                raise UnsupportedModel(
                    f"Target {name} is stored in form {entry.get('form')!r}, which needs a newer ranksearch; "
                    f"this release reads {', '.join(FORMS)}.",
                    target=name,
                )
            rank = entry.get("rank")
            if entry["form"] in MODULES and not (isinstance(rank, int) and rank >= 1):
                raise UnsupportedModel(f"Target {name} has rank {rank!r}; config.json is damaged.", target=name)

    @property
    def compressed(self) -> dict[str, dict[str, Any]]:
        """The targets that are not stored dense."""
        return {name: entry for name, entry in self.targets.items() if entry["form"] in MODULES}


class RanksearchQuantizer(HfQuantizer):
    """Swaps the targets' modules before transformers loads the weights; the weights themselves are ordinary."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        compressed = self.quantization_config.compressed
        _take_apart(model, self.quantization_config.targets)
        swap_modules(model, compressed)
        files = kwargs.get("checkpoint_files")
        if files and all(str(file).endswith(".safetensors") for file in files):
            stored: set[str] = set()
            for file in files:
                with safe_open(file, framework="pt") as tensors:
                    stored.update(tensors.keys())
            _refuse_missing(name for name in _tensor_names(compressed) if name not in stored)
        return model

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        # transformers 4 asks here; 5 passes the checkpoint's files before loading instead
        expected = set(_tensor_names(self.quantization_config.compressed))
        _refuse_missing(key for key in missing_keys if key in expected)
        return missing_keys

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # what is stored are plain floating-point matrices, so casts such as `.float()` are fine
        model.is_quantized = False
        return model

    def update_weight_conversions(self, weight_conversions: Any, model: nn.Module) -> list[Any]:
        """None: the files name the modules as they are."""
        return []

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        prefix = getattr(model, "base_model_prefix", "") + "."
        for name, module in list(model.named_modules()):
            if isinstance(module, (FactoredLinear, PivotedLinear)):
                targets, dense = self.quantization_config.targets, module.merged()
                entry = targets.get(name) or targets.get(prefix + name, {})
                alone = entry.get("transposed") and not entry.get("fused")
                model.set_submodule(name, as_conv1d(dense) if alone else dense)
        restore(model)
        return model.to(dtype) if isinstance(dtype, torch.dtype) else model

    def is_serializable(self, safe_serialization: Any = None) -> bool:
        """`save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The factors are ordinary parameters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Nothing here stands in the way of `torch.compile`."""
        return True


def swap_modules(model: nn.Module, compressed: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace each named linear layer by the empty module of its form, on the same device and in the same dtype.

    Args:
        model: The model, changed in place. A model without its head (as `AutoModel` builds it) is fine.
        compressed: `form`, `rank` and `bias` for each target name.

    Raises:
        UnsupportedModel: A target is no linear layer of this model.
    """
    prefix = getattr(model, "base_model_prefix", "") + "."
    for name, entry in compressed.items():
        path, module = name, _submodule(model, name)
        if module is None and name.startswith(prefix):
            path = name.removeprefix(prefix)
            module = _submodule(model, path)
        if not isinstance(module, (nn.Linear, Conv1D)):
            found = "has no such module" if module is None else f"has a {type(module).__name__} there"
            raise UnsupportedModel(
                f"The checkpoint compresses {name}, but {type(model).__name__} {found}. config.json and the installed "
                "transformers disagree about the model; use the transformers version that ranksearch.json names.",
                target=name,
            )
        n, m = module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]
        replacement = MODULES[entry["form"]](
            in_features=n,
            out_features=m,
            rank=entry["rank"],
            bias=bool(entry.get("bias", module.bias is not None)),
            device=module.weight.device,
            dtype=module.weight.dtype,
        )
        model.set_submodule(path, replacement)


def _take_apart(model: nn.Module, targets: Mapping[str, Mapping[str, Any]]) -> None:
    """Give each expert a layer of its own wherever one is factored.

    Raises:
        UnsupportedModel: The model keeps its experts in another way than the one that was compressed.
    """
    prefix = getattr(model, "base_model_prefix", "") + "."
    parameters = dict(model.named_parameters())
    tensors: dict[str, list[Mapping[str, Any]]] = {}
    for name, entry in targets.items():
        if entry.get("fused"):
            tensors.setdefault(name.rpartition(".")[0], []).append(entry)
    for name, entries in tensors.items():
        path = name if name in parameters else name.removeprefix(prefix)
        if path not in parameters:
            raise UnsupportedModel(
                f"The checkpoint needs {name}, one tensor for all experts, which {type(model).__name__} does not have "
                "in the installed transformers; use transformers 5, or the version that ranksearch.json names.",
                tensor=name,
            )
        if any(entry["form"] != "dense" for entry in entries):
            unfuse(model, path, transposed=bool(entries[0].get("transposed")))
            run_eagerly(model)


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _tensor_names(compressed: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    for name, entry in compressed.items():
        for part in MODULES[entry["form"]].tensor_names(bool(entry.get("bias"))):
            yield f"{name}.{part}"


def _refuse_missing(names: Iterable[str]) -> None:
    missing = sorted(names)
    if missing:
        raise BrokenWeights(
            f"The checkpoint lacks {len(missing)} tensors of its targets, first {missing[0]}; fetch it again.",
            tensors=missing[:10],
        )


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(METHOD)(RanksearchConfig)
    register_quantizer(METHOD)(RanksearchQuantizer)
