from __future__ import annotations

import pytest
import torch
from torch import nn

from ranksearch.search.errors import InvalidInput
from ranksearch.worker.bank import build_bank
from ranksearch.worker.prefix import PrefixLinear, PrefixModel
from ranksearch.worker.targets import find_targets


@pytest.fixture(params=["llama", "qwen2", "opt"])
def parts(request, tiny):
    model = tiny(request.param)
    targets = find_targets(model)
    return model, targets, build_bank(model, targets, None, metric="weight")


@torch.no_grad()
def test_a_prefix_runs_like_the_product_of_its_factors(parts, blocks):
    model, targets, bank = parts
    ranks = {target.name: 1 + index % target.break_even for index, target in enumerate(targets)}
    ranks[targets[2].name] = targets[2].full_rank  # dense
    with PrefixModel(model, bank, targets) as prefix:
        prefix.set_ranks(ranks)
        found = model(input_ids=blocks[:3]).logits
    for target in targets:
        if ranks[target.name] < target.full_rank:
            left, right = bank.pair(target.name, ranks[target.name])
            model.get_submodule(target.name).weight.copy_(left @ right)
    assert torch.allclose(found, model(input_ids=blocks[:3]).logits, atol=1e-5)


@torch.no_grad()
def test_dense_is_the_original_and_close_restores_it(parts, blocks):
    model, targets, bank = parts
    modules = [model.get_submodule(target.name) for target in targets]
    names = list(model.state_dict())
    before = model(input_ids=blocks[:3]).logits
    prefix = PrefixModel(model, bank, targets)
    assert isinstance(model.get_submodule(targets[0].name), PrefixLinear)
    assert torch.equal(model(input_ids=blocks[:3]).logits, before)
    prefix.set_ranks({target.name: 1 for target in targets})
    assert not torch.allclose(model(input_ids=blocks[:3]).logits, before)
    prefix.set_dense()
    assert torch.equal(model(input_ids=blocks[:3]).logits, before)
    prefix.set_ranks({targets[0].name: 1})
    prefix.close()
    prefix.close()
    assert [model.get_submodule(target.name) for target in targets] == modules
    assert list(model.state_dict()) == names
    assert torch.equal(model(input_ids=blocks[:3]).logits, before)


def test_a_rank_is_a_view_of_the_bank(parts):
    model, targets, bank = parts
    with PrefixModel(model, bank, targets) as prefix:
        prefix.set_ranks({targets[0].name: 5})
        left, right = model.get_submodule(targets[0].name)._prefix
        assert right.shape == (5, targets[0].in_features)
        assert right.data_ptr() == bank.right[targets[0].name].data_ptr()
        assert left.data_ptr() == bank.left[targets[0].name].data_ptr()
        with torch.profiler.profile(profile_memory=True) as profile:
            prefix.set_ranks({target.name: 3 for target in targets})
        assert not [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]


def test_a_bad_vector_changes_nothing(parts):
    model, targets, bank = parts
    first, second = targets[0], targets[1]
    with PrefixModel(model, bank, targets) as prefix:
        prefix.set_ranks({first.name: 2})
        for bad in (0, -1, second.break_even + 1, second.full_rank + 1):
            with pytest.raises(InvalidInput, match=second.kind):
                prefix.set_ranks({first.name: 3, second.name: bad})
        with pytest.raises(InvalidInput, match="not a target"):
            prefix.set_ranks({first.name: 3, "lm_head": 2})
        assert model.get_submodule(first.name)._prefix[1].shape[0] == 2


def test_the_bias_and_the_looks_of_a_linear_layer_stay():
    dense = nn.Linear(4, 6)
    layer = PrefixLinear(dense, torch.zeros(2, 6), torch.zeros(2, 4))
    layer.set_rank(1)
    assert torch.equal(layer(torch.ones(3, 4)), dense.bias.expand(3, 6))
    assert layer.weight is dense.weight
    assert layer.bias is dense.bias
