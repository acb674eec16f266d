"""Every published preset on one model: test perplexity at every budget, without a server.

    python benchmarks/presets.py --model MODEL --train train.txt --test test.txt --kept 0.6,0.4,0.25 --json table.json

What `ranksearch compare` does over REST, in one process: each preset in its own metric, all on the same calibration,
evaluation and test text; searches get `--trials` trials. Of each budget the columns are the test perplexity, the excess
ln(perplexity / dense perplexity), and the evaluations that took, with what gradients count as and without what an
earlier budget has measured.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.storages import BaseStorage

from ranksearch.search.presets import PRESETS
from ranksearch.search.space import RankSpace
from ranksearch.search.spec import Search
from ranksearch.search.study import RankStudy
from ranksearch.search.targets import Metric
from ranksearch.worker.bank import FactorBank, build_bank
from ranksearch.worker.calibrate import calibrate
from ranksearch.worker.component_gradients import component_gradients, evaluations_of, gradient_text
from ranksearch.worker.evaluate import Evaluation
from ranksearch.worker.metrics import NEEDS
from ranksearch.worker.models import load_model
from ranksearch.worker.prefix import PrefixModel
from ranksearch.worker.targets import find_targets
from ranksearch.worker.text import cut, read_text, sample, tokenize


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--train", required=True, help="text file to calibrate and search on")
    parser.add_argument("--test", required=True, help="text file that is only scored")
    parser.add_argument("--kept", default="0.6,0.4,0.25", help="budgets, comma separated")
    parser.add_argument("--presets", default=",".join(name for name in PRESETS if name != "soco"))
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--sequences", type=int, default=256, help="calibration sequences")
    parser.add_argument("--evaluation", type=int, default=64, help="evaluation sequences")
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


class Bench:
    """A model and its texts; banks are made when a preset asks for their metric."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model, tokenizer = load_model(args.model, device=args.device)
        self.targets, length = find_targets(self.model), args.sequence_length
        self.space = RankSpace(targets=self.targets)
        with tempfile.TemporaryDirectory() as cache:
            ids = {
                split: tokenize(tokenizer, read_text({"path": "text", "data_files": file}, cache_dir=cache))
                for split, file in (("train", args.train), ("test", args.test))
            }
        chosen, following = sample(ids["train"], args.sequences, args.evaluation, args.seed, length=length)
        train = cut(ids["train"], length)
        self.calibration_blocks = train[chosen]
        self.text = Evaluation(self.model, train[following])
        self.test = Evaluation(self.model, cut(ids["test"], length)[:512])
        self._banks: dict[Metric, FactorBank] = {}

    def bank(self, metric: Metric) -> FactorBank:
        if metric not in self._banks:
            found = calibrate(self.model, self.targets, self.calibration_blocks, **asdict(NEEDS[metric]))
            self._banks[metric] = build_bank(self.model, self.targets, found, metric=metric)
        return self._banks[metric]

    def run(self, preset: str, kept: float, storage: BaseStorage, before: Sequence[float]) -> dict[str, Any]:
        """One preset at one budget, which takes over what those before it have probed."""
        bank = self.bank(PRESETS[preset].metric or "two_sided")
        begun = time.perf_counter()
        study = RankStudy(
            storage=storage,
            job_id=preset,
            kept=kept,
            siblings=before if PRESETS[preset].ranks == "probes" else (),
            space=self.space,
            spectra=bank.spectra,
            spec=Search(trials=self.args.trials, pruner="none", seed=self.args.seed),
            dense_score=self.text.dense.perplexity,
            preset=preset,
            similarity={name: facts["similarity"] for name, facts in bank.facts.items()},
        )
        evaluations = 0
        with PrefixModel(self.model, bank, self.targets) as prefix:
            while (proposal := study.ask()) is not None:
                prefix.set_ranks(self.space.as_dict(proposal.ranks))
                scores = proposal.scores
                if scores is None:
                    evaluations += 1
                    score = self.text.score(self.model)
                    scores = {"perplexity": score.perplexity, "kl": score.kl}
                if (edges := study.bands(proposal.number)) is not None:
                    some = gradient_text(self.calibration_blocks, self.text.dense.tokens)
                    evaluations += evaluations_of(some, self.text.dense.tokens)
                    study.tell_gradients(proposal.number, component_gradients(prefix, edges, some))
                study.tell(proposal.number, score=scores["perplexity"], scores=scores, seconds=0.0, worker="benchmark")
            seconds = time.perf_counter() - begun
            assert study.best is not None
            prefix.set_ranks(self.space.as_dict(study.best.ranks))
            test, evaluation = self.test.score(self.model), self.text.score(self.model)
        return {
            "preset": preset,
            "kept": kept,
            "kept_exact": self.space.kept(study.best.ranks),
            "test_perplexity": test.perplexity,
            "test_kl": test.kl,
            "excess": math.log(test.perplexity / self.test.dense.perplexity),
            "evaluation_perplexity": evaluation.perplexity,
            "evaluations": evaluations,
            "seconds": seconds,
        }


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    bench, budgets = Bench(args), [float(kept) for kept in args.kept.split(",")]
    print(f"{args.model}: dense test perplexity {bench.test.dense.perplexity:.2f}\n")
    print("| preset | " + " | ".join(f"kept {kept:g} | excess | evaluations" for kept in budgets) + " |")
    print("|---" + "|---:" * (3 * len(budgets)) + "|", flush=True)
    rows: list[dict[str, Any]] = []
    for preset in args.presets.split(","):
        storage = optuna.storages.InMemoryStorage()
        own = [bench.run(preset, kept, storage, budgets[:place]) for place, kept in enumerate(budgets)]
        rows += own
        cells = (f"{row['test_perplexity']:.2f} | {row['excess']:.4f} | {row['evaluations']}" for row in own)
        print(f"| {preset} | " + " | ".join(cells) + " |", flush=True)
        if args.json:
            facts = {key: str(value) for key, value in vars(args).items()}
            args.json.write_text(json.dumps({"arguments": facts, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
