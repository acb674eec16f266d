"""Follow a job: live in a terminal, line by line in a file. It only reads, so stopping it stops nothing else."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from datetime import datetime
from queue import Empty, SimpleQueue
from typing import Any, Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ranksearch.search.objective import caption
from ranksearch.search.spec import budget_label
from ranksearch.search.trials import may_be_best
from ranksearch.service.client import FINISHED, JSON, Client, Event
from ranksearch.service.figures import duration, number
from ranksearch.service.summary import refine_line

REFRESH_SECONDS: Final = 1.0
LONELY_SECONDS: Final = 20.0  # a job that waits longer may wait for a worker that nobody has started


@dataclass(kw_only=True)
class Budget:
    """What is known of one study."""

    finished: int = 0
    scores: dict[str, float] = field(default_factory=dict)  # of prior and uniform
    best: float | None = None
    best_trial: int | None = None


class Progress:
    """What a job's events say so far; `tell` takes one and returns the line it is worth, if any."""

    def __init__(self, spec: JSON) -> None:
        self.objective = spec["search"]["objective"]
        self.planned: int | None = None  # trials per budget; a preset may take fewer or more than the spec's
        self.budgets = {budget_label(kept): Budget() for kept in spec["budget"]["kept"]}
        self.stage: str | None = None
        self._stage_began: datetime | None = None
        self._stage_kept: float | None = None

    def tell(self, event: Event, time_: datetime | None = None) -> str | None:
        describe = getattr(self, f"_on_{event.kind.replace('.', '_')}", None)
        if describe is None:
            return _plain(event)
        line: str | None = describe(event.data, time_)
        return line

    def done(self, *budgets: Budget) -> str:
        """Trials of these budgets, finished/planned; without a total until a trial has said how many are planned."""
        finished = sum(budget.finished for budget in budgets)
        return f"{finished}/{self.planned * len(budgets)}" if self.planned else str(finished)

    @property
    def finished_trials(self) -> int:
        return sum(budget.finished for budget in self.budgets.values())

    def _on_status(self, data: JSON, time_: datetime | None) -> str:
        left = self._left(time_)
        where = f" on {data['worker']}" if data.get("worker") else ""
        line = f"{data['status']}{where}"
        return f"{left}\n{line}" if left and data["status"] in FINISHED else line

    def _on_stage(self, data: JSON, time_: datetime | None) -> str | None:
        left = self._left(time_)
        self.stage, self._stage_began = data["stage"], time_
        self._stage_kept = data.get("kept")
        return left

    def _left(self, time_: datetime | None) -> str | None:
        """The line about the stage that has just ended."""
        if self.stage is None:
            return None
        took = (time_ - self._stage_began).total_seconds() if time_ and self._stage_began else None
        kept, trials = self._stage_kept, self.finished_trials
        if kept is not None:
            trials = self._budget({"kept": kept}).finished
        extra = f"  ({trials} trial{'' if trials == 1 else 's'})" if self.stage == "search" else ""
        if kept is not None and len(self.budgets) > 1:
            extra += f"  kept {budget_label(kept)}"
        return f"{self.stage:<10} {duration(took)}{extra}"

    def _on_best(self, data: JSON, _time: datetime | None) -> None:
        budget = self._budget(data)
        budget.best, budget.best_trial = data["score"], data["trial"]

    def _on_trial(self, data: JSON, _time: datetime | None) -> str:
        budget = self._budget(data)
        budget.finished += 1
        score, origin = data.get("score"), str(data.get("origin") or "search")
        state = data["state"]
        if score is not None and origin in ("prior", "uniform"):
            budget.scores[origin] = score
        if score is not None and may_be_best(state, origin) and (budget.best is None or score < budget.best):
            budget.best, budget.best_trial = score, data.get("number")
        kind = f" {origin}" if origin != "search" else ""
        outcome = f"{caption(self.objective)} {number(score)}" if state == "COMPLETE" else state.lower()
        best = f", best {number(budget.best)}" if budget.best is not None else ""
        self.planned = data.get("planned", self.planned)
        return f"trial {self.done(budget):<7} kept {budget_label(float(data['kept']))}{kind}: {outcome}{best}"

    def _on_refined(self, data: JSON, _time: datetime | None) -> str:
        kept = f", kept {budget_label(float(data['kept']))}" if len(self.budgets) > 1 else ""
        return refine_line(data, self.objective) + kept

    def _on_warning(self, data: JSON, _time: datetime | None) -> str:
        return f"warning: {data.get('message', data)}"

    def _on_cancel_requested(self, _data: JSON, _time: datetime | None) -> str:
        return "cancel requested; what was found so far is kept"

    def _on_released(self, _data: JSON, _time: datetime | None) -> None:
        """The warning that follows says it."""

    def _on_calibration_cache_hit(self, _data: JSON, _time: datetime | None) -> str:
        return "calibration: an earlier job made the same one, it is used again"

    def _on_prices_cache_hit(self, _data: JSON, _time: datetime | None) -> str:
        return "decode times: an earlier job measured the same shapes on such a device, its figures are used again"

    def _on_bank_cache_hit(self, _data: JSON, _time: datetime | None) -> str:
        return "factor bank: an earlier job made the same one, it is used again"

    def _on_checkpoint(self, data: JSON, _time: datetime | None) -> str:
        return f"checkpoint kept {budget_label(float(data['kept']))} is ready"

    def _budget(self, data: JSON) -> Budget:
        return self.budgets.setdefault(budget_label(float(data["kept"])), Budget())


def follow(client: Client, job_id: str, console: Console) -> JSON:
    """Show a job until it has finished, and return it.

    Raises:
        ServerUnreachable: The server is gone for good.
    """
    job = client.job(job_id)
    progress = Progress(job["spec"])
    events: SimpleQueue[Event | BaseException | None] = SimpleQueue()
    threading.Thread(target=_read, args=(client, job_id, events), daemon=True).start()
    if console.is_terminal:
        with Live(console=console, refresh_per_second=4, transient=True) as live:
            return _loop(client, job, progress, events, console, live)
    return _loop(client, job, progress, events, console, None)


def _loop(
    client: Client,
    job: JSON,
    progress: Progress,
    events: SimpleQueue[Event | BaseException | None],
    console: Console,
    live: Live | None,
) -> JSON:
    began = asked = time.monotonic()
    looked = False
    while True:
        try:
            event = events.get(timeout=REFRESH_SECONDS)
        except Empty:
            if not looked and time.monotonic() - began >= LONELY_SECONDS:
                looked = True
                warn_without_worker(client, job["id"], console)
        else:
            if isinstance(event, BaseException):
                raise event
            if event is None:
                return client.job(job["id"])
            _print(console, event, progress, quiet=live is not None)
        if live and time.monotonic() - asked >= REFRESH_SECONDS:
            job, asked = client.job(job["id"]), time.monotonic()
        if live:
            live.update(_picture(job, progress))


def warn_without_worker(client: Client, job_id: str, console: Console) -> None:
    if client.job(job_id)["status"] == "queued" and not any(worker["alive"] for worker in client.workers()):
        line = "warning: no worker is running, so the job waits; start one with `ranksearch worker`"
        console.print(Text(f"  {line}", style="yellow"), soft_wrap=True)


def _read(client: Client, job_id: str, events: SimpleQueue[Event | BaseException | None]) -> None:
    try:
        for event in client.events(job_id):
            events.put(event)
        events.put(None)
    except BaseException as error:  # raised again by the thread that shows
        events.put(error)


def _print(console: Console, event: Event, progress: Progress, *, quiet: bool) -> None:
    stamp = event.data.get("time")
    line = progress.tell(event, datetime.fromisoformat(stamp) if stamp else None)
    if line is None or (quiet and event.kind == "trial"):
        return
    style = "yellow" if event.kind == "warning" else ""
    for part in line.splitlines():
        console.print(Text(f"  {part}", style=style), soft_wrap=True)


def _picture(job: JSON, progress: Progress) -> RenderableType:
    """The live part: how far, and the best of each budget."""
    head = Table.grid(padding=(0, 2))
    eta = job.get("eta_seconds")
    left = f"{duration(eta)} left" if eta is not None else ""
    done = ""
    if job.get("stage") == "search":
        done = f"trial {progress.done(*progress.budgets.values())}"
    bar = ProgressBar(total=1.0, completed=float(job.get("progress") or 0.0), width=32)
    head.add_row(Text(f"  {job.get('stage') or job['status']:<10}", style="bold"), bar, done, left)
    rows: list[RenderableType] = [head]
    for label, budget in progress.budgets.items():
        if budget.best is not None or budget.scores:
            known = "".join(f"   {name} {number(score)}" for name, score in budget.scores.items())
            best = f"best {number(budget.best)} (trial {budget.best_trial})" if budget.best is not None else ""
            rows.append(Text(f"  kept {label:<6} {caption(progress.objective)} {best}{known}"))
    return Group(*rows)


def _plain(event: Event) -> str:
    facts = ", ".join(
        f"{key} {_short(value)}" for key, value in event.data.items() if key not in ("time", "kind", "id")
    )
    return f"{event.kind.replace('_', ' ')}: {facts}" if facts else event.kind.replace("_", " ")


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)
