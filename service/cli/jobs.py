"""Commands about jobs: `submit`, `watch`, `jobs`, `show`, `cancel`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ranksearch.search.objective import caption
from ranksearch.service.cli import options
from ranksearch.service.cli.output import (
    INTERRUPTED,
    JOB_FAILED,
    STATUS_STYLES,
    err,
    out,
    print_json,
    print_lines,
    say,
    status_text,
    table,
)
from ranksearch.service.client import JSON, Client
from ranksearch.service.figures import ago, duration, number, size
from ranksearch.service.watch import follow

JobId = Annotated[str, typer.Argument(metavar="JOB", help="Job id, as `submit` printed it.")]


def submit(
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
    watch_it: Annotated[
        bool, typer.Option("--watch", "-w", help="Follow the job; exit code 1 unless it succeeds.")
    ] = False,
    idempotency_key: Annotated[str | None, typer.Option(help="The same key never makes a second job.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Submit a job and print its id.

    Flags win over the file; fields that neither names take the server's defaults.
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
        job = client.submit(document, idempotency_key=idempotency_key)
        if as_json and not watch_it:
            print_json(job)
        elif not as_json:
            print_lines(job["id"])
        if not watch_it:
            say(f"follow it: ranksearch watch {job['id']}   dashboard: {client.url}/dashboard/")
            return
        _follow(client, job["id"], as_json=as_json)


def watch(job: JobId, as_json: options.AsJson = False) -> None:
    """Follow a job until it has finished.

    Exit code 1 unless it succeeds. Ctrl-C leaves the job running.
    """
    with Client() as client:
        _follow(client, job, as_json=as_json)


def _follow(client: Client, job_id: str, *, as_json: bool) -> None:
    try:
        job = follow(client, job_id, err())
    except KeyboardInterrupt:
        say(
            f"no longer watching, {job_id} goes on. Watch again: ranksearch watch {job_id}   "
            f"stop it: ranksearch cancel {job_id}"
        )
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        print_json(job)
    else:
        _print_end(job)
    if job["status"] != "succeeded":
        raise typer.Exit(JOB_FAILED)


def _print_end(job: JSON) -> None:
    say(f"{job['id']} {job['status']}{_error(job)}")
    if job["status"] == "succeeded":
        say(f"scores: ranksearch report {job['id']}   files: ranksearch fetch {job['id']} -o DIR")


def jobs(
    limit: Annotated[int, typer.Option(min=1, help="How many, newest first.")] = 20,
    as_json: options.AsJson = False,
) -> None:
    """List jobs, newest first."""
    with Client() as client:
        found = list(client.jobs(limit=limit))
    if as_json:
        print_json(found)
        return
    if not found:
        say("no jobs yet; submit one: ranksearch submit --model MODEL --kept 0.8")
        return
    grid = table("id", "status", "stage", "done", "kept", "best", "model", "created", right=("done",))
    for job in found:
        grid.add_row(
            job["id"],
            status_text(job["status"]),
            job.get("stage") or "-",
            f"{100 * float(job['progress']):.0f}%",
            ",".join(f"{kept:g}" for kept in job["spec"]["budget"]["kept"]),
            ", ".join(number(best["score"]) for best in (job.get("best") or {}).values()) or "-",
            Text(_model(job)),
            ago(job.get("created_at")),
        )
    out().print(grid)


def show(job: JobId, as_json: options.AsJson = False) -> None:
    """Show where one job stands."""
    with Client() as client:
        document = client.job(job)
        base = client.url
    if as_json:
        print_json(document)
        return
    spec, search = document["spec"], document["spec"]["search"]
    rows: list[tuple[str, str | Text]] = [
        ("job", f"{document['id']}{'  ' + document['name'] if document.get('name') else ''}"),
        ("status", Text.assemble(status_text(document["status"]), _error(document))),
        ("stage", f"{document.get('stage') or '-'}, {100 * float(document['progress']):.0f}%{_eta(document)}"),
        ("model", _model(document)),
        ("kept", _kept(spec["budget"])),
        *([("bytes", ", ".join(map(size, sizes)))] if (sizes := spec["budget"].get("bytes")) else []),
        ("search", f"{search['trials']} trials, {search['sampler']}, {search['objective']}"),
        ("created", ago(document.get("created_at"))),
    ]
    rows += [
        (f"best {label}", f"{number(best['score'])} {caption(search['objective'])}, trial {best['trial']}")
        for label, best in (document.get("best") or {}).items()
    ]
    rows += [(name, _absolute(base, link)) for name, link in (document.get("links") or {}).items() if link]
    grid = Table.grid(padding=(0, 2))
    for name, value in rows:
        grid.add_row(Text(name, style="bold"), Text(value) if isinstance(value, str) else value)
    out().print(grid)


def cancel(job: JobId, as_json: options.AsJson = False) -> None:
    """Stop a job and keep what it found."""
    with Client() as client:
        document = client.cancel(job)
    if as_json:
        print_json(document)
    elif document["status"] == "running":
        say(f"{job} stops as soon as its worker has put its things away")
    else:
        out().print(Text.assemble(job, " ", (document["status"], STATUS_STYLES.get(document["status"], ""))))


def _kept(budget: JSON) -> str:
    kept = ", ".join(f"{kept:g}" for kept in budget["kept"])
    return f"{kept} of latency" if budget.get("of") == "latency" else kept


def _model(job: JSON) -> str:
    source = str(job["spec"]["model"]["source"])
    return source if len(source) <= 40 else "..." + source[-37:]


def _error(job: JSON) -> str:
    error: Any = job.get("error")
    return f": {error.get('message') or error.get('detail') or error.get('code')}" if error else ""


def _eta(job: JSON) -> str:
    return f", {duration(job['eta_seconds'])} left" if job.get("eta_seconds") is not None else ""


def _absolute(base: str, link: str) -> str:
    return link if link.startswith("http") else base + link
