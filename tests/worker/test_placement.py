from __future__ import annotations

import gc
import weakref

import torch

from ranksearch.worker.bank import build_bank
from ranksearch.worker.evaluate import Evaluation
from ranksearch.worker.placement import fetch_blocks, fetched, held
from ranksearch.worker.prefix import PrefixModel
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
