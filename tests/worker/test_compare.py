from __future__ import annotations

import math

import pytest
import torch

from ranksearch.worker.compare import same_but_for_rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_units_of_the_last_place_are_rounding_and_more_are_not(dtype):
    values, eps = torch.tensor([1.0, -100.0], dtype=torch.float64), torch.finfo(dtype).eps
    theirs = values.to(dtype)
    assert same_but_for_rounding(values + 100 * 4 * eps, theirs)
    assert not same_but_for_rounding(values + 100 * 20 * eps, theirs)
    assert not same_but_for_rounding(theirs[:1], theirs)


def test_values_that_are_not_finite_do_not_hide_others():
    theirs = torch.tensor([math.nan, math.inf, 1.0])
    assert same_but_for_rounding(theirs.clone(), theirs)
    assert not same_but_for_rounding(torch.tensor([math.nan, math.inf, 2.0]), theirs)
