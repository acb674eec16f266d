"""What a step after the search (`method.refine`) came to, read from the facts that a job's report keeps of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one step came to.

    Attributes:
        adopted: Whether the checkpoint has what it made; False where it failed or did not pay on the evaluation text.
        tokens: What the result was trained on; 0 for a step that trains nothing.
        before: The search's objective without the step; None where it was not measured.
        after: The same with it.
    """

    adopted: bool
    tokens: int = 0
    before: float | None = None
    after: float | None = None


def outcome_of(step: Mapping[str, Any], objective: str) -> Outcome:
    """Read one entry of `budgets[].refine`, or of an event `refined`, which comes without `history`.

    Args:
        step: The entry; a loss that was not finite is null.
        objective: The spec's.
    """
    if "left_out" in step:
        return Outcome(adopted=False)
    if "tried" in step:
        tried, strength = step["tried"], step["strength"]
        return Outcome(adopted=strength != 0, before=tried.get("0"), after=tried.get(f"{strength:g}"))
    if step["step"] == "distill" and step.get("history"):
        first, best = step["history"][0], min(step["history"], key=lambda entry: float(entry[objective]))
        tokens = int(best["tokens"])
        return Outcome(adopted=tokens > 0, tokens=tokens, before=first[objective], after=best[objective])
    before, after = step.get("before"), step.get("after")
    better = after is not None and (before is None or after < before)
    return Outcome(adopted=better or "after" not in step, tokens=int(step["tokens"]), before=before, after=after)
