from __future__ import annotations

import pytest
import torch

from ranksearch.search.targets import Target
from ranksearch.worker.calibration_file import bytes_of
from ranksearch.worker.covariance import Moments, PooledCovariance
from ranksearch.worker.metrics import Needs


def features(tokens: int, size: int = 5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(tokens, size, generator=torch.Generator().manual_seed(tokens)).to(dtype) + 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_loop_over_batches_equals_one_batch(dtype):
    X = features(60, dtype=dtype)
    whole, parts = Moments(5), Moments(5)
    whole.add(X)
    for part in X.view(4, 3, 5, 5):
        parts.add(part)
    assert whole.tokens == parts.tokens == 60
    assert whole.second.dtype == torch.float32
    assert torch.allclose(first := whole.take_mean(), parts.take_mean(), rtol=1e-5)
    expected = torch.einsum("ti,tj->ij", X.double(), X.double()) / 60
    assert torch.allclose(first.double(), expected, rtol=1e-5)


def test_the_mean_takes_no_memory_of_its_own():
    moments = Moments(5)
    moments.add(features(8))
    place = moments.second.data_ptr()
    assert moments.take_mean(16).data_ptr() == place


def test_values_that_are_not_finite_are_noticed():
    for bad in (float("nan"), float("inf")):
        moments = Moments(5)
        X = features(8)
        moments.add(X)
        assert moments.finite
        X[3, 2] = bad
        moments.add(X)
        assert not moments.finite


def test_no_tokens_give_zero():
    assert not Moments(3).take_mean().any()


@pytest.mark.parametrize("size", [511, 512, 700, 1024])
def test_a_large_sum_of_which_half_is_computed_is_whole_in_the_end(size):
    X = torch.randn(96, size, generator=torch.Generator().manual_seed(0))
    moments = Moments(size)
    moments.add(X[:40])
    moments.add(X[40:])
    found = moments.take_mean()
    assert torch.allclose(found.double(), X.double().mT @ X.double() / 96, atol=1e-6)
    assert torch.allclose(found, found.mT, atol=1e-6)


def _pools(X: torch.Tensor, sizes: list[int]) -> PooledCovariance:
    found = PooledCovariance(X.shape[1])
    for pool in X.split(sizes):
        for batch in pool.split(7):
            found.add(batch)
        found.close_pool()
    return found


def test_a_pooled_covariance_is_the_mean_of_those_within_the_pools() -> None:
    X = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)) + 3
    found = _pools(X, [20, 20, 20])
    expected = torch.stack([pool.mT.cov() for pool in X.double().split(20)]).mean(0)
    torch.testing.assert_close(found.take_mean().double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.mean.double(), X.double().mean(0), rtol=1e-5, atol=1e-5)


def test_a_drift_between_pools_is_left_out_and_a_large_mean_costs_no_digits() -> None:
    X = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    drifting = X + torch.tensor([0.0, 1e4, 2e4]).repeat_interleave(20).unsqueeze(1)
    torch.testing.assert_close(
        _pools(drifting, [20, 20, 20]).take_mean(), _pools(X, [20, 20, 20]).take_mean(), rtol=0, atol=2e-2
    )


def test_pools_of_fewer_than_two_vectors_wait_for_more() -> None:
    X = torch.randn(21, 4, generator=torch.Generator().manual_seed(0))
    found = _pools(X, [1, 20])
    torch.testing.assert_close(found.take_mean(), X.mT.cov(), rtol=1e-4, atol=1e-5)
    assert found.tokens == 21
    assert not _pools(X[:1], [1]).take_mean().any()
    assert not _pools(X[:0], [0]).take_mean().any()


def test_what_a_pooled_covariance_holds_is_counted():
    found = PooledCovariance(64)
    found.add(features(20, 64))
    matrices = found._average.nbytes + found._pool.second.nbytes
    shared = [Target(name=name, out_features=8, in_features=64, kind=name, depth=0) for name in "qkv"]
    assert bytes_of(shared, Needs(pool=4)) == matrices + found.mean.nbytes
    assert bytes_of(shared, Needs()) == found._average.nbytes
