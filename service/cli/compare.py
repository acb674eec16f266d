"""The command `compare`: one spec, several methods, one table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ranksearch.search.errors import InvalidInput, RanksearchError, RequestRefused
from ranksearch.search.presets import PRESETS
from ranksearch.search.spec import budget_label
from ranksearch.service.cli import options
from ranksearch.service.cli.output import INTERRUPTED, JOB_FAILED, err, out, print_json, say, table
from ranksearch.service.client import JSON, Client
from ranksearch.service.compare import FORMS, STEPS, Row, best_so_far, contenders, names_of, rows_of
from ranksearch.service.figures import duration, number
from ranksearch.service.plot import check_picture, plot_methods
from ranksearch.service.watch_all import follow_all

Methods = Annotated[
    str | None,
    typer.Option(
        "--methods",
        metavar="NAME,NAME,...",
        help=f"Presets, of {', '.join(PRESETS)}. NAME/FORM stores the targets in another form ({', '.join(FORMS)}), "
        f"NAME+STEP adds a step of method.refine ({', '.join(STEPS)}): ranksearch/pivoted+sequential.",
    ),
]
Seeds = Annotated[str | None, typer.Option("--seeds", metavar="S,S,...", help="Seeds of the search; a job for each.")]
Kept = Annotated[str | None, typer.Option("--kept", metavar="K,K,...", help="Budgets in place of the spec's own.")]
Earlier = Annotated[
    str | None,
    typer.Option("--jobs", metavar="JOB,JOB,...", help="Compare these jobs instead; nothing is submitted."),
]
Plot = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE", help="Draw the best score so far over evaluations: svg, png or pdf."),
]


def compare(
    spec: options.SpecFile = None,
    methods: Methods = None,
    kept: Kept = None,
    seeds: Seeds = None,
    earlier: Earlier = None,
    plot: Plot = None,
    as_json: options.AsJson = False,
) -> None:
    """Compare methods on one spec.

    Submits the spec once per method and seed, follows the jobs, and prints a table per budget.

    Scores are the checkpoint's: perplexity on each test text and the evaluation text, and mean KL to the dense model.

    KL is on the first test text (without one: on the evaluation text); search and total are the seconds of the job.

    A metric or sampler that belongs to a preset takes the place of the spec's. Ctrl-C cancels nothing.
    """
    if plot is not None:
        check_picture(plot)
    with Client() as client:
        if earlier is not None:
            if spec or methods or kept or seeds:
                raise InvalidInput("--jobs takes the place of SPEC.json, --methods, --kept and --seeds")
            specs = {job: client.job(job)["spec"] for job in _list(earlier, str, "--jobs")}
        else:
            specs = _submit(client, _contenders(spec, methods, kept, seeds))
        names = names_of(specs)
        finished = _follow(client, {id: _label(names[id], spec) for id, spec in specs.items()})
        reports = {id: _report(client, id) for id in finished}
    rows = [row for id, job in finished.items() for row in rows_of(names[id], job, reports[id])]
    if as_json:
        print_json({"rows": rows})
    else:
        _print(rows, [report for report in reports.values() if report])
    failed = {row["job"]: row["error"] for row in rows if "error" in row}
    for id, why in failed.items():
        say(f"{_label(names[id], specs[id])} ({id}) {finished[id]['status']}: {why}")
    if plot is not None:
        _plot([(names[id], report) for id, report in reports.items() if report], plot)
    if failed:
        raise typer.Exit(JOB_FAILED)


def _contenders(spec: str | None, methods: str | None, kept: str | None, seeds: str | None) -> list[JSON]:
    if spec is None or methods is None:
        raise InvalidInput("name a spec and methods: ranksearch compare SPEC.json --methods uniform,ranksearch")
    budgets = None if kept is None else _list(kept, float, "--kept")
    return contenders(
        options.read_spec(spec),
        _list(methods, str, "--methods"),
        budgets,
        None if seeds is None else _list(seeds, int, "--seeds"),
    )


def _list(text: str, kind: Callable[[str], Any], option: str) -> list[Any]:
    try:
        found = [kind(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = "whole numbers" if kind is int else "numbers"
        raise InvalidInput(f"{option} {text}: write {numbers} with commas between") from None
    if not found or len(set(found)) < len(found):
        raise InvalidInput(f"{option} {text}: name at least one, and each of them once")
    return found


def _submit(client: Client, found: Sequence[JSON]) -> dict[str, JSON]:
    """Submit all of them; job id -> its spec with every field."""
    specs: dict[str, JSON] = {}
    try:
        for spec in found:
            job = client.submit(spec)
            specs[job["id"]] = job["spec"]
    except (RanksearchError, KeyboardInterrupt):
        if specs:
            say(f"submitted until here, and not cancelled: {', '.join(specs)}")
        raise
    say(f"{len(specs)} jobs; the same table later: {_again(specs)}")
    return specs


def _follow(client: Client, labels: Mapping[str, str]) -> dict[str, JSON]:
    try:
        return follow_all(client, labels, err())
    except KeyboardInterrupt:
        say(f"no longer watching, the jobs go on. The table once they are done: {_again(labels)}")
        raise typer.Exit(INTERRUPTED) from None


def _report(client: Client, job: str) -> JSON | None:
    """A job's report, of the budgets that it finished also where it failed; None where there is none."""
    try:
        return client.report(job)
    except RequestRefused as error:
        if error.data["problem"].get("status") == HTTPStatus.NOT_FOUND:
            return None
        raise


def _again(jobs: Iterable[str]) -> str:
    return f"ranksearch compare --jobs {','.join(jobs)}"


def _label(method: str, spec: JSON) -> str:
    return f"{method}, seed {spec['search']['seed']}"


def _print(rows: Sequence[Row], reports: Sequence[JSON]) -> None:
    dense = next((report["budgets"][0]["scores"]["dense"] for report in reports), None)
    for place, kept in enumerate(dict.fromkeys(row["kept"] for row in rows)):
        out().print(Text(f"{chr(10) if place else ''}kept {budget_label(kept)}", style="bold"))
        out().print(comparison([row for row in rows if row["kept"] == kept], dense))


def comparison(rows: Sequence[Row], dense: JSON | None) -> Table:
    """The rows of one budget: a line per method, mean and sample standard deviation over its seeds.

    Args:
        rows: See `rows_of`.
        dense: The dense model's scores, as in a report.
    """
    texts = list(dict.fromkeys(text for row in rows for text in row.get("test_perplexities", ())))
    scores = (*(f"{text} perplexity" for text in texts), "evaluation perplexity", "KL")
    right = (*scores, "evaluations", "search", "total")
    grid = table("method", "kept", *right, right=right)
    if dense is not None:
        test = {text: (dense.get("test") or {}).get(text) or {} for text in texts}
        own = dense["evaluation"]
        perplexities = [number(part.get("perplexity")) for part in (*test.values(), own)]
        grid.add_row("dense", "1", *perplexities, number(next(iter(test.values()), own).get("kl"), 4))
    for method in dict.fromkeys(row["method"] for row in rows):
        of_method = [row for row in rows if row["method"] == method]
        good = [row for row in of_method if "error" not in row]
        some = f" ({len(good)} of {len(of_method)} seeds)" if 0 < len(good) < len(of_method) else ""
        grid.add_row(Text(method + some), *(_figures(good, texts) if good else ("failed",)))
    return grid


def _figures(rows: Sequence[Row], texts: Sequence[str]) -> list[str]:
    return [
        f"{mean(row['kept_exact'] for row in rows):.5f}",
        *(_spread([row["test_perplexities"].get(text) for row in rows]) for text in texts),
        _spread([row["evaluation_perplexity"] for row in rows]),
        _spread([row["kl"] for row in rows], 4),
        f"{mean(row['evaluations'] for row in rows):g}",
        duration(mean(row["seconds"] for row in rows)),
        duration(mean(row["total_seconds"] for row in rows)),
    ]


def _spread(values: Sequence[float | None], digits: int = 3) -> str:
    """Mean, and standard deviation where there are several; a dash where one is not finite."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    return " ± ".join(number(f(known), digits) for f in ((mean, stdev) if len(known) > 1 else (mean,)))


def _plot(found: Sequence[tuple[str, JSON]], path: Path) -> None:
    if not found:
        return
    curves: dict[float, dict[str, list[list[float]]]] = {}
    for method, report in found:
        for budget in report["budgets"]:
            curves.setdefault(budget["kept"], {}).setdefault(method, []).append(best_so_far(budget))
    plot_methods(curves, found[0][1]["spec"]["search"]["objective"], path)
    say(f"picture: {path}")
