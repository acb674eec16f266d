"""What a job would take and give, before anything runs: arithmetic on shapes. A guess errs upwards."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Final

import numpy as np
from pydantic import BaseModel, Field

from ranksearch.search.errors import ImpossibleBudget, InvalidInput
from ranksearch.search.gradients import GRADIENT_TOKENS, MEASURED
from ranksearch.search.plan import check_budget, check_trials, sampled_space, sampler_of
from ranksearch.search.probes import planned_trials
from ranksearch.search.space import RankSpace, uniform
from ranksearch.search.spec import TRAINING_TOKENS, JobSpec, scoring_tokens
from ranksearch.search.targets import Target
from ranksearch.service.models import Tensors, find_targets
from ranksearch.service.problems import at
from ranksearch.service.weight_files import WeightFiles, width_of

_TRIAL_TOKENS_AT_ONCE: Final = 4096
_MOMENTS_AT_ONCE: Final = 4 << 30  # bytes; more are collected section by section
_SVD_OPERATIONS: Final = 25  # of one m x n decomposition, in units of m n min(m, n): two eigendecompositions and an SVD


class Parameters(BaseModel):
    """Counts of numbers."""

    model: int
    targets: int


class TargetKind(BaseModel):
    """Matrices of one kind and shape."""

    kind: str
    count: int
    out_features: int
    in_features: int
    break_even_rank: int = Field(description="The largest rank stored in fewer parameters than the dense matrix.")


class BudgetEstimate(BaseModel):
    """What one budget leaves; a budget of latency says nothing of sizes before a worker has measured."""

    kept: float
    target_parameters: int | None
    model_parameters: int | None
    checkpoint_bytes: int | None = Field(description="Of the weight files.")


class Memory(BaseModel):
    """Peaks in bytes on the worker's device."""

    model_bytes: int
    calibrate_bytes: int
    factor_bytes: int
    trial_bytes: int


class Disk(BaseModel):
    """Bytes in the artifact store."""

    calibration_bytes: int
    factor_bank_bytes: int
    checkpoints_bytes: int
    total_bytes: int


class Estimate(BaseModel):
    """What a job would take and give."""

    parameters: Parameters
    model_bytes: int
    minimum_kept: float | None = Field(
        description="The smallest budget that can be asked for; null for budgets of latency, as it is to be measured."
    )
    break_even: list[TargetKind]
    budgets: list[BudgetEstimate]
    memory: Memory
    disk: Disk
    minutes: dict[str, float] | None = Field(description="Per stage; null while no worker has measured its speed.")


def rank_space(spec: JobSpec, tensors: Tensors) -> RankSpace:
    """The rank vectors the job may use.

    Raises:
        UnsupportedModel: Nothing to compress.
        InvalidInput: A pattern of `keep_dense` matches no target.
    """
    with at("/model/source"):
        targets = find_targets(tensors)
    with at("/method/keep_dense"):
        return RankSpace.of(spec.method, targets)


def check_budgets(spec: JobSpec, space: RankSpace) -> None:
    """Refuse impossible budgets, each with its place and the smallest that works, and searches of too many trials.

    Raises:
        ImpossibleBudget: No rank vector meets one of them.
        InvalidInput: The preset would take more trials than a budget may have.
    """
    if spec.budget.of == "latency":
        return  # only a worker that has measured can tell
    for place, kept in enumerate(spec.budget.kept):
        with at(f"/budget/kept/{place}"):
            check_budget(spec, space, kept)
    with at("/method/preset"):
        check_trials(spec, space, spec.budget.kept)


def with_kept(spec: JobSpec, tensors: Tensors) -> JobSpec:
    """The spec with the `kept` that its budgets in bytes come to; a spec that names none as it is.

    Each is the largest whose weight files fit, rounded down to `DIGITS` digits.

    Raises:
        ImpossibleBudget: No rank vector is as small; `data` holds `bytes`, `minimum_bytes`.
        InvalidInput: The model fits as it is, two budgets come to the same, or another `kept` was named as well.
        UnsupportedModel: Nothing to compress.
    """
    if spec.budget.bytes is None:
        return spec
    space, kept = rank_space(spec, tensors), list[float]()
    files, smallest = WeightFiles.of(spec, space, tensors), sampled_space(space, sampler_of(spec) or "")
    for place, most in enumerate(spec.budget.bytes):
        with at(f"/budget/bytes/{place}"):
            share = files.kept(most)
            if share >= 1:
                raise InvalidInput(
                    f"the model takes {files.dense} bytes as it is, so {most} bytes need nothing compressed; ask for "
                    "fewer",
                    dense_bytes=files.dense,
                )
            if space.budget(share) < smallest.minimum:
                least = files.bytes(smallest.minimum_kept)
                raise ImpossibleBudget(
                    f"{most} bytes cannot be reached: the smallest allowed ranks take up to {least}; ask for bytes >= "
                    f"{least}",
                    bytes=most,
                    minimum_bytes=least,
                )
            if share in kept:
                other = spec.budget.bytes[kept.index(share)]
                raise InvalidInput(f"{most} and {other} bytes both come to kept {share:g}; name one of them")
            kept.append(share)
    if spec.budget.kept not in ([], kept):
        with at("/budget/kept"):
            raise InvalidInput("name kept or bytes, not both")
    return spec.model_copy(update={"budget": spec.budget.model_copy(update={"kept": kept})})


def estimate(spec: JobSpec, tensors: Tensors, flops: float | None) -> Estimate:
    """Everything at once; `flops` is the speed of the fastest worker, operations per second."""
    spec = with_kept(spec, tensors)
    space = rank_space(spec, tensors)
    check_budgets(spec, space)
    model = sum(tensor.parameters for tensor in tensors.values())
    stored = sum(tensor.size for tensor in tensors.values())
    width, files = width_of(spec.model.dtype, tensors), WeightFiles.of(spec, space, tensors)
    timed = spec.budget.of == "latency"
    budgets = [_budget(kept, space, model, files) for kept in spec.budget.kept]
    if timed:
        unknown = {"target_parameters": None, "model_parameters": None, "checkpoint_bytes": None}
        budgets = [budget.model_copy(update=unknown) for budget in budgets]
    memory, disk = _memory(spec, space, model, width), _disk(spec, space, files, width)
    return Estimate(
        parameters=Parameters(model=model, targets=space.parameters),
        model_bytes=stored,
        minimum_kept=None if timed else sampled_space(space, sampler_of(spec) or "").minimum_kept,
        break_even=_break_even(space),
        budgets=budgets,
        memory=memory,
        disk=disk,
        minutes=_minutes(spec, space, model, flops) if flops else None,
    )


def _budget(kept: float, space: RankSpace, model: int, files: WeightFiles) -> BudgetEstimate:
    targets = space.budget(kept)
    return BudgetEstimate(
        kept=kept,
        target_parameters=targets,
        model_parameters=model - space.parameters + targets,
        checkpoint_bytes=files.bytes(kept),
    )


def _break_even(space: RankSpace) -> list[TargetKind]:
    counts: dict[tuple[str, int, int, int], int] = defaultdict(int)
    for target in space.targets:
        counts[target.kind, target.out_features, target.in_features, target.largest_rank(space.form)] += 1
    return [
        TargetKind(kind=kind, count=count, out_features=rows, in_features=columns, break_even_rank=rank)
        for (kind, rows, columns, rank), count in counts.items()
    ]


def _moment_numbers(spec: JobSpec, targets: Sequence[Target]) -> int:
    """Entries of what is collected: of inputs once per group that shares them, of gradients per target."""
    metric = spec.method.metric
    groups = {(t.depth, t.name.rpartition(".")[0], t.in_features) for t in targets}
    square = sum(columns**2 for *_, columns in groups)
    entries: dict[str, int] = {
        "weight": 0,
        "feature": square,
        "two_sided": square + sum(t.out_features**2 for t in targets),
        "centred": square,
        "activation": sum(columns for *_, columns in groups),
        "fisher": sum(t.in_features for t in targets),
        "attribution": sum(t.parameters for t in targets),
    }
    return entries[metric]


def _bank_numbers(spec: JobSpec, targets: Sequence[Target]) -> int:
    every = spec.method.all_components
    return sum((t.full_rank if every else t.break_even) * t.marginal for t in targets)


def _memory(spec: JobSpec, space: RankSpace, model: int, width: int) -> Memory:
    weights = model * width
    widest = max(max(t.in_features, t.out_features) for t in space.targets)
    activations = _TRIAL_TOKENS_AT_ONCE * widest * 16 * width
    copies = 2 if spec.method.metric == "centred" else 1  # the average over pools, and the pool that is open
    calibrate = weights + min(4 * copies * _moment_numbers(spec, space.targets), _MOMENTS_AT_ONCE) + activations
    factor = weights + max(8 * 6 * max(t.in_features, t.out_features) ** 2 for t in space.targets)
    trial = weights + width * _bank_numbers(spec, space.targets) + activations
    return Memory(model_bytes=weights, calibrate_bytes=calibrate, factor_bytes=factor, trial_bytes=trial)


def _disk(spec: JobSpec, space: RankSpace, files: WeightFiles, width: int) -> Disk:
    calibration = 4 * _moment_numbers(spec, space.targets)
    bank = width * _bank_numbers(spec, space.targets)
    checkpoints = sum(files.bytes(kept) for kept in _at_most(spec))
    return Disk(
        calibration_bytes=calibration,
        factor_bank_bytes=bank,
        checkpoints_bytes=checkpoints,
        total_bytes=calibration + bank + checkpoints,
    )


def _at_most(spec: JobSpec, whole: float = 1.0) -> list[float]:
    """The share of the parameters that each budget keeps; `whole` for budgets of latency, which do not say."""
    return [whole if spec.budget.of == "latency" else kept for kept in spec.budget.kept]


def _multiplied(space: RankSpace, kept: float) -> int:
    """Parameters of the targets that a trial multiplies with: it runs two factors whatever the form."""
    if space.form == "factored":
        return space.budget(kept)
    ranks = uniform(space, kept)
    return int(np.where(ranks < space.full_ranks, ranks * space.marginals, space.dense_costs).sum())


def _searched(spec: JobSpec, space: RankSpace, model: int) -> int:
    """Parameters that the trials of all budgets multiply a token with."""
    trial = [model - space.parameters + _multiplied(space, kept) for kept in _at_most(spec)]
    # where only measuring tells which vectors are probed, it is as many as at the largest budget of parameters
    trials = [planned_trials(spec.method.preset, spec.search.trials, space, kept) for kept in _at_most(spec, 0.99)]
    if spec.method.preset == "asvd":
        # a probe leaves all targets but one dense, and serves every budget
        return (max(trials) - 1) * model + sum(trial)
    if sampler_of(spec) == "ranksearch":  # gradients: forward and back, on as much text as this
        extra = math.ceil(2 * max(1.0, GRADIENT_TOKENS / _evaluated(spec)))
        trials = [count + extra * min(MEASURED, count) for count in trials]
    return sum(count * cost for count, cost in zip(trials, trial, strict=True))


def _evaluated(spec: JobSpec) -> int:
    """Tokens of the evaluation."""
    return spec.evaluation.sequences * (spec.evaluation.sequence_length or spec.calibration.sequence_length)


def _refined_tokens(spec: JobSpec, tokens: int) -> float:
    """Operations of the steps after the search, per parameter of the model, for `tokens` of calibration text."""
    # three strengths, each about ten runs of every block; training: the teacher once, the student forward and back
    once = {
        "sequential": 3 * 10 * 2 * tokens,
        "distill": 10 * TRAINING_TOKENS,
        "soco": 18 * scoring_tokens(spec.calibration.sequence_length),
    }
    return sum(once[step] for step in spec.method.steps)


def _minutes(spec: JobSpec, space: RankSpace, model: int, flops: float) -> dict[str, float]:
    """Operations / speed: 2 per parameter and token forward, twice that backward."""
    calibration = spec.calibration
    tokens = calibration.sequences * calibration.sequence_length
    evaluated = _evaluated(spec)
    tested = sum((test.sequences or 512) * calibration.sequence_length for test in spec.evaluation.test)
    targets = space.targets
    # forward, or forward and back; the gradients of weights are one more product
    passes = {"weight": 0, "two_sided": 6, "fisher": 8, "attribution": 6}.get(spec.method.metric, 2)
    operations = {
        "calibrate": tokens * (passes * model + 2 * _moment_numbers(spec, targets)),
        "factor": sum(_SVD_OPERATIONS * t.parameters * t.full_rank for t in targets),
        "search": 2 * evaluated * (model + _searched(spec, space, model)),
        "finish": (4 * (tested + evaluated) + _refined_tokens(spec, tokens)) * model * len(spec.budget.kept),
    }
    minutes = {stage: round(count / flops / 60, 3) for stage, count in operations.items()}
    return {**minutes, "total": round(sum(minutes.values()), 3)}
