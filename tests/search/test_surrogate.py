from __future__ import annotations

import numpy as np
import pytest
import torch

from ranksearch.search.coordinates import Coordinates
from ranksearch.search.surrogate import Observations, SensitivityModel, structure

from .cases import llama_space
from .synthetic import Problem, problem


def observe(made: Problem, count: int, seed: int = 0, spread: float = 1.0) -> Observations:
    """Log excess at the prior and at random tilts of it."""
    rng = np.random.default_rng(seed)
    tilts = [0.8 * rng.standard_normal(len(made.hidden)) for _ in range(count - 1)]
    vectors = [made.allocator.prior(0.4), *(made.allocator.waterfill(0.4, z) for z in tilts)]
    excess = [np.log(made.score(ranks) / 10.0) for ranks in vectors]
    return Observations(
        tails=torch.as_tensor(np.stack([made.allocator.tail_loss(ranks) for ranks in vectors])),
        values=torch.tensor(excess).log(),
        spread=torch.full((count,), spread, dtype=torch.float64),
        group=torch.zeros(count, dtype=torch.long),
    )


@pytest.mark.parametrize("blocks", [1, 2, 6, 32])
def test_the_prior_correlation_is_one_on_the_diagonal_and_higher_within_a_kind(blocks: int) -> None:
    phi, rho = structure(Coordinates(llama_space(blocks=blocks).targets))
    correlation = phi @ phi.T + rho * torch.eye(len(phi))
    torch.testing.assert_close(correlation.diagonal(), torch.ones(len(phi), dtype=torch.float64), atol=0.02, rtol=0)
    assert float(torch.linalg.eigvalsh(correlation).min()) > 0
    if blocks > 1:
        assert correlation[0, 7] > correlation[0, 8]


def test_the_sensitivities_are_found() -> None:
    made = problem(0)
    coordinates = Coordinates(made.space.targets)
    found = [np.corrcoef(SensitivityModel(coordinates, observe(made, n)).z, made.hidden)[0, 1] for n in (10, 30, 80)]
    print("correlation with the hidden sensitivities after 10, 30, 80 observations:", np.round(found, 2))
    assert found[0] < found[1] < found[2]
    assert found[2] > 0.9


def test_the_learned_vector_beats_the_prior() -> None:
    made = problem(1)
    model = SensitivityModel(Coordinates(made.space.targets), observe(made, 40))
    learned = made.allocator.waterfill(0.4, model.z.numpy())
    assert made.gain(made.score(learned), 0.4) > 0.5


def test_the_order_of_targets_does_not_matter() -> None:
    made = problem(2)
    seen, coordinates = observe(made, 20), Coordinates(made.space.targets)
    order = np.random.default_rng(0).permutation(len(made.hidden))
    shuffled = Observations(tails=seen.tails[:, order], values=seen.values, spread=seen.spread, group=seen.group)
    other = SensitivityModel(Coordinates([made.space.targets[i] for i in order]), shuffled)
    torch.testing.assert_close(SensitivityModel(coordinates, seen).z[order], other.z, atol=1e-4, rtol=1e-4)


def test_the_linearized_process_conditioned_on_the_data_is_the_mode() -> None:
    """K_* (K + s^2)^-1 (y - m) + m = f(mode), and the draws have the mean and covariance of that posterior."""
    made = problem(3)
    seen = observe(made, 25)
    model = SensitivityModel(Coordinates(made.space.targets), seen)
    mean, phi = model.features(seen.tails)
    kernel = phi @ phi.T + model.noise**2 * torch.eye(25)
    conditioned = mean + phi @ phi.T @ torch.linalg.solve(kernel, seen.values - mean)
    torch.testing.assert_close(conditioned, model.predict(seen.tails), atol=2e-3, rtol=0)

    draws = model.draw(4000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(draws.mean(dim=0), model.z, atol=0.1, rtol=0)
    prior, rho = structure(Coordinates(made.space.targets))
    width = prior.shape[1]
    root = torch.cat([prior, rho**0.5 * torch.eye(len(prior), dtype=torch.float64)], dim=1) * model.sigma
    cross = root @ phi[:, : width + len(prior)].T
    exact = root @ root.T - cross @ torch.linalg.solve(kernel, cross.T)
    torch.testing.assert_close(draws.T.cov(), exact, atol=0.1 * model.sigma**2, rtol=0)


def test_wide_observations_move_the_mode_less() -> None:
    made = problem(4)
    coordinates = Coordinates(made.space.targets)
    sharp, wide = (SensitivityModel(coordinates, observe(made, 12, spread=s)).z.norm() for s in (1.0, 300.0))
    assert wide < 0.5 * sharp


def test_two_observations_are_enough_to_build_on() -> None:
    made = problem(5)
    model = SensitivityModel(Coordinates(made.space.targets), observe(made, 2))
    assert bool(torch.isfinite(model.z).all())
    assert bool(torch.isfinite(model.draw(3, torch.Generator().manual_seed(0))).all())
