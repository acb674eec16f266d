"""What a 7B-shaped model costs on a device: calibration, factoring and trials against what nobody can do without.

    python benchmarks/gpu.py --json gpu.json
    python benchmarks/gpu.py --preset tiny                     # in a minute on a CPU
    python benchmarks/gpu.py --fetched --memory-fraction 0.04  # blocks on the CPU, a third of the model on the device

The model is LLaMA-shaped, with random weights. Needs torch, transformers, numpy and safetensors, and this source tree.
All rows run over the same tokens, in batches of the same size:

    forward             the model's own logits, nothing scored
    forward, backward   and back to the embeddings, without gradients of the weights
    calibrate           inputs and output gradients of all targets
    factor              all targets in the metric `two_sided`
    library             eigh and svd alone, once for each shape, times how often the shapes occur
    dense scored        perplexity and what is kept for the KL divergence
    trial               set the ranks, then perplexity and KL to the dense model
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as in the worker's device process
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / ".ns"))  # runs where nothing is installed

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from ranksearch.search.allocate import Allocator
from ranksearch.search.space import RankSpace
from ranksearch.worker.bank import FactorBank, build_bank
from ranksearch.worker.calibrate import Calibration, calibrate
from ranksearch.worker.evaluate import Evaluation
from ranksearch.worker.hardware import settle
from ranksearch.worker.placement import fetch_blocks
from ranksearch.worker.prefix import PrefixModel
from ranksearch.worker.targets import find_targets

PRESETS = {
    "7b": {
        "hidden": 4096,
        "width": 11008,
        "blocks": 32,
        "heads": 32,
        "vocabulary": 32000,
        "length": 2048,
        "sequences": 32,
    },
    "1b": {
        "hidden": 2048,
        "width": 5632,
        "blocks": 22,
        "heads": 32,
        "vocabulary": 32000,
        "length": 2048,
        "sequences": 32,
    },
    "tiny": {"hidden": 128, "width": 344, "blocks": 4, "heads": 4, "vocabulary": 1000, "length": 128, "sequences": 16},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="7b")
    for name in PRESETS["7b"]:
        parser.add_argument(f"--{name}", type=int, help="instead of the preset's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kept", default="0.8,0.5", help="budgets of the trials, comma separated")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="of every row")
    parser.add_argument(
        "--memory-limit", type=int, help="bytes of covariances at once; the default's own when left out"
    )
    parser.add_argument("--memory-fraction", type=float, help="share of the CUDA device this process may use")
    parser.add_argument("--fetched", action="store_true", help="leave the blocks on the CPU and copy one at a time")
    parser.add_argument(
        "--repetitions", type=int, default=3, help="of forward, backward and trials; medians are printed"
    )
    parser.add_argument(
        "--scratch", type=Path, help="folder for what does not fit into memory (about 5 times the model)"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    found = parser.parse_args()
    for name, value in PRESETS[found.preset].items():
        if getattr(found, name) is None:
            setattr(found, name, value)
    return found


class Rows:
    """Seconds and peak memory of what was measured."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.found: dict[str, dict[str, float]] = {}

    def measure(self, name: str, run: Callable[[], Any], repetitions: int = 0) -> Any:
        """Runs something once, or once to warm up and then several times; gives what the last run gave."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        seconds, result = [], None
        for repetition in range(repetitions + 1):
            result = None
            self._wait()
            begun = time.perf_counter()
            result = run()
            self._wait()
            if repetition or not repetitions:
                seconds.append(time.perf_counter() - begun)
        self.found[name] = {"seconds": statistics.median(seconds), "peak_bytes": self._peak()}
        print(f"{name}: {self.found[name]['seconds']:.3f} s", file=sys.stderr)
        return result

    def seconds(self, name: str) -> float:
        return self.found[name]["seconds"]

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _peak(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of the process so far


def build(args: argparse.Namespace, device: torch.device) -> LlamaForCausalLM:
    """A model with random weights, made where it will be."""
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.width,
        num_hidden_layers=args.blocks,
        num_attention_heads=args.heads,
        max_position_embeddings=args.length,
    )
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, args.dtype))
    try:
        with torch.device("cpu" if args.fetched else device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(usual)
    model.eval().requires_grad_(False)
    if args.fetched:
        fetch_blocks(model, device)
    return model


def forward(model: nn.Module, batches: list[Tensor]) -> None:
    with torch.inference_mode():
        for ids in batches:
            model(input_ids=ids, use_cache=False)


def forward_backward(model: nn.Module, batches: list[Tensor]) -> None:
    for ids in batches:
        embedded = model.get_input_embeddings()(ids).requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits[:, :-1].flatten(0, 1)
        F.cross_entropy(logits.float(), ids[:, 1:].flatten(), reduction="sum").backward()


def library(calibration: Calibration, targets: Any, device: torch.device) -> dict[str, Any]:
    """Seconds of eigh and svd in fp64 for each shape, and how often each is needed."""
    eigh = Counter(moment.shape[0] for part in (calibration.inputs, calibration.gradients) for moment in part.values())
    svd = Counter(tuple(sorted((target.out_features, target.in_features))) for target in targets)
    rows = Rows(device)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {"eigh": {}, "svd": {}, "eigh_of_gram": {}}
    for size, count in eigh.items():
        A = torch.randn(size, size, generator=generator).to(device, torch.float64)
        A = A @ A.mT / size
        rows.measure(f"eigh {size}", lambda A=A: torch.linalg.eigh(A), 1)
        found["eigh"][str(size)] = {"seconds": rows.seconds(f"eigh {size}"), "count": count}
    for (small, large), count in svd.items():
        M = torch.randn(small, large, generator=generator).to(device, torch.float64)
        rows.measure(f"eigh of gram {small}", lambda M=M: torch.linalg.eigh(M @ M.mT), 1)
        rows.measure(f"svd {small}x{large}", lambda M=M: torch.linalg.svd(M, full_matrices=False))
        shape = f"{small}x{large}"
        found["svd"][shape] = {"seconds": rows.seconds(f"svd {shape}"), "count": count}
        found["eigh_of_gram"][shape] = {"seconds": rows.seconds(f"eigh of gram {small}"), "count": count}
    return found


def total(part: dict[str, dict[str, float]]) -> float:
    return sum(entry["seconds"] * entry["count"] for entry in part.values())


def main() -> None:
    args = arguments()
    device, *_ = settle(args.device)
    if args.memory_fraction is not None:
        torch.cuda.set_per_process_memory_fraction(args.memory_fraction, device)
    model = build(args, device)
    weights = sum(p.nbytes for p in model.parameters())
    targets = find_targets(model)
    shape = (args.sequences, args.length)
    blocks = torch.randint(0, args.vocabulary, shape, generator=torch.Generator().manual_seed(0))
    batches = [ids.to(device) for ids in blocks.split(max(1, args.batch_tokens // args.length))]
    rows = Rows(device)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        rows.measure("forward", lambda: forward(model, batches), args.repetitions)
        rows.measure("forward, backward", lambda: forward_backward(model, batches), args.repetitions)
        calibration = rows.measure(
            "calibrate",
            lambda: calibrate(
                model,
                targets,
                blocks,
                gradients=True,
                batch_tokens=args.batch_tokens,
                memory_limit=args.memory_limit,
                file=Path(scratch) / "calibration",
                scratch=scratch,
            ),
        )
        bank = rows.measure(
            "factor",
            lambda: build_bank(
                model, targets, calibration, metric="two_sided", device=device, file=Path(scratch) / "bank"
            ),
        )
        solvers = dict(Counter(fact["solver"] for fact in bank.facts.values()))
        if not args.fetched and device.type == "cuda":
            bank = FactorBank.load(Path(scratch) / "bank", device)
        evaluation = Evaluation(model, blocks, batch_tokens=args.batch_tokens, scratch=scratch)
        rows.measure("dense scored", lambda: evaluation.score(model), args.repetitions)
        space = RankSpace(targets=targets)
        allocator = Allocator(space, bank.spectra)
        budgets = [float(kept) for kept in args.kept.split(",")]
        for kept in budgets:
            ranks = space.as_dict(allocator.prior(kept))

            def trial(ranks: dict[str, int] = ranks) -> None:
                prefix.set_ranks(ranks)
                evaluation.score(model)

            with PrefixModel(model, bank, targets) as prefix:
                rows.measure(f"trial, kept {kept:g}", trial, args.repetitions)
        known = library(calibration, targets, device)

    decompositions = total(known["eigh"]) + total(known["svd"])
    eigensolvers = total(known["eigh"]) + total(known["eigh_of_gram"])
    passes = rows.seconds("forward, backward")
    ours = rows.seconds("calibrate") + rows.seconds("factor")
    times = {
        "calibrate / (forward, backward)": rows.seconds("calibrate") / passes,
        "factor / library (eigh and svd)": rows.seconds("factor") / decompositions,
        "factor / library (eigh alone)": rows.seconds("factor") / eigensolvers,
        "calibrate + factor / (2 (forward, backward) + library)": ours / (2 * passes + decompositions),
        "calibrate, peak / weights": rows.found["calibrate"]["peak_bytes"] / weights,
    }
    for kept in budgets:
        times[f"trial / forward, kept {kept:g}"] = rows.seconds(f"trial, kept {kept:g}") / rows.seconds("forward")
        times[f"trial / dense scored, kept {kept:g}"] = rows.seconds(f"trial, kept {kept:g}") / rows.seconds(
            "dense scored"
        )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{name}, torch {torch.__version__}: {parameters:,} parameters, {weights:,} bytes")
    print(f"{blocks.numel():,} tokens in batches of {args.batch_tokens:,}; solvers {solvers}\n")
    print("| | seconds | peak, MiB |\n|---|---|---|")
    for row, found in rows.found.items():
        print(f"| {row} | {found['seconds']:.3f} | {found['peak_bytes'] / 2**20:,.0f} |")
    print(f"| library, eigh and svd | {decompositions:.3f} | |\n| library, eigh alone | {eigensolvers:.3f} | |")
    print("\n| | times |\n|---|---|")
    for row, value in times.items():
        print(f"| {row} | {value:.2f} |")
    if args.json:
        facts = {key: str(value) for key, value in vars(args).items()}
        document = {"arguments": facts, "device": name, "weights": weights, "rows": rows.found, "library": known}
        args.json.write_text(json.dumps({**document, "solvers": solvers, "times": times}, indent=1))


if __name__ == "__main__":
    main()
