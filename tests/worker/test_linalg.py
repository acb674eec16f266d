from __future__ import annotations

import pytest
import torch

from ranksearch.search.errors import NumericalError
from ranksearch.worker.linalg import decompose, square_root

DTYPES = [torch.float32, torch.float64]


def spd(size: int, rank: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    X = torch.randn(size, rank, generator=torch.Generator().manual_seed(size), dtype=dtype)
    return scale * X @ X.mT


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e12])
def test_root_squared_is_the_matrix(dtype, scale):
    A = spd(20, 40, dtype, scale)
    root = square_root(A, damping=0.0)
    assert root.matrix.dtype == torch.float64
    assert torch.allclose(
        root.matrix @ root.matrix, A.double(), rtol=0, atol=40 * torch.finfo(dtype).eps * float(A.max())
    )
    assert root.clamped == 0
    assert root.solver == "eigh"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_singular_matrix_is_clamped_and_said_so(dtype):
    A = spd(20, 5, dtype)
    root = square_root(A, damping=1e-2)
    smallest = torch.linalg.eigvalsh(root.matrix @ root.matrix)[0]
    assert root.clamped == 15
    assert smallest == pytest.approx(1e-2 * float(A.diagonal().mean()), rel=1e-6)
    assert 1 < root.effective_rank <= 5.001


def test_shrinkage_moves_the_eigenvalues_towards_their_mean():
    A = spd(8, 20, torch.float64)
    root = square_root(A, damping=0.0, shrinkage=0.3)
    expected = 0.7 * A + 0.3 * A.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    assert torch.allclose(root.matrix @ root.matrix, expected)


def test_dividing_by_a_covariance_takes_its_damping_along():
    A = spd(8, 3, torch.float64)
    root = square_root(A, damping=1e-2)
    B = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(root.divide(B) @ root.matrix @ root.matrix, B)
    assert not square_root(torch.zeros(8, 8)).divide(B).any()


def test_the_effective_rank_of_the_identity_is_its_size():
    assert square_root(torch.eye(7)).effective_rank == pytest.approx(7)


def test_a_zero_matrix_has_a_zero_root():
    root = square_root(torch.zeros(4, 4))
    assert not root.matrix.any()
    assert root.facts["mean_eigenvalue"] == 0


def test_only_the_symmetric_part_counts():
    A = spd(6, 9, torch.float64)
    skew = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(square_root(A + skew - skew.mT).matrix, square_root(A).matrix)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(bad):
    A = torch.eye(3)
    A[1, 1] = bad
    for operation in (square_root, decompose):
        with pytest.raises(NumericalError, match=r"blocks\.3") as caught:
            operation(A, name="blocks.3")
        assert caught.value.data["target"] == "blocks.3"


@pytest.mark.parametrize("shape", [(6, 11), (11, 6), (8, 8)])
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_every_solver_in_the_chain_reconstructs_the_matrix(monkeypatch, shape, failing):
    generator = torch.Generator().manual_seed(0)
    m, n = shape
    # singular, so that a Gram matrix does not do
    M = torch.randn(m, 5, dtype=torch.float64, generator=generator) @ torch.randn(
        5, n, dtype=torch.float64, generator=generator
    )
    svd, left = torch.linalg.svd, failing

    def stubborn(*args, **kwargs):
        nonlocal left
        left -= 1
        if left >= 0:
            raise torch.linalg.LinAlgError("did not converge")
        return svd(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", stubborn)
    found = decompose(M)
    assert found.solver == ["svd", "svd of the transpose", "gram, not all digits"][failing]
    assert torch.allclose(found.U * found.S @ found.Vh, M, atol=1e-9)
    assert (found.S.diff() <= 0).all()


@pytest.mark.parametrize("shape", [(20, 31), (31, 20), (20, 20)])
@pytest.mark.parametrize("smallest", [1e-3, 1e-6])
def test_the_smaller_gram_matrix_gives_what_the_svd_gives(shape, smallest):
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(size, 20, dtype=torch.float64, generator=generator))[0] for size in shape)
    M = U * torch.logspace(0, float(torch.tensor(smallest).log10()), 20, dtype=torch.float64) @ V.mT
    found = decompose(M)
    assert found.solver == "gram"
    exact = torch.linalg.svdvals(M)
    assert torch.allclose(found.S, exact, rtol=1e-9, atol=0)
    assert torch.allclose(found.U * found.S @ found.Vh, M, rtol=0, atol=1e-14)
    for rank in (5, 10):
        error = (found.U[:, :rank] * found.S[:rank] @ found.Vh[:rank] - M).square().sum()
        assert float(error) == pytest.approx(float(exact[rank:].square().sum()), rel=1e-8)


def test_a_gram_matrix_does_only_where_it_shows_all_components_that_are_needed():
    M = torch.diag(torch.tensor([1.0, 1e-3, 1e-9], dtype=torch.float64))
    assert decompose(M).solver == "svd"
    assert decompose(M, components=2).solver == "gram"
    assert torch.allclose(decompose(M, components=2).S, M.diagonal(), rtol=1e-12, atol=1e-16)


def test_the_root_survives_an_eigensolver_that_gives_up(monkeypatch):
    A = spd(8, 3, torch.float64)
    expected = square_root(A)

    def stubborn(*args, **kwargs):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", stubborn)
    found = square_root(A)
    assert found.solver == "svd"
    assert torch.allclose(found.matrix, expected.matrix, atol=1e-9)


def test_a_silent_failure_of_every_driver_is_an_error(monkeypatch):
    def broken(A, *args, **kwargs):
        return A * float("nan"), A[0] * float("nan"), A * float("nan")

    monkeypatch.setattr(torch.linalg, "svd", broken)
    monkeypatch.setattr(torch.linalg, "eigh", lambda A: broken(A)[1:])
    with pytest.raises(NumericalError) as caught:
        decompose(torch.eye(3), name="x")
    assert len(caught.value.data["tried"]) == 4
