"""Names for what was computed: equal inputs give equal fingerprints, and then a stored result is used again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

#: Raise one when its algorithm gives other results than before: what was stored under the old number is not found then.
CALIBRATION_VERSION = 3
BANK_VERSION = 2
PRICES_VERSION = 1


def content_hash(content: bytes) -> str:
    """sha256 of some bytes."""
    return hashlib.sha256(content).hexdigest()


def calibration_fingerprint(
    prepared: Mapping[str, Any], *, gradients: bool, pool: int | None = None, only: str | None = None
) -> str:
    """Of the model's files, its dtype, and the calibration tokens, whichever dataset they came from.

    Args:
        prepared: Facts of the prepare stage.
        gradients: Whether output gradients are collected, too.
        pool: Sequences per pool, if covariances are centred.
        only: What is collected in place of covariances.
    """
    others = {name: value for name, value in (("pool", pool), ("only", only)) if value is not None}
    text = prepared["text"]["calibration"]
    return _of(
        version=CALIBRATION_VERSION,
        model=prepared["model_fingerprint"],
        dtype=prepared["dtype"],
        tokens=text["tokens"],
        sequence_length=text["sequence_length"],
        gradients=gradients,
        **others,
    )


def bank_fingerprint(prepared: Mapping[str, Any], *, calibration: str | None, metric: str, full: bool) -> str:
    """Of the model, the calibration it was whitened with, the metric, and how many components are stored.

    Args:
        prepared: Facts of the prepare stage.
        calibration: Fingerprint of the calibration; None for metric `weight`.
        metric: Its name.
        full: Whether all components are stored, or those up to the break-even rank.
    """
    return _of(
        version=BANK_VERSION,
        model=prepared["model_fingerprint"],
        dtype=prepared["dtype"],
        calibration=calibration,
        metric=metric,
        full=full,
    )


def prices_fingerprint(
    prepared: Mapping[str, Any], *, form: str, multiple: int, centred: bool, device: str, torch: str
) -> str:
    """Of all that decides how long targets take: their shapes and biases, how they are stored, and what runs them.

    Args:
        prepared: Facts of the prepare stage.
        form: How targets below full rank are stored.
        multiple: Ranks are multiples of it.
        centred: Whether compressed targets have biases of their own.
        device: Product name of the device.
        torch: Version of torch.
    """
    return _of(
        version=PRICES_VERSION,
        targets=prepared["targets"],
        biased=prepared["biased"],
        dtype=prepared["dtype"],
        form=form,
        multiple=multiple,
        centred=centred,
        device=device,
        torch=torch,
    )


def _of(**parts: Any) -> str:
    return content_hash(json.dumps(parts, sort_keys=True).encode())
