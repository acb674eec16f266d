from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ranksearch.search.errors import BrokenWeights, NumericalError, UnsupportedModel
from ranksearch.search.targets import Target
from ranksearch.worker.checkpoint import as_report, count, dense_sizes, export
from ranksearch.worker.merge import merge_to_dense
from ranksearch.worker.models import load_model
from ranksearch.worker.targets import find_targets
from ranksearch.worker.tiny import train_tokenizer

RANK = 5


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer("some words to learn from, and some more words\n" * 20, 290)


class Case:
    """A model, its plain SVD factors, and an exporter of them."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.targets = find_targets(model)
        self.ranks = {target.name: RANK for target in self.targets}
        self.ranks[self.targets[2].name] = self.targets[2].full_rank
        self.factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for target in self.targets:
            u, s, v = torch.linalg.svd(model.get_submodule(target.name).weight.double(), full_matrices=False)
            self.factors[target.name] = (u * s.sqrt(), s.sqrt()[:, None] * v)

    def pair(self, name: str, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        left, right = self.factors[name]
        return left[:, :rank], right[:rank]

    def export(self, folder: Path, **options: Any) -> Any:
        return export(
            folder,
            model=self.model,
            tokenizer=self.tokenizer,
            pairs=self.pair,
            ranks=self.ranks,
            targets=self.targets,
            **options,
        )

    def expected(self) -> int:
        """Parameters of the targets, by the budget's own arithmetic."""
        sizes = {t.name: t.parameters if self.ranks[t.name] == t.full_rank else RANK * t.marginal for t in self.targets}
        return sum(sizes.values())


@pytest.fixture
def make(tiny: Callable[..., nn.Module], tokenizer: Any) -> Callable[..., Case]:
    def build(family: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> Case:
        return Case(tiny(family, dtype, vocab_size=300, **settings), tokenizer)

    return build


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_the_files_hold_the_factors_and_nothing_twice(family: str, make: Any, tmp_path: Path) -> None:
    case = make(family, torch.bfloat16, tie_word_embeddings=True)
    sizes = case.export(tmp_path / "out")
    tensors, before = stored(tmp_path / "out"), case.model.state_dict()
    for target in case.targets:
        if case.ranks[target.name] == target.full_rank:
            assert torch.equal(tensors[f"{target.name}.weight"], before[f"{target.name}.weight"])
            continue
        left, right = case.pair(target.name, RANK)
        assert torch.equal(tensors[f"{target.name}.left.weight"], left.bfloat16())
        assert torch.equal(tensors[f"{target.name}.right.weight"], right.bfloat16())
        assert f"{target.name}.weight" not in tensors
        if f"{target.name}.bias" in before:
            assert torch.equal(tensors[f"{target.name}.left.bias"], before[f"{target.name}.bias"])
    assert sum("embed_tokens" in name or "lm_head" in name for name in tensors) == 1
    assert sizes.targets == case.expected()
    assert sizes.model == sum(tensor.numel() for tensor in tensors.values())
    assert sizes.loaded == 2 * sizes.model
    assert sizes.disk == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert sizes == count(tmp_path / "out", case.targets)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # no draft stays behind


def test_the_files_hold_pivot_rows_and_their_order(make: Any, tmp_path: Path) -> None:
    case = make("opt", torch.bfloat16)
    sizes = case.export(tmp_path / "out", form="pivoted", max_shard_bytes=1000)  # every part in a shard of its own
    tensors, biases = stored(tmp_path / "out"), case.model.state_dict()
    entries = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["targets"]
    parameters = indices = 0
    for target in case.targets:
        name, rank = target.name, case.ranks[target.name]
        if rank == target.full_rank:
            assert entries[name] == {"form": "dense", "rank": rank, "bias": True}
            parameters += target.parameters
            continue
        assert entries[name] == {"form": "pivoted", "rank": RANK, "bias": True}
        assert torch.equal(tensors[f"{name}.bias"], biases[f"{name}.bias"])
        pivots, rest = tensors[f"{name}.pivot.weight"], tensors[f"{name}.rest.weight"]
        assert (pivots.shape, rest.shape) == ((RANK, target.in_features), (target.out_features - RANK, RANK))
        assert (pivots.dtype, tensors[f"{name}.order"].dtype) == (torch.bfloat16, torch.int32)
        left, right = case.pair(name, RANK)
        weight = torch.cat([pivots.double(), rest.double() @ pivots.double()])[tensors[f"{name}.order"].long()]
        assert (weight - left @ right).norm() < 0.01 * (left @ right).norm()
        parameters += pivots.numel() + rest.numel()
        indices += target.out_features
    assert indices > 0
    assert sizes.targets == parameters
    assert sizes.model == sum(tensor.numel() for tensor in tensors.values()) - indices
    assert sizes.loaded == 2 * sizes.model + 4 * indices


def test_shards_and_index_load_as_one_model(make: Any, tmp_path: Path) -> None:
    case = make()
    case.export(tmp_path / "whole")
    case.export(tmp_path / "shards", max_shard_bytes=20_000)
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert len(files) == 3
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert all(file.stat().st_size < 25_000 for file in files if len(load_file(file)) > 1)
    whole, shards = stored(tmp_path / "whole"), stored(tmp_path / "shards")
    assert whole.keys() == shards.keys() == index["weight_map"].keys()
    loaded = load_model(tmp_path / "shards")[0].state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in whole.items())


def test_the_dtype_may_be_another(make: Any, tmp_path: Path) -> None:
    case = make()
    sizes = case.export(tmp_path / "out", dtype="bfloat16")
    assert {tensor.dtype for tensor in stored(tmp_path / "out").values()} == {torch.bfloat16}
    assert sizes.loaded == 2 * sizes.model
    assert load_model(tmp_path / "out")[0].dtype == torch.bfloat16


def test_the_original_config_stays_word_for_word(make: Any, tmp_path: Path) -> None:
    case = make()
    case.model.save_pretrained(tmp_path / "model")
    case.tokenizer.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config.pop("rope_parameters")
    config |= {"rope_theta": 123.0, "torch_dtype": config.pop("dtype"), "note": "as transformers 4 writes it"}
    path.write_text(json.dumps(config))
    model, tokenizer = load_model(tmp_path / "model")
    Case(model, tokenizer).export(tmp_path / "out", dtype="float16")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written.pop("quantization_config")["targets"].keys() == case.ranks.keys()
    assert written == config | {"torch_dtype": "float16"}
    tokenizer_class = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert tokenizer_class == "PreTrainedTokenizerFast"  # transformers 4 knows no other name for it


def test_another_export_replaces_the_folder_whole(make: Any, tmp_path: Path) -> None:
    case = make()
    case.export(tmp_path / "out", max_shard_bytes=20_000)
    case.export(tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").glob("model*")] == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("value", "dtype", "says"), [(float("nan"), "auto", "not finite"), (1e6, "float16", "1e\\+06, too large")]
)
def test_a_value_that_cannot_be_stored_names_its_target(
    value: float, dtype: str, says: str, make: Any, tmp_path: Path
) -> None:
    case = make()
    name = case.targets[4].name
    case.factors[name][0][1, 1] = value
    with pytest.raises(NumericalError, match=says) as caught:
        case.export(tmp_path / "out", dtype=dtype)
    assert caught.value.data["target"] == name
    assert name in caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_a_model_with_its_targets_swapped_is_refused(make: Any, tmp_path: Path) -> None:
    case = make()
    name = case.targets[0].name
    case.model.set_submodule(name, nn.Sequential(case.model.get_submodule(name)))
    with pytest.raises(UnsupportedModel, match=name):
        case.export(tmp_path / "out")


def test_sizes_before_and_after_stand_side_by_side(make: Any, tmp_path: Path) -> None:
    case = make(tie_word_embeddings=True)
    case.model.save_pretrained(tmp_path / "model")
    dense = dense_sizes(case.model, case.targets, tmp_path / "model")
    assert dense == count(tmp_path / "model", case.targets)
    report = as_report(case.export(tmp_path / "out"), dense)
    assert report["parameters"]["targets_dense"] == sum(target.parameters for target in case.targets)
    assert report["parameters"]["targets"] == case.expected()
    saved = {part: report[part][f"{key}_dense"] - report[part][key] for part, key in (("parameters", "model"),)}
    assert saved["parameters"] == sum(target.parameters for target in case.targets) - case.expected()
    assert report["bytes"]["loaded_dense"] == 4 * report["parameters"]["model_dense"]


def test_counting_misses_no_target(make: Any, tmp_path: Path) -> None:
    case = make()
    case.export(tmp_path / "out")
    stranger = Target(name="model.layers.7.up_proj", out_features=3, in_features=3, kind="up_proj", depth=7)
    with pytest.raises(BrokenWeights, match=stranger.name):
        count(tmp_path / "out", [stranger])


@pytest.mark.parametrize("form", ["factored", "pivoted"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_merging_gives_an_ordinary_model_that_computes_the_same(
    family: str, form: str, make: Any, tmp_path: Path
) -> None:
    case = make(family)
    case.export(tmp_path / "out", form=form, max_shard_bytes=20_000)
    merge_to_dense(tmp_path / "out", tmp_path / "merged", max_shard_bytes=30_000)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert stored(tmp_path / "merged").keys() == case.model.state_dict().keys() - {"lm_head.weight"} | (
        {"lm_head.weight"} & stored(tmp_path / "out").keys()
    )
    ids = torch.arange(24)[None]
    with torch.inference_mode():
        factored = load_model(tmp_path / "out")[0](ids).logits
        merged = load_model(tmp_path / "merged")[0](ids).logits
    assert (factored - merged).abs().max() < 1e-4 * factored.abs().max()
    with pytest.raises(UnsupportedModel, match="no ranksearch checkpoint"):
        merge_to_dense(tmp_path / "merged", tmp_path / "again")
