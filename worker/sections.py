"""Cutting a model into sections of consecutive blocks whose covariances fit into memory together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ranksearch.search.errors import UnsupportedModel
from ranksearch.search.targets import Target
from ranksearch.worker.placement import fetched
from ranksearch.worker.stream import BlockStream

#: Targets that share their inputs, in groups.
Groups = list[list[Target]]


@dataclass(frozen=True, kw_only=True)
class Section:
    """Blocks that are run together.

    Attributes:
        parts: Which blocks; None for the whole model, run as its own code does.
        passes: Groups of targets to collect in one run; several runs where they do not fit together.
    """

    parts: range | None
    passes: list[Groups]


def plan_sections(model: nn.Module, groups: Groups, ids: Tensor, *, gradients: bool, limit: int) -> list[Section]:
    """Chooses the fewest sections that fit.

    A model that fits as a whole, or whose blocks cannot be run one at a time, is one section.

    Args:
        model: A causal language model.
        groups: Targets that share their inputs, in the model's order.
        ids: Token ids, to try the blocks on.
        gradients: Whether gradient covariances are collected too.
        limit: Bytes of fp32 covariances, and of weights that have to be fetched, to hold at once.
    """
    moments = sum(_moment_bytes(group, gradients) for group in groups)
    if moments <= limit and not fetched(model):
        return [Section(parts=None, passes=[groups])]
    paths = _paths(model, ids[:1, :16])
    if paths is None:
        return [Section(parts=None, passes=_split(groups, gradients, limit))]
    sections: list[Section] = []
    start, together, used = 0, Groups(), 0
    for index, path in enumerate(paths):
        own = [group for group in groups if f"{group[0].name}.".startswith(f"{path}.")]
        size = sum(_moment_bytes(group, gradients) for group in own) + _fetched_bytes(model, path)
        if index > start and used + size > limit:
            sections.append(Section(parts=range(start, index), passes=_split(together, gradients, limit)))
            start, together, used = index, Groups(), 0
        together, used = together + own, used + size
    return [*sections, Section(parts=range(start, len(paths)), passes=_split(together, gradients, limit))]


def _paths(model: nn.Module, ids: Tensor) -> list[str] | None:
    """Module paths of the blocks, if they can be run one at a time on any tokens."""
    try:
        return BlockStream(model, ids, rows=1).paths
    except UnsupportedModel:
        return None


def _split(groups: Groups, gradients: bool, limit: int) -> list[Groups]:
    """Cuts groups into runs that fit, or that hold a single group."""
    runs: list[Groups] = [[]]
    used = 0
    for group in groups:
        size = _moment_bytes(group, gradients)
        if runs[-1] and used + size > limit:
            runs.append([])
            used = 0
        runs[-1].append(group)
        used += size
    return runs


def _moment_bytes(group: Sequence[Target], gradients: bool) -> int:
    outputs: Iterable[Target] = group if gradients else ()
    return 4 * (group[0].in_features ** 2 + sum(target.out_features**2 for target in outputs))


def _fetched_bytes(model: nn.Module, path: str) -> int:
    return sum(p.nbytes for p in model.get_submodule(path).parameters()) if fetched(model) else 0
