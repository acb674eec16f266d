"""What the device process can do: the operations of a job on one torch device.

Every request brings the job's context: its spec and the files made so far. The bench loads whatever of it is not loaded
yet, so a fresh process can take over in the middle of a job, and a process that has the model keeps it.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ranksearch.search.errors import RanksearchError
from ranksearch.search.space import RankSpace
from ranksearch.search.spec import JobSpec
from ranksearch.worker.bank import FactorBank, build_bank
from ranksearch.worker.calibrate import Calibration, calibrate
from ranksearch.worker.checkpoint import as_report, dense_sizes, export
from ranksearch.worker.evaluate import Evaluation, Scores
from ranksearch.worker.fingerprints import content_hash
from ranksearch.worker.models import load_model, locate, model_fingerprint
from ranksearch.worker.prefix import PrefixModel
from ranksearch.worker.speed import measure
from ranksearch.worker.targets import check_weights, find_targets
from ranksearch.worker.text import Material, gather

Progress = Callable[[float], None]
CHUNKS = 8  # partial scores of a trial, for the pruner


class Workbench:
    """One torch device and what is loaded on it."""

    def __init__(self, device: str) -> None:
        """Settle on a device and a thread count.

        Args:
            device: A torch device; `auto` is the first CUDA device, or the CPU.
        """
        # sums depend on how they are split over threads, so the count is fixed rather than left to the load
        torch.set_num_threads(int(os.environ.get("RANKSEARCH_THREADS") or os.environ.get("OMP_NUM_THREADS") or _cpus()))
        if device == "auto":
            device = "cuda:0" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.use_deterministic_algorithms(True, warn_only=True)
        self._operations: dict[str, Callable[..., dict[str, Any]]] = {
            "prepare": self.prepare,
            "calibrate": self.calibrate,
            "factor": self.factor,
            "dense": self.dense,
            "chunk": self.chunk,
            "finish": self.finish,
            "close": self.close,
        }
        self._loaded: dict[str, tuple[Any, Any]] = {}
        self._trial: tuple[int, Iterator[Scores], list[Scores]] | None = None

    def do(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """Carry out one operation by name."""
        return self._operations[operation](**arguments)

    def facts(self) -> dict[str, Any]:
        """The device: its torch name, product name, memory in bytes, and measured fp32 operations per second."""
        cuda = self.device.type == "cuda"
        memory = (
            torch.cuda.mem_get_info(self.device)[1]
            if cuda
            else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        )
        name = torch.cuda.get_device_name(self.device) if cuda else _cpu_name()
        return {
            "device": str(self.device),
            "name": name,
            "memory_bytes": int(memory),
            "flops": self._measure_flops(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    def _measure_flops(self) -> float:
        size = 4096 if self.device.type == "cuda" else 512
        a = torch.ones(size, size, device=self.device)
        seconds = float("inf")
        for _ in range(3):  # the first one also pays for starting threads and libraries
            begun = time.perf_counter()
            float((a @ a)[0, 0])
            seconds = min(seconds, time.perf_counter() - begun)
        return 2 * size**3 / seconds

    def recover(self) -> None:
        """Let go of everything after an error: what failed may have left half of it."""
        self.close({}, progress=_silent)

    def close(self, job: Mapping[str, Any], *, progress: Progress) -> dict[str, Any]:
        """Unload everything."""
        self._trial = None
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
        source, revision = job["source"], spec.model.revision
        model, tokenizer = self._model(job)
        progress(0.3)
        check_weights(model)
        targets = find_targets(model)
        space = space_of(spec, targets)
        for kept in spec.budget.kept:
            space.check_budget(kept)
        progress(0.4)
        material = gather(
            spec.calibration.model_dump(),
            spec.evaluation.model_dump(),
            tokenizer,
            cache_dir=job["cache_dir"],
            vocabulary=model.get_input_embeddings().weight.shape[0],
        )
        progress(0.8)
        text = _save_blocks(material, Path(output))
        return {
            "targets": [asdict(target) for target in targets],
            "dtype": str(model.dtype).removeprefix("torch."),
            "parameters": sum(p.numel() for p in model.parameters()),
            "model_fingerprint": model_fingerprint(source, revision),
            "text": text,
        }

    def calibrate(self, job: Mapping[str, Any], output: str, *, progress: Progress) -> dict[str, Any]:
        """Collect covariances on the calibration blocks and write them to a file."""
        spec = _spec(job)
        model, _ = self._model(job)
        gradients = spec.method.metric == "two_sided"
        self._unload("trials")
        blocks = _blocks(job)["calibration"]
        found = calibrate(model, find_targets(model), blocks, gradients=gradients, progress=progress)
        found.save(output)
        return {"tokens": found.total_tokens}

    def factor(self, job: Mapping[str, Any], output: str, *, progress: Progress) -> dict[str, Any]:
        """Factor all targets and write the bank to a file."""
        spec = _spec(job)
        model, _ = self._model(job)
        self._unload("trials")
        calibration = Calibration.load(job["calibration"]) if job.get("calibration") else None
        bank = build_bank(model, find_targets(model), calibration, metric=spec.method.metric, progress=progress)
        bank.save(output)
        return {"bytes": bank.nbytes}

    def dense(self, job: Mapping[str, Any], *, progress: Progress) -> dict[str, Any]:
        """Score the dense model on the evaluation blocks."""
        return _brief(self._trials(job)[1].dense)

    def chunk(
        self, job: Mapping[str, Any], number: int, ranks: Mapping[str, int], index: int, *, progress: Progress
    ) -> dict[str, Any]:
        """Score the next part of the evaluation blocks at a rank vector; part 0 begins a trial.

        Returns:
            `{"part": scores}`, or after the last part `{"total": scores}`.

        Raises:
            TrialLost: This process has not begun the trial.
        """
        prefix, evaluation = self._trials(job)
        if index == 0:
            prefix.set_ranks(ranks)
            self._trial = (number, evaluation.score_chunks(prefix.model, CHUNKS), [])
        if self._trial is None or self._trial[0] != number or len(self._trial[2]) != index:
            raise RanksearchError(f"trial {number} was not begun in this process", index=index)
        _, chunks, parts = self._trial
        part = next(chunks, None)
        if part is None:
            self._trial = None
            return {"total": _brief(Scores.union(parts))}
        parts.append(part)
        return {"part": _brief(part)}

    def finish(
        self, job: Mapping[str, Any], vectors: Mapping[str, Mapping[str, int]], folder: str, *, progress: Progress
    ) -> dict[str, Any]:
        """Export the vector `best`, load the exported folder again, and score it beside the others on every text.

        Args:
            job: The context.
            vectors: `uniform`, `prior` and `best`, each target -> rank.
            folder: An empty folder for the checkpoint.
            progress: Told the fraction done.

        Returns:
            `scores` (row -> `evaluation` and `test`), `parameters`, `bytes`, `speed` before and after, and the head of
            the source's README as `card`.
        """
        spec = _spec(job)
        model, tokenizer = self._model(job)
        bank = self._bank(job)
        self._unload("trials")
        targets = find_targets(model)
        written = export(
            folder,
            model=model,
            tokenizer=tokenizer,
            pairs=bank.pair,
            ranks=dict(vectors["best"]),
            targets=targets,
            dtype=spec.export.dtype,
            max_shard_bytes=spec.export.max_shard_bytes,
        )
        progress(0.1)
        final, _ = load_model(folder, device=self.device)
        length = float(os.environ.get("RANKSEARCH_SPEED_SECONDS") or 3.0)
        before = measure(model, self.device, seconds=length)
        after = measure(final, self.device, seconds=length)
        progress(0.2)
        scores: dict[str, dict[str, Any]] = {row: {"test": {}} for row in ("dense", *vectors, "final")}
        blocks = _blocks(job)
        texts = [name for name in blocks if name != "calibration"]
        for index, name in enumerate(texts):
            for row, score in self._rows(model, final, bank, blocks[name], vectors).items():
                if name == "evaluation":
                    scores[row]["evaluation"] = score
                else:
                    scores[row]["test"][name.removeprefix("test/")] = score
            progress(0.2 + 0.8 * (index + 1) / len(texts))
        source = locate(job["source"], revision=spec.model.revision)
        sizes = as_report(written, dense_sizes(model, targets, source))
        return {
            "scores": scores,
            **sizes,
            "card": _card(source),
            "speed": {"device": self.facts()["name"], "before": before, "after": after},
        }

    def _rows(
        self, model: Any, final: Any, bank: FactorBank, blocks: Tensor, vectors: Mapping[str, Mapping[str, int]]
    ) -> dict[str, dict[str, float]]:
        evaluation = Evaluation(model, blocks)
        rows = {"dense": _brief(evaluation.dense), "final": _brief(evaluation.score(final))}
        known: dict[tuple[int, ...], dict[str, float]] = {}
        with PrefixModel(model, bank, find_targets(model)) as prefix:
            for row, ranks in vectors.items():
                prefix.set_ranks(ranks)
                vector = tuple(ranks.values())
                rows[row] = known.get(vector) or known.setdefault(vector, _brief(evaluation.score(model)))
        return rows

    # what is loaded

    def _model(self, job: Mapping[str, Any]) -> tuple[Any, Any]:
        spec = _spec(job)
        key = (job["id"], job["source"])

        def load() -> tuple[Any, Any]:
            self.close({}, progress=_silent)
            return load_model(
                job["source"],
                revision=spec.model.revision,
                dtype=spec.model.dtype,
                device=self.device,
                trust_remote_code=job["trust_remote_code"],
            )

        return self._once("model", key, load)  # type: ignore[no-any-return]

    def _bank(self, job: Mapping[str, Any]) -> FactorBank:
        return self._once("bank", job["bank"], lambda: FactorBank.load(job["bank"], self.device))  # type: ignore[no-any-return]

    def _trials(self, job: Mapping[str, Any]) -> tuple[PrefixModel, Evaluation]:
        model, _ = self._model(job)
        bank = self._bank(job)

        def build() -> tuple[PrefixModel, Evaluation]:
            evaluation = Evaluation(model, _blocks(job)["evaluation"])
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
        if what == "trials" and held is not None:
            held[1][0].close()


def space_of(spec: JobSpec, targets: Any) -> RankSpace:
    """The rank vectors a spec allows for these targets."""
    method = spec.method
    return RankSpace(targets=tuple(targets), rank_multiple=method.rank_multiple, keep_dense=tuple(method.keep_dense))


def _spec(job: Mapping[str, Any]) -> JobSpec:
    return JobSpec.model_validate(job["spec"])


def _brief(scores: Scores) -> dict[str, float]:
    return {"perplexity": scores.perplexity, "kl": scores.kl}


def _save_blocks(material: Material, output: Path) -> dict[str, Any]:
    """Write all blocks; returns what they are, with a hash of the calibration tokens."""
    parts = {"calibration": material.calibration, "evaluation": material.evaluation}
    parts |= {f"test/{blocks.label}": blocks for blocks in material.test}
    tensors: dict[str, Tensor] = {name: blocks.tokens.contiguous() for name, blocks in parts.items()}
    save_file(tensors, output, metadata={"order": json.dumps(list(parts))})
    return {
        name: {
            "label": blocks.label,
            "dataset": blocks.fingerprint,
            "tokens": content_hash(tensors[name].numpy().tobytes()),
            "sequences": tensors[name].shape[0],
            "sequence_length": tensors[name].shape[1],
            "ids": content_hash(json.dumps(blocks.ids).encode()),
        }
        for name, blocks in parts.items()
    }


def _blocks(job: Mapping[str, Any]) -> dict[str, Tensor]:
    with safe_open(job["blocks"], framework="pt") as file:
        return {name: file.get_tensor(name) for name in json.loads(file.metadata()["order"])}


def _card(source: Path) -> str | None:
    """The head of the original model's README, which names its licence."""
    try:
        return (source / "README.md").read_text("utf-8", errors="replace")[:8192]
    except OSError:
        return None


def _silent(_: float) -> None:
    return None


def _cpus() -> int:
    return len(os.sched_getaffinity(0))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "CPU"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
