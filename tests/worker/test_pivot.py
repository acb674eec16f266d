from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ranksearch.search.errors import NumericalError
from ranksearch.worker.pivot import BOUND, Pivoted, pivot


def factors(m: int, n: int, r: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two random factors whose components fall in size by a factor of a thousand."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(m, r, dtype=torch.float64, generator=generator)
    right = torch.randn(r, n, dtype=torch.float64, generator=generator)
    sizes = torch.logspace(0, -1.5, r, dtype=torch.float64)
    return left * sizes, sizes[:, None] * right


def product(found: Pivoted, dtype: torch.dtype = torch.float64) -> Tensor:
    """The matrix that is meant after rounding to a dtype."""
    pivots, rest = found.pivot.to(dtype).double(), found.rest.to(dtype).double()
    return torch.cat([pivots, rest @ pivots]).index_select(0, found.order)


def error(found: Pivoted, left: Tensor, right: Tensor, dtype: torch.dtype = torch.float64) -> float:
    W = left @ right
    return float((product(found, dtype) - W).norm() / W.norm())


@pytest.mark.parametrize(
    ("m", "n", "r"), [(40, 40, 17), (30, 90, 12), (90, 30, 29), (25, 25, 1), (25, 60, 24), (2, 2, 1), (70, 20, 19)]
)
def test_the_matrix_is_the_same(m: int, n: int, r: int) -> None:
    left, right = factors(m, n, r)
    found = pivot(left, right)
    assert (found.pivot.shape, found.rest.shape) == ((r, n), (m - r, r))
    assert found.order.dtype == torch.int32
    assert found.order.sort().values.tolist() == list(range(m))
    assert error(found, left, right) < 1e-10
    assert found.rest.abs().max() <= BOUND + 1e-9


def test_pivot_rows_are_rows_of_the_matrix() -> None:
    left, right = factors(12, 9, 4)
    found = pivot(left, right)
    rows = found.order.argsort()[:4]
    assert torch.allclose((left @ right)[rows], found.pivot, rtol=0, atol=1e-13)


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_channel_ten_thousand_times_larger_does_no_harm(side: str) -> None:
    left, right = factors(48, 40, 20)
    (right[:, 3] if side == "input" else left[7]).mul_(1e4)
    found = pivot(left, right)
    W = left @ right
    assert torch.allclose(product(found), W, rtol=1e-9, atol=1e-10)
    assert found.rest.abs().max() <= BOUND + 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dead", ["left", "right", "both", "repeated", "all"])
def test_vanishing_components_are_served(dead: str, dtype: torch.dtype) -> None:
    left, right = factors(30, 24, 9)
    if dead in ("left", "both"):
        left[:, 5:] = 0
    if dead in ("right", "both"):
        right[6:] = 0
    if dead == "repeated":
        left[:, 1] = left[:, 0]
    if dead == "all":
        left.zero_()
    found = pivot(left, right, dtype)
    assert (found.pivot.shape, found.rest.shape) == ((9, 24), (21, 9))
    W = left @ right
    assert (product(found, dtype) - W).norm() <= 4 * torch.finfo(dtype).eps * W.norm() + 1e-10
    assert found.rest.abs().max() <= 2


def test_rounding_costs_about_as_much_as_rounding_two_factors() -> None:
    left, right = factors(160, 96, 60)
    W, found = left @ right, pivot(left, right, torch.bfloat16)
    factored = float((left.bfloat16().double() @ right.bfloat16().double() - W).norm() / W.norm())
    pivoted = error(found, left, right, torch.bfloat16)
    print(f"relative error in bfloat16: factored {factored:.2e}, pivoted {pivoted:.2e}")
    assert pivoted < 3 * factored


def test_coefficients_make_up_for_rounded_pivot_rows() -> None:
    left, right = factors(160, 96, 60)
    fitted = error(pivot(left, right, torch.bfloat16), left, right, torch.bfloat16)
    assert fitted < 0.9 * error(pivot(left, right), left, right, torch.bfloat16)


def test_a_factor_that_is_not_finite_names_its_target() -> None:
    left, right = factors(8, 6, 3)
    left[2, 1] = float("inf")
    with pytest.raises(NumericalError, match="up_proj"):
        pivot(left, right, name="up_proj")
