from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ranksearch.worker.fused import FusedExperts, TransposedLinear
from ranksearch.worker.plain import as_loaded, make_plain, restore
from ranksearch.worker.targets import find_targets

SIZE = 8
IDS = torch.arange(6)[None]


class OwnLinear(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


class ClippingLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x.clamp(-8, 8))


class QuantizingLinear(nn.Linear):
    def forward(self, x):
        return super().forward((x * 64).round() / 64)


class Router(nn.Linear):
    def forward(self, x):
        logits = super().forward(x)
        return logits.softmax(-1), logits.argmax(-1)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, SIZE, 12))
        self.down = nn.Parameter(torch.randn(3, 12, SIZE))

    def forward(self, x, index):
        out = torch.zeros_like(x)
        for expert in index.unique():
            out[index == expert] = (x[index == expert] @ self.up[expert]).relu() @ self.down[expert]
        return out


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, SIZE, SIZE))

    def forward(self, x):
        return torch.einsum("btn,enm->btm", x, self.weight)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.own, self.router, self.turned = OwnLinear(SIZE, SIZE), Router(SIZE, 3), Conv1D(SIZE, SIZE)
        self.experts, self.whole, self.read = Experts(), Whole(), nn.Linear(SIZE, SIZE)

    def forward(self, x):
        scores, index = self.router(x)
        x = x + self.turned(self.own(x)) + self.whole(x)
        return x + self.experts(x, index) * scores.amax(-1, keepdim=True) + x @ self.read.weight.exp()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, SIZE)
        self.blocks = nn.ModuleList([Block(), Block()])

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, use_cache=False):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = nn.functional.layer_norm(block(x), (SIZE,))
        return SimpleNamespace(logits=x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval().requires_grad_(False)


def test_only_what_multiplies_and_nothing_else_becomes_a_target(model):
    expected = model(IDS).logits
    make_plain(model)
    assert torch.allclose(model(IDS).logits, expected, atol=1e-6)
    kinds = {t.kind: (t.out_features, t.in_features) for t in find_targets(model)}
    assert kinds == {
        "own": (SIZE, SIZE),
        "turned": (SIZE, SIZE),
        "experts.up": (12, SIZE),
        "experts.down": (SIZE, 12),
    }
    assert isinstance(model.blocks[0].router, Router)
    assert isinstance(model.blocks[0].turned, TransposedLinear)
    assert model.blocks[0].experts.up.transposed


@pytest.mark.parametrize("kind", [ClippingLinear, QuantizingLinear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_changes_its_input_first_is_not_plain(model, kind, dtype):
    model.blocks[0].own = kind(SIZE, SIZE)
    make_plain(model.to(dtype))
    assert type(model.blocks[0].own) is kind
    assert type(model.blocks[1].own) is nn.Linear


def test_no_weight_is_copied(model):
    up, turned = model.blocks[0].experts.up, model.blocks[0].turned.weight
    make_plain(model)
    up[1, 2, 3] = turned[4, 5] = 7.0
    assert model.blocks[0].experts.up.get_submodule("1").weight[3, 2] == 7
    assert model.blocks[0].turned.weight[5, 4] == 7


def test_a_tensor_used_as_a_whole_is_left_alone_and_named(model, caplog):
    with caplog.at_level(logging.WARNING, "ranksearch.worker"):
        make_plain(model)
    assert [record.args[0] for record in caplog.records] == ["blocks.0.whole.weight", "blocks.1.whole.weight"]
    assert isinstance(model.blocks[0].whole.weight, nn.Parameter)


def test_it_can_be_undone_for_a_while_and_for_good(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    make_plain(model)
    targets, expected = find_targets(model), model(IDS).logits
    with as_loaded(model):
        assert type(model.blocks[1].turned) is Conv1D
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert find_targets(model) == targets
    assert torch.equal(model(IDS).logits, expected)
    assert set(restore(model)) == {f"blocks.{depth}.experts.{name}" for depth in (0, 1) for name in ("up", "down")}
    assert not any(isinstance(module, FusedExperts) for module in model.modules())


def test_a_transposed_layer_reads_and_writes_state_dicts_as_its_model_does(model):
    before = model.state_dict()
    make_plain(model)
    layer = model.blocks[0].turned
    assert torch.equal(layer.state_dict()["weight"], before["blocks.0.turned.weight"])
    layer.load_state_dict({"weight": torch.arange(64.0).view(SIZE, SIZE), "bias": torch.ones(SIZE)})
    assert torch.equal(layer(torch.eye(SIZE)), torch.arange(64.0).view(SIZE, SIZE) + 1)


def test_slices_refuse_other_uses():
    experts = FusedExperts(torch.randn(2, 3, 4), transposed=False)
    assert experts.shape == (2, 3, 4)
    assert torch.equal(experts.fused()[1].T, experts[1].layer(torch.eye(4)))
    with pytest.raises(TypeError):
        torch.randn(5, 3) @ experts[0]
    with pytest.raises(TypeError):
        torch.add(torch.randn(3, 4), experts[0])
