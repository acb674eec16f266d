from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

import pytest

from ranksearch.worker.fingerprints import bank_fingerprint, calibration_fingerprint
from ranksearch.worker.metrics import NEEDS

PREPARED = {"model_fingerprint": "m", "dtype": "float32"}
INPUTS: dict[str, Any] = {"calibration": "c", "metric": "two_sided", "full": False}


def test_a_bank_of_an_older_algorithm_is_not_found() -> None:
    parts = {"version": 1, "model": "m", "dtype": "float32", **INPUTS}
    first = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    assert bank_fingerprint(PREPARED, **INPUTS) != first
    assert bank_fingerprint(PREPARED, **INPUTS) == bank_fingerprint(dict(PREPARED), **INPUTS)


@pytest.mark.parametrize("change", [{"calibration": None}, {"metric": "feature"}, {"full": True}])
def test_a_bank_of_other_inputs_is_another(change: dict[str, Any]) -> None:
    assert bank_fingerprint(PREPARED, **INPUTS | change) != bank_fingerprint(PREPARED, **INPUTS)


def test_a_bank_of_another_dtype_is_another() -> None:
    assert bank_fingerprint(PREPARED | {"dtype": "bfloat16"}, **INPUTS) != bank_fingerprint(PREPARED, **INPUTS)


def test_a_calibration_of_another_metric_is_another() -> None:
    text = {"tokens": "t", "sequence_length": 8}
    prepared = PREPARED | {"text": {"calibration": text}}
    found = {metric: calibration_fingerprint(prepared, **asdict(needs)) for metric, needs in NEEDS.items()}
    assert len(set(found.values())) == len(NEEDS)
    assert calibration_fingerprint(prepared, gradients=True) == found["two_sided"]
