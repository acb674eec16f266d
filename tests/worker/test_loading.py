"""The checkpoint format and its loader. Needs torch and transformers only, so that it also runs beside their oldest
supported versions: `pytest --noconftest tests/worker/test_loading.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ranksearch.search.errors import BrokenWeights, UnsupportedModel
from ranksearch.search.targets import Target
from ranksearch.worker.checkpoint import export
from ranksearch.worker.loading import FactoredLinear, PivotedLinear
from ranksearch.worker.pivot import pivot

ROOT = Path(__file__).parents[2]
SMALL = {"vocab_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 64, "num_attention_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 24, "intermediate_size": 40, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2": {"hidden_size": 24, "intermediate_size": 40, "num_key_value_heads": 2},  # biases on q, k and v
    "opt": {"hidden_size": 24, "ffn_dim": 40, "word_embed_proj_dim": 16},  # biases everywhere, tied
    "mixtral": {"hidden_size": 24, "intermediate_size": 40, "num_key_value_heads": 2, "num_local_experts": 4},
}
RANK = 7
FORMS = {"factored": FactoredLinear, "pivoted": PivotedLinear}
TOKENS = torch.arange(32).mul(29).remainder(96).view(2, 16)


class NoTokenizer:
    def save_pretrained(self, folder: Path) -> None:
        """Nothing to write: these tests are about the model."""


def build(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL, **FAMILIES[family], eos_token_id=None)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)  # biases and norms away from their trivial values, too
    return model.to(dtype).eval()


def targets_of(model: nn.Module) -> list[Target]:
    return [
        Target(name=name, out_features=m.out_features, in_features=m.in_features, kind="any", depth=0)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and ".layers." in name and min(m.weight.shape) > RANK
    ]


def pairs_of(model: nn.Module) -> Callable[[str, int], tuple[torch.Tensor, torch.Tensor]]:
    def pair(name: str, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        u, s, v = torch.linalg.svd(model.get_submodule(name).weight.double(), full_matrices=False)
        return (u * s.sqrt())[:, :rank], (s.sqrt()[:, None] * v)[:rank]

    return pair


def write(folder: Path, model: nn.Module, **options: Any) -> dict[str, int]:
    """Exports all targets at one rank, but the first, which stays dense."""
    targets = targets_of(model)
    ranks = {target.name: RANK for target in targets} | {targets[0].name: targets[0].full_rank}
    export(folder, model=model, tokenizer=NoTokenizer(), pairs=pairs_of(model), ranks=ranks, targets=targets, **options)
    return ranks


def compressed_by_hand(model: nn.Module, ranks: dict[str, int], form: str) -> nn.Module:
    """The same matrices put into the live model, in its dtype."""
    pair = pairs_of(model)
    for name, rank in list(ranks.items())[1:]:
        dense = model.get_submodule(name)
        layer = FORMS[form](in_features=dense.in_features, out_features=dense.out_features, rank=rank, bias=True)
        values = {f"{side}.weight": factor for side, factor in zip(("left", "right"), pair(name, rank), strict=True)}
        if form == "pivoted":
            values = vars(pivot(*values.values(), dense.weight.dtype))
            values = {"pivot.weight": values["pivot"], "rest.weight": values["rest"], "order": values["order"]}
        bias = torch.zeros(dense.out_features) if dense.bias is None else dense.bias
        layer.load_state_dict({**values, "bias" if form == "pivoted" else "left.bias": bias})
        model.set_submodule(name, layer.to(dense.weight.dtype))
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits  # type: ignore[no-any-return]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {form: tmp_path_factory.mktemp(form) / "checkpoint" for form in FORMS}
    for form, folder in folders.items():
        write(folder, build("llama", torch.bfloat16), form=form)
    return folders


@pytest.fixture(params=FORMS)
def checkpoint(checkpoints: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    return checkpoints[request.param]


@pytest.fixture
def broken(checkpoints: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of the checkpoint with another `quantization_config`."""

    def change(
        edit: Callable[[dict[str, Any]], None],
        state: Callable[[dict[str, Any]], None] | None = None,
        form: str = "factored",
    ) -> Path:
        checkpoint = checkpoints[form]
        config = json.loads((checkpoint / "config.json").read_text())
        edit(config["quantization_config"])
        (tmp_path / "config.json").write_text(json.dumps(config))
        stored = tensors(checkpoint)
        if state:
            state(stored)
        save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return tmp_path

    return change


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_loaded_computes_what_was_exported(form: str, family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(family, dtype)
    ranks = write(tmp_path / "out", model, form=form)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.dtype == dtype
    assert isinstance(loaded.get_submodule(list(ranks)[1]), FORMS[form])
    assert isinstance(loaded.get_submodule(next(iter(ranks))), nn.Linear)
    expected = logits(compressed_by_hand(model, ranks, form))
    # kernels may round differently for weights that lie differently in memory
    assert (logits(loaded) - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("place", [{}, {"device_map": {"": "cpu"}}, {"device_map": "auto"}])
def test_it_loads_in_another_dtype_and_with_a_device_map(checkpoint: Path, dtype: Any, place: dict[str, Any]) -> None:
    stored = logits(AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")).float()
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, **place)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert (logits(loaded).float() - stored).abs().max() < 0.05 * stored.abs().max()


def test_a_fresh_process_needs_one_import_and_generates_with_the_cache(checkpoint: Path) -> None:
    code = """
import sys, torch, ranksearch.worker.loading
heavy = {"datasets", "optuna", "pydantic", "sqlalchemy", "botorch"} & set(sys.modules)
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.arange(5)[None]
with_cache, without = (model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False))
print(heavy or "light", torch.equal(with_cache, without), with_cache.shape[1])
"""
    command = [sys.executable, "-c", code, str(checkpoint)]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / ".ns", check=False)
    assert answer.stdout.split() == ["light", "True", "13"], answer.stderr


def test_save_pretrained_writes_the_same_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").save_pretrained(tmp_path)
    before, after = tensors(checkpoint), tensors(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((f / "config.json").read_text())["quantization_config"] for f in (checkpoint, tmp_path)]
    assert configs[0] == configs[1]
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")),
        logits(AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")),
    )


def test_tied_embeddings_stay_tied(checkpoint: Path) -> None:
    assert "lm_head.weight" not in tensors(checkpoint)
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_model_without_its_head_loads_too(checkpoint: Path) -> None:
    body = AutoModel.from_pretrained(checkpoint, dtype="auto")
    whole = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    with torch.inference_mode():
        assert torch.equal(body(TOKENS).last_hidden_state, whole.model(TOKENS).last_hidden_state)


def test_it_may_be_cast_and_multiplied_out(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").float()
    before = logits(model)
    model.dequantize()
    model.float()  # transformers 5 casts back to the config's dtype
    assert not any(isinstance(module, tuple(FORMS.values())) for module in model.modules())
    assert (logits(model) - before).abs().max() < 0.02 * before.abs().max()


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda config: config.update(version=2), "format version 2"),
        (lambda config: config.pop("version"), "format version None"),
        (lambda config: next(iter(config["targets"].values())).update(form="braided"), "needs a newer ranksearch"),
        (lambda config: config["targets"].update({"model.layers.9.mlp": {"form": "factored", "rank": 2}}), "layers.9"),
        (lambda config: list(config["targets"].values())[1].update(rank="many"), "rank 'many'"),
    ],
)
def test_a_checkpoint_it_cannot_read_is_refused(broken: Callable[..., Path], edit: Any, says: str) -> None:
    with pytest.raises(UnsupportedModel, match=says):
        AutoModelForCausalLM.from_pretrained(broken(edit))


@pytest.mark.parametrize(
    ("form", "part"), [("factored", "left.weight"), ("pivoted", "rest.weight"), ("pivoted", "order")]
)
def test_a_missing_factor_is_never_made_up(form: str, part: str, broken: Callable[..., Path]) -> None:
    name = f"model.layers.1.mlp.up_proj.{part}"
    folder = broken(lambda config: None, lambda stored: stored.pop(name), form)
    with pytest.raises(BrokenWeights, match=name):
        AutoModelForCausalLM.from_pretrained(folder)


def test_nothing_in_the_folder_can_be_executed(checkpoint: Path) -> None:
    assert {path.suffix for path in checkpoint.iterdir()} <= {".json", ".safetensors", ".md", ".txt", ".jinja"}
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("form", FORMS)
def test_a_compressed_layer_looks_like_a_linear_layer(form: str) -> None:
    layer = FORMS[form](in_features=6, out_features=9, rank=2, bias=True, dtype=torch.float64)
    torch.nn.init.normal_(layer.bias)
    if form == "pivoted":
        layer.order.copy_(torch.randperm(9))
    features = torch.randn(4, 5, 6, dtype=torch.float64)
    assert {name for name, _ in layer.state_dict().items()} == set(layer.tensor_names(True))
    expected = nn.functional.linear(features, layer.weight, layer.bias)
    assert torch.allclose(layer(features), expected)
    assert torch.allclose(layer.merged()(features), expected)
    assert (layer.in_features, layer.out_features) == (6, 9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(6,), (1, 6), (0, 6), (2, 1, 6), (4, 5, 6)])
def test_what_a_compressed_layer_returns_may_be_viewed(form: str, shape: tuple[int, ...]) -> None:
    layer = FORMS[form](in_features=6, out_features=9, rank=2, bias=True)
    found = layer(torch.randn(shape))
    assert found.view(-1, 3).shape == (found.numel() // 3, 3)  # as models do that split heads
    assert found.is_contiguous()
