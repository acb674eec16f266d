from __future__ import annotations

import pytest
import torch

from ranksearch.search.targets import Target
from ranksearch.worker.bank import build_bank
from ranksearch.worker.calibrate import Calibration
from ranksearch.worker.pooled import Pooled, own_share, shrink

N, M, TOTAL = 4, 3, 100


def expert(name: str, kind: str = "experts.up", depth: int = 0) -> Target:
    return Target(name=name, out_features=M, in_features=N, kind=kind, depth=depth)


def spd(size: int, seed: int) -> torch.Tensor:
    rows = torch.randn(9, size, generator=torch.Generator().manual_seed(seed))
    return rows.T @ rows


TARGETS = [expert("many"), expert("few"), expert("none"), expert("elsewhere", depth=1)]
COUNTS = {"many": 50, "few": 1, "none": 0, "elsewhere": 1}


@pytest.fixture
def calibration() -> Calibration:
    inputs = {name: spd(N, seed) for seed, name in enumerate(COUNTS)}
    gradients = {name: spd(M, 10 + seed) * count / TOTAL for seed, (name, count) in enumerate(COUNTS.items())}
    inputs["none"].zero_()
    return Calibration(
        inputs=inputs,
        leader={name: name for name in COUNTS},
        gradients=gradients,
        tokens=COUNTS,
        total_tokens=TOTAL,
    )


def test_the_own_moment_weighs_as_much_as_its_tokens_cover_its_width() -> None:
    own, pooled = spd(N, 0), spd(N, 1)
    assert [own_share(tokens, N) for tokens in (0, 1, 4, 9)] == [0, 0.25, 1, 1]
    assert shrink(own, pooled, N) is own
    assert torch.equal(shrink(own, pooled, 0), pooled)
    assert torch.allclose(shrink(own, pooled, 1), 0.25 * own + 0.75 * pooled)


def test_experts_borrow_from_their_peers_of_the_same_layer_only(calibration: Calibration) -> None:
    pooled = Pooled(calibration, TARGETS)
    mean = (50 * calibration.input("many").double() + calibration.input("few").double()) / 51
    assert pooled.input(TARGETS[0]) is calibration.input("many")
    assert torch.allclose(pooled.input(TARGETS[1]), 0.25 * calibration.input("few") + 0.75 * mean)
    assert torch.allclose(pooled.input(TARGETS[2]), mean)
    # it has no peers: few tokens are all there is to know
    assert pooled.input(TARGETS[3]) is calibration.input("elsewhere")


def test_gradients_are_pooled_per_use_and_keep_how_often_an_expert_is_used(calibration: Calibration) -> None:
    pooled, G = Pooled(calibration, TARGETS), calibration.gradients
    per_use = (G["many"] + G["few"]).double() * TOTAL / 51
    assert pooled.gradient(TARGETS[0]) is G["many"]
    few = (G["few"] * TOTAL / 3 + 2 / 3 * per_use) / TOTAL
    assert torch.allclose(pooled.gradient(TARGETS[1]), few)
    assert torch.allclose(pooled.gradient(TARGETS[2]), per_use / TOTAL)  # as if used once
    assert [pooled.share(target) for target in TARGETS] == [0.5, 0.01, 0.01, 0.01]


def test_without_any_token_nothing_is_made_up(calibration: Calibration) -> None:
    alone = Pooled(calibration, [TARGETS[2]])
    assert not alone.input(TARGETS[2]).any()
    both = Pooled(calibration, [TARGETS[2], expert("none")])
    assert not both.input(TARGETS[2]).any()
    assert not both.gradient(TARGETS[2]).any()


@pytest.mark.parametrize("metric", ["feature", "two_sided"])
def test_the_bank_says_how_much_was_borrowed(calibration: Calibration, metric) -> None:
    model = torch.nn.Module()
    for name in COUNTS:
        model.add_module(name, torch.nn.Linear(N, M))
    facts = build_bank(model, TARGETS, calibration, metric=metric).facts
    assert "input_own_share" not in facts["many"]
    assert facts["few"]["input_own_share"] == 0.25
    assert facts["none"]["input_own_share"] == 0
    assert "zero_covariance" not in facts["none"]
    assert "input_own_share" not in facts["elsewhere"]
    assert facts["few"].get("output_own_share") == (pytest.approx(1 / 3) if metric == "two_sided" else None)
