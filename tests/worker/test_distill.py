from __future__ import annotations

import math

import pytest
import torch

from ranksearch.search.errors import InvalidInput, NumericalError
from ranksearch.search.steps import outcome_of
from ranksearch.worker import distill as module
from ranksearch.worker import student
from ranksearch.worker.bank import build_bank
from ranksearch.worker.distill import distill, divide, step_size
from ranksearch.worker.evaluate import Evaluation
from ranksearch.worker.targets import find_targets


@pytest.fixture
def parts(tiny):
    model = tiny()
    targets = find_targets(model)
    bank = build_bank(model, targets, None, metric="weight")
    # one target stays dense
    return model, {target.name: bank.pair(target.name, 6) for target in targets[:-1]}


def run(parts, blocks, **settings):
    model, pairs = parts
    options = {"blocks": blocks[:32], "evaluation": blocks[32:], "tokens": 40 * 16, **settings}
    return distill(model, pairs, **options)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(module, "STEPS", 20)


@pytest.mark.parametrize(
    ("dtype", "compute"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
def test_training_brings_the_factors_nearer_to_the_dense_model(tiny, blocks, monkeypatch, dtype, compute):
    monkeypatch.setattr(student, "compute_dtype", lambda model: compute)  # as on the CPU, and as elsewhere
    model = tiny(dtype=dtype)
    targets = find_targets(model)
    bank = build_bank(model, targets, None, metric="weight")
    pairs = {target.name: bank.pair(target.name, 6) for target in targets}
    told: list[float] = []
    found = run((model, pairs), blocks, tokens=100 * 16, progress=told.append)
    assert found.history[0]["tokens"] == 0
    assert found.history[-1]["kl"] < 0.9 * found.history[0]["kl"]
    for name, (left, right) in found.pairs.items():
        for new, old in ((left, pairs[name][0]), (right, pairs[name][1])):
            assert new.shape == old.shape
            assert new.dtype == dtype
            assert not new.requires_grad
            assert not torch.equal(new, old)
            assert torch.isfinite(new).all()
    assert told == sorted(told)
    assert told[-1] == 1


def test_the_same_seed_gives_the_same_factors_and_another_one_others(parts, blocks):
    first, again, other = (run(parts, blocks, seed=seed) for seed in (0, 0, 1))
    name = next(iter(first.pairs))
    assert torch.equal(first.pairs[name][0], again.pairs[name][0])
    assert not torch.equal(first.pairs[name][0], other.pairs[name][0])


class Killed(Exception):
    pass


def test_a_run_that_was_killed_goes_on_to_bitwise_the_same_factors(parts, blocks, tmp_path):
    whole = run(parts, blocks)
    told: list[float] = []

    def die(fraction):
        told.append(fraction)
        if len(told) in (7, 9):
            raise Killed

    state = {"state": tmp_path / "state.safetensors", "save_seconds": 0.0, "progress": die}
    for _ in range(2):
        with pytest.raises(Killed):
            run(parts, blocks, **state)
    resumed = run(parts, blocks, **state)
    assert len(told) == 20  # no step was made twice
    assert resumed.history == whole.history
    for name, (left, right) in whole.pairs.items():
        assert torch.equal(resumed.pairs[name][0], left)
        assert torch.equal(resumed.pairs[name][1], right)
    done = run(parts, blocks, **state)  # asked once more, it has nothing left to do
    assert done.history == whole.history
    assert len(told) == 20


def test_the_best_factors_are_kept_and_a_training_that_only_spoils_them_ends_early(parts, blocks):
    model, pairs = parts
    found = run(parts, blocks, learning_rate=3.0)
    assert len(found.history) == 1 + module.PATIENCE
    assert min(entry["kl"] for entry in found.history) == found.history[0]["kl"]
    for name, (left, right) in pairs.items():
        assert torch.equal(found.pairs[name][0], left)
        assert torch.equal(found.pairs[name][1], right)
    assert type(model.get_submodule(name)) is torch.nn.Linear


def test_both_objectives_choose_by_the_sum_of_their_excesses(parts, blocks):
    model, _ = parts
    found = run(parts, blocks, objective="both", tokens=10 * 16)
    dense = Evaluation(model, blocks[32:]).dense.perplexity
    for entry in found.history:
        assert entry["both"] == pytest.approx(math.log(entry["perplexity"] / dense) + entry["kl"], rel=1e-9)
    best = min(found.history, key=lambda entry: entry["both"])
    assert outcome_of({"step": "distill", "tokens": 160, "history": found.history}, "both").after == best["both"]


def test_steps_that_are_not_finite_are_left_out(parts, blocks, monkeypatch):
    learn, calls = student.Student.learn, []

    def broken(self, ids, leaves, **options):
        calls.append(learn(self, ids, leaves, **options))
        return math.nan if broken.always or len(calls) == 3 else calls[-1]

    broken.always = False
    monkeypatch.setattr(student.Student, "learn", broken)
    assert math.isfinite(run(parts, blocks).history[-1]["kl"])
    broken.always = True
    with pytest.raises(NumericalError, match="not finite"):
        run(parts, blocks)


def test_factors_that_are_not_finite_are_refused_with_a_way_out(parts, blocks):
    model, pairs = parts
    name = next(iter(pairs))
    left, right = pairs[name]
    with pytest.raises(NumericalError, match="finite"):
        run((model, pairs | {name: (left * math.nan, right)}), blocks)
    assert type(model.get_submodule(name)) is torch.nn.Linear


def test_without_factors_there_is_nothing_to_train(parts, blocks):
    with pytest.raises(InvalidInput, match="no factors"):
        run((parts[0], {}), blocks)


def test_tokens_become_steps_of_whole_sequences(blocks):
    assert divide(20 * 16, blocks) == (1, 20)
    assert divide(200 * 16, blocks) == (10, 20)
    assert divide(1, blocks) == (1, 1)


def test_a_step_is_the_same_share_of_every_factor(tiny):
    factor = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    expected = 0.04 * float(torch.linalg.matrix_norm(factor, 2)) / 350**0.5
    assert step_size(factor, 0.04) == pytest.approx(expected, rel=1e-5)
    assert step_size(3 * factor.mT, 0.04) == pytest.approx(3 * expected, rel=1e-5)
