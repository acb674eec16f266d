"""Scoring rank vectors part by part: a model that takes them, the text they are scored on, and the trial that runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ranksearch.search.errors import RanksearchError
from ranksearch.worker.evaluate import Evaluation, Scores
from ranksearch.worker.prefix import PrefixModel


@dataclass
class _Trial:
    number: int
    rest: Iterator[Scores]
    parts: list[Scores] = field(default_factory=list)


class Scorer:
    """Scores of one trial at a time.

    Attributes:
        prefix: The model at the ranks of the last vector.
        evaluation: The text.
    """

    def __init__(self, prefix: PrefixModel, evaluation: Evaluation) -> None:
        """Begins no trial yet."""
        self.prefix = prefix
        self.evaluation = evaluation
        self._trial: _Trial | None = None

    def score_part(self, number: int, ranks: Mapping[str, int], index: int) -> tuple[Scores, bool]:
        """Scores the next part of the text; part 0 begins a trial, whatever became of the one before.

        Args:
            number: The trial's.
            ranks: Target -> rank.
            index: How many parts of the trial came before.

        Returns:
            Scores of the part and False, or, after the last part, those of all parts together and True.

        Raises:
            RanksearchError: The trial was not begun here.
            NumericalError: A score is not finite.
        """
        if index == 0:
            self.prefix.set_ranks(ranks)
            self._trial = _Trial(number, self.evaluation.score_chunks(self.prefix.model))
        trial = self._trial
        if trial is None or trial.number != number or len(trial.parts) != index:
            raise RanksearchError(f"trial {number} was not begun in this process", index=index)
        self._trial = None  # unless all goes well: what raised has no further parts
        part = next(trial.rest, None)
        if part is None:
            return Scores.union(trial.parts), True
        trial.parts.append(part)
        self._trial = trial
        return part, False

    def close(self) -> None:
        """Gives the model its own weights back; a trial that was stopped is forgotten."""
        self._trial = None
        self.prefix.close()
