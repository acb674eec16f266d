"""Each metric against its formula, from whole weight gradients and features that torch gives without our code."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ranksearch.search.errors import InvalidInput, NumericalError
from ranksearch.worker.bank import FactorBank, build_bank
from ranksearch.worker.calibrate import Calibration, calibrate
from ranksearch.worker.metrics import NEEDS
from ranksearch.worker.plain import make_plain
from ranksearch.worker.targets import find_targets

PUBLISHED = ("centred", "activation", "fisher", "attribution")


def needs(metric, **changes):
    return asdict(NEEDS[metric]) | changes


def features(model, name, blocks):
    """Inputs of a target, `sequences x length x n`, fp64."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=blocks)
    hook.remove()
    return seen[0].double().view(*blocks.shape, -1)


def weight_gradients(model, blocks, reduction):
    """Target -> gradient of the loss with respect to its weight."""
    targets = find_targets(model)
    weights = [model.get_parameter(f"{target.name}.weight") for target in targets]
    logits = model(input_ids=blocks).logits.float()
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten(), reduction=reduction)
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    return {t.name: torch.zeros_like(w) if g is None else g for t, w, g in zip(targets, weights, found, strict=True)}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request, tiny):
    model = tiny(request.param)
    make_plain(model)
    return model.requires_grad_(True)


def bank_of(model, blocks, metric, **options):
    targets = find_targets(model)
    calibration = calibrate(model, targets, blocks, **needs(metric))
    return targets, calibration, build_bank(model, targets, calibration, metric=metric, full=True, **options)


def is_the_best(model, bank, target, scale, rank=5):
    """Whether the factors are the truncated decomposition of W with its columns scaled."""
    left, right = bank.pair(target.name, rank)
    U, S, Vh = torch.linalg.svd(model.get_submodule(target.name).weight.detach().double() * scale, full_matrices=False)
    np.testing.assert_allclose(bank.spectra[target.name][:12], S[:12].numpy(), rtol=2e-4)
    torch.testing.assert_close(
        left.double() @ right.double() * scale, (U[:, :rank] * S[:rank]) @ Vh[:rank], rtol=1e-3, atol=1e-4 * float(S[0])
    )


@torch.no_grad()
def test_activation_scales_by_the_root_of_the_mean_size(model, blocks):
    targets, calibration, bank = bank_of(model, blocks, "activation", damping=0)
    assert not calibration.inputs
    for target in targets:
        size = features(model, target.name, blocks).abs().flatten(0, 1).mean(0)
        is_the_best(model, bank, target, size.sqrt())


def test_fisher_weights_columns_by_squared_gradients_of_sequences(model, blocks):
    targets, calibration, bank = bank_of(model, blocks[:12], "fisher", damping=0)
    each = [weight_gradients(model, row.unsqueeze(0), "sum") for row in blocks[:12]]
    assert not calibration.inputs
    for target in targets:
        columns = torch.stack([g[target.name].double().square().sum(0) for g in each]).mean(0)
        torch.testing.assert_close(calibration.fisher[target.name].double(), columns, rtol=1e-3, atol=0)
        is_the_best(model, bank, target, columns.sqrt())


def test_attribution_orders_components_by_their_share_of_the_loss(model, blocks):
    targets, calibration, bank = bank_of(model, blocks, "attribution")
    gradients = weight_gradients(model, blocks, "mean")
    assert not calibration.inputs
    for target in targets:
        D = gradients[target.name].double()
        torch.testing.assert_close(calibration.weight_gradients[target.name].double(), D, rtol=1e-3, atol=1e-6)
        left, right = (factor.double() for factor in bank.pair(target.name, target.full_rank))
        scores = torch.einsum("mr,mn,rn->r", left, D, right).abs()
        np.testing.assert_allclose(bank.spectra[target.name] ** 2, scores.numpy(), rtol=1e-2, atol=1e-7)
        assert (np.diff(bank.spectra[target.name]) <= 0).all()
        W = model.get_submodule(target.name).weight.detach().double()
        torch.testing.assert_close(left @ right, W, rtol=1e-4, atol=1e-5)
        values = (left.norm(dim=0) * right.norm(dim=1)).sort(descending=True).values
        torch.testing.assert_close(values, torch.linalg.svdvals(W), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_centred_takes_covariances_within_pools_and_keeps_the_mean(model, blocks):
    targets, _, bank = bank_of(model, blocks, "centred", damping=0)  # 32 sequences, and a pool of the other 8
    for target in targets:
        x = features(model, target.name, blocks)
        pools = [pool.flatten(0, 1) for pool in x.split(32)]
        C = sum(pool.mT.cov() * len(pool) for pool in pools) / blocks.numel()
        values = torch.linalg.eigvalsh(model.get_submodule(target.name).weight.double() @ C @ _T(model, target)).flip(0)
        np.testing.assert_allclose(bank.spectra[target.name][:8] ** 2, values[:8].numpy(), rtol=1e-3)
        torch.testing.assert_close(bank.means[target.name].double(), x.flatten(0, 1).mean(0), rtol=1e-4, atol=1e-6)


def _T(model, target):
    return model.get_submodule(target.name).weight.double().mT


@pytest.mark.parametrize("metric", PUBLISHED)
def test_sections_batches_and_files_change_nothing(tiny, blocks, tmp_path, metric):
    model, blocks = tiny(), blocks[:5]
    targets = find_targets(model)
    what = needs(metric, pool=2 if metric == "centred" else None)
    whole = calibrate(model, targets, blocks, **what, batch_tokens=2 * 16)
    ways = {"memory_limit": 1, "file": tmp_path / "calibration", "batch_tokens": 2 * 16}
    parts = calibrate(model, targets, blocks, **what, **ways)
    small = calibrate(model, targets, blocks, **what, batch_tokens=16)
    assert whole.leader == parts.leader
    assert whole.tokens == parts.tokens == {target.name: 5 * 16 for target in targets}
    collected = {"inputs", "gradients", "means", "absolute", "fisher", "weight_gradients"}
    expected = {"centred": {"inputs", "means"}, "activation": {"absolute"}, "fisher": {"fisher"}}
    assert {part for part in collected if getattr(whole, part)} == expected.get(metric, {"weight_gradients"})
    for part in collected:
        for name, tensor in getattr(whole, part).items():
            assert torch.equal(tensor, getattr(parts, part)[name]), name
            torch.testing.assert_close(tensor, getattr(small, part)[name], rtol=1e-3, atol=1e-5)
    bank = build_bank(model, targets, parts, metric=metric, file=tmp_path / "bank")
    again = FactorBank.load(tmp_path / "bank")
    assert again.facts == bank.facts
    assert again.means.keys() == ({target.name for target in targets} if metric == "centred" else set())
    assert all(fact["similarity"] == whole.similarity[name] for name, fact in again.facts.items())


@pytest.mark.parametrize("metric", PUBLISHED)
@pytest.mark.parametrize("limit", [None, 1])
def test_the_first_target_with_broken_features_is_named(tiny, blocks, metric, limit):
    model = tiny(num_hidden_layers=3)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericalError) as caught:
        calibrate(model, find_targets(model), blocks, **needs(metric), memory_limit=limit)
    assert caught.value.data["target"] == "model.layers.0.mlp.down_proj"


def test_experts_count_by_what_they_see(tiny, blocks):
    model = tiny("mixtral")
    make_plain(model)
    model.requires_grad_(True)
    targets = find_targets(model)
    found = {metric: calibrate(model, targets, blocks[:4], **needs(metric)) for metric in PUBLISHED}
    each = [weight_gradients(model, row.unsqueeze(0), "sum") for row in blocks[:4]]
    for target in targets:
        columns = torch.stack([g[target.name].square().sum(0) for g in each]).mean(0)
        torch.testing.assert_close(found["fisher"].fisher[target.name], columns, rtol=1e-3, atol=1e-6)
    unseen = [target.name for target in targets if not found["activation"].tokens[target.name]]
    for metric, calibration in found.items():
        bank = build_bank(model, targets, calibration, metric=metric, full=True)
        for target in targets:
            left, right = bank.pair(target.name, target.full_rank)
            W = model.get_submodule(target.name).weight
            torch.testing.assert_close(left @ right, W.detach(), rtol=1e-3, atol=1e-3)
            assert np.isfinite(bank.spectra[target.name]).all()
        if metric in ("fisher", "attribution"):
            assert not any(bank.spectra[name].any() for name in unseen)


def test_a_metric_without_what_it_needs_is_refused(tiny, blocks):
    model = tiny()
    targets = find_targets(model)
    plain = calibrate(model, targets, blocks[:2])
    for metric, missing in zip(PUBLISHED, ("means", "absolute", "fisher", "weight_gradients"), strict=True):
        with pytest.raises(InvalidInput, match=f"{metric} needs a calibration with {missing}"):
            build_bank(model, targets, plain, metric=metric)


def test_a_calibration_from_before_similarities_can_be_read(tiny, blocks):
    model = tiny()
    found = calibrate(model, find_targets(model), blocks[:2])
    facts = {"leader": dict(found.leader), "tokens": dict(found.tokens), "total_tokens": 32}
    tensors = {f"inputs/{name}": tensor for name, tensor in found.inputs.items()}
    assert not Calibration._of(tensors, facts).similarity
