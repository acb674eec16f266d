from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ranksearch.search.allocate import Allocator
from ranksearch.search.errors import ImpossibleBudget, InvalidInput, NumericalError
from ranksearch.search.space import RankSpace
from ranksearch.worker import soco as module
from ranksearch.worker import student
from ranksearch.worker.bank import FactorBank, build_bank
from ranksearch.worker.evaluate import Evaluation
from ranksearch.worker.prefix import PrefixModel
from ranksearch.worker.soco import best_ranks, pack, soco, top
from ranksearch.worker.targets import find_targets


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(module, "STEPS", 60)


def parts_of(model):
    """A model that is sure of what it predicts, so that its matrices matter, and all there is to score."""
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    space = RankSpace(targets=find_targets(model))
    return model, build_bank(model, space.targets, None, metric="weight", full=True), space


@pytest.fixture
def parts(tiny):
    return parts_of(tiny())


def run(parts, kept, blocks, **settings):
    return soco(*parts, kept, blocks=blocks, **{"tokens": 120 * 16, **settings})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [0.25, 0.8])
def test_the_budget_is_met_exactly_by_factors_of_the_ranks_it_names(tiny, blocks, dtype, kept):
    model, bank, space = parts_of(tiny(dtype=dtype))
    told: list[float] = []
    found = run((model, bank, space), kept, blocks, progress=told.append)
    assert space.is_exact(space.from_dict(found.ranks), kept)
    assert found.pairs.keys() == {t.name for t in space.targets if found.ranks[t.name] < t.full_rank}
    for target in space.targets:
        if target.name in found.pairs:
            left, right = found.pairs[target.name]
            rank = found.ranks[target.name]
            assert left.shape == (target.out_features, rank)
            assert right.shape == (rank, target.in_features)
            assert left.dtype == right.dtype == dtype
            assert int((found.scores[target.name] > 0).sum()) <= rank
    assert told == sorted(told)
    assert told[-1] == 1
    assert type(model.get_submodule(space.targets[0].name)) is torch.nn.Linear


def test_a_component_without_effect_is_dropped_though_its_singular_value_is_the_largest(tiny, blocks):
    model, _, space = parts_of(tiny())
    name = "model.layers.0.mlp.down_proj"
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.gate_proj").weight[0] = 0  # so this feature is always zero
        model.get_submodule(name).weight[:, 0] = 100.0
    bank = build_bank(model, space.targets, None, metric="weight", full=True)
    assert bank.spectra[name][0] > 20 * bank.spectra[name][1]
    assert abs(float(bank.right[name][0, 0])) > 0.99 * float(bank.right[name][0].norm())
    found = run((model, bank, space), 0.4, blocks, tokens=240 * 16)
    assert found.ranks[name] < space.targets[0].full_rank
    assert float(found.scores[name][0]) == 0
    assert float(found.scores[name].max()) > 0.5


def test_targets_that_must_stay_dense_are_neither_scored_nor_packed(parts, blocks):
    model, bank, space = parts
    space = RankSpace(targets=space.targets, keep_dense=("*.v_proj",))
    found = run((model, bank, space), 0.4, blocks)
    assert space.is_exact(space.from_dict(found.ranks), 0.4)
    fixed = {target.name for target in space.targets if target.kind == "self_attn.v_proj"}
    assert not fixed & (found.pairs.keys() | found.scores.keys())


@pytest.mark.parametrize("keep_dense", [(), ("*",)])
def test_where_nothing_has_to_go_everything_stays_dense(parts, blocks, keep_dense):
    model, bank, space = parts
    space = RankSpace(targets=space.targets, keep_dense=keep_dense)
    found = run((model, bank, space), 1.0, blocks)
    assert found.ranks == {target.name: target.full_rank for target in space.targets}
    assert found.pairs == found.scores == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_components_on_the_cpu_are_scored_like_those_beside_a_model_on_a_gpu(tiny, blocks):
    model, bank, space = parts_of(tiny().to("cuda"))
    away = {side: {name: t.cpu() for name, t in getattr(bank, side).items()} for side in ("left", "right")}
    beside = run((model, bank, space), 0.4, blocks, tokens=20 * 16)
    found = run((model, replace(bank, **away), space), 0.4, blocks, tokens=20 * 16)
    for name, s in beside.scores.items():
        assert torch.allclose(found.scores[name], s, atol=1e-4)
    assert all(left.device.type == "cpu" for left, _ in found.pairs.values())


def test_packed_factors_run_like_the_scored_components(parts, blocks):
    _, bank, space = parts
    found = run(parts, 0.4, blocks)
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    for name, (left, right) in found.pairs.items():
        s = found.scores[name]
        x_n = x[:, : right.shape[1]]
        masked = F.linear(F.linear(x_n, bank.right[name]) * s, bank.left[name].mT)
        assert torch.allclose(F.linear(F.linear(x_n, right), left), masked, atol=1e-5)
    name = space.targets[0].name
    scores = torch.rand(space.targets[0].full_rank, generator=torch.Generator().manual_seed(1)) * 2
    left, right = pack(bank, name, scores, torch.tensor([1, 4]))
    one, four = (scores[j] * torch.outer(bank.left[name][j], bank.right[name][j]) for j in (1, 4))
    assert torch.allclose(left @ right, one + four, atol=1e-6)


def kl_of(model, bank, space, ranks, blocks):
    evaluation = Evaluation(model, blocks)
    targets = [target for target in space.targets if target.name in bank.left]
    with PrefixModel(model, bank, targets) as prefix:
        prefix.set_ranks({target.name: ranks[target.name] for target in targets})
        return evaluation.score(model).kl


def test_learned_components_are_nearer_to_the_dense_model_than_the_prior(parts, blocks):
    model, bank, space = parts
    found = run(parts, 0.4, blocks[:30])
    packed = FactorBank(
        spectra=bank.spectra,
        left={name: left.mT for name, (left, _) in found.pairs.items()},
        right={name: right for name, (_, right) in found.pairs.items()},
        facts={},
        metric="weight",
    )
    prior = space.as_dict(Allocator(space, bank.spectra).prior(0.4))
    learned = kl_of(model, packed, space, found.ranks, blocks[30:])
    assert learned < 0.5 * kl_of(model, bank, space, prior, blocks[30:])


def test_a_run_from_given_ranks_starts_nearer_to_the_budget(parts, blocks):
    _, _, space = parts
    ranks = {target.name: 4 for target in space.targets}
    found = run(parts, 0.4, blocks, start=ranks)
    everything = run(parts, 0.4, blocks)
    assert found.history[0]["kept"] < 0.9 < everything.history[0]["kept"]
    assert space.is_exact(space.from_dict(found.ranks), 0.4)


class Killed(Exception):
    pass


def test_a_run_that_was_killed_goes_on_to_bitwise_the_same_components(parts, blocks, tmp_path):
    whole = run(parts, 0.4, blocks)
    told: list[float] = []

    def die(fraction):
        told.append(fraction)
        if len(told) in (20, 50):  # in the first and in the last stage
            raise Killed

    state = {"state": tmp_path / "state.safetensors", "save_seconds": 0.0, "progress": die}
    for _ in range(2):
        with pytest.raises(Killed):
            run(parts, 0.4, blocks, **state)
    resumed = run(parts, 0.4, blocks, **state)
    assert len(told) == 60
    assert resumed.ranks == whole.ranks
    assert resumed.history == whole.history
    for name, scores in whole.scores.items():
        assert torch.equal(resumed.scores[name], scores)
    assert not all(
        torch.equal(scores, whole.scores[name]) for name, scores in run(parts, 0.4, blocks, seed=1).scores.items()
    )


def test_scores_are_values_per_parameter(parts):
    _, _, space = parts
    order = np.random.default_rng(0)
    scores = {t.name: torch.from_numpy(order.random(t.full_rank)) for t in space.targets}
    ranks = space.as_dict(best_ranks(space, scores, 0.3))
    assert space.is_exact(space.from_dict(ranks), 0.3)
    factored = [t.name for t in space.targets if ranks[t.name] < t.full_rank]
    assert len(factored) > 7
    kept = [float(s) for name in factored for s in scores[name][top(scores[name], ranks[name])]]
    lost = [float(s) for name in factored for s in scores[name].sort(descending=True).values[ranks[name] :]]
    # but for the last few, which fill the budget
    assert np.mean(np.array(kept) > max(lost)) > 0.9


def test_a_bank_without_all_components_is_refused(parts, blocks):
    model, _, space = parts
    bank = build_bank(model, space.targets, None, metric="weight")
    with pytest.raises(InvalidInput, match="full=True"):
        run((model, bank, space), 0.4, blocks)
    with pytest.raises(ImpossibleBudget):
        run(parts, 0.001, blocks)


def test_a_loss_that_is_never_finite_ends_the_run(parts, blocks, monkeypatch):
    monkeypatch.setattr(student.Student, "learn", lambda self, ids, leaves, **options: _nothing(leaves))
    with pytest.raises(NumericalError, match="not finite"):
        run(parts, 0.4, blocks)


def _nothing(leaves):
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)
    return math.nan
