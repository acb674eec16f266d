"""What a model is made of, read from the headers of its safetensors files: no torch, and not one weight is read."""

from __future__ import annotations

import json
import re
import struct
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ranksearch.search.errors import BrokenWeights, ModelNotFound, RanksearchError, UnsafeModel, UnsupportedModel
from ranksearch.search.spec import JobSpec
from ranksearch.search.targets import Target
from ranksearch.service.store.paths import local_model, resolve_allowed
from ranksearch.service.store.settings import Settings

INDEX: Final = "model.safetensors.index.json"
PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
MAX_HEADER_BYTES: Final = 32_000_000
MAX_TENSORS: Final = 1_000_000
MAX_EXPERTS: Final = 4096  # of one tensor
HUB_SECONDS: Final = 4.0
HUB_PAUSE_SECONDS: Final = 60.0
BYTES_PER_ELEMENT: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}

_BLOCK: Final = re.compile(r"(?P<stack>.+?)\.(?P<depth>\d+)\.(?P<below>.+?)(?P<weight>\.weight)?")


_Found = tuple[str, int, str, tuple[int, ...]]  # stack, depth, path below it, shape


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One stored tensor: its dtype as safetensors writes it (`BF16`), its shape, and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    size: int

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        total = 1
        for length in self.shape:
            total *= length
        return total


Tensors = Mapping[str, Tensor]


class HubUnreachable(RanksearchError):
    """The hub cannot be asked now; the worker will find out."""


class HubSilent(HubUnreachable):
    """The hub does not answer at all."""


def read_model(spec: JobSpec, settings: Settings, *, hub_seconds: float = HUB_SECONDS) -> Tensors:
    """The tensors of the model that a spec names; the hub is given `hub_seconds` to tell.

    Raises:
        PathNotAllowed: A local folder, or a file of it, lies outside the allowed folders.
        ModelNotFound: There is no such model, or no weights.
        UnsafeModel: Only pickled weights.
        BrokenWeights: A file is damaged.
        UnsupportedModel: The model is quantized.
        HubUnreachable: It is on the hub, and the hub cannot be reached.
    """
    folder = local_model(spec.model.source, settings)
    if folder is None:
        return _read_hub(spec.model.source, spec.model.revision, hub_seconds)
    return read_folder(folder, settings)


def read_folder(folder: Path, settings: Settings) -> Tensors:
    """The tensors of a local model; see `read_model`."""
    if not folder.is_dir():
        raise ModelNotFound(f"there is no model folder {folder}", path=str(folder))
    config = _read_config(folder, settings)
    if config.get("quantization_config"):
        raise UnsupportedModel(f"{folder} is quantized or compressed already; name the original model")
    tensors: dict[str, Tensor] = {}
    for name in _weight_names(folder, settings):
        path = folder / name
        if not path.is_file():
            raise ModelNotFound(f"the weights file {name} of {folder} is missing; fetch the model again", file=name)
        tensors |= read_header(resolve_allowed(path, settings))
    return tensors


def _read_config(folder: Path, settings: Settings) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelNotFound(f"{folder} has no config.json, so it is no Hugging Face model folder", path=str(folder))
    config = _read_json(resolve_allowed(path, settings))
    if not isinstance(config, dict):
        raise ModelNotFound(f"config.json of {folder} is not a JSON object", path=str(folder))
    return config


def _weight_names(folder: Path, settings: Settings) -> list[str]:
    if (folder / INDEX).is_file():
        index = _read_json(resolve_allowed(folder / INDEX, settings))
        names = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(names, dict) or not names:
            raise BrokenWeights(f"{INDEX} of {folder} is not a valid index; fetch the model again")
        for name in names.values():
            # An index is data from a stranger: a name that climbs out of the folder is not followed.
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise UnsafeModel(f"{INDEX} of {folder} names {name!r}, which is no safetensors file of the folder")
        return sorted(set(names.values()))
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    pickled = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickled:
        raise UnsafeModel(
            f"{folder} holds pickled weights only ({pickled[0]}), and a pickle can run any code; convert it to "
            "safetensors on a machine you trust: AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)",
            file=pickled[0],
        )
    raise ModelNotFound(f"{folder} holds no weights: neither model.safetensors nor {INDEX}", path=str(folder))


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file.

    Raises:
        BrokenWeights: The header is damaged, too large, or speaks of bytes the file does not have.
    """
    try:
        total = path.stat().st_size
        with open(path, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(MAX_HEADER_BYTES, total - 8):
                raise ValueError(f"a header of {length} bytes in a file of {total}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        if len(header) > MAX_TENSORS:
            raise ValueError(f"{len(header)} tensors")
        return {name: _tensor(facts, total - 8 - length) for name, facts in header.items()}
    except (OSError, struct.error, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BrokenWeights(
            f"{path.name} is damaged or cut short ({str(error)[:200] or type(error).__name__}); fetch the model again",
            file=path.name,
        ) from error


def _tensor(facts: Any, room: int) -> Tensor:
    begin, end = facts["data_offsets"]
    shape = tuple(facts["shape"])
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)) or not begin <= end <= room:
        raise ValueError("a tensor lies outside the file")
    tensor = Tensor(dtype=str(facts["dtype"]), shape=shape, size=end - begin)
    width = BYTES_PER_ELEMENT.get(tensor.dtype)
    if width is not None and tensor.parameters * width != tensor.size:
        raise ValueError("a tensor's shape and bytes disagree")
    return tensor


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise ValueError("the file is too large")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error)[:200] or type(error).__name__
        raise ModelNotFound(f"{path.name} cannot be read ({reason}); fetch the model again", file=path.name) from error


def find_targets(tensors: Tensors) -> tuple[Target, ...]:
    """The matrices a worker will find in the loaded model, judged by the names of the stored tensors.

    A file may name a model's parts otherwise than the model does, and store transposed what it turns: then names and
    orientation differ from the worker's, sizes do not.

    Raises:
        UnsupportedModel: There is none.
    """
    found: list[_Found] = []
    for name, tensor in tensors.items():
        match = _BLOCK.fullmatch(name)
        if match is None or tensor.dtype not in BYTES_PER_ELEMENT:
            continue
        place = (match["stack"], int(match["depth"]))
        if len(tensor.shape) == 2 and match["weight"]:
            found.append((*place, match["below"], tensor.shape))
        elif len(tensor.shape) == 3 and min(tensor.shape) > 1 and tensor.shape[0] <= MAX_EXPERTS:
            below = match["below"] + (match["weight"] or "")
            found += [(*place, f"{below}.{expert}", tensor.shape[1:]) for expert in range(tensor.shape[0])]
    found = _of_text(found, tensors)
    several = len({stack for stack, *_ in found}) > 1
    targets = []
    for stack, depth, below, (rows, columns) in sorted(found):
        kind = ".".join(part for part in below.split(".") if not part.isdecimal())
        target = Target(
            name=f"{stack}.{depth}.{below}",
            out_features=rows,
            in_features=columns,
            kind=f"{stack}.{kind}" if several else kind,
            depth=depth,
        )
        if min(rows, columns) > 0 and target.break_even >= 1:
            targets.append(target)
    if not targets:
        raise UnsupportedModel(
            "the model has no weight matrices in a list of repeated blocks, so there is nothing to compress"
        )
    return tuple(targets)


def _of_text(found: list[_Found], tensors: Tensors) -> list[_Found]:
    """Those in the blocks nearest to the token embedding, which is the table with the most rows outside of blocks."""
    tables = {n: t.shape[0] for n, t in tensors.items() if len(t.shape) == 2 and not _BLOCK.fullmatch(n)}
    rows = max(tables.values(), default=0)
    # an output head may have as many rows; it lies further out
    path = max((name for name in tables if tables[name] == rows), key=lambda name: name.count("."), default="")
    stacks = {stack for stack, *_ in found}
    path = path.removesuffix(".weight")
    while path:
        path = path.rpartition(".")[0]
        near = {stack: stack.count(".") for stack in stacks if stack.startswith(f"{path}." if path else "")}
        if near:
            return [entry for entry in found if near.get(entry[0]) == min(near.values())]
    return found


_hub_asked_again: float = 0.0


def _read_hub(source: str, revision: str | None, seconds: float) -> Tensors:
    """Ask the hub, but never let it hold up a request: one that is out of reach is left alone for a while."""
    if time.monotonic() < _hub_asked_again:
        raise HubUnreachable()
    answer: list[Tensors | RanksearchError] = []

    def ask() -> None:
        global _hub_asked_again
        try:
            answer.append(_ask_hub(source, revision))
        except RanksearchError as error:
            if isinstance(error, HubSilent):
                _hub_asked_again = time.monotonic() + HUB_PAUSE_SECONDS
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    result = answer[0] if answer else HubUnreachable()
    if isinstance(result, RanksearchError):
        raise result
    return result


def _ask_hub(source: str, revision: str | None) -> Tensors:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        NotASafetensorsRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        SafetensorsParsingError,
    )

    try:
        hub = HfApi()
        hub.model_info(source, revision=revision, timeout=HUB_SECONDS)  # tells what is missing, unlike the next call
        found = hub.get_safetensors_metadata(source, revision=revision)
    except NotASafetensorsRepoError:
        raise UnsafeModel(f"{source} has no safetensors weights on the hub; name a model that has") from None
    except GatedRepoError:
        raise HubUnreachable() from None  # a worker may hold a token that this server does not
    except RevisionNotFoundError:
        raise ModelNotFound(f"{source} has no revision {revision!r} on the hub", source=source) from None
    except RepositoryNotFoundError:
        raise ModelNotFound(f"there is no model {source} on the hub that this server may see", source=source) from None
    except HFValidationError as error:
        raise ModelNotFound(f"{source} is no name of a model on the hub: {error}", source=source) from None
    except (HfHubHTTPError, SafetensorsParsingError, ValueError):  # the hub is there, only this model is not told
        raise HubUnreachable() from None
    except Exception:
        raise HubSilent() from None
    return _tensors_of(found.files_metadata.values())


def _tensors_of(files: Iterable[Any]) -> Tensors:
    return {
        name: Tensor(dtype=str(info.dtype), shape=tuple(info.shape), size=info.data_offsets[1] - info.data_offsets[0])
        for file in files
        for name, info in file.tensors.items()
    }
