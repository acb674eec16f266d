"""What each step of the numerics gives: one table, a row per step, test perplexity at every budget.

    python benchmarks/ablation.py --model MODEL --train train.txt --test test.txt --kept 0.6,0.4,0.25 --json table.json

Text follows the protocol of a job. Whatever a row has to choose (strengths, vectors, when to stop) it chooses on the
evaluation blocks, drawn from the training text; the test text is only scored. `--seeds 0,1,2` repeats the rows without
a search for several calibrations and prints mean and spread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import torch

from ranksearch.search.allocate import Allocator
from ranksearch.search.space import Ranks, RankSpace, uniform
from ranksearch.search.spec import TRAINING_TOKENS, JobSpec, Search
from ranksearch.search.study import RankStudy
from ranksearch.worker.bank import FactorBank, build_bank
from ranksearch.worker.blocks import CALIBRATION, EVALUATION, TRAINING
from ranksearch.worker.calibrate import Calibration, calibrate
from ranksearch.worker.component_gradients import component_gradients, gradient_text
from ranksearch.worker.evaluate import Evaluation
from ranksearch.worker.metrics import NEEDS
from ranksearch.worker.models import load_model
from ranksearch.worker.prefix import PrefixModel
from ranksearch.worker.refine import Refined, Refinement
from ranksearch.worker.targets import find_targets
from ranksearch.worker.text import apart, cut, read_text, sample, tokenize

BOLACO_TRIALS = 50


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--train", required=True, help="text file to calibrate and train on")
    parser.add_argument("--test", required=True, help="text file to score")
    parser.add_argument("--kept", default="0.6,0.4,0.25", help="budgets, comma separated")
    parser.add_argument("--rows", help="only rows whose name contains one of these words, comma separated")
    parser.add_argument("--train-at", default="0.25", help="budgets at which distill and SoCo are run")
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--sequences", type=int, default=256, help="calibration sequences")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seeds", default="0", help="of the calibration blocks, comma separated")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


class Ground:
    """One model and one calibration of it, and what the rows share."""

    def __init__(self, args: argparse.Namespace, model: Any, ids: Mapping[str, torch.Tensor], seed: int) -> None:
        self.args, self.model, self.seed = args, model, seed
        self.targets = find_targets(model)
        #: Parameters that centring adds: a bias for every target that has none.
        self.biases = sum(t.out_features for t in self.targets if model.get_submodule(t.name).bias is None)
        length = args.sequence_length
        chosen, following = sample(ids["train"], args.sequences, 64, seed, length=length)
        train = cut(ids["train"], length)
        used = [slice(i * length, (i + 1) * length) for i in following]
        more = apart(ids["train"], used, seed, length=length)[: TRAINING_TOKENS // length]
        self.blocks = {CALIBRATION: train[chosen], EVALUATION: train[following], TRAINING: train[more]}
        self.spaces = {form: RankSpace(targets=self.targets, form=form) for form in ("factored", "pivoted")}
        self.calibration = self.calibrate()
        self.banks: dict[str, FactorBank] = {}

    def calibrate(self, **options: Any) -> Calibration:
        return calibrate(self.model, self.targets, self.blocks[CALIBRATION], gradients=True, **options)

    def bank(self, metric: str) -> FactorBank:
        if metric not in self.banks:
            self.banks[metric] = self.factor(self.calibration, metric)
        return self.banks[metric]

    def factor(self, calibration: Calibration, metric: str = "two_sided", **options: Any) -> FactorBank:
        return build_bank(self.model, self.targets, calibration, metric=metric, full=True, **options)

    def refine(self, ranks: Ranks, form: str, kept: float, *, metric: str = "two_sided", **method: Any) -> Refined:
        # metric `feature` knows no gradients
        calibration = self.calibration if metric == "two_sided" else replace(self.calibration, gradients={})
        spec = JobSpec.model_validate(
            {"model": {"source": "-"}, "budget": {"kept": [kept]}, "method": {"form": form, "metric": metric, **method}}
        )
        with tempfile.TemporaryDirectory() as folder:
            refinement = Refinement(
                self.model,
                lambda: self.bank(metric),
                self.spaces[form],
                self.blocks,
                calibration,
                spec=spec,
                kept=kept,
                state=Path(folder) / "state",
            )
            return refinement.run(self.spaces[form].as_dict(ranks), lambda fraction: None)

    def search(self, form: str, kept: float) -> Ranks:
        """The best of some trials of the sampler, by perplexity on the evaluation blocks."""
        bank = self.bank("two_sided")
        with PrefixModel(self.model, bank, self.targets) as prefix:
            return self.best(prefix, bank, self.spaces[form], kept, "ranksearch", self.args.trials)

    def best(
        self, prefix: PrefixModel, bank: FactorBank, space: RankSpace, kept: float, preset: str, trials: int
    ) -> Ranks:
        """The best trial of a preset, by perplexity on the evaluation blocks."""
        text = Evaluation(self.model, self.blocks[EVALUATION])
        study = RankStudy(
            storage=optuna.storages.InMemoryStorage(),
            job_id="ablation",
            kept=kept,
            space=space,
            spectra=bank.spectra,
            spec=Search(trials=trials, pruner="none", seed=self.seed),
            dense_score=text.dense.perplexity,
            preset=preset,
        )
        while (proposal := study.ask()) is not None:
            prefix.set_ranks(space.as_dict(proposal.ranks))
            score = text.score(self.model).perplexity
            if (edges := study.bands(proposal.number)) is not None:
                some = gradient_text(self.blocks[CALIBRATION], text.dense.tokens)
                study.tell_gradients(proposal.number, component_gradients(prefix, edges, some))
            study.tell(proposal.number, score=score, scores={"perplexity": score}, seconds=0.0, worker="here")
        assert study.best is not None
        return study.best.ranks


def bolaco(ground: Ground, prefix: PrefixModel, kept: float) -> Ranks:
    """Bolaco's search: a Gaussian process over one share per matrix type, q and k together and v dense, all layers
    alike. The published code draws until the budget is met within a tenth; here a common factor meets it exactly."""
    space, bank = ground.spaces["factored"], ground.bank("feature")  # the search itself looks at no spectrum
    less = kept - ground.biases / space.parameters
    return ground.best(prefix, bank, space, less, "bolaco", BOLACO_TRIALS)


def rows(ground: Ground) -> dict[str, Callable[[float], AbstractContextManager[int]]]:
    """Name of each row -> what has the model run it at a budget, and tells its parameters."""
    memory: dict[Any, Any] = {}

    def once(key: Any, make: Callable[[], Any]) -> Any:
        if key not in memory:
            memory[key] = make()
        return memory[key]

    def allocated(space: RankSpace, bank: FactorBank, allocation: str, kept: float) -> Ranks:
        return uniform(space, kept) if allocation == "uniform" else Allocator(space, bank.spectra).prior(kept)

    def vector(metric: str, allocation: str, form: str = "factored", bank: FactorBank | None = None) -> Any:
        @contextmanager
        def run(kept: float) -> Iterator[int]:
            space, factors = ground.spaces[form], bank or ground.bank(metric)
            ranks = allocated(space, factors, allocation, kept)
            with PrefixModel(ground.model, factors, ground.targets) as prefix:
                prefix.set_ranks(space.as_dict(ranks))
                yield space.cost(ranks)

        return run

    def with_options(calibration: Mapping[str, Any], factoring: Mapping[str, Any]) -> Any:
        @contextmanager
        def run(kept: float) -> Iterator[int]:
            key = ("options", *calibration.items(), *factoring.items())
            bank = once(key, lambda: ground.factor(_calibration(calibration), **factoring))
            with vector("two_sided", "prior", bank=bank)(kept) as cost:
                yield cost

        return run

    def _calibration(options: Mapping[str, Any]) -> Calibration:
        if not options:
            return ground.calibration
        calibration: Calibration = once(("calibration", *options.items()), lambda: ground.calibrate(**options))
        return calibration

    def centred(metric: str, choose: Callable[[PrefixModel, FactorBank, float], Ranks]) -> Any:
        @contextmanager
        def run(kept: float) -> Iterator[int]:
            space, pool = ground.spaces["factored"], NEEDS["centred"].pool
            bank = once(("centred", metric), lambda: ground.factor(_calibration({"pool": pool}), metric))
            with PrefixModel(ground.model, bank, ground.targets) as prefix:
                ranks = choose(prefix, bank, kept)
                prefix.set_ranks(space.as_dict(ranks))
                yield space.cost(ranks) + ground.biases

        return run

    def prior_less_biases(_: PrefixModel, bank: FactorBank, kept: float) -> Ranks:
        space = ground.spaces["factored"]
        return Allocator(space, bank.spectra).prior(kept - ground.biases / space.parameters)

    def refined(
        form: str, metric: str = "two_sided", allocation: str = "prior", *, searched: bool = False, **method: Any
    ) -> Any:
        @contextmanager
        def run(kept: float) -> Iterator[int]:
            space, bank = ground.spaces[form], ground.bank(metric)
            if searched:
                ranks = once((form, kept), lambda: ground.search(form, kept))
            else:
                ranks = allocated(space, bank, allocation, kept)
            done = ground.refine(ranks, form, kept, metric=metric, **method)
            with PrefixModel(ground.model, bank, ground.targets) as prefix:
                prefix.set_pairs(done.pairs)
                yield space.cost(space.from_dict(dict(done.ranks)))

        return run

    return {
        "weight, uniform": vector("weight", "uniform"),
        "feature, uniform (SVD-LLM)": vector("feature", "uniform"),
        "  SVD-LLM + sequential": refined("factored", "feature", "uniform", refine=["sequential"]),
        "Bolaco: centred features, bias, 50 trials": centred("centred", lambda p, bank, kept: bolaco(ground, p, kept)),
        "two-sided, uniform": vector("two_sided", "uniform"),
        "two-sided, prior": vector("two_sided", "prior"),
        "  labels drawn from the model": with_options({"labels": "model"}, {}),
        "  shrinkage 0.1": with_options({}, {"shrinkage": 0.1}),
        "  centred, bias counted": centred("two_sided", prior_less_biases),
        "  + sequential": refined("factored", refine=["sequential"]),
        "  + search": refined("factored", searched=True, refine=[]),
        "  + search + sequential": refined("factored", searched=True, refine=["sequential"]),
        "two-sided, prior, pivoted": vector("two_sided", "prior", "pivoted"),
        "  pivoted + sequential": refined("pivoted", refine=["sequential"]),
        "  pivoted + search + sequential": refined("pivoted", searched=True, refine=["sequential"]),
        "trained: pivoted + search + sequential + distill": refined(
            "pivoted", searched=True, refine=["sequential", "distill"]
        ),
        "trained: prior + distill": refined("factored", refine=["distill"]),
        "trained: SoCo alone": refined("factored", preset="soco"),
        "trained: SoCo from the prior": refined("factored", refine=["soco"]),
    }


def main() -> None:
    args = arguments()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    budgets, seeds = ([kind(x) for x in text.split(",")] for kind, text in ((float, args.kept), (int, args.seeds)))
    train_at = {float(kept) for kept in args.train_at.split(",") if kept}
    model, tokenizer = load_model(args.model, dtype=args.dtype, device=args.device)
    with tempfile.TemporaryDirectory() as cache:
        ids = {
            split: tokenize(tokenizer, read_text({"path": "text", "data_files": file}, cache_dir=cache))
            for split, file in (("train", args.train), ("test", args.test))
        }
    test = Evaluation(model, cut(ids["test"], args.sequence_length)[:512])
    found: list[dict[str, Any]] = []
    for seed in seeds:
        ground = Ground(args, model, ids, seed)
        if seed == seeds[0]:
            _head(args, ground, test, budgets)
        for name, run in rows(ground).items():
            if args.rows and not any(word in name for word in args.rows.split(",")):
                continue
            cells = []
            for kept in budgets:
                if name.startswith("trained") and kept not in train_at:
                    cells.append("")
                    continue
                begun = time.perf_counter()
                with run(kept) as cost:
                    scores = test.score(model)
                seconds = time.perf_counter() - begun
                exact = cost / ground.spaces["factored"].parameters
                facts = {"row": name.strip(), "seed": seed, "kept": kept, "kept_exact": exact, "seconds": seconds}
                found.append({**facts, "perplexity": scores.perplexity, "kl": scores.kl})
                cells.append(f"{scores.perplexity:.2f}")
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
            if args.json:
                facts = {key: str(value) for key, value in vars(args).items()}
                document = {"arguments": facts, "dense": test.dense.perplexity, "rows": found}
                args.json.write_text(json.dumps(document, indent=1))
    if len(seeds) > 1:
        _spread(found, budgets)


def _head(args: argparse.Namespace, ground: Ground, test: Evaluation, budgets: list[float]) -> None:
    space = ground.spaces["factored"]
    print(f"{args.model}: {len(space.targets)} targets, {space.parameters:,} parameters, {ground.model.dtype}")
    print(f"dense test perplexity {test.dense.perplexity:.2f}\n")
    print("| | " + " | ".join(f"kept {kept:g}" for kept in budgets) + " |\n|---" + "|---:" * len(budgets) + "|")


def _spread(found: list[dict[str, Any]], budgets: list[float]) -> None:
    print("\nmean and standard deviation over the calibration seeds")
    for name in dict.fromkeys(row["row"] for row in found):
        cells = []
        for kept in budgets:
            values = [row["perplexity"] for row in found if row["row"] == name and row["kept"] == kept]
            cells.append(f"{statistics.mean(values):.2f} +- {statistics.stdev(values):.2f}" if len(values) > 1 else "")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
