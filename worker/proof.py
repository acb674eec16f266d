"""The proof of a checkpoint: it is exported, read back from its files, and scored beside the vectors it must beat."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ranksearch.search.spec import JobSpec
from ranksearch.worker.bank import FactorBank
from ranksearch.worker.blocks import CALIBRATION, EVALUATION, TEST
from ranksearch.worker.checkpoint import as_report, dense_sizes, export
from ranksearch.worker.evaluate import Evaluation, Scores
from ranksearch.worker.models import load_model
from ranksearch.worker.prefix import PrefixModel
from ranksearch.worker.speed import measure
from ranksearch.worker.targets import find_targets

Vectors = Mapping[str, Mapping[str, int]]


def prove(
    model: Any,
    tokenizer: Any,
    bank: FactorBank,
    blocks: Mapping[str, Tensor],
    vectors: Vectors,
    *,
    spec: JobSpec,
    source: Path,
    folder: str,
    device: torch.device,
    device_name: str,
    progress: Callable[[float], None],
) -> dict[str, Any]:
    """Export the vector `best`, load the folder again, and score it beside the others on every text.

    Args:
        model: The dense model, its targets plain.
        tokenizer: Its tokenizer.
        bank: Its factors.
        blocks: Name -> token ids, `blocks x length`.
        vectors: `uniform`, `prior` and `best`, each target -> rank.
        spec: The job's.
        source: Folder of the original model.
        folder: Where the checkpoint goes.
        device: Where to compute.
        device_name: For the report.
        progress: Told the fraction done.

    Returns:
        `scores` (row -> `evaluation` and `test`), `parameters`, `bytes`, `speed` before and after, and the head of the
        original model's README as `card`.
    """
    targets, settings = find_targets(model), spec.export
    written = export(
        folder,
        model=model,
        tokenizer=tokenizer,
        pairs=bank.pair,
        ranks=dict(vectors["best"]),
        targets=targets,
        dtype=settings.dtype,
        max_shard_bytes=settings.max_shard_bytes,
    )
    progress(0.1)
    final, _ = load_model(folder, device=device)
    seconds = float(os.environ.get("RANKSEARCH_SPEED_SECONDS") or 3.0)
    before, after = (measure(each, device, seconds=seconds) for each in (model, final))
    progress(0.2)
    scores: dict[str, dict[str, Any]] = {row: {"test": {}} for row in ("dense", *vectors, "final")}
    texts = [name for name in blocks if name != CALIBRATION]
    for index, name in enumerate(texts):
        for row, score in _rows(model, final, bank, blocks[name], vectors).items():
            place, key = (scores[row], name) if name == EVALUATION else (scores[row]["test"], name.removeprefix(TEST))
            place[key] = score
        progress(0.2 + 0.8 * (index + 1) / len(texts))
    return {
        "scores": scores,
        **as_report(written, dense_sizes(model, targets, source)),
        "speed": {"device": device_name, "before": before, "after": after},
        "card": _card(source),
    }


def brief(scores: Scores) -> dict[str, float]:
    """The scores that are kept."""
    return {"perplexity": scores.perplexity, "kl": scores.kl}


def _rows(model: Any, final: Any, bank: FactorBank, blocks: Tensor, vectors: Vectors) -> dict[str, dict[str, float]]:
    evaluation = Evaluation(model, blocks)
    rows = {"dense": brief(evaluation.dense), "final": brief(evaluation.score(final))}
    known: dict[tuple[int, ...], dict[str, float]] = {}
    with PrefixModel(model, bank, find_targets(model)) as prefix:
        for row, ranks in vectors.items():
            prefix.set_ranks(ranks)
            vector = tuple(ranks.values())
            rows[row] = known.get(vector) or known.setdefault(vector, brief(evaluation.score(model)))
    return rows


def _card(source: Path) -> str | None:
    """The head of the original model's README, which names its licence."""
    try:
        return (source / "README.md").read_text("utf-8", errors="replace")[:8192]
    except OSError:
        return None
