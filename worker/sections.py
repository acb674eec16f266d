"""Cutting a model into sections of consecutive blocks for which what is collected fits into memory together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ranksearch.search.errors import UnsupportedModel
from ranksearch.search.targets import Target
from ranksearch.worker.hardware import free_bytes
from ranksearch.worker.placement import fetched
from ranksearch.worker.spread import devices_of
from ranksearch.worker.stream import BlockStream

#: Bytes of what is collected at once, at most: more sections cost little by then.
MOST_ON_DEVICE = 4 << 30

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


def plan_sections(
    model: nn.Module,
    groups: Groups,
    ids: Tensor,
    *,
    bytes_of: Callable[[Sequence[Target]], int],
    limit: int | None = None,
) -> list[Section]:
    """Chooses the fewest sections that fit.

    A model that fits as a whole, or whose blocks cannot be run one at a time, is one section.

    Args:
        model: A causal language model.
        groups: Targets that share their inputs, in the model's order.
        ids: Token ids, to try the blocks on.
        bytes_of: Of what is collected for one group.
        limit: Bytes of that, and of weights that have to be fetched, to hold at once. None is `MOST_ON_DEVICE`, or half
            of what is free if less.
    """
    if limit is None:
        limit = min(MOST_ON_DEVICE, min(map(free_bytes, devices_of(model))) // 2)
    moments = sum(bytes_of(group) for group in groups)
    if moments <= limit and not fetched(model):
        return [Section(parts=None, passes=[groups])]
    paths = _paths(model, ids[:1, :16])
    if paths is None:
        return [Section(parts=None, passes=_split(groups, bytes_of, limit))]
    sections: list[Section] = []
    start, together, used = 0, Groups(), 0
    for index, path in enumerate(paths):
        own = [group for group in groups if f"{group[0].name}.".startswith(f"{path}.")]
        size = sum(bytes_of(group) for group in own) + _fetched_bytes(model, path)
        if index > start and used + size > limit:
            sections.append(Section(parts=range(start, index), passes=_split(together, bytes_of, limit)))
            start, together, used = index, Groups(), 0
        together, used = together + own, used + size
    return [*sections, Section(parts=range(start, len(paths)), passes=_split(together, bytes_of, limit))]


def _paths(model: nn.Module, ids: Tensor) -> list[str] | None:
    """Module paths of the blocks, if they can be run one at a time on any tokens."""
    try:
        return BlockStream(model, ids, rows=1).paths
    except UnsupportedModel:
        return None


def _split(groups: Groups, bytes_of: Callable[[Sequence[Target]], int], limit: int) -> list[Groups]:
    """Cuts groups into runs that fit, or that hold a single group."""
    runs: list[Groups] = [[]]
    used = 0
    for group in groups:
        size = bytes_of(group)
        if runs[-1] and used + size > limit:
            runs.append([])
            used = 0
        runs[-1].append(group)
        used += size
    return runs


def _fetched_bytes(model: nn.Module, path: str) -> int:
    return sum(p.nbytes for p in model.get_submodule(path).parameters()) if fetched(model) else 0
