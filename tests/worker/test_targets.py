from __future__ import annotations

import pytest
import torch
from torch import nn

from ranksearch.search.errors import BrokenWeights, UnsupportedModel
from ranksearch.worker.targets import block_stack, check_weights, find_targets

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "granite"])
def test_decoder_blocks_give_seven_kinds_each(tiny, family):
    targets = find_targets(tiny(family))
    assert [t.kind for t in targets if t.depth == 1] == ATTENTION + MLP
    assert [t.depth for t in targets] == [0] * 7 + [1] * 7
    key = next(t for t in targets if t.name == "model.layers.1.self_attn.k_proj")
    assert (key.out_features, key.in_features) == (12, 24)


def test_opt_projections_outside_the_blocks_are_no_targets(tiny):
    model = tiny("opt")
    assert any("project_in" in name for name, _ in model.named_modules())
    targets = find_targets(model)
    assert len(targets) == 12
    assert {t.kind for t in targets} >= {"fc1", "fc2", "self_attn.out_proj"}
    assert not [t for t in targets if "project" in t.name or "head" in t.name]


def test_a_mixture_gives_its_attention(tiny):
    kinds = {t.kind for t in find_targets(tiny("mixtral"))}
    assert kinds >= set(ATTENTION)


def test_experts_in_a_list_share_a_kind_and_single_output_gates_are_left_out():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8)) for _ in range(3))
            self.gate = nn.Linear(8, 1)

    model = nn.Module()
    model.layers = nn.ModuleList([Block(), Block()])
    model.lm_head = nn.Linear(8, 50)
    targets = find_targets(model)
    assert len(targets) == 12
    assert {t.kind for t in targets} == {"experts.0", "experts.1"}
    assert targets[-1].name == "layers.1.experts.2.1"
    assert targets[-1].depth == 1


def test_several_stacks_keep_their_kinds_apart():
    model = nn.Module()
    model.encoder = nn.ModuleList([nn.Linear(8, 8)])
    model.decoder = nn.ModuleList([nn.Linear(8, 8)])
    assert [(t.name, t.kind) for t in find_targets(model)] == [
        ("encoder.0", "encoder.Linear"),
        ("decoder.0", "decoder.Linear"),
    ]


class Tower(nn.Module):
    """Embedding and blocks of text beside blocks of something else, and more of those deeper inside."""

    def __init__(self, *, together):
        super().__init__()
        self.language = nn.Module()
        owner = self if together else self.language
        owner.embed = nn.Embedding(9, 8)
        owner.layers = nn.ModuleList([nn.Linear(8, 8)])
        owner.images = nn.Module()
        owner.images.layers = nn.ModuleList([nn.Linear(8, 8)])
        self.vision = nn.ModuleList([nn.Linear(8, 8)]) if not together else None
        self.get_input_embeddings = lambda: owner.embed


@pytest.mark.parametrize(("together", "name"), [(True, "layers.0"), (False, "language.layers.0")])
def test_only_the_blocks_nearest_to_the_embedding_read_text(together, name):
    model = Tower(together=together)
    assert [t.name for t in find_targets(model)] == [name]
    assert block_stack(model) == [name]


def test_a_model_without_linear_layers_is_refused(tiny):
    with pytest.raises(UnsupportedModel, match="no linear layer"):
        find_targets(tiny("gpt2"))


def test_quantized_layers_are_refused_by_name(tiny):
    class Linear8bit(nn.Linear):
        pass

    model = tiny()
    layer = model.model.layers[1].mlp.up_proj = Linear8bit(24, 40)
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.1\.mlp\.up_proj is a Linear8bit with torch.int8"):
        find_targets(model)


def test_an_already_compressed_model_is_refused(tiny):
    model = tiny()
    model.config.quantization_config = {"quant_method": "ranksearch"}
    with pytest.raises(UnsupportedModel, match="original checkpoint"):
        find_targets(model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_broken_weight_is_named(tiny, bad, dtype):
    model = tiny(dtype=dtype)
    check_weights(model)
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] = bad
    with pytest.raises(BrokenWeights) as caught:
        check_weights(model)
    assert caught.value.data["tensor"] == "model.layers.1.mlp.down_proj.weight"
