"""Test perplexity of one model at several budgets, metric by metric, under the uniform and the prior allocation; no
search.

    python benchmarks/quality.py --model MODEL --train train.txt --test test.txt --kept 0.6,0.4,0.25 --json quality.json

Text follows the protocol of a job: tokenised once, cut into blocks, calibration blocks drawn by a seeded permutation,
the first 512 blocks of the test text scored.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch

from ranksearch.search.allocate import Allocator
from ranksearch.search.space import RankSpace, uniform
from ranksearch.search.targets import Form
from ranksearch.worker.bank import build_bank
from ranksearch.worker.calibrate import calibrate
from ranksearch.worker.evaluate import Evaluation
from ranksearch.worker.linalg import DAMPING
from ranksearch.worker.metrics import NEEDS, Metric
from ranksearch.worker.models import load_model
from ranksearch.worker.prefix import PrefixModel
from ranksearch.worker.targets import check_weights, find_targets
from ranksearch.worker.text import cut, read_text, sample, tokenize


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--train", required=True, help="text file to calibrate on")
    parser.add_argument("--test", required=True, help="text file to score")
    parser.add_argument("--kept", default="0.6,0.4,0.25", help="budgets, comma separated")
    parser.add_argument("--metrics", default=",".join(get_args(Metric)))
    parser.add_argument("--form", choices=get_args(Form), default="factored")
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--sequences", type=int, default=256, help="calibration sequences")
    parser.add_argument("--test-sequences", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--damping", type=float, default=DAMPING)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


def read_blocks(args: argparse.Namespace, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with tempfile.TemporaryDirectory() as cache:
        ids = {
            split: tokenize(tokenizer, read_text({"path": "text", "data_files": file}, cache_dir=cache))
            for split, file in (("train", args.train), ("test", args.test))
        }
    chosen, _ = sample(ids["train"], args.sequences, 0, args.seed, length=args.sequence_length)
    test = cut(ids["test"], args.sequence_length)[: args.test_sequences]
    return cut(ids["train"], args.sequence_length)[chosen], test


def main() -> None:
    args = arguments()
    budgets = [float(kept) for kept in args.kept.split(",")]
    model, tokenizer = load_model(args.model, dtype=args.dtype, device=args.device)
    check_weights(model)
    targets = find_targets(model)
    space = RankSpace(targets=targets, form=args.form)
    for kept in budgets:
        space.check_budget(kept)
    calibration_blocks, test = read_blocks(args, tokenizer)

    seconds: dict[str, float] = {}
    evaluation = Evaluation(model, test)
    dense = evaluation.dense.perplexity
    print(f"{args.model}: {len(targets)} targets, {space.parameters:,} parameters, {model.dtype} on {model.device}")
    print(f"form {args.form}")
    print(f"{calibration_blocks.numel():,} calibration tokens, {evaluation.dense.tokens:,} predicted test tokens")
    print(f"dense test perplexity {dense:.2f}\n")
    print(
        "| metric | allocation |"
        + "".join(f" kept {kept:g} | KL |" for kept in budgets)
        + "\n"
        + "|---" * (2 + 2 * len(budgets))
        + "|"
    )

    rows: list[dict[str, Any]] = []
    for metric in args.metrics.split(","):
        begun = time.perf_counter()
        needs = NEEDS.get(metric)
        calibration = calibrate(model, targets, calibration_blocks, **asdict(needs)) if needs else None
        seconds[f"calibrate {metric}"] = time.perf_counter() - begun
        begun = time.perf_counter()
        bank = build_bank(model, targets, calibration, metric=metric, damping=args.damping, full=args.form == "pivoted")
        seconds[f"factor {metric}"] = time.perf_counter() - begun
        allocator = Allocator(space, bank.spectra)
        with PrefixModel(model, bank, targets) as prefix:
            for allocation in ("uniform", "prior"):
                line = f"| {metric} | {allocation} |"
                for kept in budgets:
                    ranks = uniform(space, kept) if allocation == "uniform" else allocator.prior(kept)
                    prefix.set_ranks(space.as_dict(ranks))
                    scores = evaluation.score(model)
                    line += f" {scores.perplexity:.2f} | {scores.kl:.4f} |"
                    rows.append(
                        {
                            "metric": metric,
                            "allocation": allocation,
                            "kept": kept,
                            "kept_exact": space.kept(ranks),
                            "test_perplexity": scores.perplexity,
                            "kl": scores.kl,
                        }
                    )
                print(line, flush=True)
    print("\nseconds: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()))
    if args.json:
        facts = {key: str(value) for key, value in vars(args).items()}
        args.json.write_text(
            json.dumps({"arguments": facts, "dense": dense, "rows": rows, "seconds": seconds}, indent=1)
        )


if __name__ == "__main__":
    main()
