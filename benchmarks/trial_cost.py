"""What a trial costs: prefix slices of a factor bank against the dense forward, and against rebuilding a model per
trial.

    python benchmarks/trial_cost.py --model MODEL --kept 0.8,0.5,0.25 --json trial_cost.json

All rows run over the same tokens in one process, interleaved, and the medians of the repetitions are compared:

    dense forward   the model's own logits, nothing scored (at the trial's batch size, and at a larger one)
    trial           set the ranks, then perplexity and KL to the dense model
    copy            deep-copy the model, multiply factors from cached bases and swap them in, score
    decompose       deep-copy the model, decompose every weight in its metric, swap the factors in, score
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ranksearch.search.space import RankSpace, uniform
from ranksearch.worker.bank import build_bank
from ranksearch.worker.calibrate import calibrate
from ranksearch.worker.evaluate import Evaluation
from ranksearch.worker.models import load_model
from ranksearch.worker.prefix import PrefixModel
from ranksearch.worker.targets import find_targets


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--kept", default="0.8,0.5,0.25", help="budgets, comma separated")
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--batch-tokens", type=int, help="tokens per pass of a trial; default: from the model's size")
    parser.add_argument("--large-batch", type=int, default=2048, help="tokens per pass of the second dense row")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a machine that is busy otherwise"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


def interleave(
    runs: dict[str, Callable[[], Any]], repetitions: int, device: torch.device, clock: Callable[[], float]
) -> dict[str, float]:
    """Median seconds of each run; every round runs each of them once."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(repetitions + 1):
        for name, run in runs.items():
            wait()
            begun = clock()
            run()
            wait()
            if repetition:  # the first round warms up
                seconds[name].append(clock() - begun)
    return {name: statistics.median(values) for name, values in seconds.items()}


def swapped(model: nn.Module, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> nn.Module:
    """A deep copy of the model with two small layers in place of each target."""
    built = copy.deepcopy(model)
    for name, (left, right) in pairs.items():
        dense = built.get_submodule(name)
        down = nn.Linear(right.shape[1], right.shape[0], bias=False, device=right.device, dtype=right.dtype)
        up = nn.Linear(left.shape[1], left.shape[0], bias=dense.bias is not None, device=left.device, dtype=left.dtype)
        with torch.no_grad():
            down.weight.copy_(right)
            up.weight.copy_(left)
            if dense.bias is not None:
                up.bias.copy_(dense.bias)
        built.set_submodule(name, nn.Sequential(down, up))
    return built


def main() -> None:
    args = arguments()
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    model, _ = load_model(args.model, dtype=args.dtype, device=args.device)
    targets = find_targets(model)
    space = RankSpace(targets=targets)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    shape = (args.sequences, args.sequence_length)
    blocks = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(0))
    calibration = calibrate(model, targets, blocks, gradients=True)
    bank = build_bank(model, targets, calibration, metric="two_sided")
    evaluation = Evaluation(model, blocks, batch_tokens=args.batch_tokens)
    bases = {
        t.name: torch.linalg.eigh(w @ calibration.input(t.name).to(w) @ w.mT)[1].to(model.dtype)
        for t in targets
        for w in [model.get_submodule(t.name).weight.detach().double()]
    }

    def forward(tokens: int) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode():
                for ids in blocks.split(max(1, tokens // args.sequence_length)):
                    model(input_ids=ids.to(model.device), use_cache=False)

        return run

    def copied(ranks: dict[str, int]) -> nn.Module:
        pairs = {}
        for name, rank in ranks.items():
            Q = bases[name][:, -rank:]
            pairs[name] = (Q, Q.mT @ model.get_submodule(name).weight.detach())
        return swapped(model, pairs)

    def decomposed(ranks: dict[str, int]) -> nn.Module:
        fresh = build_bank(model, targets, calibration, metric="two_sided")
        return swapped(model, {name: fresh.pair(name, rank) for name, rank in ranks.items()})

    rounds: dict[str, dict[str, float]] = {}
    for kept in (float(k) for k in args.kept.split(",")):
        ranks = space.as_dict(uniform(space, kept))
        factored = {name: rank for name, rank in ranks.items() if rank < min(model.get_submodule(name).weight.shape)}
        building: dict[str, list[float]] = {"copy": [], "decompose": [], "set ranks": []}

        def trial(ranks: dict[str, int] = ranks, building: dict[str, list[float]] = building) -> None:
            with PrefixModel(model, bank, targets) as prefix:
                begun = clock()
                prefix.set_ranks(ranks)
                building["set ranks"].append(clock() - begun)
                evaluation.score(model)

        def rebuilt(
            way: str,
            build: Callable[[dict[str, int]], nn.Module],
            ranks: dict[str, int] = factored,
            building: dict[str, list[float]] = building,
        ) -> None:
            begun = clock()
            built = build(ranks)
            building[way].append(clock() - begun)
            evaluation.score(built)

        rounds[f"{kept:g}"] = interleave(
            {
                "dense forward": forward(evaluation.batch_tokens),
                "dense forward, large batch": forward(args.large_batch),
                "dense scored": lambda: evaluation.score(model),
                "trial": trial,
                "copy": lambda: rebuilt("copy", copied),
                "decompose": lambda: rebuilt("decompose", decomposed),
            },
            args.repetitions,
            model.device,
            clock,
        )
        # the first of each was the warm-up
        medians = {f"{way}, before scoring": statistics.median(values[1:]) for way, values in building.items()}
        rounds[f"{kept:g}"] |= medians

    threads = torch.get_num_threads()
    print(f"{args.model}: {model.dtype} on {model.device}, {threads} threads, {args.repetitions} repetitions")
    print(
        f"{blocks.numel():,} tokens, {evaluation.batch_tokens} per pass, logits of {evaluation.chunk_tokens} at once\n"
    )
    head = "".join(f" kept {kept} |" for kept in rounds) + "\n" + "|---" * (1 + len(rounds)) + "|"
    print(f"| median {args.clock} seconds |{head}")
    for name in next(iter(rounds.values())):
        print(f"| {name} |" + "".join(f" {seconds[name]:.4f} |" for seconds in rounds.values()))
    against = {
        "trial / dense forward": ("trial", "dense forward"),
        "trial / dense forward, large batch": ("trial", "dense forward, large batch"),
        "copy / trial": ("copy", "trial"),
        "decompose / trial": ("decompose", "trial"),
        "copy / set ranks, before scoring": ("copy, before scoring", "set ranks, before scoring"),
        "decompose / set ranks, before scoring": ("decompose, before scoring", "set ranks, before scoring"),
    }
    print(f"\n| times |{head}")
    for name, (over, under) in against.items():
        print(f"| {name} |" + "".join(f" {s[over] / s[under]:.2f} |" for s in rounds.values()))
    if args.json:
        facts = {key: str(value) for key, value in vars(args).items()}
        args.json.write_text(json.dumps({"arguments": facts, "threads": threads, "seconds": rounds}, indent=1))


if __name__ == "__main__":
    main()
