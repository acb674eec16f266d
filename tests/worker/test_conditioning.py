"""Layers that break arithmetic elsewhere, through the whole line: calibrate, factor, allocate, solve again, score."""

from __future__ import annotations

import copy

import pytest
import torch

from ranksearch.search.allocate import Allocator
from ranksearch.search.errors import NumericalError
from ranksearch.search.space import RankSpace
from ranksearch.worker.bank import build_bank
from ranksearch.worker.calibrate import calibrate
from ranksearch.worker.evaluate import Evaluation
from ranksearch.worker.prefix import PrefixModel
from ranksearch.worker.sequential import resolve
from ranksearch.worker.targets import find_targets

KEPT = 0.6


def dead_layer(model):
    model.model.layers[0].self_attn.o_proj.weight.zero_()
    model.model.layers[1].mlp.up_proj.weight.zero_()  # so that nothing reaches down_proj


def rank_deficient(model):
    gate = model.model.layers[0].mlp.gate_proj.weight
    gate.copy_(gate[:, :2] @ gate[:2])
    model.model.embed_tokens.weight[:, 3:] = model.model.embed_tokens.weight[:, :1]


def outlier_channel(model):
    """One channel of the features is 1e4 times the others, and the weights that read it are small."""
    block = model.model.layers[1]
    block.post_attention_layernorm.weight[5] *= 1e4
    for part in (block.mlp.gate_proj, block.mlp.up_proj):
        part.weight[:, 5] /= 1e4


def large_features(model):
    """Features whose squares are beyond the largest number of 16 bits, 65504."""
    block = model.model.layers[0]
    block.mlp.up_proj.weight *= 400
    block.mlp.down_proj.weight /= 400


DAMAGES = [dead_layer, rank_deficient, outlier_channel, large_features]


def line(model, blocks):
    """Perplexity of the prior and of what is solved again, and the facts about each target."""
    targets = find_targets(model)
    calibration = calibrate(model, targets, blocks, gradients=True)
    bank = build_bank(model, targets, calibration, metric="two_sided")
    space = RankSpace(targets=targets)
    ranks = space.as_dict(Allocator(space, bank.spectra).prior(KEPT))
    text = Evaluation(model, blocks)
    below = [t.name for t in targets if ranks[t.name] < t.full_rank]
    with PrefixModel(model, bank, targets) as prefix:
        prefix.set_ranks(ranks)
        prior = text.score(model).perplexity
        found = resolve(
            prefix,
            {n: bank.pair(n, ranks[n]) for n in below},
            targets,
            blocks,
            leader=calibration.leader,
            gradients=calibration.gradients,
            strength=0.5,
        )
        prefix.set_pairs(found.pairs)
        return prior, text.score(model).perplexity, bank.facts | found.facts


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_damaged_layer_scores_as_in_double_precision(tiny, blocks, damage, dtype):
    model = tiny("llama", dtype)
    with torch.no_grad():
        damage(model)
    reference = copy.deepcopy(model).double()
    prior, solved, facts = line(model, blocks)
    expected_prior, expected_solved, _ = line(reference, blocks)
    assert prior == pytest.approx(expected_prior, rel=0.01)
    assert solved == pytest.approx(expected_solved, rel=0.01)
    assert all(fact["damping"] > 0 and fact["input_clamped"] >= 0 for fact in facts.values())


def test_features_that_overflow_themselves_are_named(tiny, blocks):
    model = tiny("llama", torch.float16)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight *= 1e5
    with pytest.raises(NumericalError, match="down_proj"):
        line(model, blocks)
