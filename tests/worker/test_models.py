from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from ranksearch.search.errors import (
    BrokenWeights,
    ModelNotFound,
    OutOfMemory,
    RanksearchError,
    StorageFull,
    UnsafeModel,
    UnsupportedModel,
)
from ranksearch.worker import models
from ranksearch.worker.models import load_model, locate, model_fingerprint
from ranksearch.worker.tiny import train_tokenizer

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def original(tiny: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "original"
    tiny("llama", torch.bfloat16, vocab_size=300).save_pretrained(folder)
    train_tokenizer("some words to learn from, and some more words\n" * 20, 300).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def shard(folder: Path) -> dict[str, str]:
    """Splits the weights over two files and returns the index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    places = {name: f"model-{1 + place % 2:05d}-of-00002.safetensors" for place, name in enumerate(tensors)}
    for file in set(places.values()):
        save_file({n: t for n, t in tensors.items() if places[n] == file}, folder / file, metadata={"format": "pt"})
    write_index(folder, places)
    return places


def write_index(folder: Path, places: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_a_model_is_loaded_as_stored_and_ready_to_read(original: Path) -> None:
    model, tokenizer = load_model(original)
    stored = load_file(original / WEIGHTS)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in stored.items())
    assert tokenizer.decode(tokenizer("some words")["input_ids"]) == "some words"
    assert load_model(str(original), dtype="float32")[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "said", "share"),
    [("auto", None, 1), ("auto", "float32", 2), ("float32", None, 2), (torch.float64, None, 4), ("bfloat16", None, 1)],
)
def test_a_model_fits_if_its_weights_as_they_will_be_do_into_what_is_free(
    folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: str | torch.dtype, said: str | None, share: int
) -> None:
    edit_config(folder, dtype=said, torch_dtype=said)
    stored = sum(tensor.nbytes for tensor in load_file(folder / WEIGHTS).values())
    device = torch.device("cuda:0")
    for free, expected in ((1.01, True), (0.99, False)):
        room = int(free * share * stored / models.MOST_OF_DEVICE)
        monkeypatch.setattr(models, "free_bytes", lambda _, room=room: room)
        assert models.fits(folder, dtype, device) is expected
    assert models.fits(folder, dtype, torch.device("cpu"))


def test_shards_are_one_model(folder: Path, original: Path) -> None:
    shard(folder)
    sharded, whole = load_model(folder)[0].state_dict(), load_model(original)[0].state_dict()
    assert all(torch.equal(sharded[name], tensor) for name, tensor in whole.items())


def no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def pickle_only(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    no_weights(folder)


def no_shard(folder: Path) -> None:
    (folder / shard(folder)["model.norm.weight"]).unlink()


def climbing_index(folder: Path) -> None:
    write_index(folder, dict.fromkeys(shard(folder), "../elsewhere.safetensors"))


def index_without_map(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text("[]")


def cut_short(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) * 2 // 3])


def own_code(folder: Path) -> None:
    (folder / "modeling_own.py").write_text(f"open({str(folder / 'executed')!r}, 'w').close()\n")
    auto = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    edit_config(folder, model_type="own", auto_map=auto)


def no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (lambda f: shutil.rmtree(f), ModelNotFound, "no model folder"),
        (lambda f: (f / "config.json").unlink(), ModelNotFound, "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), ModelNotFound, "not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), ModelNotFound, "no object"),
        (no_weights, ModelNotFound, "no weights"),
        (pickle_only, UnsafeModel, "save_pretrained"),
        (no_shard, ModelNotFound, "of-00002.safetensors is missing"),
        (climbing_index, UnsafeModel, "elsewhere"),
        (index_without_map, BrokenWeights, "not a valid index"),
        (cut_short, BrokenWeights, "cut short"),
        (lambda f: edit_weights(f, lambda t: t.pop("model.norm.weight")), BrokenWeights, "first model.norm.weight"),
        (
            lambda f: edit_weights(f, lambda t: t.update({"model.norm.weight": torch.ones(3)})),
            BrokenWeights,
            "model.norm.weight of .* another shape",
        ),
        (own_code, UnsafeModel, "trust_remote_code"),
        (lambda f: edit_config(f, model_type="nonesuch"), UnsupportedModel, "causal language model"),
        (lambda f: edit_config(f, model_type="vit", architectures=None), UnsupportedModel, "causal language model"),
        (lambda f: edit_config(f, quantization_config={"quant_method": "gptq", "bits": 4}), UnsupportedModel, "gptq"),
        (no_tokenizer, ModelNotFound, "tokenizer"),
        (lambda f: (f / "tokenizer.json").write_text("{"), ModelNotFound, "tokenizer"),
    ],
)
def test_each_bad_folder_gets_its_one_clear_error(
    folder: Path, damage: Callable[[Path], Any], error: type[RanksearchError], says: str
) -> None:
    damage(folder)
    with pytest.raises(error, match=says) as caught:
        load_model(folder)
    assert type(caught.value) is error
    assert "\n" not in caught.value.message
    assert not (folder / "executed").exists()


@pytest.mark.parametrize(
    ("raised", "known"),
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."), OutOfMemory),
        (OSError(errno.ENOSPC, "No space left on device"), StorageFull),
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemory),
    ],
)
def test_a_machine_too_small_is_not_the_models_fault(
    folder: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, known: type[RanksearchError]
) -> None:
    def load(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(known):
        load_model(folder)
    monkeypatch.setattr("huggingface_hub.snapshot_download", load)
    if isinstance(raised, OSError):
        with pytest.raises(known):
            locate("someone/some-model")


@pytest.mark.parametrize("source", ["/no/such/folder", "./nowhere", "a/b/c", "nobody/nothing", "not a name!"])
def test_what_is_nowhere_is_not_found(source: str) -> None:
    with pytest.raises(ModelNotFound, match="model"):
        locate(source)


def test_the_fingerprint_follows_what_decides_the_result(folder: Path) -> None:
    first = model_fingerprint(folder)
    (folder / "README.md").write_text("words")
    assert model_fingerprint(folder) == first
    seen = {first}
    edit_weights(folder, lambda tensors: tensors["model.norm.weight"].mul_(2))
    seen.add(model_fingerprint(folder))
    edit_config(folder, rms_norm_eps=1e-3)
    seen.add(model_fingerprint(folder))
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + "\n")
    seen.add(model_fingerprint(folder))
    assert len(seen) == 4
