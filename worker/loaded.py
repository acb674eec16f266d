"""What of a job is loaded on its devices: the model, the bank, what scores vectors, and a bank in the making.

There is one of each kind at most. It is loaded when it is asked for and not there yet, and goes when another job's is.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from ranksearch.search.errors import InvalidInput
from ranksearch.search.spec import JobSpec
from ranksearch.search.targets import Target
from ranksearch.worker.ahead import Ahead
from ranksearch.worker.bank import FactorBank, build_bank
from ranksearch.worker.blocks import load_blocks
from ranksearch.worker.evaluate import Evaluation
from ranksearch.worker.hardware import free_bytes, memory_bytes, threads_for
from ranksearch.worker.models import load_model, locate, model_fingerprint
from ranksearch.worker.prefix import PrefixModel
from ranksearch.worker.scorer import Scorer
from ranksearch.worker.spread import device_of
from ranksearch.worker.targets import find_targets

Kind = Literal["model", "bank", "scorer", "ahead"]

#: Share of a device that the factors leave free for activations and logits; they stay on the CPU otherwise.
SPARE = 0.15


class Loaded:
    """What is loaded, by kind. A job is the context that every request brings; see `Workbench`."""

    def __init__(self, devices: Sequence[torch.device], threads: int) -> None:
        """Loads nothing yet.

        Args:
            devices: Where models go; the first one holds everything but their blocks and the factors of those.
            threads: That computing may use.
        """
        self._devices = devices
        self._threads = threads
        self._held: dict[Kind, tuple[Any, Any]] = {}

    def model(self, job: Mapping[str, Any]) -> tuple[Any, Any, Path]:
        """The job's model, its tokenizer, and the folder they come from. Another job's goes, and all else with it.

        Raises:
            InvalidInput: It is not the model that the job began with.
        """
        key = (job["id"], job["source"])

        def load() -> tuple[Any, Any, Path]:
            self.clear()
            spec, source, trust = spec_of(job).model, job["source"], job["trust_remote_code"]
            folder = locate(source, revision=job.get("revision") or spec.revision, trust_remote_code=trust)
            if job.get("model_fingerprint") not in (None, model_fingerprint(folder)):
                raise InvalidInput(f"The model {source} has changed since the job began; submit the job again.")
            model, tokenizer = load_model(folder, dtype=spec.dtype, device=self._devices, trust_remote_code=trust)
            widest = max(target.parameters for target in find_targets(model))
            torch.set_num_threads(threads_for(widest, self._threads))
            return model, tokenizer, folder

        return self._once("model", key, load)  # type: ignore[no-any-return]

    def builder(self, job: Mapping[str, Any]) -> Callable[..., FactorBank]:
        """Makes the job's bank of its calibration; see `build_bank`."""
        method = spec_of(job).method
        model, _, _ = self.model(job)
        return partial(
            build_bank,
            model,
            find_targets(model),
            metric=method.metric,
            full=method.all_components,
            device=self._devices[0],
        )

    def bank(self, job: Mapping[str, Any]) -> FactorBank:
        """The job's bank, each target's factors where it computes if there is room."""

        def load() -> FactorBank:
            self.free("ahead")  # the bank was there already
            model, _, _ = self.model(job)
            return FactorBank.load(job["bank"], beside(find_targets(model), model, Path(job["bank"]).stat().st_size))

        return self._once("bank", job["bank"], load)  # type: ignore[no-any-return]

    def take_bank(self, job: Mapping[str, Any]) -> FactorBank:
        """Gives the bank away: nothing here holds it afterwards."""
        self.free("scorer")
        bank = self.bank(job)
        del self._held["bank"]
        return bank

    def scorer(self, job: Mapping[str, Any]) -> Scorer:
        """Scores vectors of the job's bank on its evaluation blocks."""
        model, _, _ = self.model(job)
        bank = self.bank(job)

        def build() -> Scorer:
            evaluation = Evaluation(model, load_blocks(job["blocks"])["evaluation"], scratch=job["cache_dir"])
            return Scorer(PrefixModel(model, bank, find_targets(model)), evaluation)

        return self._once("scorer", (job["bank"], job["blocks"]), build)  # type: ignore[no-any-return]

    def keep_ahead(self, job: Mapping[str, Any], ahead: Ahead) -> None:
        """Keeps the job's bank in the making."""
        self.free("ahead")
        self._held["ahead"] = (job["id"], ahead)

    def ahead(self, job: Mapping[str, Any]) -> Ahead | None:
        """The job's bank in the making, if it is made here."""
        number, ahead = self._held.get("ahead", (None, None))
        return ahead if number == job["id"] else None

    def free(self, *kinds: Kind) -> None:
        """Lets go of what of these kinds is there."""
        for kind in kinds:
            _, held = self._held.pop(kind, (None, None))
            if isinstance(held, Ahead):
                held.drop()
            elif isinstance(held, Scorer):
                held.close()

    def clear(self) -> None:
        """Lets go of everything, and of the memory it took."""
        self.free("ahead")
        self._held.clear()
        gc.collect()
        if self._devices[0].type == "cuda":
            torch.cuda.empty_cache()

    def _once(self, kind: Kind, key: Any, load: Callable[[], Any]) -> Any:
        held = self._held.get(kind)
        if held is None or held[0] != key:
            self.free(kind)
            self._held[kind] = held = (key, load())
        return held[1]


def spec_of(job: Mapping[str, Any]) -> JobSpec:
    """What a job asks for."""
    return JobSpec.model_validate(job["spec"])


def beside(targets: Sequence[Target], model: Any, size: int) -> dict[str, torch.device]:
    """Target -> the device that it computes on, or the CPU where the device has no room for its part of a bank.

    Args:
        targets: All targets.
        model: Their model.
        size: Bytes of the bank.
    """
    places = {target.name: device_of(model, target.name) for target in targets}
    parameters = Counter[torch.device]()
    for target in targets:
        parameters[places[target.name]] += target.parameters
    full = {
        device
        for device, count in parameters.items()
        if size * count / parameters.total() > free_bytes(device) - SPARE * memory_bytes(device)
    }
    return {name: torch.device("cpu") if device in full else device for name, device in places.items()}
