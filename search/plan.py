"""Whether a spec's search can be done, from the shapes of the targets alone: before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ranksearch.search.errors import ImpossibleBudget, InvalidInput
from ranksearch.search.presets import PRESETS
from ranksearch.search.probes import planned_trials
from ranksearch.search.space import RankSpace
from ranksearch.search.spec import MOST_TRIALS, JobSpec

ATTENTION = ("q_proj", "k_proj", "v_proj")


def has_attention(space: RankSpace) -> bool:
    """Whether query, key and value have matrices of their own, under their usual names."""
    return set(ATTENTION) <= {t.kind.rpartition(".")[2] for t in space.targets}


def sampled_space(space: RankSpace, sampler: str) -> RankSpace:
    """The vectors that a sampler draws from: Bolaco leaves value matrices dense, every other one takes them all."""
    if sampler in ("bolaco", "bolaco-20") and has_attention(space):
        return replace(space, keep_dense=(*space.keep_dense, "*v_proj"))
    return space


def check_sampler(space: RankSpace, sampler: str, kept: float) -> None:
    """Refuse a budget that no vector meets which the sampler may draw.

    Raises:
        ImpossibleBudget: `data` holds `kept`, `minimum_kept`.
    """
    space.check_budget(kept)
    sampled = sampled_space(space, sampler)
    if sampled.budget(kept) < sampled.minimum:
        raise ImpossibleBudget(
            f"kept {kept:g} cannot be reached by {sampler}, which keeps the value matrices (v_proj) dense; ask for "
            f"kept >= {sampled.minimum_kept:g}.",
            kept=kept,
            minimum_kept=sampled.minimum_kept,
        )


def sampler_of(spec: JobSpec) -> str | None:
    """The sampler that a job searches with; None where its preset does not search."""
    return spec.search.sampler if PRESETS[spec.method.preset].ranks == "search" else None


def check_budget(spec: JobSpec, space: RankSpace, kept: float) -> None:
    """Refuse a budget that the job's method cannot meet.

    Raises:
        ImpossibleBudget: No rank vector meets it; `data` holds `kept`, `minimum_kept`.
    """
    check_sampler(space, sampler_of(spec) or "", kept)


def check_searches(spec: JobSpec, space: RankSpace) -> None:
    """Refuse budgets and presets that cannot be searched.

    Of budgets of latency only a space with prices tells, which comes late: one that can be met is enough for the job to
    go on, and the others fail each by itself.

    Raises:
        ImpossibleBudget: No rank vector meets a budget, or any budget of latency; `data` holds `kept`, `minimum_kept`.
        InvalidInput: The preset would take more trials than a budget may have.
    """
    late = spec.budget.of == "latency"
    if late and space.prices is None:
        return
    possible, refused = [], None
    for kept in spec.budget.kept:
        try:
            check_budget(spec, space, kept)
            possible.append(kept)
        except ImpossibleBudget as error:
            refused = refused or error
    if refused is not None and not (late and possible):
        raise refused
    check_trials(spec, space, possible)


def check_trials(spec: JobSpec, space: RankSpace, budgets: Iterable[float]) -> None:
    """Refuse a preset that would measure more vectors of this model than a budget may have trials.

    Raises:
        InvalidInput: `data` holds the `trials` and the `most` allowed.
    """
    preset = spec.method.preset
    planned = max(planned_trials(preset, spec.search.trials, space, kept) for kept in budgets)
    if planned > MOST_TRIALS:
        raise InvalidInput(
            f"preset {preset} would take {planned} trials for the {len(space.targets)} targets of this model, and a "
            f"budget may have {MOST_TRIALS}; keep targets dense (method.keep_dense), or choose another preset.",
            trials=planned,
            most=MOST_TRIALS,
        )
