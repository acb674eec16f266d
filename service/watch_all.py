"""Follow several jobs at once: a bar for each in a terminal, a line per change in a file. It only reads."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Final

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ranksearch.service.client import FINISHED, JSON, Client
from ranksearch.service.figures import duration
from ranksearch.service.watch import LONELY_SECONDS, warn_without_worker

POLL_SECONDS: Final = 1.0


def follow_all(client: Client, labels: Mapping[str, str], console: Console) -> dict[str, JSON]:
    """Show jobs until all have finished, and return them.

    Args:
        client: Of their server.
        labels: Job id -> what it is called.
        console: Where they are shown.

    Raises:
        JobNotFound: There is no such job.
        ServerUnreachable: The server is gone for good.
    """
    began, lonely = time.monotonic(), False
    said: dict[str, str] = {}
    jobs: dict[str, JSON] = {}
    live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
    with live or nullcontext():
        while True:
            for job_id, label in labels.items():
                if job_id not in jobs or jobs[job_id]["status"] not in FINISHED:
                    jobs[job_id] = client.job(job_id)
                    _say(console, label, jobs[job_id], said, quiet=live is not None)
            if all(job["status"] in FINISHED for job in jobs.values()):
                return jobs
            if live:
                live.update(_picture(labels, jobs))
            if not lonely and time.monotonic() - began >= LONELY_SECONDS:
                lonely = True
                warn_without_worker(client, next(iter(labels)), console)
            time.sleep(POLL_SECONDS)


def _say(console: Console, label: str, job: JSON, said: dict[str, str], *, quiet: bool) -> None:
    """One line when a job has come to another stage; in a terminal only when it has ended."""
    running = job["status"] == "running" and job.get("stage")
    where = str(job["stage"] if running else job["status"])
    if said.get(job["id"]) == where:
        return
    said[job["id"]] = where
    if not quiet or job["status"] in FINISHED:
        console.print(Text(f"  {label}: {where}"), soft_wrap=True)


def _picture(labels: Mapping[str, str], jobs: Mapping[str, JSON]) -> Table:
    """A bar for each job that has not finished."""
    grid = Table.grid(padding=(0, 2))
    for job_id, job in jobs.items():
        if job["status"] not in FINISHED:
            eta = job.get("eta_seconds")
            bar = ProgressBar(total=1.0, completed=float(job.get("progress") or 0.0), width=32)
            left = f"{duration(eta)} left" if eta is not None else ""
            grid.add_row(Text(f"  {labels[job_id]}"), bar, Text(job.get("stage") or job["status"]), left)
    return grid
