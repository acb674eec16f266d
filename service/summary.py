"""Reports and estimates as a person reads them."""

from __future__ import annotations

from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ranksearch.search.objective import caption
from ranksearch.search.spec import budget_label
from ranksearch.search.steps import outcome_of
from ranksearch.service.figures import count, duration, number, size
from ranksearch.service.front import Excess, front, text_of

ROWS: Final = ("dense", "uniform", "prior", "best", "final")


def score_table(report: dict[str, Any]) -> Table:
    """Scores: a row for the dense model, then uniform to final of every budget; columns evaluation and test sets."""
    budgets = report["budgets"]
    tests = list(
        dict.fromkeys(label for budget in budgets for row in budget["scores"].values() for label in row.get("test", {}))
    )
    grid = _grid("kept", "ranks")
    for heading in ("evaluation", *tests):
        grid.add_column(Text(f"{heading} perplexity"), justify="right")
        grid.add_column("KL", justify="right")
    shown = set[str]()
    for budget in budgets:
        for row in ROWS:
            if row not in budget["scores"] or (row == "dense" and row in shown):  # it is the same for all
                continue
            shown.add(row)
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


def front_table(report: dict[str, Any]) -> Table:
    """One line per budget, the largest first; a checkpoint that is larger and worse than another is marked."""
    points = front(report)
    dominated = {point.kept: by for point in points if (by := point.dominated_by(points)) is not None}
    grid = _grid("kept")
    headings = ("parameters", "on disk", "dense", "uniform", "prior", "final", "excess, nats/token", "KL", "decode")
    for heading in headings:
        grid.add_column(heading, justify="right", no_wrap=True)
    if dominated:
        grid.add_column("", no_wrap=True)
    for point in points:
        perplexities = [number(perplexity) for perplexity in point.perplexity.values()]
        mark = f"dominated by {budget_label(by.kept)}" if (by := dominated.get(point.kept)) else ""
        grid.add_row(
            budget_label(point.kept),
            count(point.parameters),
            size(point.disk),
            *perplexities,
            _excess(point.excess.get("final")),
            number(point.kl, 4),
            number(point.decode, 0),
            *([mark] if dominated else []),
            style="dim" if mark else "",
        )
    grid.title = Text(f"front on {text_of(report)}: perplexity, excess with its 95% interval, KL, decode tokens/s")
    grid.title_justify, grid.title_style = "left", "bold"
    return grid


def _excess(excess: Excess | None) -> str:
    if excess is None:
        return "-"
    ends = f" [{', '.join(number(end, 4) for end in excess.interval)}]" if excess.interval else ""
    return number(excess.mean, 4) + ends


def budget_line(budget: dict[str, Any]) -> str:
    """Sizes and speed of one budget's checkpoint, before and after."""
    parameters, held, speed = budget["parameters"], budget["bytes"], budget.get("speed") or {}
    asked = f" of at most {size(held['asked'])}" if "asked" in held else ""
    lines = [
        f"kept {budget_label(budget['kept'])}",
        f"  parameters  targets {count(parameters['targets'])} of {count(parameters['targets_dense'])}"
        f" (kept {budget['kept_exact']:.4f}), model {count(parameters['model'])} of {count(parameters['model_dense'])}",
        f"  disk        {size(held['disk'])}{asked}, dense {size(held['disk_dense'])}",
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
    if len(points := budget.get("pareto_front") or ()) > 1:
        listed = (f"trial {p['number']} {number(p['perplexity'])} {number(p['kl'], 4)}" for p in points)
        lines.append(f"  pareto      {len(points)} trials, perplexity and KL: {', '.join(listed)}")
    if timed := speed.get("targets"):
        share = timed["seconds"] / timed["dense_seconds"]
        lines.append(
            f"  targets     {1e6 * timed['seconds']:,.1f} us/token, {share:.4f} of dense, by the table of ranks"
        )
    return "\n".join(lines)


def refine_line(step: dict[str, Any], objective: str) -> str:
    """What one step after the search did, of the report's `refine` or of an event `refined`."""
    found, name, loss = outcome_of(step, objective), f"{step['step']:<10}", caption(objective)
    if not found.adopted:
        return f"{name}  left out: {step.get('left_out') or f'it does not lower {loss} {number(found.before)}'}"
    how = f"{count(found.tokens)} tokens" if found.tokens else f"strength {step['strength']:g}"
    if found.after is None:
        return f"{name}  {how}"
    return f"{name}  {how}: {loss} {number(found.before)} -> {number(found.after)}"


def print_estimate(console: Console, answer: dict[str, Any]) -> None:
    """What a job would take and give, as tables."""
    parameters = answer["parameters"]
    facts = Table.grid(padding=(0, 2))
    facts.add_row("model", f"{count(parameters['model'])} parameters, {size(answer['model_bytes'])}")
    least = answer["minimum_kept"]
    known = "the least kept is measured by the worker" if least is None else f"kept {least:.4g} or more"
    facts.add_row("targets", f"{count(parameters['targets'])} parameters, {known}")
    for part, unit in (("memory", size), ("disk", size), ("minutes", lambda minutes: duration(60 * minutes))):
        for name, value in (answer[part] or {}).items():
            facts.add_row(f"{'time' if part == 'minutes' else part}, {_words(name)}", unit(value))
    if answer["minutes"] is None:
        facts.add_row("time", "known as soon as a worker runs")
    console.print(facts)
    console.print(_rows(answer["budgets"]))
    console.print(_rows(answer["break_even"]))


def _rows(items: list[dict[str, Any]]) -> Table:
    """Alike items as one table, a blank line above it."""
    grid = _grid()
    for name in items[0] if items else ():
        words = isinstance(items[0][name], str)
        grid.add_column(Text(f"\n{_words(name)}"), justify="left" if words else "right", no_wrap=True)
    for item in items:
        grid.add_row(*(_figure(name, value) for name, value in item.items()))
    return grid


def _figure(name: str, value: Any) -> str:
    if name.endswith("bytes"):
        return size(value)
    if name == "kept":
        return budget_label(value)
    return str(value) if isinstance(value, str) else count(value)


def _words(name: str) -> str:
    return name.removesuffix("_bytes").replace("_", " ")


def _grid(*columns: str) -> Table:
    grid = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        grid.add_column(column, no_wrap=True)
    return grid
