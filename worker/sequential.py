"""Error-propagated re-solving: after a search every target is solved again, in the order of the network, against the
inputs the compressed model really feeds it.

Notation, per target y = W x of rank r:
    x     its input in the dense model
    z     its input in the compressed model, whose targets before it are solved already
    B     `n x n`, E[z z'], damped
    e     what the dense output is ahead of W z, per token
    s     strength, 0 to 1

The best matrix for what comes in is `W + E[e z'] B^-1`; of the correction a share s is taken, because all of it follows
the calibration text too closely [QEP2025]_, and the result is truncated to rank r in the metric of B and of the bank's
output gradients. Where a target writes straight into the stream of hidden states, e is what the stream lacks, so that
the errors of everything before are made up for as well; elsewhere e = W (x - z). Which of the two it is shows in the
numbers: with the later targets of the block silenced, a change of the target's output must come out of the block as it
is.

Targets that see a choice of the tokens (experts) keep their factors: dense and compressed model choose differently.

.. [QEP2025] Arai and Ichikawa, Quantization Error Propagation, 2025, https://arxiv.org/abs/2504.09629
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.search.targets import Target
from ranksearch.worker.factors import factor
from ranksearch.worker.linalg import DAMPING, Root, square_root
from ranksearch.worker.placement import held
from ranksearch.worker.prefix import Pair, PrefixModel
from ranksearch.worker.spill import Spill
from ranksearch.worker.spread import device_of
from ranksearch.worker.stream import BlockStream

#: Tokens per forward pass of a block.
BATCH_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """Factors after a sweep through the network.

    Attributes:
        pairs: Factored target -> `left` `m x r` and `right` `r x n`, in the model's dtype.
        facts: Target that was solved again -> what it was matched to (`stream` or `output`), and the damping.
    """

    pairs: Mapping[str, Pair]
    facts: Mapping[str, Mapping[str, Any]]


@torch.no_grad()
def resolve(
    prefix: PrefixModel,
    pairs: Mapping[str, Pair],
    targets: Sequence[Target],
    blocks: Tensor,
    *,
    leader: Mapping[str, str],
    gradients: Mapping[str, Tensor],
    strength: float,
    damping: float = DAMPING,
    scratch: str | Path | None = None,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Resolved:
    """Solve every factored target again, block by block.

    Args:
        prefix: The dense model with its targets swapped; runs dense afterwards.
        pairs: Factored target -> `left` `m x r` and `right` `r x n`; the other targets are dense.
        targets: All targets.
        blocks: Token ids of the calibration, `sequences x length`.
        leader: Target -> one of the targets that share its input, the same for all of them.
        gradients: Target -> `m x m` covariance of its output gradients; empty for the metrics without.
        strength: Share of the correction that is taken.
        damping: Relative clamp of the eigenvalues of B.
        scratch: Folder on a disk for the hidden states between blocks; the system's own when None.
        progress: Told the fraction done.

    Raises:
        UnsupportedModel: The model's blocks cannot be run one at a time.
        NumericalError: A covariance is not finite; names the target.
        OSError: The disk is full.
    """
    prefix.set_dense()
    sweep = _Sweep(prefix, pairs, gradients, blocks, strength=strength, damping=damping, scratch=scratch)
    for index, path in enumerate(sweep.stream.paths):
        inside = [target for target in targets if target.name.startswith(f"{path}.")]
        with held(prefix.model, [path]):
            sweep.solve_block(index, _by_input(inside, leader))
        progress((index + 1) / len(sweep.stream.paths))
    prefix.set_dense()
    return Resolved(pairs=sweep.pairs, facts=sweep.facts)


def _by_input(targets: Sequence[Target], leader: Mapping[str, str]) -> list[list[Target]]:
    groups: dict[str, list[Target]] = {}
    for target in targets:
        groups.setdefault(leader[target.name], []).append(target)
    return list(groups.values())


class _Sweep:
    """The two models' hidden states at the block that is being solved, and the factors so far."""

    def __init__(
        self,
        prefix: PrefixModel,
        pairs: Mapping[str, Pair],
        gradients: Mapping[str, Tensor],
        blocks: Tensor,
        *,
        strength: float,
        damping: float,
        scratch: str | Path | None,
    ) -> None:
        self._prefix, self._gradients, self._scratch = prefix, gradients, scratch
        self._device = next(prefix.model.parameters()).device  # of the block that is being solved
        self._strength, self._damping = strength, damping
        self.stream = BlockStream(prefix.model, blocks, rows=max(1, BATCH_TOKENS // blocks.shape[1]))
        self.pairs, self.facts = dict(pairs), dict[str, dict[str, Any]]()
        self._solved: dict[str, Pair] = {}  # what the compressed model runs by now
        self._dense = self._stored(self.stream.embed())
        self._compressed = self._dense

    def solve_block(self, index: int, groups: Sequence[Sequence[Target]]) -> None:
        self._device = device_of(self._prefix.model, self.stream.paths[index])
        groups = self.stream.in_order(index, self._first(), {group[0].name: group for group in groups})
        for place, group in enumerate(groups):
            factored = [target for target in group if target.name in self.pairs]
            later = [target.name for after in groups[place + 1 :] for target in after]
            if factored:
                self._solve(index, group, factored, later)
            self._solved |= {target.name: self.pairs[target.name] for target in factored}
        self._run_dense()
        dense = self._stored(self.stream.run(index, hidden) for hidden, _ in self._batches())
        self._run_compressed()
        self._compressed = self._stored(self.stream.run(index, hidden) for _, hidden in self._batches())
        self._dense = dense

    def _stored(self, hidden: Iterable[Tensor]) -> Spill:
        spill = Spill(self._scratch)
        for batch in hidden:
            spill.append([batch])
        return spill

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Hidden states of the dense and of the compressed model, batch by batch."""
        for index in range(len(self._dense)):
            yield self._dense[index][0].to(self._device), self._compressed[index][0].to(self._device)

    def _first(self) -> Tensor:
        return self._dense[0][0].to(self._device)

    def _solve(self, index: int, group: Sequence[Target], factored: Sequence[Target], later: Sequence[str]) -> None:
        leader = group[0].name
        into_stream = len(group) == 1 and self._writes_to_stream(index, leader, later)
        moments = self._moments(index, leader, later if into_stream else None)
        if moments is None:
            return
        B, error = moments
        root = square_root(B, damping=self._damping, name=leader)
        for target in factored:
            left, right = self.pairs[target.name]
            W = self._prefix.dense_weight(target.name).to(self._device, torch.float64)
            W = W + self._strength * root.divide(error if into_stream else W @ error)
            rank = right.shape[0]
            found = factor(W, root, self._gradient_root(target), components=rank, name=target.name)
            self.pairs[target.name] = (found.left[:rank].mT.to(left), found.right[:rank].to(right))
            matched = "stream" if into_stream else "output"
            self.facts[target.name] = {"matched": matched, "damping": self._damping, **found.facts}

    def _gradient_root(self, target: Target) -> Root | None:
        G = self._gradients.get(target.name)
        return None if G is None else square_root(G.to(self._device), damping=self._damping, name=target.name)

    def _moments(self, index: int, leader: str, later: Sequence[str] | None) -> tuple[Tensor, Tensor] | None:
        """E[z z'] and E[e z'], fp64, for the stream if `later` is given and else for x - z in place of e.

        None when the two models feed the target different tokens, or none.
        """
        second = error = None
        tokens = 0
        for dense, compressed in self._batches():
            seen = self._inputs_and_error(index, leader, later, dense, compressed)
            if seen is None:
                return None
            z, e = (part.flatten(0, -2).float() for part in seen)
            if second is None or error is None:
                second, error = z.new_zeros(z.shape[1], z.shape[1]), z.new_zeros(e.shape[1], z.shape[1])
            second.addmm_(z.mT, z)
            error.addmm_(e.mT, z)
            tokens += len(z)
        assert second is not None
        assert error is not None
        return second.double() / tokens, error.double() / tokens

    def _inputs_and_error(
        self, index: int, leader: str, later: Sequence[str] | None, dense: Tensor, compressed: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        stream, tokens = self.stream, dense.shape[:-1].numel()
        self._run_dense()
        if later is not None:
            with self._silenced(later):
                wanted = stream.run(index, dense)
                self._run_compressed()
                z, got = stream.run_and_see(index, compressed, leader)
            return z, wanted - got
        x = stream.input_of(index, dense, leader)
        self._run_compressed()
        z = stream.input_of(index, compressed, leader)
        if not x.shape[:-1].numel() == z.shape[:-1].numel() == tokens:
            return None
        return z, x - z

    def _writes_to_stream(self, index: int, name: str, later: Sequence[str]) -> bool:
        """Whether a change of the target's output, with the later targets silenced, leaves the block unchanged."""
        hidden = self._first()
        generator = torch.Generator().manual_seed(0)
        change = torch.randn(hidden.shape, generator=generator).to(hidden) * hidden.float().square().mean().sqrt()

        def shift(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output + change if output.shape == change.shape else output

        self._run_dense()
        with self._silenced(later):
            before = self.stream.run(index, hidden)
            handle = self._prefix.model.get_submodule(name).register_forward_hook(shift)
            try:
                after = self.stream.run(index, hidden)
            finally:
                handle.remove()
        missed = (after.float() - before.float() - change.float()).norm()
        return bool(missed <= 0.05 * change.float().norm())

    @contextmanager
    def _silenced(self, names: Sequence[str]) -> Iterator[None]:
        """Make targets put out zeros."""
        hooks = [
            self._prefix.model.get_submodule(name).register_forward_hook(lambda module, args, y: torch.zeros_like(y))
            for name in names
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _run_dense(self) -> None:
        self._prefix.set_pairs({})

    def _run_compressed(self) -> None:
        self._prefix.set_pairs(self._solved)
