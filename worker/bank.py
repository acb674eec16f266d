"""The factor bank: every target factored once, components sorted, so that a rank is a prefix slice.

Per target, in the metric of its covariances [IOSVD2026]_:

    M = G^(1/2) W C^(1/2) = U S V'
    left_r = W C^(1/2) V_r / S_r          right_r = U_r' G^(1/2) W          (no inverse of C or G anywhere)

up to a scale per component that gives the two vectors equal norms, so that any storage dtype is safe. `left_r
right_r` is the best rank-r matrix in the norm |G^(1/2) (.) C^(1/2)|_F and its squared error is the sum of the dropped
S^2: twice the predicted increase of the loss, in nats per token, comparable over all targets (metric `two_sided`).
`worker/metrics.py` says what C and G are in each metric, and which one orders components otherwise.

.. [IOSVD2026] IO-SVD, https://arxiv.org/abs/2605.15626
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ranksearch.search.errors import InvalidInput
from ranksearch.search.targets import Metric, Target
from ranksearch.worker.calibrate import Calibration
from ranksearch.worker.centred_bias import CentredBias
from ranksearch.worker.factors import Factors, attribute, factor
from ranksearch.worker.linalg import DAMPING
from ranksearch.worker.roots import COVARIANCE, Roots
from ranksearch.worker.tensor_file import TensorFile

#: Metric -> the parts of a calibration that it needs.
_PARTS: dict[Metric, tuple[str, ...]] = {
    "feature": ("inputs",),
    "two_sided": ("inputs", "gradients"),
    "centred": ("inputs", "means"),
    "activation": ("absolute",),
    "fisher": ("fisher",),
    "attribution": ("weight_gradients",),
}


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
        means: Target -> `n`, fp32, mean of its inputs, where its factors need `CentredBias`; empty otherwise.
    """

    spectra: Mapping[str, np.ndarray[Any, np.dtype[np.float64]]]
    left: Mapping[str, Tensor]
    right: Mapping[str, Tensor]
    facts: Mapping[str, Mapping[str, Any]]
    metric: str
    means: Mapping[str, Tensor] = field(default_factory=dict)

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

    def bias(self, name: str, rank: int, dense: nn.Linear) -> Tensor:
        """The bias that the factors of one target need, if the bank has means.

        Args:
            name: A target.
            rank: As in `pair`.
            dense: Its layer.

        Returns:
            `m`, in the layer's dtype.
        """
        return CentredBias(dense, self.means[name])(*self.pair(name, rank))

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(t.nbytes for part in (self.left, self.right) for t in part.values())

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device | Mapping[str, torch.device] = "cpu") -> FactorBank:
        """Reads what `build_bank` wrote.

        Args:
            path: The file.
            device: Where the factors go, or those of each target; on the CPU they stay in the file, shared between
                processes.
        """
        with safe_open(str(path), framework="pt") as file:
            header = json.loads(file.metadata()["bank"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the file is no mapping
        for key, tensor in tensors.items():
            part, name = key.split("/", 1)
            if part != "spectra":
                tensors[key] = tensor.to(device[name] if isinstance(device, Mapping) else device)
        return cls._of(tensors, header["metric"], header["facts"])

    @classmethod
    def _of(cls, tensors: Mapping[str, Tensor], metric: str, facts: Mapping[str, Mapping[str, Any]]) -> FactorBank:
        parts: dict[str, dict[str, Any]] = {"left": {}, "right": {}, "spectra": {}, "means": {}}
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
        calibration: What the metric needs (`NEEDS`), or parts of it as they come, in any order, each of all targets of
            some blocks; may be None for metric `weight`. Of covariances that are centred the means go into the bank.
        metric: Which one; see `worker/metrics.py`.
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
    centred = metric == "centred" or (metric in COVARIANCE and bool(getattr(calibration, "means", None)))
    weights = {target.name: model.get_parameter(f"{target.name}.weight").detach() for target in targets}
    stored = {target.name: target.full_rank if full else target.break_even for target in targets}
    tensors: dict[str, Tensor] = {}
    facts: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        keep = tensors.__setitem__
        if file is not None:
            dtypes = {name: dtype or weight.dtype for name, weight in weights.items()}
            shapes = _shapes(targets, stored, dtypes, means=centred)
            written = stack.enter_context(TensorFile(file, shapes, room=sum(2048 + 4 * len(name) for name in stored)))
            keep = written.write
        roots_of = partial(Roots, damping=damping, shrinkage=shrinkage)
        factored = (_factored(targets, weights, stored, part, metric, roots_of, device) for part in parts)
        for name, factors, fact, mean in chain.from_iterable(factored):
            keep(f"spectra/{name}", factors.sigma.cpu())
            keep(f"left/{name}", factors.left[: stored[name]].to(dtype or weights[name].dtype).contiguous())
            keep(f"right/{name}", factors.right[: stored[name]].to(dtype or weights[name].dtype).contiguous())
            if mean is not None:
                keep(f"means/{name}", mean.to(factors.left.device))
            facts[name] = {**factors.facts, **fact}
            progress(len(facts) / len(targets))
        facts = {name: facts[name] for name in stored}
        if file is not None:
            written.describe({"bank": json.dumps({"metric": metric, "facts": facts})})
    return FactorBank.load(file) if file is not None else FactorBank._of(tensors, metric, facts)


def _shapes(
    targets: Sequence[Target], stored: Mapping[str, int], dtypes: Mapping[str, torch.dtype], *, means: bool
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for target in targets:
        name, rank = target.name, stored[target.name]
        shapes[f"left/{name}"] = (rank, target.out_features), dtypes[name]
        shapes[f"right/{name}"] = (rank, target.in_features), dtypes[name]
        shapes[f"spectra/{name}"] = (target.full_rank,), torch.float64
        if means:
            shapes[f"means/{name}"] = (target.in_features,), torch.float32
    return shapes


def _factored(
    targets: Sequence[Target],
    weights: Mapping[str, Tensor],
    stored: Mapping[str, int],
    calibration: Calibration | None,
    metric: Metric,
    roots_of: Callable[..., Roots],
    device: str | torch.device | None,
) -> Iterator[tuple[str, Factors, dict[str, Any], Tensor | None]]:
    """Name, factors, further facts and mean input of each target of a calibration, one target after the other."""
    missing = [part for part in _PARTS.get(metric, ()) if not getattr(calibration, part, None)]
    if missing:
        raise InvalidInput(f"Metric {metric} needs a calibration with {' and '.join(missing)}.", metric=metric)
    targets = [target for target in targets if calibration is None or target.name in calibration.leader]
    roots = None if calibration is None else roots_of(calibration, targets)
    for target in targets:
        name, weight = target.name, weights[target.name]
        W = weight.to(device or weight.device, torch.float64)
        C = G = None  # before others are made
        C = roots.input(target, metric, W.device) if roots else None
        if metric == "attribution" and roots:
            factors = attribute(W, roots.calibration.weight_gradients[name].to(W.device), name=name)
        else:
            G = roots.output(target, metric, W.device) if roots else None
            factors = factor(W, C, G, components=stored[name], name=name)
        del W
        share = roots.share(target, metric) if roots else 1.0
        seen = roots.facts(target, metric) if roots else {}
        facts = {"damping": C.damping if C else 0.0, **seen}
        centred = calibration is not None and metric in COVARIANCE and bool(calibration.means)
        mean = roots.pooled.mean(target) if roots and centred else None
        yield name, replace(factors, sigma=factors.sigma * share**0.5), facts, mean
