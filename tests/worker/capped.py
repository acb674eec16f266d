"""A whole compression under a cap on memory: `python capped.py FOLDER BUDGET SECTION_BYTES`, run in its own process.

What counts is anonymous memory (RssAnon) above that of the imported libraries; pages of mapped files are the system's
to drop. A thread looks every millisecond and ends the process with status 77 when the budget is exceeded.
"""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import threading
import time
from pathlib import Path

import torch

from ranksearch.search.allocate import Allocator
from ranksearch.search.space import RankSpace
from ranksearch.worker.bank import build_bank
from ranksearch.worker.calibrate import calibrate
from ranksearch.worker.checkpoint import export
from ranksearch.worker.evaluate import Evaluation
from ranksearch.worker.models import load_model
from ranksearch.worker.prefix import PrefixModel
from ranksearch.worker.targets import check_weights, find_targets

EXCEEDED = 77


def anonymous() -> int:
    """Bytes of memory that is no file's."""
    with open("/proc/self/statm") as file:
        _, resident, shared, *_ = map(int, file.read().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


class Cap:
    """Watches the process."""

    def __init__(self, budget: int) -> None:
        self.base, self.budget, self.stage = anonymous(), budget, "load"
        self.peaks: dict[str, int] = {}
        self.seconds: dict[str, float] = {}  # until the end of each stage
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        begun = time.monotonic()
        while True:
            self.seconds[self.stage] = round(time.monotonic() - begun, 1)
            used = anonymous() - self.base
            self.peaks[self.stage] = max(used, self.peaks.get(self.stage, 0))
            if used > self.budget:
                print(f"{self.stage}: {used} bytes, more than {self.budget}; before: {self.peaks}", file=sys.stderr)
                os._exit(EXCEEDED)
            time.sleep(0.001)


def main(folder: Path, budget: int, section_bytes: int) -> None:
    load_model(folder)  # libraries import and set up much when they are first used
    torch.linalg.svd(torch.ones(64, 64, dtype=torch.float64))
    gc.collect()
    cap = Cap(budget)
    model, tokenizer = load_model(folder)
    check_weights(model)
    targets = find_targets(model)
    text = torch.arange(8 * 64).mul(37).remainder(101).view(8, 64)
    cap.stage = "calibrate"
    calibration = calibrate(
        model,
        targets,
        text,
        gradients=True,
        batch_tokens=128,
        memory_limit=section_bytes,
        file=folder / "calibration",
        scratch=folder,
    )
    cap.stage = "factor"
    bank = build_bank(model, targets, calibration, metric="two_sided", file=folder / "bank")
    cap.stage = "trial"
    space = RankSpace(targets=targets)
    ranks = space.as_dict(Allocator(space, bank.spectra).prior(0.5))
    evaluation = Evaluation(model, text, batch_tokens=128, chunk_tokens=128, scratch=folder)
    with PrefixModel(model, bank, targets) as prefix:
        prefix.set_ranks(ranks)
        trial = evaluation.score(model)
    cap.stage = "export"
    export(
        folder / "checkpoint",
        model=model,
        tokenizer=tokenizer,
        pairs=bank.pair,
        ranks=ranks,
        targets=targets,
        max_shard_bytes=budget // 4,
    )
    cap.stage = "check"
    compressed, _ = load_model(folder / "checkpoint")
    final = evaluation.score(compressed)
    resident = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    print(
        json.dumps(
            {
                "anonymous": cap.peaks,
                "seconds": cap.seconds,
                "budget": budget,
                "weights": sum(p.nbytes for p in model.parameters()),
                "base": cap.base,
                "most_resident": int(resident.group(1)) * 1024 if resident else None,
                "files": {name: (folder / name).stat().st_size for name in ("calibration", "bank")},
                "perplexity": {
                    "dense": evaluation.dense.perplexity,
                    "trial": trial.perplexity,
                    "final": final.perplexity,
                },
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
