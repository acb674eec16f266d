"""Solving targets again against what the compressed model feeds them."""

from __future__ import annotations

import pytest
import torch

from ranksearch.worker.bank import build_bank
from ranksearch.worker.calibrate import calibrate
from ranksearch.worker.evaluate import Evaluation
from ranksearch.worker.plain import make_plain
from ranksearch.worker.prefix import PrefixModel
from ranksearch.worker.sequential import resolve
from ranksearch.worker.targets import find_targets

RANK = 6


@pytest.fixture
def setting(tiny, blocks):
    """A model, its targets, their calibration and bank, for a family."""

    def build(family="llama", full=False, dtype=torch.float32):
        model = tiny(family, dtype)
        make_plain(model)
        targets = find_targets(model)
        calibration = calibrate(model, targets, blocks, gradients=True)
        return model, targets, calibration, build_bank(model, targets, calibration, metric="two_sided", full=full)

    return build


def told(calibration):
    return {"leader": calibration.leader, "gradients": calibration.gradients}


def _pairs(bank, targets, rank=RANK):
    return {target.name: bank.pair(target.name, min(rank, bank.right[target.name].shape[0])) for target in targets}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "opt", "gpt2"])
def test_a_sweep_brings_the_model_nearer_to_the_dense_one(setting, blocks, family):
    model, targets, calibration, bank = setting(family)
    evaluation, pairs = Evaluation(model, blocks), _pairs(bank, targets)
    with PrefixModel(model, bank, targets) as prefix:
        prefix.set_pairs(pairs)
        before = evaluation.score(model).kl
        found = resolve(prefix, pairs, targets, blocks, **told(calibration), strength=0.5)
        prefix.set_pairs(found.pairs)
        after = evaluation.score(model).kl
    assert found.facts.keys() == pairs.keys()
    assert after < before


def test_nothing_is_corrected_where_nothing_was_compressed_before(setting, blocks):
    model, targets, calibration, bank = setting()
    pairs = _pairs(bank, targets)
    first = targets[0].name
    with PrefixModel(model, bank, targets) as prefix:
        found = resolve(
            prefix,
            {first: pairs[first]},
            targets,
            blocks,
            **told(calibration),
            strength=1.0,
        )
    (left, right), (bank_left, bank_right) = found.pairs[first], pairs[first]
    torch.testing.assert_close(left @ right, bank_left @ bank_right, rtol=1e-4, atol=1e-5)


def test_the_last_matrix_of_a_block_makes_up_for_all_that_a_linear_map_can(setting, blocks):
    model, targets, calibration, bank = setting(full=True)
    pairs = _pairs(bank, targets)
    down = next(target for target in targets if target.kind == "mlp.down_proj")
    pairs[down.name] = bank.pair(down.name, down.full_rank)  # not truncated
    block, seen, wanted = model.model.layers[0], [], []
    inside = {name: pair for name, pair in pairs.items() if name.startswith("model.layers.0.")}
    with PrefixModel(model, bank, targets) as prefix, torch.no_grad():
        found = resolve(
            prefix,
            inside,
            targets,
            blocks,
            **told(calibration),
            strength=1.0,
            damping=0.0,
        )
        hook = block.register_forward_hook(lambda module, args, output: wanted.append(output))
        model(input_ids=blocks)
        prefix.set_pairs(found.pairs)
        block.mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
        model(input_ids=blocks)
        hook.remove()
    assert found.facts[down.name]["matched"] == "stream"
    error = (wanted[0] - wanted[1]).flatten(0, 1).double()
    z = seen[0].double()
    left_over = torch.linalg.lstsq(z, error).solution
    assert float((z @ left_over).norm() / error.norm()) < 1e-2


def test_what_writes_into_the_stream_is_seen(setting, blocks):
    model, targets, calibration, bank = setting()
    with PrefixModel(model, bank, targets) as prefix:
        found = resolve(
            prefix,
            _pairs(bank, targets),
            targets,
            blocks,
            **told(calibration),
            strength=0.5,
        )
    matched = {target.kind: found.facts[target.name]["matched"] for target in targets}
    assert matched == {
        **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"), "output"),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), "output"),
        **dict.fromkeys(("self_attn.o_proj", "mlp.down_proj"), "stream"),
    }


def test_experts_keep_their_factors_and_the_rest_is_solved(setting, blocks):
    model, targets, calibration, bank = setting("mixtral")
    pairs = _pairs(bank, targets)
    with PrefixModel(model, bank, targets) as prefix:
        found = resolve(prefix, pairs, targets, blocks, **told(calibration), strength=0.5)
    experts = {target.name for target in targets if "experts" in target.name}
    assert experts
    assert found.facts.keys() == pairs.keys() - experts
    assert all(found.pairs[name][0] is pairs[name][0] for name in experts)


def test_dense_targets_stay_dense_and_the_model_is_left_dense(setting, blocks):
    model, targets, calibration, bank = setting(dtype=torch.bfloat16)
    dense = model(input_ids=blocks).logits
    pairs = {name: pair for name, pair in _pairs(bank, targets).items() if "mlp" in name}
    with PrefixModel(model, bank, targets) as prefix:
        found = resolve(prefix, pairs, targets, blocks, **told(calibration), strength=0.5)
        assert torch.equal(model(input_ids=blocks).logits, dense)
    assert found.pairs.keys() == pairs.keys()
    assert all(part.dtype == torch.bfloat16 for pair in found.pairs.values() for part in pair)


def test_two_sweeps_are_the_same(setting, blocks):
    model, targets, calibration, bank = setting()
    with PrefixModel(model, bank, targets) as prefix:
        one, two = (
            resolve(
                prefix,
                _pairs(bank, targets),
                targets,
                blocks,
                **told(calibration),
                strength=0.5,
            ).pairs
            for _ in range(2)
        )
    assert all(torch.equal(a, b) for name in one for a, b in zip(one[name], two[name], strict=True))
