"""The factor bank: every target factored once, components sorted, so that a rank is a prefix slice.

Per target, in the metric of its covariances [IOSVD2026]_:

    M = G^(1/2) W C^(1/2) = U S V'
    left_r = W C^(1/2) V_r / S_r          right_r = U_r' G^(1/2) W          (no inverse of C or G anywhere)

up to a scale per component that gives the two vectors equal norms, so that any storage dtype is safe. `left_r
right_r` is the best rank-r matrix in the norm |G^(1/2) (.) C^(1/2)|_F and its squared error is the sum of the dropped
S^2: twice the predicted increase of the loss, in nats per token, comparable over all targets (metric `two_sided`).

.. [IOSVD2026] IO-SVD, https://arxiv.org/abs/2605.15626
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ranksearch.search.errors import InvalidInput
from ranksearch.search.targets import Target
from ranksearch.worker.calibrate import Calibration
from ranksearch.worker.linalg import DAMPING, Root, decompose, square_root
from ranksearch.worker.pooled import Pooled
from ranksearch.worker.tensor_file import TensorFile

Metric = Literal["weight", "feature", "two_sided"]


@dataclass(frozen=True, kw_only=True)
class FactorBank:
    """All targets, factored.

    Attributes:
        spectra: Target -> all `min(m, n)` singular values in the metric, fp64, descending.
        left: Target -> `k x m`, transposed so that the first r components are one contiguous slice.
        right: Target -> `k x n`.
        facts: Target -> what was done: damping, clamped eigenvalues, effective ranks, tokens, solver, dropped
            components.
        metric: The metric it was built in.
    """

    spectra: Mapping[str, np.ndarray[Any, np.dtype[np.float64]]]
    left: Mapping[str, Tensor]
    right: Mapping[str, Tensor]
    facts: Mapping[str, Mapping[str, Any]]
    metric: str

    def pair(self, name: str, rank: int) -> tuple[Tensor, Tensor]:
        """The factors of one target, as views.

        Args:
            name: A target.
            rank: Components to keep, 1 to the number stored.

        Returns:
            `left` `m x r` and `right` `r x n`.

        Raises:
            InvalidInput: The rank is not in the bank.
        """
        stored = self.right[name].shape[0]
        if not 1 <= rank <= stored:
            raise InvalidInput(
                f"Rank {rank} of {name} is not in the bank, which holds 1 to {stored}.", target=name, rank=rank
            )
        return self.left[name][:rank].mT, self.right[name][:rank]

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(t.nbytes for part in (self.left, self.right) for t in part.values())

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> FactorBank:
        """Reads what `build_bank` wrote.

        Args:
            path: The file.
            device: Where the factors go; on the CPU they stay in the file, shared between processes.
        """
        with safe_open(str(path), framework="pt") as file:
            header = json.loads(file.metadata()["bank"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the file is no mapping
        factors = {key: t if key.startswith("spectra/") else t.to(device) for key, t in tensors.items()}
        return cls._of(factors, header["metric"], header["facts"])

    @classmethod
    def _of(cls, tensors: Mapping[str, Tensor], metric: str, facts: Mapping[str, Mapping[str, Any]]) -> FactorBank:
        parts: dict[str, dict[str, Any]] = {"left": {}, "right": {}, "spectra": {}}
        for key, tensor in tensors.items():
            part, name = key.split("/", 1)
            parts[part][name] = tensor.numpy().copy() if part == "spectra" else tensor
        return cls(metric=metric, facts=facts, **parts)


@torch.no_grad()
def build_bank(
    model: nn.Module,
    targets: Sequence[Target],
    calibration: Calibration | Iterable[Calibration] | None,
    *,
    metric: Metric,
    dtype: torch.dtype | None = None,
    damping: float = DAMPING,
    shrinkage: float = 0.0,
    full: bool = False,
    device: str | torch.device | None = None,
    file: str | Path | None = None,
    progress: Callable[[float], None] = lambda fraction: None,
) -> FactorBank:
    """Factors every target.

    Args:
        model: The dense model.
        targets: What to factor.
        calibration: Covariances, or parts of them as they come, in any order, each of all targets of some blocks; None
            will do for metric `weight`.
        metric: `weight` (C = G = I), `feature` (G = I) or `two_sided`.
        dtype: Storage dtype of the factors; that of each weight when None. More digits would be lost at once: a trial
            runs in the model's dtype.
        damping: Relative eigenvalue clamp of the roots.
        shrinkage: Of the covariances, as in `square_root`.
        full: Store all `min(m, n)` components; otherwise up to the break-even rank, past which dense is smaller.
        device: Where to decompose and leave the factors; that of each weight when None.
        file: Where the factors are written as they come, to be mapped from there; kept on the device when None.
        progress: Told the fraction done.

    Raises:
        InvalidInput: The metric needs covariances that the calibration does not have.
        NumericalError: A covariance or weight is not finite, or no decomposition converged.
        OSError: The disk is full.
    """
    parts = [calibration] if calibration is None or isinstance(calibration, Calibration) else calibration
    weights = {target.name: model.get_parameter(f"{target.name}.weight").detach() for target in targets}
    stored = {target.name: target.full_rank if full else target.break_even for target in targets}
    tensors: dict[str, Tensor] = {}
    facts: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        keep = tensors.__setitem__
        if file is not None:
            shapes = _shapes(targets, stored, {name: dtype or weight.dtype for name, weight in weights.items()})
            written = stack.enter_context(TensorFile(file, shapes, room=sum(2048 + 4 * len(name) for name in stored)))
            keep = written.write
        root_of = partial(square_root, damping=damping, shrinkage=shrinkage)
        factored = (_factored(targets, weights, stored, part, metric, root_of, device) for part in parts)
        for index, (name, factors, fact) in enumerate(chain.from_iterable(factored)):
            keep(f"spectra/{name}", factors.sigma.cpu())
            keep(f"left/{name}", factors.left[: stored[name]].to(dtype or weights[name].dtype).contiguous())
            keep(f"right/{name}", factors.right[: stored[name]].to(dtype or weights[name].dtype).contiguous())
            facts[name] = {**factors.facts, **fact}
            progress((index + 1) / len(targets))
        facts = {name: facts[name] for name in stored}
        if file is not None:
            written.describe({"bank": json.dumps({"metric": metric, "facts": facts})})
    return FactorBank.load(file) if file is not None else FactorBank._of(tensors, metric, facts)


def _shapes(
    targets: Sequence[Target], stored: Mapping[str, int], dtypes: Mapping[str, torch.dtype]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for target in targets:
        name, rank = target.name, stored[target.name]
        shapes[f"left/{name}"] = (rank, target.out_features), dtypes[name]
        shapes[f"right/{name}"] = (rank, target.in_features), dtypes[name]
        shapes[f"spectra/{name}"] = (target.full_rank,), torch.float64
    return shapes


def _factored(
    targets: Sequence[Target],
    weights: Mapping[str, Tensor],
    stored: Mapping[str, int],
    calibration: Calibration | None,
    metric: Metric,
    root_of: Callable[..., Root],
    device: str | torch.device | None,
) -> Iterator[tuple[str, Factors, dict[str, Any]]]:
    """Name, factors and further facts of each target of a calibration; only one target's are in memory at a time."""
    if metric != "weight" and (calibration is None or (metric == "two_sided" and not calibration.gradients)):
        raise InvalidInput(f"Metric {metric} needs a calibration{' with gradients' if metric == 'two_sided' else ''}.")
    targets = [target for target in targets if calibration is None or target.name in calibration.leader]
    pooled = Pooled(calibration, targets) if calibration else None
    root: tuple[str, Root] | None = None
    for target in targets:
        name, weight = target.name, weights[target.name]
        W = weight.to(device or weight.device, torch.float64)
        C = G = None
        if metric != "weight" and calibration is not None and pooled is not None:
            lead = calibration.leader[name]
            if root is None or root[0] != lead:
                root = None  # before another one is made
                root = (lead, root_of(pooled.input(target).to(W.device), name=name))
            C = root[1]
        if metric == "two_sided" and pooled is not None:
            G = root_of(pooled.gradient(target).to(W.device), name=name)
        factors = factor(W, C, G, components=stored[name], name=name)
        del W, G
        # a target that sees a share of the tokens (an expert) weighs that much; G is per token of the text already
        share = pooled.share(target) if pooled and metric == "feature" else 1.0
        seen = pooled.facts(target, gradients=metric == "two_sided") if pooled else {}
        yield name, replace(factors, sigma=factors.sigma * share**0.5), {"damping": C.damping if C else 0.0, **seen}


@dataclass(frozen=True, kw_only=True)
class Factors:
    """One target, factored at full rank, in fp64.

    Attributes:
        sigma: `k` singular values in the metric, descending.
        left: `k x m`, transposed.
        right: `k x n`.
        facts: What was done.
    """

    sigma: Tensor
    left: Tensor
    right: Tensor
    facts: dict[str, Any]


def factor(
    W: Tensor, C: Root | None = None, G: Root | None = None, *, components: int | None = None, name: str = ""
) -> Factors:
    """Factors one matrix in the metric of its roots.

    Components whose singular value vanishes beside the largest are set to zero: nothing is divided by them.

    Args:
        W: `m x n`, fp64.
        C: Root of the input covariance; None for the identity.
        G: Root of the output gradient covariance; None for the identity.
        components: How many are needed with all digits; all when None.
        name: Target to name in an error.
    """
    facts: dict[str, Any] = {}
    for side, root in (("input", C), ("output", G)):
        if root is not None:
            facts |= {f"{side}_{key}": value for key, value in root.facts.items() if key != "damping"}
    unseen = any(root is not None and root.mean_eigenvalue == 0 for root in (C, G))
    if unseen:
        # nothing is known about where this matrix matters: keep its plain factors, at no predicted loss
        C = G = None
        facts["zero_covariance"] = True
    WC = W if C is None else W @ C.matrix
    svd = decompose(WC if G is None else G.matrix @ WC, components=components, name=name)
    left = svd.Vh @ WC.mT
    right = svd.U.mT @ (W if G is None else G.matrix @ W)
    floor = svd.S[0] * max(W.shape) * torch.finfo(W.dtype).eps
    norms = left.norm(dim=1) * right.norm(dim=1)
    alive = svd.S.gt(floor) & norms.gt(0)
    # left_j right_j / sigma_j, with both vectors of the same norm
    size = torch.where(alive, norms / torch.where(alive, svd.S, 1.0), 0.0).sqrt()
    left = left * (size / left.norm(dim=1).where(alive, left.new_ones(()))).unsqueeze(1)
    right = right * (size / right.norm(dim=1).where(alive, right.new_ones(()))).unsqueeze(1)
    facts |= {"solver": svd.solver, "dropped": int((~alive).sum())}
    return Factors(sigma=torch.zeros_like(svd.S) if unseen else svd.S, left=left, right=right, facts=facts)
