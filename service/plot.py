"""Perplexity against trial as a picture; the only file that draws."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

from ranksearch.search.presets import PROBE
from ranksearch.search.spec import budget_label

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")


def plot_search(report: dict[str, Any], path: Path) -> None:
    """Draw every budget's trials, the best so far, and where prior and uniform stand."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    budgets = report["budgets"]
    figure = Figure(figsize=(7.0, 3.4 * len(budgets)), layout="constrained")
    objective = report["spec"]["search"]["objective"]
    for place, (budget, colour) in enumerate(zip(budgets, COLOURS * len(budgets), strict=False)):
        axes = figure.add_subplot(len(budgets), 1, place + 1)
        _panel(axes, budget, objective, colour)
    figure.savefig(path, dpi=130)


def _panel(axes: Any, budget: dict[str, Any], objective: str, colour: str) -> None:
    complete = [t for t in budget["history"] if t.get("score") is not None and t["state"] == "COMPLETE"]
    trials = [t for t in complete if t["origin"] != PROBE]
    numbers, scores = [t["number"] for t in trials], [t["score"] for t in trials]
    axes.plot(numbers, scores, "o", color=colour, alpha=0.55, markersize=4.5, label="trial")
    axes.step(numbers, list(accumulate(scores, min)), where="post", color=colour, linewidth=1.8, label="best so far")
    for trial in trials:
        if trial["origin"] in ("prior", "uniform"):
            mark = {"prior": "D", "uniform": "s"}[trial["origin"]]
            axes.plot(trial["number"], trial["score"], mark, color="black", markersize=7, label=trial["origin"])
    dense = (budget["scores"].get("dense") or {}).get("evaluation", {}).get(objective)
    if objective == "perplexity" and dense:
        axes.axhline(dense, color="gray", linewidth=1, linestyle="--", label="dense")
    if scores and min(scores) > 0 and max(scores) > 3 * min(scores):
        axes.set_yscale("log")
    axes.set_title(f"kept {budget_label(budget['kept'])}", loc="left")
    axes.set_xlabel("trial")
    axes.set_ylabel(f"{objective} on the evaluation text")
    axes.grid(alpha=0.25)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(
        frameon=False, fontsize="small", ncols=5, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.1
    )
