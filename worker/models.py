"""Loading a causal language model and its tokenizer, from a folder or a hub, without ever executing anything from it.

Weights are read from safetensors only. Code that comes with a model runs only if the caller says so. What cannot be
loaded exactly as stored (a missing tensor that would be filled with random numbers) is refused.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from ranksearch.search.errors import BrokenWeights, ModelNotFound, UnsafeModel, UnsupportedModel
from ranksearch.worker.hardware import free_bytes
from ranksearch.worker.known_errors import as_known_error
from ranksearch.worker.loading import METHOD  # a compressed checkpoint is a model, too
from ranksearch.worker.placement import fetch_blocks
from ranksearch.worker.plain import make_plain
from ranksearch.worker.spread import spread_blocks
from ranksearch.worker.tensor_file import DTYPES

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
)
VOCABULARIES = tuple(name for name in TOKENIZER_FILES if name.startswith(("tokenizer.", "vocab", "s", "*.")))
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
#: Share of what is free on a device that weights may fill.
MOST_OF_DEVICE = 0.6

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def load_model(
    source: str | Path,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | Sequence[torch.device] = "cpu",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model in evaluation mode, its weights in plain linear layers (`make_plain`), and its tokenizer.

    A compressed checkpoint is loaded as its users load it.

    Args:
        source: Local folder or hub id.
        revision: Hub revision.
        dtype: A dtype or its name; `auto` is the dtype the weights are stored in.
        device: Where it computes. The weights go there; those of a model that does not fit (`fits`) are laid over
            several devices if there are any, the main one first (`spread_blocks`). Of one that does not fit there
            either the blocks stay on the CPU and are fetched one at a time.
        trust_remote_code: Run code that comes with the model.

    Returns:
        The model, without gradients, and its tokenizer.

    Raises:
        ModelNotFound: There is no such model, or a file of it is missing.
        UnsafeModel: Only pickled weights, or the model needs its own code.
        UnsupportedModel: transformers has no causal language model for it.
        BrokenWeights: A weights file is damaged or incomplete.
    """
    folder = locate(source, revision=revision, trust_remote_code=trust_remote_code)
    config = _read_config(folder)
    _check_files(folder)
    tokenizer = _load_tokenizer(folder, trust_remote_code)
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method not in (None, METHOD):
        raise UnsupportedModel(
            f"{source} is quantized ({method}); ranksearch compresses the original weights. Name the unquantized model."
        )
    devices = [torch.device(device)] if isinstance(device, str | torch.device) else list(device)
    placed = fits(folder, dtype, devices[0])
    model = _load_weights(folder, dtype, devices[0] if placed else torch.device("cpu"), trust_remote_code)
    model.eval().requires_grad_(False)
    if method is None:
        make_plain(model)
    if not placed and not (len(devices) > 1 and spread_blocks(model, devices, [*map(_room, devices)])):
        fetch_blocks(model, devices[0])
    return model, tokenizer


def fits(folder: Path, dtype: str | torch.dtype, device: torch.device) -> bool:
    """Whether a model's weights take no more than `MOST_OF_DEVICE` of what is free on a device now; the CPU maps them.

    Args:
        folder: A model folder.
        dtype: A dtype or its name; `auto` is what the config says, or what each tensor is stored in.
        device: A device.
    """
    if device.type == "cpu":
        return True
    config = _read_config(folder)
    named = (config.get("dtype") or config.get("torch_dtype")) if dtype == "auto" else dtype
    wanted = getattr(torch, named, None) if isinstance(named, str) else named
    size = 0
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for part in map(file.get_slice, file.keys()):
                stored = DTYPES.get(part.get_dtype(), torch.float64)  # a rare kind is taken for a wide one
                kind = wanted if isinstance(wanted, torch.dtype) and stored.is_floating_point else stored
                size += math.prod(part.get_shape()) * kind.itemsize
    return size <= _room(device)


def _room(device: torch.device) -> float:
    return MOST_OF_DEVICE * free_bytes(device)


def model_fingerprint(source: str | Path, revision: str | None = None) -> str:
    """A sha256 over names and contents of all that decides what a model computes: config, weights, tokenizer, code."""
    folder = locate(source, revision=revision)
    names = {"config.json", "generation_config.json", *(path.name for path in weight_files(folder))}
    names.update(path.name for pattern in TOKENIZER_FILES for path in folder.glob(pattern))
    names.update(path.name for path in folder.glob("*.py"))
    total = hashlib.sha256()
    for name in sorted(names):
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                total.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order; empty when there are none.

    Raises:
        ModelNotFound: The index names a file that is not there.
        BrokenWeights: The index cannot be read.
    """
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BrokenWeights(f"{INDEX} of {folder} is not a valid index: {error}. Fetch the model again.") from error
        for name in names:
            # an index is data from a stranger: a name that climbs out of the folder is not followed
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise UnsafeModel(f"{INDEX} of {folder} names {name!r}, which is no safetensors file of the folder.")
            if not (folder / name).is_file():
                raise ModelNotFound(
                    f"The weights file {name} is missing in {folder}; fetch the model again.", file=name
                )
        return [folder / name for name in names]
    return [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else []


def locate(source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """The local folder of a model; a hub model is downloaded (or found in the hub cache) first.

    Args:
        source: Local folder or hub id.
        revision: Hub revision.
        trust_remote_code: Fetch the model's code files as well.

    Raises:
        ModelNotFound: Neither a folder nor a hub model that can be reached.
    """
    text = str(source)
    folder = Path(text).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or isinstance(source, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise ModelNotFound(f"There is no model folder {text}.", source=text)
    return _download(text, revision, trust_remote_code)


def _download(source: str, revision: str | None, trust_remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.errors import RevisionNotFoundError as NoRevision

    patterns = ["config.json", "generation_config.json", "model*.safetensors", INDEX, "README.md"]
    patterns += [*TOKENIZER_FILES, *PROCESSOR_FILES]
    if trust_remote_code:
        patterns.append("*.py")
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except NoRevision as error:
        raise ModelNotFound(f"The hub model {source} has no revision {revision!r}.", source=source) from error
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise ModelNotFound(
            f"{source} is neither a folder nor a model on the hub (a gated model needs HF_TOKEN).", source=source
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise as_known_error(error, "downloading the model") or ModelNotFound(
            f"{source} is no local folder, and the hub cannot be reached to look it up ({type(error).__name__}). "
            "Name a local model folder, or set HF_ENDPOINT or HF_HOME to where the model is.",
            source=source,
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelNotFound(f"{folder} has no config.json, so it is no Hugging Face model folder.")
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ModelNotFound(f"config.json of {folder} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ModelNotFound(f"config.json of {folder} holds no object.")
    return config


def _check_files(folder: Path) -> None:
    files = weight_files(folder)
    if not files:
        pickled = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickled:
            raise UnsafeModel(
                f"{folder} holds pickled weights only ({pickled[0]}), and a pickle can run any code. Convert it to "
                "safetensors where you trust it: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW).",
                file=pickled[0],
            )
        raise ModelNotFound(f"{folder} holds no weights: neither {WEIGHTS} nor {INDEX}.")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError, MemoryError) as error:
            raise as_known_error(error, "reading the weights") or BrokenWeights(
                f"{file.name} is damaged or cut short ({error}); fetch the model again.", file=file.name
            ) from error


def _load_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    absent = f"{folder} has no tokenizer that can be loaded; add the model's tokenizer files (tokenizer.json)."
    if not trust_remote_code and not any(True for pattern in VOCABULARIES for _ in folder.glob(pattern)):
        raise ModelNotFound(absent)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise _needs_code(folder, "tokenizer") from error
        known = as_known_error(error, "loading the tokenizer")
        raise known or ModelNotFound(f"{absent[:-1]}: {_first_line(error)}.") from error


def _load_weights(
    folder: Path, dtype: str | torch.dtype, device: torch.device, trust_remote_code: bool
) -> PreTrainedModel:
    logging.disable_progress_bar()
    direct = device.type != "cpu" and importlib.util.find_spec("accelerate") is not None
    try:
        model, report = auto_class(folder, trust_remote_code).from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            device_map={"": device} if direct else None,
        )
    except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise _needs_code(folder, "model") from error
        raise UnsupportedModel(
            f"transformers cannot load {folder} as a causal language model: {_first_line(error)}"
        ) from error
    except (SafetensorError, OSError, RuntimeError) as error:
        known = as_known_error(error, "loading the model")
        raise known or BrokenWeights(f"The weights of {folder} cannot be loaded: {_first_line(error)}") from error
    _refuse_random(folder, report)
    return model.to(device)


def auto_class(folder: Path, trust_remote_code: bool = False) -> Any:
    """The class of transformers that loads a folder: for a language model, or for one that reads images as well."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    known = [
        auto for auto in (AutoModelForCausalLM, AutoModelForImageTextToText) if type(config) in auto._model_mapping
    ]
    return known[0] if known else AutoModelForCausalLM


def _refuse_random(folder: Path, report: dict[str, Any]) -> None:
    shapes = [str(key[0]) for key in report["mismatched_keys"]]
    if shapes:
        raise BrokenWeights(
            f"{shapes[0]} of {folder} has another shape than config.json says.", tensors=sorted(shapes)[:10]
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise BrokenWeights(
            f"The weights of {folder} lack {len(missing)} tensors, first {missing[0]}; they would be random numbers. "
            "Fetch the model again, or check that it is a causal language model.",
            tensors=missing[:10],
        )


def _needs_code(folder: Path, part: str) -> UnsafeModel:
    return UnsafeModel(
        f"The {part} of {folder} needs Python code that comes with it, which is off. If you trust its author, set "
        "model.trust_remote_code in the job and RANKSEARCH_TRUST_REMOTE_CODE on the server."
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
