"""A report as a person reads it: one table of scores, one paragraph per budget."""

from __future__ import annotations

from typing import Any, Final

from rich.table import Table

from ranksearch.search.spec import budget_label
from ranksearch.service.figures import count, number, size

ROWS: Final = ("dense", "uniform", "prior", "best", "final")


def score_table(report: dict[str, Any]) -> Table:
    """Scores of every budget: rows dense to final, columns evaluation set and test sets."""
    budgets = report["budgets"]
    tests = list(
        dict.fromkeys(label for budget in budgets for row in budget["scores"].values() for label in row.get("test", {}))
    )
    grid = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    grid.add_column("kept", no_wrap=True)
    grid.add_column("ranks", no_wrap=True)
    for heading in ("evaluation", *tests):
        grid.add_column(f"{heading} perplexity", justify="right")
        grid.add_column("KL", justify="right")
    for budget in budgets:
        for row in ROWS:
            if row not in budget["scores"]:
                continue
            scores = budget["scores"][row]
            columns = [
                scores.get("evaluation") or {},
                *((scores.get("test") or {}).get(label) or {} for label in tests),
            ]
            figures = [
                text for column in columns for text in (number(column.get("perplexity")), number(column.get("kl"), 4))
            ]
            kept = "1" if row == "dense" else budget_label(budget["kept"])
            grid.add_row(kept, row, *figures, style="bold" if row == "final" else "")
    return grid


def budget_line(budget: dict[str, Any]) -> str:
    """Sizes and speed of one budget's checkpoint, before and after."""
    parameters, held, speed = budget["parameters"], budget["bytes"], budget.get("speed") or {}
    lines = [
        f"kept {budget_label(budget['kept'])}",
        f"  parameters  targets {count(parameters['targets'])} of {count(parameters['targets_dense'])}"
        f" (kept {budget['kept_exact']:.4f}), model {count(parameters['model'])} of {count(parameters['model_dense'])}",
        f"  disk        {size(held['disk'])}, dense {size(held['disk_dense'])}",
        f"  loaded      {size(held['loaded'])}, dense {size(held['loaded_dense'])}",
    ]
    before, after = speed.get("before") or {}, speed.get("after") or {}
    for name, label in (("prefill", "prefill   "), ("decode", "decode    ")):
        key = f"{name}_tokens_per_second"
        if key in before and key in after:
            lines.append(
                f"  {label}  {number(after[key], 0)} tokens/s, dense {number(before[key], 0)}"
                f" ({after[key] / before[key]:.2f} times) on {speed.get('device', '?')}"
            )
    return "\n".join(lines)
