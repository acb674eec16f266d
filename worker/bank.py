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

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ranksearch.search.errors import InvalidInput
from ranksearch.search.targets import Target
from ranksearch.worker.calibrate import Calibration
from ranksearch.worker.linalg import DAMPING, Root, decompose, square_root
from ranksearch.worker.pooled import Pooled

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

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file; facts are JSON in its header."""
        tensors = {f"left/{name}": tensor for name, tensor in self.left.items()}
        tensors |= {f"right/{name}": tensor for name, tensor in self.right.items()}
        tensors |= {f"spectra/{name}": torch.from_numpy(sigma) for name, sigma in self.spectra.items()}
        facts = {"metric": self.metric, "facts": {name: dict(f) for name, f in self.facts.items()}}
        save_file(
            {k: t.contiguous().cpu() for k, t in tensors.items()}, str(path), metadata={"bank": json.dumps(facts)}
        )

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> FactorBank:
        """Reads what `save` wrote.

        Args:
            path: The file.
            device: Where the factors go; on the CPU they stay in the file, shared between processes.
        """
        parts: dict[str, dict[str, Any]] = {"left": {}, "right": {}, "spectra": {}}
        with safe_open(str(path), framework="pt") as file:
            header = json.loads(file.metadata()["bank"])
            for key in file.keys():  # noqa: SIM118 - the file is no mapping
                part, name = key.split("/", 1)
                tensor = file.get_tensor(key)
                if part == "spectra":
                    parts[part][name] = tensor.numpy().copy()
                else:
                    parts[part][name] = tensor.to(device)
        return cls(metric=header["metric"], facts=header["facts"], **parts)


@torch.no_grad()
def build_bank(
    model: nn.Module,
    targets: Sequence[Target],
    calibration: Calibration | None,
    *,
    metric: Metric,
    dtype: torch.dtype | None = None,
    damping: float = DAMPING,
    full: bool = False,
    device: str | torch.device | None = None,
    progress: Callable[[float], None] = lambda fraction: None,
) -> FactorBank:
    """Factors every target.

    Args:
        model: The dense model.
        targets: What to factor.
        calibration: Covariances; may be None for metric `weight`.
        metric: `weight` (C = G = I), `feature` (G = I) or `two_sided`.
        dtype: Storage dtype of the factors; that of each weight when None.
        damping: Relative eigenvalue clamp of the roots.
        full: Store all `min(m, n)` components; otherwise up to the break-even rank, past which dense is smaller.
        device: Where to decompose and leave the factors; that of each weight when None.
        progress: Told the fraction done.

    Raises:
        InvalidInput: The metric needs covariances that the calibration does not have.
        NumericalError: A covariance or weight is not finite, or no decomposition converged.
    """
    if metric != "weight" and (calibration is None or (metric == "two_sided" and not calibration.gradients)):
        raise InvalidInput(f"Metric {metric} needs a calibration{' with gradients' if metric == 'two_sided' else ''}.")
    spectra, left, right, facts = {}, {}, {}, {}
    pooled = Pooled(calibration, targets) if calibration else None
    root: tuple[str, Root] | None = None
    for index, target in enumerate(targets):
        name = target.name
        weight = model.get_parameter(f"{name}.weight").detach()
        W = weight.to(device or weight.device, torch.float64)
        C = G = None
        if metric != "weight" and calibration is not None and pooled is not None:
            lead = calibration.leader[name]
            if root is None or root[0] != lead:
                root = (lead, square_root(pooled.input(target).to(W.device), damping=damping, name=name))
            C = root[1]
        if metric == "two_sided" and pooled is not None:
            G = square_root(pooled.gradient(target).to(W.device), damping=damping, name=name)
        factors = factor(W, C, G, name=name)
        # a target that sees a share of the tokens (an expert) weighs that much; G is per token of the text already
        share = pooled.share(target) if pooled and metric == "feature" else 1.0
        stored = target.full_rank if full else target.break_even
        spectra[name] = (factors.sigma * share**0.5).cpu().numpy()
        left[name] = factors.left[:stored].to(dtype or weight.dtype).contiguous()
        right[name] = factors.right[:stored].to(dtype or weight.dtype).contiguous()
        seen = pooled.facts(target, gradients=metric == "two_sided") if pooled else {}
        facts[name] = {"damping": damping if C else 0.0, **factors.facts, **seen}
        progress((index + 1) / len(targets))
    return FactorBank(spectra=spectra, left=left, right=right, facts=facts, metric=metric)


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


def factor(W: Tensor, C: Root | None = None, G: Root | None = None, *, name: str = "") -> Factors:
    """Factors one matrix in the metric of its roots.

    Components whose singular value vanishes beside the largest are set to zero: nothing is divided by them.

    Args:
        W: `m x n`, fp64.
        C: Root of the input covariance; None for the identity.
        G: Root of the output gradient covariance; None for the identity.
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
    GW = W if G is None else G.matrix @ W
    svd = decompose(WC if G is None else G.matrix @ WC, name=name)
    left = (WC @ svd.Vh.mT).mT
    right = svd.U.mT @ GW
    floor = svd.S[0] * max(W.shape) * torch.finfo(W.dtype).eps
    norms = left.norm(dim=1) * right.norm(dim=1)
    alive = svd.S.gt(floor) & norms.gt(0)
    # left_j right_j / sigma_j, with both vectors of the same norm
    size = torch.where(alive, norms / torch.where(alive, svd.S, 1.0), 0.0).sqrt()
    left = left * (size / left.norm(dim=1).where(alive, left.new_ones(()))).unsqueeze(1)
    right = right * (size / right.norm(dim=1).where(alive, right.new_ones(()))).unsqueeze(1)
    facts |= {"solver": svd.solver, "dropped": int((~alive).sum())}
    return Factors(sigma=torch.zeros_like(svd.S) if unseen else svd.S, left=left, right=right, facts=facts)
