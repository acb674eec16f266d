"""The stages of a job, in order. Each may run again after a crash: what was made before is found by its fingerprint.

A stage takes the facts of the earlier ones and returns its own: small JSON that the engine keeps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from ranksearch.search.plan import check_searches
from ranksearch.search.prices import read_prices
from ranksearch.search.space import RankSpace
from ranksearch.search.targets import Target
from ranksearch.worker.fingerprints import bank_fingerprint, calibration_fingerprint, prices_fingerprint
from ranksearch.worker.metrics import NEEDS
from ranksearch.worker.running_job import RunningJob

Facts = Mapping[str, Any]


def prepare(run: RunningJob) -> dict[str, Any]:
    """Load the model, check it and every budget, and turn the texts into token blocks."""
    output = run.fresh_folder("prepare") / "blocks.safetensors"
    facts: dict[str, Any] = run.ask("prepare", output=str(output))
    return {**facts, "blocks": run.worker.artifacts.put_file(output, job_id=run.id).sha256}


def calibrate(run: RunningJob, prepared: Facts) -> dict[str, Any]:
    """Collect what the metric needs, unless an earlier job collected the same."""
    metric = run.spec.method.metric
    if metric == "weight":
        return {"fingerprint": None, "calibration": None}
    fingerprint = calibration_fingerprint(prepared, **asdict(NEEDS[metric]))
    bank = None  # where `factor` will find it begun
    if run.worker.artifacts.find("bank", _bank_fingerprint(run, prepared, fingerprint), job_id=run.id) is None:
        bank = str(run.fresh_folder("ahead") / "bank.safetensors")
    path, hit = _made_once(run, "calibration", fingerprint, "calibrate", bank=bank)
    return {"fingerprint": fingerprint, "calibration": path.name, "cache_hit": hit}


def factor(run: RunningJob, prepared: Facts, calibrated: Facts) -> dict[str, Any]:
    """Factor every target, unless an earlier job did so in the same metric."""
    fingerprint = _bank_fingerprint(run, prepared, calibrated["fingerprint"])
    path, hit = _made_once(run, "bank", fingerprint, "factor")
    facts = {"fingerprint": fingerprint, "bank": path.name, "cache_hit": hit}
    return facts if run.spec.budget.of == "parameters" else {**facts, "prices": _prices(run, prepared)}


def _prices(run: RunningJob, prepared: Facts) -> str:
    """The file of what each rank takes to decode with, measured unless an earlier job did so on such a device."""
    device = run.surviving(lambda: run.worker.device.start(run.check))
    method = run.spec.method
    fingerprint = prices_fingerprint(
        prepared,
        form=method.form,
        multiple=method.rank_multiple,
        centred=method.metric == "centred",
        device=device["name"],
        torch=device["torch"],
    )
    path, _ = _made_once(run, "prices", fingerprint, "prices")
    check_searches(run.spec, _space(run, prepared, str(path)))
    return path.name


def _space(run: RunningJob, prepared: Facts, prices: str | None) -> RankSpace:
    targets = (Target(**target) for target in prepared["targets"])
    return RankSpace.of(run.spec.method, targets, read_prices(prices))


def _bank_fingerprint(run: RunningJob, prepared: Facts, calibration: str | None) -> str:
    method = run.spec.method
    return bank_fingerprint(prepared, calibration=calibration, metric=method.metric, full=method.all_components)


def _made_once(run: RunningJob, kind: str, fingerprint: str, operation: str, **arguments: Any) -> tuple[Path, bool]:
    """Find a stored file by its fingerprint, or have the device make it and store it."""
    artifacts = run.worker.artifacts
    if (path := artifacts.find(kind, fingerprint, job_id=run.id)) is not None:
        run.tell(f"{kind}.cache_hit", fingerprint=fingerprint)
        return path, True
    output = run.fresh_folder(operation) / kind
    run.ask(operation, output=str(output), **arguments)
    return artifacts.save(kind, fingerprint, output, job_id=run.id), False


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What search and finish stand on: the targets' rank space and what the bank says about each target.

    Attributes:
        space: The rank vectors the spec allows.
        bank: File of the factor bank.
    """

    space: RankSpace
    bank: Path

    @classmethod
    def of(cls, run: RunningJob, prepared: Facts) -> Ground:
        """Rebuild it from the facts of the earlier stages."""
        return cls(space=_space(run, prepared, run.known.get("prices")), bank=Path(run.known["bank"]))

    @cached_property
    def spectra(self) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
        """Target -> its singular values in the metric, descending; read without torch."""
        with safe_open(self.bank, framework="np") as file:
            return {
                t.name: np.asarray(file.get_tensor(f"spectra/{t.name}"), dtype=np.float64) for t in self.space.targets
            }

    @cached_property
    def target_facts(self) -> dict[str, dict[str, Any]]:
        """Target -> what was done to factor it."""
        with safe_open(self.bank, framework="np") as file:
            facts: dict[str, dict[str, Any]] = json.loads(file.metadata()["bank"])["facts"]
        return facts

    @property
    def similarity(self) -> dict[str, float]:
        """Target -> mean cosine between the hidden states before and after its sublayer, where the bank tells it."""
        return {name: facts["similarity"] for name, facts in self.target_facts.items() if "similarity" in facts}


def known_of(path: Callable[[str], Path], *facts: Facts) -> dict[str, str]:
    """What a device process that takes over must stick to: the model's commit and fingerprint, and files made so far.

    Args:
        path: Where a blob lies.
        *facts: Of the stages so far.
    """
    found = {name: value for part in facts for name, value in part.items() if value}
    known: dict[str, str] = {name: found[name] for name in ("revision", "model_fingerprint") if name in found}
    known |= {name: str(path(found[name])) for name in ("blocks", "calibration", "bank", "prices") if name in found}
    return known
