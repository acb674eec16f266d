"""Commands about results: `report`, `fetch`, `estimate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.text import Text

from ranksearch.search.errors import InvalidInput
from ranksearch.search.spec import budget_label
from ranksearch.service.cli import options
from ranksearch.service.cli.jobs import JobId
from ranksearch.service.cli.output import err, out, print_json, print_lines, say
from ranksearch.service.client import Client
from ranksearch.service.download import choose
from ranksearch.service.download import fetch as fetch_files
from ranksearch.service.figures import size
from ranksearch.service.heatmap import heatmap, report_panels
from ranksearch.service.plot import check_picture, plot_front
from ranksearch.service.summary import budget_line, front_table, print_estimate, refine_line, score_table

Budget = Annotated[float | None, typer.Option("--kept", help="Which budget.")]


def report(
    job: JobId,
    picture: Annotated[
        Path | None,
        typer.Option("--heatmap", metavar="FILE.svg", help="Draw what each matrix keeps, layer by type."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw the front: svg, png or pdf by its ending.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Print the proof.

    Scores of dense, uniform, prior, best and final; sizes; speed before and after; of several budgets the front.
    """
    if plot is not None:
        check_picture(plot)
    with Client() as client:
        document = client.report(job)
    if picture is not None:
        _draw(document, picture)
    if plot is not None:
        plot_front(document, plot)
        say(f"front drawn: {plot}")
    if as_json:
        print_json(document)
        return
    console = out()
    console.print(score_table(document))
    for budget in document["budgets"]:
        console.print(Text(budget_line(budget)))
        for step in budget.get("refine") or ():
            console.print(Text(f"  {refine_line(step, document['spec']['search']['objective'])}"))
    if len(document["budgets"]) > 1:
        console.print()
        console.print(front_table(document))


def _draw(document: dict[str, Any], path: Path) -> None:
    try:
        path.write_text(heatmap(report_panels(document)), encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"cannot write {path}: {error.strerror or error}") from error
    say(f"heat map: {path}")


def fetch(
    job: JobId,
    kept: Budget = None,
    folder: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="Default: ./JOB-KEPT.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Download a checkpoint.

    A broken download goes on where it stopped, and every file's sha256 is verified.
    """
    with Client() as client:
        checkpoint = choose(client.checkpoints(job), kept)
        files: list[dict[str, Any]] = checkpoint["files"]
        target = folder or Path(f"{job}-{budget_label(checkpoint['kept'])}")
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=err(), transient=True, disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task("fetching", total=sum(int(file["size"]) for file in files))
            here: dict[str, int] = {}

            def seen(path: str, have: int) -> None:
                here[path] = have
                progress.update(task, description=path, completed=sum(here.values()))

            fetch_files(client, files, target, seen)
    total = sum(int(file["size"]) for file in files)
    if as_json:
        print_json({"folder": str(target.absolute()), "files": len(files), "bytes": total})
        return
    print_lines(str(target))
    say(f"{len(files)} files, {size(total)}, every sha256 verified")


def estimate(
    spec: options.SpecFile = None,
    model: options.Model = None,
    kept: options.Kept = None,
    bytes: options.Bytes = None,
    of: options.Of = None,
    name: options.Name = None,
    dtype: options.Dtype = None,
    dataset: options.DatasetName = None,
    text: options.TextFile = None,
    test: options.TestFiles = None,
    sequences: options.Sequences = None,
    length: options.Length = None,
    preset: options.Preset = None,
    metric: options.Metric = None,
    form: options.Form = None,
    refine: options.Refine = None,
    multiple: options.Multiple = None,
    dense: options.Dense = None,
    trials: options.Trials = None,
    sampler: options.Sampler = None,
    objective: options.Objective = None,
    seed: options.Seed = None,
    learn_from: options.LearnFrom = None,
    assign: options.Set = None,
    as_json: options.AsJson = False,
) -> None:
    """Say what a job would take and give.

    Memory, disk, time and final size; nothing runs, and no job is made.
    """
    document = options.build_spec(
        spec,
        model=model,
        kept=kept,
        bytes=bytes,
        of=of,
        name=name,
        dtype=dtype,
        dataset=dataset,
        text=text,
        test=test,
        sequences=sequences,
        length=length,
        preset=preset,
        metric=metric,
        form=form,
        refine=refine,
        multiple=multiple,
        dense=dense,
        trials=trials,
        sampler=sampler,
        objective=objective,
        seed=seed,
        learn_from=learn_from,
        set=assign,
    )
    with Client() as client:
        answer = client.estimate(document)
    if as_json:
        print_json(answer)
        return
    print_estimate(out(), answer)
