"""The proof of a checkpoint: it is exported, read back from its files, and scored beside the vectors it must beat."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ranksearch.search.spec import JobSpec
from ranksearch.worker.bank import FactorBank
from ranksearch.worker.blocks import CALIBRATION, EVALUATION, TEST, TRAINING
from ranksearch.worker.checkpoint import Pairs, as_report, dense_sizes, export
from ranksearch.worker.evaluate import Evaluation, Scores
from ranksearch.worker.models import auto_class, load_model
from ranksearch.worker.paired import difference
from ranksearch.worker.plain import as_loaded
from ranksearch.worker.prefix import PrefixModel
from ranksearch.worker.refine import Refined
from ranksearch.worker.speed import measure
from ranksearch.worker.targets import find_targets

Vectors = Mapping[str, Mapping[str, int]]
Rows = dict[str, dict[str, Scores]]  # row -> text -> scores


def prove(
    model: Any,
    tokenizer: Any,
    take_bank: Callable[[], FactorBank],
    blocks: Mapping[str, Tensor],
    vectors: Vectors,
    *,
    refined: Refined | None = None,
    spec: JobSpec,
    source: Path,
    folder: Path,
    devices: Sequence[torch.device],
    device_name: str,
    progress: Callable[[float], None],
) -> dict[str, Any]:
    """Export the vector `best` or what was made of it, load the folder again, and score it beside the others.

    The bank is let go of before the checkpoint is loaded, so that the device never holds both.

    Args:
        model: The dense model, its targets plain.
        tokenizer: Its tokenizer.
        take_bank: Gives its factors away; called once.
        blocks: Name -> token ids, `blocks x length`.
        vectors: `uniform`, `prior` and `best`, each target -> rank.
        refined: What is exported instead of `best`.
        spec: The job's.
        source: Folder of the original model.
        folder: Where the checkpoint goes.
        devices: Where to compute, the main one first.
        device_name: For the report.
        progress: Told the fraction done.

    Returns:
        `scores` (row -> `evaluation` and `test`), what `final` gains `against` other rows, `parameters`, `bytes`,
        `speed` before and after, the head of the original model's README as `card`, and the name of the class that
        loads the checkpoint as `auto_class`.
    """
    targets, settings = find_targets(model), spec.export
    read = [name for name in blocks if name not in (CALIBRATION, TRAINING)]
    texts = {name: Evaluation(model, blocks[name], scratch=folder.parent) for name in read}
    progress(0.2)
    bank = take_bank()
    rows = {"dense": {name: text.dense for name, text in texts.items()}, **_compare(model, bank, texts, vectors)}
    progress(0.6)
    pairs = refined.pair if refined else bank.pair
    biases = partial(_bias, model, bank) if bank.means and not refined else None
    written = export(
        folder,
        model=model,
        tokenizer=tokenizer,
        # pivot rows are chosen in double precision, which takes long on a CPU
        pairs=_on(devices[0], pairs) if spec.method.form == "pivoted" else pairs,
        ranks=dict(refined.ranks if refined else vectors["best"]),
        targets=targets,
        biases=biases,
        form=spec.method.form,
        dtype=settings.dtype,
        max_shard_bytes=settings.max_shard_bytes,
    )
    del bank, pairs, biases
    progress(0.7)
    final, _ = load_model(folder, device=devices, trust_remote_code=spec.model.trust_remote_code)
    rows["final"] = {name: text.score(final) for name, text in texts.items()}
    progress(0.9)
    seconds = float(os.environ.get("RANKSEARCH_SPEED_SECONDS") or 3.0)
    with as_loaded(model):
        before = measure(model, devices[0], seconds=seconds)
    after = measure(final, devices[0], seconds=seconds)
    return {
        "scores": {row: _by_text(_beside(scores, rows["dense"])) for row, scores in rows.items()},
        "against": _against(rows),
        **as_report(written, dense_sizes(model, targets, source)),
        "speed": {"device": device_name, "before": before, "after": after},
        "card": _card(source),
        "auto_class": auto_class(folder, spec.model.trust_remote_code).__name__,
    }


def _bias(model: Any, bank: FactorBank, name: str, rank: int) -> Tensor:
    return bank.bias(name, rank, model.get_submodule(name))


def _on(device: torch.device, pairs: Pairs) -> Pairs:
    """Each pair moved to a device when it is asked for."""

    def moved(name: str, rank: int) -> tuple[Tensor, Tensor]:
        left, right = pairs(name, rank)
        return left.to(device), right.to(device)

    return moved


def brief(scores: Scores) -> dict[str, float]:
    """The scores that are kept."""
    return {"perplexity": scores.perplexity, "kl": scores.kl}


def _compare(model: Any, bank: FactorBank, texts: Mapping[str, Evaluation], vectors: Vectors) -> Rows:
    """Scores of each vector, run through the bank."""
    known: dict[tuple[int, ...], dict[str, Scores]] = {}
    with PrefixModel(model, bank, find_targets(model)) as prefix:
        for ranks in vectors.values():
            if (vector := tuple(ranks.values())) not in known:
                prefix.set_ranks(ranks)
                known[vector] = {name: text.score(model) for name, text in texts.items()}
    return {row: known[tuple(ranks.values())] for row, ranks in vectors.items()}


def _beside(scores: Mapping[str, Scores], dense: Mapping[str, Scores]) -> dict[str, dict[str, Any]]:
    """Text -> what is kept of its scores, with `excess`: ln(perplexity / dense perplexity), and its interval."""
    found = {}
    for name, score in scores.items():
        excess, interval = difference(score.nll, dense[name].nll)
        found[name] = {**brief(score), "excess": excess, "excess_interval": interval}
    return found


def _against(rows: Rows) -> dict[str, dict[str, Any]]:
    """What `final` gains on `uniform` and `prior` on the first test text, nats per token; empty without such a text.

    Not on the evaluation text: the search chose by it.
    """
    text = next((name for name in rows["final"] if name.startswith(TEST)), None)
    if text is None:
        return {}
    found = {}
    for row in ("uniform", "prior"):
        gain, interval = difference(rows[row][text].nll, rows["final"][text].nll)
        found[row] = {"gain": gain, "interval": interval}
    return found


def _by_text(scores: Mapping[str, Any]) -> dict[str, Any]:
    tests = {name.removeprefix(TEST): score for name, score in scores.items() if name != EVALUATION}
    return {EVALUATION: scores[EVALUATION], "test": tests}


def _card(source: Path) -> str | None:
    """The head of the original model's README, which names its licence."""
    try:
        return (source / "README.md").read_text("utf-8", errors="replace")[:8192]
    except OSError:
        return None
