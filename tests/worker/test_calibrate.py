from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ranksearch.search.errors import NumericalError
from ranksearch.worker.calibrate import Calibration, calibrate
from ranksearch.worker.placement import fetch_blocks
from ranksearch.worker.targets import find_targets


def reference(model, targets, blocks):
    """Moments by autograd on the whole model at once, weight gradients and all."""
    inputs, outputs = {}, {}
    hooks = []
    for target in targets:
        module = model.get_submodule(target.name)

        def keep(module, args, output, name=target.name):
            output.retain_grad()
            inputs[name], outputs[name] = args[0].detach(), output

        hooks.append(module.register_forward_hook(keep))
    logits = model(input_ids=blocks).logits.float()
    F.cross_entropy(logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten(), reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()

    def second(x):
        x = x.reshape(-1, x.shape[-1]).double()
        return x.mT @ x / blocks.numel()

    return {n: second(x) for n, x in inputs.items()}, {n: second(y.grad) for n, y in outputs.items()}


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gemma2", "granite"])
def test_moments_equal_autograd_over_the_whole_model(tiny, blocks, family):
    model = tiny(family)
    targets = find_targets(model)
    inputs, gradients = reference(model, targets, blocks)
    found = calibrate(model, targets, blocks, gradients=True, batch_tokens=48)
    for target in targets:
        scale = float(gradients[target.name].abs().max())
        assert torch.allclose(found.input(target.name).double(), inputs[target.name], rtol=1e-3, atol=1e-5)
        assert torch.allclose(
            found.gradients[target.name].double(), gradients[target.name], rtol=1e-3, atol=1e-4 * scale
        )
        assert found.tokens[target.name] == found.total_tokens == blocks.numel()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_targets_fed_the_same_tensor_share_one_covariance(tiny, blocks, family):
    model = tiny(family)
    found = calibrate(model, find_targets(model), blocks[:2], gradients=False)
    short = {name.split("layers.")[1]: leader.split("layers.")[1] for name, leader in found.leader.items()}
    assert short["1.self_attn.k_proj"] == short["1.self_attn.v_proj"] == "1.self_attn.q_proj"
    assert short["0.mlp.up_proj"] == "0.mlp.gate_proj"
    assert short["0.mlp.down_proj"] == "0.mlp.down_proj"
    assert len(found.inputs) == 8
    assert not found.gradients


def test_no_weight_gradient_ever_exists_and_the_model_comes_back_as_it_was(tiny, blocks):
    model = tiny()
    model.train()
    model.model.norm.weight.requires_grad_(False)
    made = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(made.append)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    calibrate(model, find_targets(model), blocks, gradients=True)
    assert not made
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks


@pytest.mark.parametrize("limit", [60_000, 10_000, 1], ids=["a block", "half a block", "one group"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gemma2", "granite", "mixtral"])
def test_sections_give_what_the_whole_model_gives_to_the_last_bit(tiny, blocks, family, limit):
    model = tiny(family, num_hidden_layers=3)
    targets = find_targets(model)
    told: list[float] = []
    whole = calibrate(model, targets, blocks, gradients=True, batch_tokens=12 * 16)
    ways = {"batch_tokens": 12 * 16, "memory_limit": limit, "progress": told.append}
    split = calibrate(model, targets, blocks, gradients=True, **ways)
    assert told == sorted(told)
    assert told[-1] == 1
    assert len(told) >= 4 * (4 if limit < 60_000 else 1)  # as many batches, and two more runs at least
    assert (whole.leader, whole.tokens) == (split.leader, split.tokens)
    features = calibrate(model, targets, blocks, gradients=False, **ways)
    for target in targets:
        assert torch.equal(whole.input(target.name), split.input(target.name)), target.name
        assert torch.equal(whole.gradients[target.name], split.gradients[target.name]), target.name
        assert torch.equal(whole.input(target.name), features.input(target.name)), target.name


def stretch(module, args, kwargs):
    """What the block is given is no longer what the one before it gave."""
    return (args[0] * 1.5, *args[1:]), kwargs


def look_at_tokens(module, args, kwargs):
    """What the block is given beside the hidden states depends on the tokens."""
    size = 1 + args[0].detach().mean((1, 2), keepdim=True)
    return args, kwargs | {"position_embeddings": tuple(part * size for part in kwargs["position_embeddings"])}


@pytest.mark.parametrize("change", [stretch, look_at_tokens])
def test_a_model_whose_blocks_cannot_be_run_alone_is_run_whole_several_times(tiny, blocks, change):
    model = tiny(num_hidden_layers=3)
    targets = find_targets(model)
    before = calibrate(model, targets, blocks, gradients=True)
    model.model.layers[1].register_forward_pre_hook(change, with_kwargs=True)
    whole = calibrate(model, targets, blocks, gradients=True)
    split = calibrate(model, targets, blocks, gradients=True, memory_limit=20_000)
    last = targets[-1].name
    assert not torch.equal(whole.input(last), before.input(last))
    for part in ("inputs", "gradients"):
        for name, moment in getattr(whole, part).items():
            assert torch.equal(moment, getattr(split, part)[name]), name


@pytest.mark.parametrize("gradients", [True, False])
def test_sections_name_the_first_target_with_broken_features_too(tiny, blocks, gradients):
    model = tiny(num_hidden_layers=3)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericalError) as caught:
        calibrate(model, find_targets(model), blocks, gradients=gradients, memory_limit=1)
    assert caught.value.data["target"] == "model.layers.0.mlp.down_proj"


def there(model):
    """Blocks whose weights are on the device."""
    return sum(bool(layer.fetcher._away) for layer in model.model.layers)


def test_only_one_block_and_one_batch_are_there_at_a_time(tiny, blocks):
    model = tiny(num_hidden_layers=4)
    targets = find_targets(model)
    whole = calibrate(model, targets, blocks, gradients=True, batch_tokens=12 * 16)
    copies = []
    block = model.model.layers[0]
    fetch_blocks(model, "cpu")
    for layer in model.model.layers:
        layer.mlp.act_fn.register_forward_pre_hook(lambda *_: copies.append(there(model)))
    weights = [parameter.data_ptr() for parameter in block.parameters()]
    found = calibrate(model, targets, blocks, gradients=True, batch_tokens=12 * 16, memory_limit=1)
    assert set(copies) == {1}
    assert [parameter.data_ptr() for parameter in block.parameters()] == weights
    for part in ("inputs", "gradients"):
        for name, moment in getattr(whole, part).items():
            assert torch.equal(moment, getattr(found, part)[name]), name


def test_batches_do_not_change_moments(tiny, blocks):
    model = tiny()
    targets = find_targets(model)
    small = calibrate(model, targets, blocks, gradients=True, batch_tokens=1)
    large = calibrate(model, targets, blocks, gradients=True, batch_tokens=1 << 20)
    for name, moment in small.inputs.items():
        assert torch.allclose(moment, large.inputs[name], rtol=1e-4, atol=1e-6)


def test_batches_are_halved_until_they_fit_into_memory(tiny, blocks):
    model = tiny()
    targets = find_targets(model)
    whole = calibrate(model, targets, blocks, gradients=True)
    seen = []

    def needs_memory(module, args, kwargs):
        seen.append(len(args[0]) if args else len(kwargs["input_ids"]))
        if seen[-1] > 12:
            raise torch.OutOfMemoryError("too many")

    hook = model.model.register_forward_pre_hook(needs_memory, with_kwargs=True)
    found = calibrate(model, targets, blocks, gradients=True, batch_tokens=40 * 16)
    hook.remove()
    assert 40 in seen
    assert 20 in seen
    assert found.tokens == whole.tokens
    for target in targets:
        assert torch.allclose(found.input(target.name), whole.input(target.name), rtol=1e-4, atol=1e-6)
    model.model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("far too many")))
    with pytest.raises(torch.OutOfMemoryError, match="far too many"):
        calibrate(model, targets, blocks, gradients=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_calibration_is_the_same_to_the_last_bit_on_a_gpu(tiny):
    size = {"hidden_size": 256, "head_dim": 64, "max_position_embeddings": 512}
    model = tiny(dtype=torch.bfloat16, **size).to("cuda")
    targets = find_targets(model)
    blocks = torch.arange(8 * 512).mul(37).remainder(96).view(8, 512)
    first, second = (calibrate(model, targets, blocks, gradients=True) for _ in range(2))
    for part in ("inputs", "gradients"):
        for name, moment in getattr(first, part).items():
            assert torch.equal(moment, getattr(second, part)[name]), name


def test_a_calibration_in_a_file_is_the_one_in_memory(tiny, blocks, tmp_path):
    model = tiny(dtype=torch.bfloat16)
    targets = find_targets(model)
    found = calibrate(model, targets, blocks[:8], gradients=True)
    calibrate(model, targets, blocks[:8], gradients=True, file=tmp_path / "calibration.safetensors")
    again = Calibration.load(tmp_path / "calibration.safetensors")
    assert (again.leader, again.tokens, again.total_tokens) == (found.leader, found.tokens, found.total_tokens)
    for part in ("inputs", "gradients"):
        assert getattr(again, part).keys() == getattr(found, part).keys()
        assert all(torch.equal(t, getattr(again, part)[n]) for n, t in getattr(found, part).items())


def test_the_first_target_with_broken_features_is_named(tiny, blocks):
    model = tiny()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"layers\.0\.mlp\.down_proj") as caught:
        calibrate(model, find_targets(model), blocks, gradients=False)
    assert caught.value.data["target"] == "model.layers.0.mlp.down_proj"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.layers.modules())


def test_covariances_centred_within_pools(tiny, blocks):
    model = tiny("llama")
    targets = find_targets(model)
    seen = []
    hook = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(input_ids=blocks)
    hook.remove()
    found = calibrate(model, targets, blocks, gradients=False, pool=2, batch_tokens=3 * blocks.shape[1])
    pools = [pool.flatten(0, 1).double() for pool in seen[0].split(2)]
    tokens = sum(len(pool) for pool in pools)
    expected = sum(pool.mT.cov() * len(pool) / tokens for pool in pools)
    name = "model.layers.0.mlp.down_proj"
    torch.testing.assert_close(found.input(name).double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.means[name].double(), torch.cat(pools).mean(0), rtol=1e-4, atol=1e-6)


def test_centred_covariances_go_through_sections_and_files(tiny, blocks, tmp_path):
    model = tiny("llama")
    targets = find_targets(model)
    whole = calibrate(model, targets, blocks, gradients=True, pool=2)
    parts = calibrate(model, targets, blocks, gradients=True, pool=2, memory_limit=1, file=tmp_path / "calibration")
    for name in whole.inputs:
        assert torch.equal(whole.inputs[name], parts.inputs[name])
        assert torch.equal(whole.means[name], parts.means[name])


def test_labels_drawn_from_the_model_give_its_fisher_information(tiny, blocks):
    model, blocks = tiny("llama"), blocks[:1, :6]
    targets = find_targets(model)
    drawn, again = (calibrate(model, targets, blocks, gradients=True, labels="model") for _ in range(2))
    text = calibrate(model, targets, blocks, gradients=True)
    name = targets[0].name
    assert torch.equal(drawn.gradients[name], again.gradients[name])
    assert not torch.allclose(drawn.gradients[name], text.gradients[name])
    many = calibrate(model, targets, blocks.repeat(500, 1), gradients=True, labels="model").gradients[name]
    expected = _fisher(model, name, blocks)
    assert float((many - expected).norm() / expected.norm()) < 0.2


def _fisher(model, name, blocks):
    """Sum over next tokens v of p(v) g_v g_v', per token of the text: the Fisher information without sampling."""
    outputs = []
    hook = model.get_submodule(name).register_forward_hook(
        lambda module, args, y: outputs.append(y.requires_grad_()) or y
    )
    total = 0
    for row in blocks[:, :-1]:
        outputs.clear()
        with torch.enable_grad():
            logs = model(input_ids=row.unsqueeze(0)).logits.log_softmax(-1)[0]
        for position in range(len(row)):
            for label in range(logs.shape[-1]):
                (slope,) = torch.autograd.grad(logs[position, label], outputs[0], retain_graph=True)
                g = slope[0].double()
                total = total + logs[position, label].exp().detach().double() * g.mT @ g
    hook.remove()
    return (total / blocks.numel()).float()
