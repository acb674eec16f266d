from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranksearch.worker.curves import rising


@given(st.lists(st.integers(0, 30), max_size=12), st.lists(st.integers(0, 30), max_size=12))
def test_the_nearest_values_that_never_fall(values: list[int], others: list[int]) -> None:
    found = rising(values)
    assert found == sorted(found)
    assert sum(found) == pytest.approx(sum(values))
    # the projection on a convex set: no other member lies on the far side of it
    other = np.resize(np.sort(others or [0]), len(values))
    other = np.sort(other)
    assert np.dot(np.subtract(values, found), other - found) <= 1e-9
    assert rising(found) == pytest.approx(found)
