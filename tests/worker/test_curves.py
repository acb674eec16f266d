from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranksearch.worker.curves import jump, rising


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


@pytest.mark.parametrize("multiple", [1, 3, 8])
def test_a_jump_is_closed_in_on(multiple: int) -> None:
    def time(rank: int) -> float:
        return rank + (1000.0 if rank > 100 else 0.0)

    times = {rank: time(rank) for rank in range(multiple, 50 * multiple, 16 * multiple)}
    while (rank := jump(times, multiple)) is not None:
        assert rank not in times
        assert rank % multiple == 0
        times[rank] = time(rank)
        if len(times) == 10:
            below = max((r for r in times if r <= 100), default=0)
            above = min((r for r in times if r > 100), default=10**9)
            assert above - below == multiple or above == 10**9
    assert sorted(times) == list(range(multiple, max(times) + 1, multiple))
