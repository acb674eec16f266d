from __future__ import annotations

import numpy as np
import pytest
import torch

from ranksearch.search.errors import InvalidInput, NumericalError
from ranksearch.worker.bank import FactorBank, build_bank
from ranksearch.worker.calibrate import calibrate
from ranksearch.worker.evaluate import Evaluation
from ranksearch.worker.factors import factor
from ranksearch.worker.linalg import square_root
from ranksearch.worker.prefix import PrefixModel
from ranksearch.worker.targets import find_targets


def wave(*shape: int, step: float = 0.7) -> torch.Tensor:
    """Fixed values, without a random number generator."""
    return torch.arange(float(np.prod(shape)), dtype=torch.float64).square().mul(step).sin().view(*shape)


def covariance(size: int, step: float) -> torch.Tensor:
    X = wave(3 * size, size, step=step) * torch.linspace(0.1, 3, size, dtype=torch.float64)
    return X.mT @ X / (3 * size)


@pytest.fixture(scope="module")
def calibrated(tiny, blocks):
    model = tiny()
    targets = find_targets(model)
    return model, targets, calibrate(model, targets, blocks, gradients=True)


@pytest.mark.parametrize(("m", "n"), [(9, 14), (14, 9)])
def test_truncation_error_in_the_metric_is_the_tail_of_the_spectrum(m, n):
    W, C, G = wave(m, n), square_root(covariance(n, 1.3), damping=0), square_root(covariance(m, 2.1), damping=0)
    factors = factor(W, C, G)
    assert (factors.sigma.diff() <= 0).all()
    for rank in range(10):
        approximation = factors.left[:rank].mT @ factors.right[:rank]
        error = (G.matrix @ (W - approximation) @ C.matrix).square().sum()
        assert float(error) == pytest.approx(float(factors.sigma[rank:].square().sum()), rel=1e-6, abs=1e-12)


def test_no_matrix_of_the_same_rank_is_closer_in_the_metric():
    W, C, G = wave(9, 14), square_root(covariance(14, 1.3)), square_root(covariance(9, 2.1))
    factors = factor(W, C, G)

    def error(approximation):
        return float((G.matrix @ (W - approximation) @ C.matrix).square().sum())

    ours = error(factors.left[:4].mT @ factors.right[:4])
    for other in (factor(W), factor(W, C), factor(W, None, G)):
        assert ours < error(other.left[:4].mT @ other.right[:4])
    for step in (0.3, 0.9, 1.7):
        nudged = (factors.left[:4].mT + 1e-3 * wave(9, 4, step=step)) @ (
            factors.right[:4] + 1e-3 * wave(4, 14, step=step)
        )
        assert ours < error(nudged)


def test_golden_spectrum():
    factors = factor(wave(6, 8), square_root(covariance(8, 1.3)), square_root(covariance(6, 2.1)))
    assert float(factors.sigma.sum()) == pytest.approx(13.54943722348527, rel=1e-9)
    assert float((factors.left[:2].mT @ factors.right[:2]).square().sum()) == pytest.approx(
        18.857004279286212, rel=1e-9
    )


def test_both_vectors_of_a_component_have_the_same_norm():
    factors = factor(wave(9, 14), square_root(1e-8 * covariance(14, 1.3)), square_root(1e6 * covariance(9, 2.1)))
    assert torch.allclose(factors.left.norm(dim=1), factors.right.norm(dim=1))


def test_rank_deficient_covariances_and_weights_are_facts():
    thin = wave(14, 3)
    W = wave(9, 2) @ wave(2, 14, step=1.1)
    factors = factor(W, square_root(thin @ thin.mT, damping=0), square_root(torch.ones(9, 9), damping=0))
    assert factors.facts["input_clamped"] >= 0
    assert factors.facts["input_effective_rank"] <= 3.001
    assert factors.facts["dropped"] >= 7
    assert factors.left.isfinite().all()
    assert factors.right.isfinite().all()
    # directions that carry features and gradients are reproduced
    x, g = thin[:, 0], torch.ones(9, dtype=torch.float64)
    assert float(g @ factors.left.mT @ factors.right @ x) == pytest.approx(float(g @ W @ x), rel=1e-6)


def test_a_target_that_saw_nothing_keeps_plain_factors_at_no_loss():
    W = wave(5, 7)
    factors = factor(W, square_root(torch.zeros(7, 7)), square_root(covariance(5, 2.1)))
    assert not factors.sigma.any()
    assert factors.facts["zero_covariance"]
    assert torch.allclose(factors.left.mT @ factors.right, W)


@pytest.mark.parametrize("metric", ["weight", "feature", "two_sided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_metric_reproduces_the_weights_at_full_rank(calibrated, metric, dtype):
    model, targets, calibration = calibrated
    bank = build_bank(model, targets, calibration, metric=metric, dtype=dtype, full=True)
    for target in targets:
        left, right = bank.pair(target.name, target.full_rank)
        W = model.get_submodule(target.name).weight.double()
        assert left.dtype == dtype
        assert left.shape == (target.out_features, target.full_rank)
        assert torch.allclose(left.double() @ right.double(), W, atol=3e-2 if dtype == torch.bfloat16 else 1e-4)
        assert bank.spectra[target.name].shape == (target.full_rank,)
        assert bank.left[target.name].is_contiguous()


def test_the_metrics_match_their_definitions(calibrated):
    model, targets, calibration = calibrated
    target = targets[-1]
    W = model.get_submodule(target.name).weight.detach().double()
    C, G = calibration.input(target.name).double(), calibration.gradients[target.name].double()
    expected = {
        "weight": torch.linalg.eigvalsh(W @ W.mT),
        "feature": torch.linalg.eigvalsh(W @ C @ W.mT),
        "two_sided": torch.linalg.eigvals(G @ W @ C @ W.mT).real.sort().values,
    }
    for metric, values in expected.items():
        bank = build_bank(model, targets, calibration, metric=metric, damping=0)
        np.testing.assert_allclose(bank.spectra[target.name][:8] ** 2, values.flip(0)[:8].numpy(), rtol=1e-5)


def test_components_past_break_even_are_left_out_unless_asked_for(calibrated):
    model, targets, _ = calibrated
    bank = build_bank(model, targets, None, metric="weight")
    query = targets[0]
    assert bank.right[query.name].shape == (query.break_even, query.in_features)
    assert bank.nbytes < sum(4 * t.parameters for t in targets)
    for rank in (0, query.break_even + 1):
        with pytest.raises(InvalidInput, match="1 to 11"):
            bank.pair(query.name, rank)


def test_a_bank_in_a_file_is_the_one_in_memory(calibrated, tmp_path):
    model, targets, calibration = calibrated
    bank = build_bank(model, targets, calibration, metric="two_sided", dtype=torch.bfloat16)
    path = tmp_path / "bank.safetensors"
    build_bank(model, targets, calibration, metric="two_sided", dtype=torch.bfloat16, file=path)
    again = FactorBank.load(path)
    assert again.metric == "two_sided"
    assert again.facts == bank.facts
    for target in targets:
        np.testing.assert_array_equal(again.spectra[target.name], bank.spectra[target.name])
        assert torch.equal(again.left[target.name], bank.left[target.name])
        assert torch.equal(again.right[target.name], bank.right[target.name])
    facts = bank.facts[targets[0].name]
    assert facts["damping"] > 0
    assert facts["tokens"] == 640
    assert 0 < facts["output_effective_rank"] <= 24


def test_wider_factors_than_the_models_do_not_change_a_score(tiny, blocks):
    model = tiny(dtype=torch.bfloat16)
    targets = find_targets(model)
    calibration = calibrate(model, targets, blocks, gradients=True)
    evaluation = Evaluation(model, blocks[:8])
    scores = []
    for dtype in (None, torch.float64):
        bank = build_bank(model, targets, calibration, metric="two_sided", dtype=dtype)
        with PrefixModel(model, bank, targets) as prefix:
            prefix.set_ranks({target.name: target.break_even // 2 for target in targets})
            scores.append(evaluation.score(model))
    assert scores[0] == scores[1]


def test_a_metric_without_its_covariances_is_refused(calibrated, blocks):
    model, targets, _ = calibrated
    with pytest.raises(InvalidInput, match="needs a calibration"):
        build_bank(model, targets, None, metric="feature")
    inputs_only = calibrate(model, targets, blocks[:2], gradients=False)
    with pytest.raises(InvalidInput, match="with gradients"):
        build_bank(model, targets, inputs_only, metric="two_sided")


def test_a_broken_weight_is_named(tiny):
    model = tiny()
    targets = find_targets(model)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.up_proj"):
        build_bank(model, targets, None, metric="weight")
