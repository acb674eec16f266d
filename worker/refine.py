"""The steps between a search and its checkpoint (`method.refine`), each on what the one before has made.

Whatever a step has to choose it chooses on the evaluation text, and it is left out where it does not pay there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ranksearch.search.errors import NumericalError
from ranksearch.search.objective import objective_of
from ranksearch.search.space import RankSpace
from ranksearch.search.spec import TRAINING_TOKENS, JobSpec, Step, scoring_tokens
from ranksearch.worker.bank import FactorBank
from ranksearch.worker.blocks import CALIBRATION, EVALUATION, TRAINING
from ranksearch.worker.calibrate import Calibration, leaders
from ranksearch.worker.distill import distill
from ranksearch.worker.evaluate import Evaluation
from ranksearch.worker.prefix import Pair, PrefixModel
from ranksearch.worker.sequential import resolve
from ranksearch.worker.soco import soco

Progress = Callable[[float], None]


@dataclass(frozen=True, kw_only=True)
class Refined:
    """What goes into the checkpoint.

    Attributes:
        ranks: Target -> rank; its full rank means dense.
        pairs: Target that is not dense -> `left` `m x r` and `right` `r x n`.
        steps: What each step did, ready for JSON.
    """

    ranks: Mapping[str, int]
    pairs: Mapping[str, Pair]
    steps: Sequence[Mapping[str, Any]]

    def pair(self, name: str, rank: int) -> Pair:
        """The factors of one target."""
        left, right = self.pairs[name]
        assert right.shape[0] == rank
        return left, right

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        tensors = {
            f"{side}/{name}": factor.contiguous().cpu()
            for name, pair in self.pairs.items()
            for side, factor in zip(("left", "right"), pair, strict=True)
        }
        facts = {"ranks": dict(self.ranks), "steps": [dict(step) for step in self.steps]}
        save_file(tensors, str(path), metadata={"refined": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path) -> Refined:
        """Read what `save` wrote; factors stay in the file until they are used."""
        with safe_open(str(path), framework="pt") as file:
            facts = json.loads(file.metadata()["refined"])
            names = sorted({key.partition("/")[2] for key in file.keys()})  # noqa: SIM118 - the file is no mapping
            pairs = {name: (file.get_tensor(f"left/{name}"), file.get_tensor(f"right/{name}")) for name in names}
        return cls(ranks=facts["ranks"], pairs=pairs, steps=facts["steps"])


class Refinement:
    """Runs a job's steps on one rank vector."""

    def __init__(
        self,
        model: Any,
        take_bank: Callable[[], FactorBank],
        space: RankSpace,
        blocks: Mapping[str, Tensor],
        calibration: Calibration | None,
        *,
        spec: JobSpec,
        kept: float,
        state: Path,
    ) -> None:
        """Keep what the steps share.

        Args:
            model: The dense model.
            take_bank: Gives its factors away, in the model's dtype; called whenever they are needed and not held.
            space: The rank space.
            blocks: Name -> token ids: calibration, evaluation, and training where a step needs it.
            calibration: The bank's; None for metric `weight`.
            spec: The job's.
            kept: The budget.
            state: File that the result is written to, and prefix of those that hold what earlier steps came to and the
                state of one that takes long, until the caller removes them.
        """
        self._model, self._take_bank, self._space, self._blocks = model, take_bank, space, blocks
        self._held: FactorBank | None = None
        self._calibration, self._spec, self._kept, self._state = calibration, spec, kept, state

    @property
    def _bank(self) -> FactorBank:
        if self._held is None:
            self._held = self._take_bank()
        return self._held

    def run(self, ranks: Mapping[str, int], progress: Progress) -> Refined:
        """Run every step.

        Args:
            ranks: Target -> rank, the vector that the search found.
            progress: Told the fraction done.
        """
        steps = self._spec.method.steps
        below = [target.name for target in self._space.targets if ranks[target.name] < target.full_rank]
        refined = Refined(ranks=ranks, pairs={name: self._bank.pair(name, ranks[name]) for name in below}, steps=())
        for place, step in enumerate(steps):
            if not refined.pairs:
                break  # every target is dense
            if step == "distill":
                # it needs the room of the bank, which as long as there are views of it stays where it is
                self._held = None
                cpu = {name: (left.cpu(), right.cpu()) for name, (left, right) in refined.pairs.items()}
                refined = replace(refined, pairs=cpu)
            file = self._state if place + 1 == len(steps) else self._file(f"after-{step}")
            refined = self._once(step, refined, file, _share(progress, place, len(steps)))
        if not self._state.exists():
            refined.save(self._state)
        return refined

    def _once(self, step: Step, refined: Refined, file: Path, progress: Progress) -> Refined:
        """A step, or what it came to in an earlier process, which is in the file."""
        if file.exists():
            return Refined.load(file)
        run = {"soco": self._soco, "sequential": self._sequential, "distill": self._distill}[step]
        try:
            refined = run(refined, progress)
        except NumericalError as error:
            if step == "soco" and self._alone:
                raise
            refined = replace(refined, steps=[*refined.steps, {"step": step, "left_out": error.message}])
        draft = file.with_name(f"{file.name}.draft")
        refined.save(draft)
        draft.replace(file)
        return refined

    @property
    def _alone(self) -> bool:
        return self._spec.method.preset == "soco"

    def _soco(self, refined: Refined, progress: Progress) -> Refined:
        alone, blocks = self._alone, self._blocks[TRAINING]
        tokens = scoring_tokens(blocks.shape[1])
        chosen = soco(
            self._model,
            self._bank,
            self._space,
            self._kept,
            blocks=blocks,
            tokens=tokens,
            start=None if alone else refined.ranks,
            seed=self._spec.search.seed,
            state=self._file("soco"),
            progress=progress,
        )
        facts = {"step": "soco", "tokens": tokens, "history": chosen.history}
        if not alone:
            before, after = self._losses(refined.pairs, chosen.pairs)
            facts |= {"before": before, "after": after}
            if after >= before:
                return replace(refined, steps=[*refined.steps, facts])
        return Refined(ranks=chosen.ranks, pairs=chosen.pairs, steps=[*refined.steps, facts])

    def _sequential(self, refined: Refined, progress: Progress) -> Refined:
        best, text, known = refined.pairs, self._evaluation(), self._calibration
        leader = known.leader if known else leaders(self._model, self._space.targets, self._blocks[CALIBRATION])
        with PrefixModel(self._model, self._bank, self._space.targets) as prefix:
            prefix.set_pairs(refined.pairs)
            tried = {0.0: self._loss(text)}
            for place in range(3):
                strength, loss = _next_strength(tried), math.inf
                with suppress(NumericalError):
                    found = resolve(
                        prefix,
                        refined.pairs,
                        self._space.targets,
                        self._blocks[CALIBRATION],
                        leader=leader,
                        gradients=known.gradients if known else {},
                        strength=strength,
                        scratch=self._state.parent,
                        progress=_share(progress, place, 3),
                    ).pairs
                    prefix.set_pairs(found)
                    loss = self._loss(text)
                if loss < min(tried.values()):
                    best = found
                tried[strength] = loss
        chosen = min(tried, key=lambda strength: (tried[strength], strength))
        facts = {"step": "sequential", "strength": chosen, "tried": {f"{s:g}": found for s, found in tried.items()}}
        return replace(refined, pairs=best, steps=[*refined.steps, facts])

    def _evaluation(self) -> Evaluation:
        return Evaluation(self._model, self._blocks[EVALUATION], scratch=self._state.parent)

    def _losses(self, *candidates: Mapping[str, Pair]) -> list[float]:
        """The search's objective of each set of factors, on the evaluation text."""
        text, losses = self._evaluation(), []
        with PrefixModel(self._model, self._bank, self._space.targets) as prefix:
            for pairs in candidates:
                prefix.set_pairs(pairs)
                losses.append(self._loss(text))
        return losses

    def _loss(self, text: Evaluation) -> float:
        try:
            scores = vars(text.score(self._model))
            return objective_of(scores, self._spec.search.objective, text.dense.perplexity)
        except NumericalError:
            return math.inf

    def _distill(self, refined: Refined, progress: Progress) -> Refined:
        found = distill(
            self._model,
            refined.pairs,
            blocks=self._blocks[TRAINING],
            evaluation=self._blocks[EVALUATION],
            tokens=TRAINING_TOKENS,
            objective=self._spec.search.objective,
            seed=self._spec.search.seed,
            state=self._file("distill"),
            scratch=self._state.parent,
            progress=progress,
        )
        losses = [entry[self._spec.search.objective] for entry in found.history]
        facts = {"step": "distill", "tokens": TRAINING_TOKENS, "history": found.history}
        facts |= {"before": losses[0], "after": min(losses)}
        return replace(refined, pairs=found.pairs, steps=[*refined.steps, facts])

    def _file(self, step: str) -> Path:
        return self._state.with_name(f"{self._state.name}-{step}.safetensors")


def _share(progress: Progress, place: int, parts: int) -> Progress:
    """Progress of one of several parts of equal length."""
    return lambda done: progress((place + done) / parts)


def _next_strength(tried: Mapping[float, float]) -> float:
    """The strengths of `sequential` that are worth a try, after none at all: a half, more, and still more or less."""
    known = (0.0, 0.5, 0.75)
    if len(tried) < len(known):
        return known[len(tried)]
    return 1.0 if tried[0.75] < tried[0.5] else 0.25
