from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ranksearch.search.space import RankSpace
from ranksearch.worker import soco as scores
from ranksearch.worker.bank import build_bank
from ranksearch.worker.calibrate import calibrate
from ranksearch.worker.distill import distill
from ranksearch.worker.evaluate import Evaluation
from ranksearch.worker.placement import fetch_blocks, fetched, held
from ranksearch.worker.prefix import PrefixModel
from ranksearch.worker.sequential import resolve
from ranksearch.worker.soco import soco
from ranksearch.worker.targets import find_targets


def watched(model, made):
    """Notes every weight that block 0 runs with."""
    linear = model.model.layers[0].mlp.up_proj
    linear.register_forward_hook(lambda module, *_: made.append(weakref.ref(module.weight)))
    return linear


@torch.no_grad()
def test_a_fetched_model_says_the_same_and_keeps_no_copy(tiny, blocks):
    model = tiny("qwen2")
    expected = model(input_ids=blocks[:3]).logits
    made: list[weakref.ref] = []
    linear = watched(model, made)
    own, names = linear.weight, list(model.state_dict())
    assert not fetched(model)
    fetch_blocks(model, "cpu")
    assert fetched(model)
    assert torch.equal(model(input_ids=blocks[:3]).logits, expected)
    gc.collect()
    assert len(made) == 1
    assert made[0]() is None  # what ran was a copy, and it is gone
    assert linear.weight is own
    assert list(model.state_dict()) == names


@torch.no_grad()
def test_a_held_block_is_fetched_once(tiny, blocks):
    model = tiny()
    made: list[weakref.ref] = []
    linear = watched(model, made)
    own = linear.weight
    fetch_blocks(model, "cpu")
    with held(model, ["model.layers.0"]):
        for _ in range(3):
            model(input_ids=blocks[:3])
        assert len({id(weight()) for weight in made}) == 1
        assert linear.weight is not own
    assert linear.weight is own


@torch.no_grad()
def test_a_block_that_fails_is_put_back(tiny, blocks):
    model = tiny()
    linear = model.model.layers[0].mlp.up_proj
    own = linear.weight
    fetch_blocks(model, "cpu")
    hook = linear.register_forward_pre_hook(lambda *_: 1 / 0)
    try:
        model(input_ids=blocks[:3])
    except ZeroDivisionError:
        assert linear.weight is own
    else:
        raise AssertionError
    hook.remove()


def test_trials_of_a_fetched_model_score_the_same(tiny, blocks):
    model = tiny()
    targets = find_targets(model)
    bank = build_bank(model, targets, None, metric="weight")
    ranks = {target.name: 1 + index % target.break_even for index, target in enumerate(targets)}
    ranks[targets[2].name] = targets[2].full_rank

    def scored():
        evaluation = Evaluation(model, blocks[:8])
        with PrefixModel(model, bank, targets) as prefix:
            prefix.set_ranks(ranks)
            return evaluation.dense, evaluation.score(model)

    resident = scored()
    fetch_blocks(model, "cpu")
    assert scored() == resident


class OriginalsInUse(TorchDispatchMode):
    """Notes which tensors of a model's blocks are computed with themselves, not through copies that were fetched."""

    COPYING = (torch.ops.aten.detach, torch.ops.aten._to_copy, torch.ops.aten.to)

    def __init__(self, model, but=()):
        super().__init__()
        held = {**dict(model.model.layers.named_parameters()), **dict(model.model.layers.named_buffers())}
        self._names = {tensor.untyped_storage().data_ptr(): name for name, tensor in held.items()}
        self._names = {place: name for place, name in self._names.items() if name not in but}
        self.used: set[str] = set()
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        if function.overloadpacket not in self.COPYING:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.used |= {self._names.get(tensor.untyped_storage().data_ptr(), "") for tensor in tensors} - {""}
        return function(*args, **kwargs or {})


def run_soco(model, targets, bank, blocks):
    ranks = soco(model, bank, RankSpace(targets=targets), 0.95, blocks=blocks, tokens=20 * 16).ranks
    assert any(ranks[target.name] == target.full_rank for target in targets)


def run_distill(model, targets, bank, blocks):
    pairs = {target.name: bank.pair(target.name, 4) for target in targets}
    distill(model, pairs, blocks=blocks, evaluation=blocks[:4], tokens=5 * 16)


def run_sequential(model, targets, bank, blocks):
    calibration = calibrate(model, targets, blocks[:4], gradients=True)
    with PrefixModel(model, bank, targets) as prefix:
        pairs = {target.name: bank.pair(target.name, 4) for target in targets}
        leader, gradients = calibration.leader, calibration.gradients
        resolve(prefix, pairs, targets, blocks[:4], leader=leader, gradients=gradients, strength=0.5)


@pytest.mark.parametrize("step", [run_soco, run_distill, run_sequential])
def test_a_fetched_block_computes_with_nothing_that_was_not_fetched(tiny, blocks, monkeypatch, step):
    monkeypatch.setattr(scores, "STEPS", 20)
    model = tiny("qwen2")
    targets = find_targets(model)
    bank = build_bank(model, targets, None, metric="weight", full=True)
    fetch_blocks(model, "cpu")
    # what fetches itself is taken to where it runs, which is where it is here
    themselves = [t.name.removeprefix("model.layers.") for t in targets] if step is run_sequential else []
    with OriginalsInUse(model, [f"{name}.{part}" for name in themselves for part in ("weight", "bias")]) as found:
        step(model, targets, bank, blocks)
    assert found.calls > 1000
    assert found.used == set()
    assert all("forward" in vars(layer) for layer in model.model.layers)
