from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ranksearch.worker.paired import difference, t_quantile


@given(st.integers(1, 3000))
def test_the_quantile_is_students(degrees: int) -> None:
    assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-10)


@pytest.mark.parametrize("sequences", [2, 3, 64])
def test_the_interval_is_that_of_the_paired_t_test(sequences: int) -> None:
    rng = np.random.default_rng(sequences)
    hardness = rng.normal(3.0, 1.0, sequences)
    ours, theirs = hardness + rng.normal(0.3, 0.1, sequences), hardness + rng.normal(0.0, 0.1, sequences)
    mean, interval = difference(ours.tolist(), theirs.tolist())
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert interval == pytest.approx([expected.low, expected.high], rel=1e-9)
    assert mean == pytest.approx(math.log(math.exp(ours.mean()) / math.exp(theirs.mean())))


def test_one_sequence_has_no_interval() -> None:
    assert difference([3.5], [3.25]) == (0.25, None)
