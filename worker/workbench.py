"""What the device process can do: the operations of a job on one torch device, or on several together.

Every request brings the job's context: its spec and the files made so far. The bench loads whatever of it is not loaded
yet, so a fresh process can take over in the middle of a job, and a process that has the model keeps it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ranksearch.search.errors import InvalidInput
from ranksearch.search.objective import METRICS
from ranksearch.search.plan import check_searches
from ranksearch.search.prices import as_document, read_prices
from ranksearch.search.space import RankSpace
from ranksearch.search.spec import TRAINING_TOKENS, JobSpec
from ranksearch.worker.ahead import Ahead
from ranksearch.worker.bank import FactorBank
from ranksearch.worker.blocks import load_blocks, save_blocks
from ranksearch.worker.calibrate import Calibration, calibrate
from ranksearch.worker.component_gradients import component_gradients, evaluations_of, gradient_text
from ranksearch.worker.curves import measure_curves
from ranksearch.worker.hardware import device_facts, settle
from ranksearch.worker.loaded import Loaded, spec_of
from ranksearch.worker.metrics import NEEDS
from ranksearch.worker.models import model_fingerprint
from ranksearch.worker.proof import brief, prove
from ranksearch.worker.refine import Refined, Refinement
from ranksearch.worker.stream import BlockStream
from ranksearch.worker.targets import check_weights, find_targets
from ranksearch.worker.text import gather

Progress = Callable[[float], None]


class Workbench:
    """One torch device, or several that hold a model together, and what is loaded there.

    Attributes:
        devices: All of them.
        device: The first, where everything but a model's blocks and their factors goes.
        loaded: What is loaded there.
    """

    def __init__(self, device: str) -> None:
        """Settle on devices.

        Args:
            device: As in `settle`.
        """
        self.devices = settle(device)
        self.device = self.devices[0]
        self._facts = device_facts(*self.devices)
        self.loaded = Loaded(self.devices, self._facts["threads"])
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
        self.loaded.clear()
        return {}

    # operations

    def prepare(self, job: Mapping[str, Any], output: str, *, progress: Progress) -> dict[str, Any]:
        """Check model, budgets and text; write all token blocks to one file.

        Returns:
            Facts later stages need: targets, fingerprints, sizes and where the text came from.
        """
        spec = spec_of(job)
        model, tokenizer, folder = self.loaded.model(job)
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
        spec = spec_of(job)
        model, _, _ = self.loaded.model(job)
        self.loaded.free("scorer", "ahead")
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
        with Ahead(self.loaded.builder(job), targets, self.device, bank) as ahead:
            found = collect(complete=ahead.add)
        self.loaded.keep_ahead(job, ahead)
        return {"tokens": found.total_tokens}

    def factor(self, job: Mapping[str, Any], output: str, *, progress: Progress) -> dict[str, Any]:
        """Factor all targets and write the bank to a file."""
        self.loaded.free("scorer")
        build = self.loaded.builder(job)
        calibration = Calibration.load(job["calibration"]) if job.get("calibration") else None
        ahead = self.loaded.ahead(job)
        if ahead is None or not ahead.finish(output, progress):
            build(calibration, file=output, progress=progress)
        self.loaded.free("ahead")
        return {"bytes": FactorBank.load(output).nbytes}

    def prices(self, job: Mapping[str, Any], output: str, *, progress: Progress) -> dict[str, Any]:
        """Measure how long each target takes to decode a token at each rank, and write it to a file."""
        spec = spec_of(job)
        model, _, _ = self.loaded.model(job)
        self.loaded.free("scorer", "ahead")
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
        return brief(self.loaded.scorer(job).evaluation.dense)

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
        scores, last = self.loaded.scorer(job).score_part(number, ranks, index)
        if last:
            return {"total": brief(scores)}
        losses = {"perplexity": scores.nll, "kl": scores.divergence}
        names = METRICS[spec_of(job).search.objective]
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
            `gradients`, target -> one number per band, and as how many `evaluations` they count.
        """
        scorer = self.loaded.scorer(job)
        evaluated = scorer.evaluation.dense.tokens
        text = gradient_text(load_blocks(job["blocks"])["calibration"], evaluated)
        scorer.prefix.set_ranks(ranks)
        found = component_gradients(scorer.prefix, edges, text, scratch=job["cache_dir"])
        return {"gradients": found, "evaluations": evaluations_of(text, evaluated)}

    def refine(
        self, job: Mapping[str, Any], ranks: Mapping[str, int], kept: float, output: str, *, progress: Progress
    ) -> dict[str, Any]:
        """Run the steps after the search and write the factors they come to.

        What steps came to, and the state of one that takes long, is kept beside the output until the job is over: the
        next process goes on from there.

        Returns:
            `ranks` of the factors, and what each of the `steps` did.
        """
        spec = spec_of(job)
        model, _, _ = self.loaded.model(job)
        self.loaded.free("scorer")
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        refinement = Refinement(
            model,
            partial(self.loaded.take_bank, job),
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
        spec = spec_of(job)
        model, tokenizer, folder_of_model = self.loaded.model(job)
        self.loaded.free("scorer")
        return prove(
            model,
            tokenizer,
            partial(self.loaded.take_bank, job),
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


def _check_lengths(spec: JobSpec, config: Any) -> None:
    """Raises InvalidInput naming the field that asks for longer sequences than the model reads."""
    limit = getattr(config, "max_position_embeddings", None)
    for part in ("calibration", "evaluation"):
        length = getattr(spec, part).sequence_length
        if limit and length and length > limit:
            field = f"{part}.sequence_length"
            raise InvalidInput(f"{field} is {length}, but the model reads {limit} tokens at most.", field=field)


def _silent(_: float) -> None:
    return None
