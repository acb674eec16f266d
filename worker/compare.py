"""Whether two ways to compute the same thing give the same."""

from __future__ import annotations

import torch
from torch import Tensor


def same_but_for_rounding(ours: Tensor, theirs: Tensor) -> bool:
    """Whether no value is off by more than 8 units of the last place of the largest one.

    Values that are not finite are for others to report: here those of the same place count as equal.
    """
    if ours.shape != theirs.shape:
        return False
    a, b = (each.double().nan_to_num(posinf=0.0, neginf=0.0) for each in (ours, theirs))
    return bool((a - b).abs().max() <= 8 * torch.finfo(theirs.dtype).eps * b.abs().max().clamp(min=1e-30))
