"""What the device process can do: the operations of a job on one torch device, or on several together.

Every request brings the job's context: its spec and the files made so far. The bench loads whatever of it is not loaded
yet, so a fresh process can take over in the middle of a job, and a process that has the model keeps it.
"""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ranksearch.search.errors import InvalidInput, RanksearchError
from ranksearch.search.objective import METRICS
from ranksearch.search.plan import check_searches
from ranksearch.search.prices import as_document, read_prices
from ranksearch.search.space import RankSpace
from ranksearch.search.spec import TRAINING_TOKENS, JobSpec
from ranksearch.search.targets import Target
from ranksearch.worker.ahead import Ahead
from ranksearch.worker.bank import FactorBank, build_bank
from ranksearch.worker.blocks import load_blocks, save_blocks
from ranksearch.worker.calibrate import Calibration, calibrate
from ranksearch.worker.component_gradients import component_gradients, gradient_text
from ranksearch.worker.curves import measure_curves
from ranksearch.worker.evaluate import Evaluation, Scores
from ranksearch.worker.hardware import device_facts, free_bytes, memory_bytes, settle, threads_for
from ranksearch.worker.metrics import NEEDS
from ranksearch.worker.models import load_model, locate, model_fingerprint
from ranksearch.worker.prefix import PrefixModel
from ranksearch.worker.proof import brief, prove
from ranksearch.worker.refine import Refined, Refinement
from ranksearch.worker.spread import device_of
from ranksearch.worker.stream import BlockStream
from ranksearch.worker.targets import check_weights, find_targets
from ranksearch.worker.text import gather

Progress = Callable[[float], None]

#: Share of a device that the factors leave free for activations and logits; they stay on the CPU otherwise.
SPARE = 0.15


class Workbench:
    """One torch device, or several that hold a model together, and what is loaded there.

    Attributes:
        devices: All of them.
        device: The first, where everything but a model's blocks and their factors goes.
    """

    def __init__(self, device: str) -> None:
        """Settle on devices.

        Args:
            device: As in `settle`.
        """
        self.devices = settle(device)
        self.device = self.devices[0]
        self._facts = device_facts(*self.devices)
        self._operations: dict[str, Callable[..., dict[str, Any]]] = {
            "prepare": self.prepare,
            "calibrate": self.calibrate,
            "factor": self.factor,
            "prices": self.prices,
            "dense": self.dense,
            "chunk": self.chunk,
            "gradients": self.gradients,
            "refine": self.refine,
            "finish": self.finish,
            "close": self.close,
        }
        self._loaded: dict[str, tuple[Any, Any]] = {}
        self._trial: tuple[int, Iterator[Scores], list[Scores]] | None = None

    def do(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """Carry out one operation by name."""
        return self._operations[operation](**arguments)

    def facts(self) -> dict[str, Any]:
        """The device; see `device_facts`."""
        return self._facts

    def recover(self) -> None:
        """Let go of everything after an error: what failed may have left half of it."""
        self.close({}, progress=_silent)

    def close(self, job: Mapping[str, Any], *, progress: Progress) -> dict[str, Any]:
        """Unload everything."""
        self._trial = None
        self._unload("ahead")
        self._loaded.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return {}

    # operations

    def prepare(self, job: Mapping[str, Any], output: str, *, progress: Progress) -> dict[str, Any]:
        """Check model, budgets and text; write all token blocks to one file.

        Returns:
            Facts later stages need: targets, fingerprints, sizes and where the text came from.
        """
        spec = _spec(job)
        model, tokenizer, folder = self._model(job)
        progress(0.3)
        _check_lengths(spec, model.config.get_text_config())
        check_weights(model)
        targets = find_targets(model)
        space = RankSpace.of(spec.method, targets)
        check_searches(spec, space)
        progress(0.4)
        material = gather(
            spec.calibration.model_dump(),
            spec.evaluation.model_dump(),
            tokenizer,
            cache_dir=job["cache_dir"],
            vocabulary=model.get_input_embeddings().weight.shape[0],
            training_tokens=TRAINING_TOKENS if spec.method.trains else 0,
        )
        if "sequential" in spec.method.steps:
            BlockStream(model, material.calibration.tokens[:1, :8], rows=1)  # whether the model allows it
        progress(0.8)
        text = save_blocks(material, output)
        return {
            "targets": [asdict(target) for target in targets],
            "biased": [target.name for target in targets if model.get_submodule(target.name).bias is not None],
            "dtype": str(model.dtype).removeprefix("torch."),
            "parameters": sum(p.numel() for p in model.parameters()),
            "model_fingerprint": model_fingerprint(folder),
            # the commit of a hub model: its branch may move on before the job is over
            "revision": folder.name if folder.parent.name == "snapshots" else None,
            "text": text,
        }

    def calibrate(
        self, job: Mapping[str, Any], output: str, bank: str | None = None, *, progress: Progress
    ) -> dict[str, Any]:
        """Collect what the metric needs on the calibration blocks and write it to a file.

        With a place for a bank, targets are factored beside it if it takes several sections; `factor` takes that over.
        """
        spec = _spec(job)
        model, _, _ = self._model(job)
        self._unload("trials")
        self._unload("ahead")
        targets = find_targets(model)
        collect = partial(
            calibrate,
            model,
            targets,
            load_blocks(job["blocks"])["calibration"],
            **asdict(NEEDS[spec.method.metric]),
            file=output,
            scratch=job["cache_dir"],
            progress=progress,
        )
        if bank is None:
            return {"tokens": collect().total_tokens}
        with Ahead(self._build(job), targets, self.device, bank) as ahead:
            found = collect(complete=ahead.add)
        self._loaded["ahead"] = (job["id"], ahead)
        return {"tokens": found.total_tokens}

    def factor(self, job: Mapping[str, Any], output: str, *, progress: Progress) -> dict[str, Any]:
        """Factor all targets and write the bank to a file."""
        self._unload("trials")
        build = self._build(job)
        calibration = Calibration.load(job["calibration"]) if job.get("calibration") else None
        number, ahead = self._loaded.get("ahead", (None, None))
        if number != job["id"] or not ahead.finish(output, progress):
            build(calibration, file=output, progress=progress)
        self._unload("ahead")
        return {"bytes": FactorBank.load(output).nbytes}

    def prices(self, job: Mapping[str, Any], output: str, *, progress: Progress) -> dict[str, Any]:
        """Measure how long each target takes to decode a token at each rank, and write it to a file."""
        spec = _spec(job)
        model, _, _ = self._model(job)
        self._unload("trials")
        self._unload("ahead")
        curves = measure_curves(
            model,
            targets := find_targets(model),
            form=spec.method.form,
            multiple=spec.method.rank_multiple,
            centred=spec.method.metric == "centred",
            device=self.device,
            progress=progress,
        )
        document = as_document([target.name for target in targets], curves)
        facts = {key: self._facts[key] for key in ("name", "torch")}
        Path(output).write_text(json.dumps({**facts, "dtype": str(model.dtype), **document}), "utf-8")
        return {}

    def dense(self, job: Mapping[str, Any], *, progress: Progress) -> dict[str, Any]:
        """Score the dense model on the evaluation blocks."""
        return brief(self._trials(job)[1].dense)

    def chunk(
        self, job: Mapping[str, Any], number: int, ranks: Mapping[str, int], index: int, *, progress: Progress
    ) -> dict[str, Any]:
        """Score the next part of the evaluation blocks at a rank vector; part 0 begins a trial.

        Returns:
            `{"losses": [...]}`, the objective of each sequence in nats per token (of both, the sum), or after the last
            part `{"total": scores}`.

        Raises:
            RanksearchError: This process has not begun the trial.
        """
        prefix, evaluation = self._trials(job)
        if index == 0:
            prefix.set_ranks(ranks)
            self._trial = (number, evaluation.score_chunks(prefix.model), [])
        if self._trial is None or self._trial[0] != number or len(self._trial[2]) != index:
            raise RanksearchError(f"trial {number} was not begun in this process", index=index)
        _, chunks, parts = self._trial
        part = next(chunks, None)
        if part is None:
            self._trial = None
            return {"total": brief(Scores.union(parts))}
        parts.append(part)
        losses = {"perplexity": part.nll, "kl": part.divergence}
        names = METRICS[_spec(job).search.objective]
        return {"losses": [sum(each) for each in zip(*(losses[name] for name in names), strict=True)]}

    def gradients(
        self,
        job: Mapping[str, Any],
        ranks: Mapping[str, int],
        edges: Mapping[str, Sequence[int]],
        *,
        progress: Progress,
    ) -> dict[str, Any]:
        """Gradients of bands of components at a rank vector, on calibration blocks; see `component_gradients`.

        Returns:
            Target -> one number per band.
        """
        prefix, evaluation = self._trials(job)
        text = gradient_text(load_blocks(job["blocks"])["calibration"], evaluation.dense.tokens)
        prefix.set_ranks(ranks)
        return component_gradients(prefix, edges, text, scratch=job["cache_dir"])

    def refine(
        self, job: Mapping[str, Any], ranks: Mapping[str, int], kept: float, output: str, *, progress: Progress
    ) -> dict[str, Any]:
        """Run the steps after the search and write the factors they come to.

        What steps came to, and the state of one that takes long, is kept beside the output until the job is over: the
        next process goes on from there.

        Returns:
            `ranks` of the factors, and what each of the `steps` did.
        """
        spec = _spec(job)
        model, _, _ = self._model(job)
        self._unload("trials")
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        refinement = Refinement(
            model,
            partial(self._take_bank, job),
            RankSpace.of(spec.method, find_targets(model), read_prices(job.get("prices"))),
            load_blocks(job["blocks"]),
            Calibration.load(job["calibration"]) if job.get("calibration") else None,
            spec=spec,
            kept=kept,
            state=Path(output),
        )
        refined = refinement.run(ranks, progress)
        return {"ranks": dict(refined.ranks), "steps": list(refined.steps)}

    def finish(
        self,
        job: Mapping[str, Any],
        vectors: Mapping[str, Mapping[str, int]],
        folder: str,
        refined: str | None = None,
        *,
        progress: Progress,
    ) -> dict[str, Any]:
        """Export the vector `best`, or what was made of it, to a folder and prove it; see `prove`."""
        spec = _spec(job)
        model, tokenizer, folder_of_model = self._model(job)
        self._unload("trials")
        return prove(
            model,
            tokenizer,
            partial(self._take_bank, job),
            load_blocks(job["blocks"]),
            vectors,
            refined=Refined.load(refined) if refined else None,
            spec=spec,
            source=folder_of_model,
            folder=Path(folder),
            devices=self.devices,
            device_name=self._facts["name"],
            progress=progress,
        )

    # what is loaded

    def _model(self, job: Mapping[str, Any]) -> tuple[Any, Any, Path]:
        """The job's model, its tokenizer, and the folder they come from.

        Raises:
            InvalidInput: It is not the model that the job began with.
        """
        spec = _spec(job).model
        key = (job["id"], job["source"])

        def load() -> tuple[Any, Any, Path]:
            self.close({}, progress=_silent)
            source, trust = job["source"], job["trust_remote_code"]
            folder = locate(source, revision=job.get("revision") or spec.revision, trust_remote_code=trust)
            if job.get("model_fingerprint") not in (None, model_fingerprint(folder)):
                raise InvalidInput(f"The model {source} has changed since the job began; submit the job again.")
            model, tokenizer = load_model(folder, dtype=spec.dtype, device=self.devices, trust_remote_code=trust)
            widest = max(target.parameters for target in find_targets(model))
            torch.set_num_threads(threads_for(widest, self._facts["threads"]))
            return model, tokenizer, folder

        return self._once("model", key, load)  # type: ignore[no-any-return]

    def _build(self, job: Mapping[str, Any]) -> Callable[..., FactorBank]:
        """Makes the job's bank of its calibration."""
        method = _spec(job).method
        model, _, _ = self._model(job)
        return partial(
            build_bank,
            model,
            find_targets(model),
            metric=method.metric,
            full=method.all_components,
            device=self.device,
        )

    def _bank(self, job: Mapping[str, Any]) -> FactorBank:
        def load() -> FactorBank:
            self._unload("ahead")  # the bank was there already
            model, _, _ = self._model(job)
            return FactorBank.load(job["bank"], _beside(find_targets(model), model, Path(job["bank"]).stat().st_size))

        return self._once("bank", job["bank"], load)  # type: ignore[no-any-return]

    def _take_bank(self, job: Mapping[str, Any]) -> FactorBank:
        """Give the factors away: nothing here holds them afterwards."""
        bank = self._bank(job)
        del self._loaded["bank"]
        return bank

    def _trials(self, job: Mapping[str, Any]) -> tuple[PrefixModel, Evaluation]:
        model, _, _ = self._model(job)
        bank = self._bank(job)

        def build() -> tuple[PrefixModel, Evaluation]:
            evaluation = Evaluation(model, load_blocks(job["blocks"])["evaluation"], scratch=job["cache_dir"])
            return PrefixModel(model, bank, find_targets(model)), evaluation

        return self._once("trials", (job["bank"], job["blocks"]), build)  # type: ignore[no-any-return]

    def _once(self, what: str, key: Any, build: Callable[[], Any]) -> Any:
        held = self._loaded.get(what)
        if held is None or held[0] != key:
            self._unload(what)
            self._loaded[what] = held = (key, build())
        return held[1]

    def _unload(self, what: str) -> None:
        held = self._loaded.pop(what, None)
        if what == "ahead" and held is not None:
            held[1].drop()
        if what == "trials":
            self._trial = None  # a pruned one would hold the evaluation
            if held is not None:
                held[1][0].close()


def _check_lengths(spec: JobSpec, config: Any) -> None:
    """Raises InvalidInput naming the field that asks for longer sequences than the model reads."""
    limit = getattr(config, "max_position_embeddings", None)
    for part in ("calibration", "evaluation"):
        length = getattr(spec, part).sequence_length
        if limit and length and length > limit:
            field = f"{part}.sequence_length"
            raise InvalidInput(f"{field} is {length}, but the model reads {limit} tokens at most.", field=field)


def _beside(targets: Sequence[Target], model: Any, size: int) -> dict[str, torch.device]:
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


def _spec(job: Mapping[str, Any]) -> JobSpec:
    return JobSpec.model_validate(job["spec"])


def _silent(_: float) -> None:
    return None
