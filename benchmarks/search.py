"""How fast each sampler finds good ranks: best score so far over evaluations, several seeds, one table per problem.

    python benchmarks/search.py --model MODEL --train train.txt --test test.txt --kept 0.6,0.4,0.25 --json search.json
    python benchmarks/search.py --synthetic 224 --json synthetic.json

A model's problem is the perplexity of its evaluation blocks on one factor bank in metric two_sided; all samplers see
the same bank and the same text, seeds are those of the samplers. The table holds the excess ln(perplexity / dense
perplexity) of the best vector after so many evaluations, and at last that of the final vector on the test text, which
no sampler sees. Published searches start from uniform, all others from the prior. A pass that measures gradients
counts as so many evaluations as three times its text is of theirs. A synthetic problem
(tests/search/synthetic.py) has a hidden optimum; its table holds the share of the way from the prior to it, in percent;
seeds are also those of the problem. All samplers meet the budget exactly.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import optuna
import torch

from ranksearch.search.presets import PRESETS
from ranksearch.search.space import Ranks, RankSpace
from ranksearch.search.spec import Search
from ranksearch.search.study import RankStudy
from ranksearch.worker.bank import build_bank
from ranksearch.worker.calibrate import calibrate
from ranksearch.worker.component_gradients import component_gradients, evaluations_of, gradient_text
from ranksearch.worker.evaluate import Evaluation
from ranksearch.worker.models import load_model
from ranksearch.worker.prefix import PrefixModel
from ranksearch.worker.targets import find_targets
from ranksearch.worker.text import cut, read_text, sample, tokenize

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.search import synthetic

SAMPLERS = get_args(Search.model_fields["sampler"].annotation)
SHOWN = (1, 3, 5, 10, 20, 30, 50, 100, 200)
YARDSTICK, YARDSTICK_TRIALS = "bolaco", 50


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is to be minimized.

    Attributes:
        name: For the table.
        space: The rank space.
        spectra: Target -> singular values.
        kept: The budget.
        dense: Score of the dense model.
        score: Of a vector.
        figure: What the table shows of a score.
        rising: Whether a larger figure is better.
        test: Figure of a vector on other text, if there is such.
        gradients: Of components around a vector (see `RankStudy.tell_gradients`), where they can be had.
        gradient_cost: What they cost, in evaluations.
    """

    name: str
    space: RankSpace
    spectra: dict[str, Any]
    kept: float
    dense: float
    score: Callable[[Ranks], float]
    figure: Callable[[float], float]
    rising: bool = False
    test: Callable[[Ranks], float] | None = None
    gradients: Callable[[Ranks, dict[str, list[int]]], dict[str, list[float]]] | None = None
    gradient_cost: int = 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id")
    parser.add_argument("--train", help="text file to calibrate and search on")
    parser.add_argument("--test", help="text file that is only scored")
    parser.add_argument("--synthetic", type=int, help="targets of a made-up problem, a multiple of 7, instead")
    parser.add_argument("--kept", default="0.4", help="budgets, comma separated")
    parser.add_argument("--samplers", default=",".join(SAMPLERS))
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seeds", default="0,1,2,3,4", help="of the samplers, comma separated")
    parser.add_argument("--form", default="factored", choices=("factored", "pivoted"))
    parser.add_argument("--sequences", type=int, default=256, help="calibration sequences")
    parser.add_argument("--evaluation", type=int, default=64, help="evaluation sequences")
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="also write curves and figures here")
    args = parser.parse_args()
    if bool(args.model) == bool(args.synthetic) or (args.model and not (args.train and args.test)):
        parser.error("name --model, --train and --test, or --synthetic")
    return args


@contextmanager
def real_problems(
    args: argparse.Namespace, budgets: Sequence[float]
) -> Iterator[dict[float, Callable[[int], Problem]]]:
    model, tokenizer = load_model(args.model, device=args.device)
    targets, length = find_targets(model), args.sequence_length
    space = RankSpace(targets=targets, form=args.form)
    with tempfile.TemporaryDirectory() as cache:
        ids = {
            split: tokenize(tokenizer, read_text({"path": "text", "data_files": file}, cache_dir=cache))
            for split, file in (("train", args.train), ("test", args.test))
        }
    chosen, following = sample(ids["train"], args.sequences, args.evaluation, 0, length=length)
    train = cut(ids["train"], length)
    calibration = calibrate(model, targets, train[chosen], gradients=True)
    bank = build_bank(model, targets, calibration, metric="two_sided", full=args.form == "pivoted")
    texts = {
        "evaluation": Evaluation(model, train[following]),
        "test": Evaluation(model, cut(ids["test"], length)[:512]),
    }
    measuring = gradient_text(train[chosen], texts["evaluation"].dense.tokens)
    known: dict[tuple[str, str], float] = {}

    with PrefixModel(model, bank, targets) as prefix:

        def score(text: str, ranks: Ranks) -> float:
            key = text, space.pack(ranks)
            if key not in known:
                prefix.set_ranks(space.as_dict(ranks))
                known[key] = texts[text].score(model).perplexity
            return known[key]

        def excess(text: str, perplexity: float) -> float:
            return float(np.log(perplexity / texts[text].dense.perplexity))

        def gradients(ranks: Ranks, edges: dict[str, list[int]]) -> dict[str, list[float]]:
            prefix.set_ranks(space.as_dict(ranks))
            return component_gradients(prefix, edges, measuring)

        def problem(kept: float, seed: int) -> Problem:
            return Problem(
                name=f"{Path(args.model).name}, kept {kept:g}",
                space=space,
                spectra=dict(bank.spectra),
                kept=kept,
                dense=texts["evaluation"].dense.perplexity,
                score=lambda ranks: score("evaluation", ranks),
                figure=lambda perplexity: excess("evaluation", perplexity),
                test=lambda ranks: excess("test", score("test", ranks)),
                gradients=gradients,
                gradient_cost=evaluations_of(measuring, texts["evaluation"].dense.tokens),
            )

        yield {kept: partial(problem, kept) for kept in budgets}


@contextmanager
def made_up_problems(
    args: argparse.Namespace, budgets: Sequence[float]
) -> Iterator[dict[float, Callable[[int], Problem]]]:
    def problem(kept: float, seed: int) -> Problem:
        made = synthetic.problem(seed, blocks=args.synthetic // 7, kept=kept)
        return Problem(
            name=f"synthetic, {len(made.space.targets)} targets, kept {kept:g}",
            space=made.space,
            spectra=made.spectra,
            kept=kept,
            dense=synthetic.DENSE,
            score=made.score,
            figure=lambda score: 100 * made.gain(score, kept),
            rising=True,
        )

    yield {kept: partial(problem, kept) for kept in budgets}


def run(problem: Problem, sampler: str, seed: int, trials: int) -> dict[str, Any]:
    """One search: the best score after each evaluation, the test figure at the end, and what a proposal took."""
    study = RankStudy(
        storage=optuna.storages.InMemoryStorage(),
        job_id="benchmark",
        kept=problem.kept,
        space=problem.space,
        spectra=problem.spectra,
        spec=Search.model_validate({"trials": trials, "pruner": "none", "seed": seed, "sampler": sampler}),
        dense_score=problem.dense,
        preset=sampler if sampler in PRESETS else "ranksearch",
    )
    curve: list[float] = []
    asking = []
    while len(curve) < trials:
        begun = time.process_time()
        proposal = study.ask()
        asking.append(time.process_time() - begun)
        if proposal is None:
            break
        score = problem.score(proposal.ranks)
        edges = study.bands(proposal.number) if problem.gradients else None
        if problem.gradients and edges is not None:
            study.tell_gradients(proposal.number, problem.gradients(proposal.ranks, edges))
        study.tell(proposal.number, score=score, scores={}, seconds=0.0, worker="benchmark")
        curve.append(min(score, curve[-1] if curve else score))
        curve += [curve[-1]] * (problem.gradient_cost if edges is not None else 0)
    assert study.best is not None
    return {
        "sampler": sampler,
        "seed": seed,
        "curve": curve,
        "trials": study.finished,
        "figures": [problem.figure(score) for score in curve],
        "test": problem.test(study.best.ranks) if problem.test else None,
        "seconds_per_proposal": statistics.mean(asking),
        "slowest_proposal_seconds": max(asking),
    }


def show(problem: Problem, runs: Sequence[dict[str, Any]], trials: int) -> None:
    """Mean and spread over the seeds, a row per sampler."""
    columns = [n for n in SHOWN if n <= trials]
    last = ["test"] if problem.test else []
    print(f"\n{problem.name}\n\n| sampler | " + " | ".join(f"@{n}" for n in columns), end="")
    print(" | " + " | ".join([*last, "s/proposal"]) + " |\n|---" + "|---:" * (len(columns) + len(last) + 1) + "|")
    digits = 0 if problem.rising else 4
    for sampler in dict.fromkeys(r["sampler"] for r in runs):
        own = [r for r in runs if r["sampler"] == sampler]
        cells = [_cell([r["figures"][min(n, len(r["figures"])) - 1] for r in own], digits) for n in columns]
        cells += [_cell([r["test"] for r in own], digits)] if problem.test else []
        cells.append(f"{statistics.mean(r['seconds_per_proposal'] for r in own):.3f}")
        print(f"| {sampler} | " + " | ".join(cells) + " |", flush=True)


def show_race(runs: Sequence[dict[str, Any]]) -> None:
    """Evaluations each sampler takes to what the yardstick has after its own."""
    marks = [r["curve"][min(YARDSTICK_TRIALS, len(r["curve"])) - 1] for r in runs if r["sampler"] == YARDSTICK]
    if not marks:
        return
    mark = statistics.mean(marks)
    print(f"\nevaluations to the mean score of {YARDSTICK} after {YARDSTICK_TRIALS}, {mark:.4f}, for each seed:")
    for sampler in dict.fromkeys(r["sampler"] for r in runs):
        reached = [
            next((str(n) for n, s in enumerate(r["curve"], 1) if s <= mark), "-")
            for r in runs
            if r["sampler"] == sampler
        ]
        print(f"{sampler}: {' '.join(reached)}")


def _cell(values: Sequence[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    budgets, seeds = ([kind(x) for x in text.split(",")] for kind, text in ((float, args.kept), (int, args.seeds)))
    found: list[dict[str, Any]] = []
    with (made_up_problems if args.synthetic else real_problems)(args, budgets) as problems:
        for kept, problem_of in problems.items():
            runs: list[dict[str, Any]] = []
            for sampler in args.samplers.split(","):
                for seed in seeds:
                    runs.append(run(problem_of(seed), sampler, seed, args.trials))
                    print(f"{kept:g} {sampler} {seed}: {runs[-1]['figures'][-1]:.4f}", file=sys.stderr, flush=True)
                    if args.json:
                        facts = {key: str(value) for key, value in vars(args).items()}
                        document = {"arguments": facts, "problems": [*found, {"kept": kept, "runs": runs}]}
                        args.json.write_text(json.dumps(document, indent=1))
            found.append({"kept": kept, "runs": runs})
            show(problem_of(seeds[0]), runs, args.trials)
            show_race(runs)


if __name__ == "__main__":
    main()
