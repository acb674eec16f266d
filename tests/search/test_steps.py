from __future__ import annotations

import pytest

from ranksearch.search.steps import Outcome, outcome_of

HISTORY = [
    {"tokens": 0, "kl": 0.3, "perplexity": 13.0},
    {"tokens": 500, "kl": 0.1, "perplexity": 12.0},
    {"tokens": 1000, "kl": 0.2, "perplexity": 11.0},
]


@pytest.mark.parametrize(
    ("objective", "tokens", "before", "after"), [("kl", 500, 0.3, 0.1), ("perplexity", 1000, 13, 11)]
)
def test_training_comes_to_its_best_evaluation(objective: str, tokens: int, before: float, after: float) -> None:
    found = outcome_of({"step": "distill", "tokens": 1_000_000, "history": HISTORY}, objective)
    assert found == Outcome(adopted=True, tokens=tokens, before=before, after=after)


def test_training_that_never_got_better_is_not_adopted() -> None:
    assert not outcome_of({"step": "distill", "tokens": 1000, "history": HISTORY[:1]}, "kl").adopted


def test_a_loss_that_was_not_finite_is_no_better() -> None:
    step = {"step": "soco", "tokens": 1000}
    assert outcome_of(step, "kl").adopted
    assert outcome_of({**step, "before": None, "after": 2.0}, "kl").adopted
    assert not outcome_of({**step, "before": 2.0, "after": None}, "kl").adopted
    assert not outcome_of({**step, "before": None, "after": None}, "kl").adopted


def test_a_step_that_failed_is_not_adopted() -> None:
    assert outcome_of({"step": "sequential", "left_out": "NaN"}, "kl") == Outcome(adopted=False)
