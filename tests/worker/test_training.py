"""Training that can be taken up again."""

from __future__ import annotations

import pytest
import torch

from ranksearch.search.errors import NumericalError
from ranksearch.worker import training
from ranksearch.worker.training import Training, batch, schedule


def test_batches_go_through_the_text_once_an_epoch_in_an_order_of_the_seed():
    blocks = torch.arange(10).unsqueeze(1)
    taken = torch.cat([batch(blocks, step, 4, seed=3) for step in range(5)]).flatten().tolist()
    assert sorted(taken[:10]) == sorted(taken[10:]) == list(range(10))
    assert taken[:10] != taken[10:]
    assert taken != torch.cat([batch(blocks, step, 4, seed=4) for step in range(5)]).flatten().tolist()


def test_the_schedule_rises_and_falls():
    factors = [schedule(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.2)
    assert max(factors) == factors[4] > 0.99
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert 0 < factors[-1] < 0.01
    assert schedule(0, 1) == 1


def new_training(path=None, **identity):
    leaves = {"a": torch.ones(3), "b": torch.zeros(2, 2)}
    return Training(leaves, {"a": 0.1, "b": 0.01}, identity=identity, path=path, save_seconds=0)


def give_gradients(training, seed):
    for leaf in training.leaves.values():
        leaf.grad = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(seed))


def test_a_step_that_is_not_finite_is_left_out_and_several_in_a_row_end_the_training():
    one = new_training()
    for loss, grad in ((float("nan"), 1.0), (1.0, float("inf"))):
        give_gradients(one, 0)
        one.leaves["a"].grad[0] = grad
        assert not one.update(loss, 1.0)
    assert torch.equal(one.leaves["a"].detach(), torch.ones(3))
    give_gradients(one, 0)
    assert one.update(1.0, 1.0)
    assert not torch.equal(one.leaves["a"].detach(), torch.ones(3))
    for _ in range(training.MOST_FAILURES - 1):
        assert not one.update(float("nan"), 1.0)
    with pytest.raises(NumericalError, match="learning rate") as error:
        one.update(float("nan"), 1.0)
    assert error.value.data["step"] == one.step == 3 + training.MOST_FAILURES


def test_a_training_goes_on_from_its_file_bitwise_and_only_from_its_own(tmp_path):
    path = tmp_path / "state.safetensors"
    whole, broken = new_training(seed=1), new_training(path, seed=1)
    for each in (whole, broken):
        for step in range(3):
            give_gradients(each, step)
            each.update(1.0, 0.5)
    broken.facts, broken.tensors = {"price": 0.1}, {"best": torch.arange(3)}
    broken.save()
    resumed = new_training(path, seed=1)
    assert resumed.step == 3
    assert resumed.facts == {"price": 0.1}
    assert resumed.tensors["best"].tolist() == [0, 1, 2]
    for each in (whole, resumed):
        for step in range(3, 6):
            give_gradients(each, step)
            each.update(1.0, 0.5)
    for name, leaf in whole.leaves.items():
        assert torch.equal(leaf, resumed.leaves[name])
    assert new_training(path, seed=2).step == 0
    path.write_bytes(path.read_bytes()[:100])
    assert new_training(path, seed=1).step == 0
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
