"""What was found as pictures: the trials of a job, the progress of several methods, and the front of a job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from ranksearch.search.errors import InvalidInput
from ranksearch.search.objective import caption
from ranksearch.search.spec import budget_label
from ranksearch.search.trials import may_be_best
from ranksearch.service.front import ALLOCATIONS, Excess, front, text_of

PICTURES = (".svg", ".png", ".pdf")
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")
MORE_COLOURS = (*COLOURS, "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#393b79", "#637939", "#000000")

#: Method -> for each of its runs the best score after each evaluation, not a number before the first.
Curves = Mapping[str, Sequence[Sequence[float]]]


def check_picture(path: Path) -> None:
    """Refuse a file that could not be drawn, before hours are spent on what it shows.

    Raises:
        InvalidInput: The ending names no format, it is a folder or in one that is not there, or matplotlib is missing.
    """
    if path.suffix not in PICTURES or path.is_dir() or not path.absolute().parent.is_dir():
        raise InvalidInput(f"--plot {path}: name a file in an existing folder that ends in {', '.join(PICTURES)}")
    if find_spec("matplotlib") is None:
        raise InvalidInput("--plot draws with matplotlib, which is missing here: pip install matplotlib")


def plot_search(report: dict[str, Any], path: Path) -> None:
    """Draw every budget's trials, the best so far, and where prior and uniform stand."""
    budgets = report["budgets"]
    figure = _figure(7.0, 3.4 * len(budgets))
    objective = report["spec"]["search"]["objective"]
    for place, (budget, colour) in enumerate(zip(budgets, COLOURS * len(budgets), strict=False)):
        axes = figure.add_subplot(len(budgets), 1, place + 1)
        _panel(axes, budget, objective, colour)
    _save(figure, path)


def plot_methods(curves: Mapping[float, Curves], objective: str, path: Path) -> None:
    """Draw the best score so far over evaluations, a panel per budget: the mean over runs, and where they lie."""
    figure = _figure(8.0, 3.8 * len(curves))
    for place, (kept, methods) in enumerate(curves.items()):
        axes = figure.add_subplot(len(curves), 1, place + 1)
        lengths = [len(run) for runs in methods.values() for run in runs]
        for (method, runs), colour in zip(methods.items(), MORE_COLOURS * len(methods), strict=False):
            _curve(axes, method, runs, colour, max(lengths))
        axes.xaxis.get_major_locator().set_params(integer=True)
        if max(lengths) > 5 * min((n for n in lengths if n > 1), default=max(lengths)):
            axes.set_xscale("log")
        axes.set_title(f"kept {budget_label(kept)}", loc="left")
        axes.set_xlabel("evaluations")
        axes.set_ylabel(f"best {caption(objective)} on the evaluation text")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _save(figure, path)


def _curve(axes: Any, method: str, runs: Sequence[Sequence[float]], colour: str, length: int) -> None:
    """One method; thin dots go on from its last evaluation, so that it can be compared with longer ones."""
    end = max(map(len, runs))
    scores = np.array([[*run, *[run[-1]] * (end - len(run))] for run in runs if run])
    if not scores.size:
        return
    evaluations, mean = np.arange(1, end + 1), scores.mean(axis=0)
    axes.step(evaluations, mean, where="post", color=colour, linewidth=1.8, label=method)
    if len(scores) > 1:
        spread = scores.std(axis=0, ddof=1)
        axes.fill_between(evaluations, mean - spread, mean + spread, step="post", color=colour, alpha=0.18, linewidth=0)
    axes.plot(end, mean[-1], "o", color=colour, markersize=4)
    axes.plot([end, length], [mean[-1]] * 2, ":", color=colour, linewidth=1)


def _figure(width: float, height: float) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise InvalidInput(f"cannot write {path}: {error.strerror or error}") from error


def _panel(axes: Any, budget: dict[str, Any], objective: str, colour: str) -> None:
    scored = [t for t in budget["history"] if t.get("score") is not None]
    trials = [t for t in scored if may_be_best(t["state"], t["origin"])]
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
    axes.set_ylabel(f"{caption(objective)} on the evaluation text")
    axes.grid(alpha=0.25)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(
        frameon=False, fontsize="small", ncols=5, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.1
    )


def plot_front(report: dict[str, Any], path: Path) -> None:
    """Draw what every budget costs over the dense model, a line each for uniform, prior and the checkpoints.

    Args:
        report: A job's, of one or more budgets; without intervals, as older ones are, it gets no bars.
        path: Where to; the ending says the format, such as svg, png or pdf.
    """
    points = front(report)
    figure = _figure(7.0, 4.2)
    axes = figure.add_subplot()
    for row, colour, mark in zip(ALLOCATIONS, ("gray", COLOURS[0], COLOURS[1]), "sDo", strict=True):
        drawn = [(point.kept, point.excess[row]) for point in points if row in point.excess]
        kept, excess = [k for k, _ in drawn], [e for _, e in drawn]
        bars = [[_length(e, end) for e in excess] for end in (0, 1)]
        axes.errorbar(kept, [e.mean for e in excess], yerr=bars, fmt=f"{mark}-", color=colour, capsize=3, label=row)
    axes.set_xlabel("kept")
    axes.set_ylabel(f"excess on {text_of(report)}, nats per token")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    _save(figure, path)


def _length(excess: Excess, end: int) -> float:
    """Of the bar from the mean to the lower or upper end."""
    return abs(excess.interval[end] - excess.mean) if excess.interval else 0.0
