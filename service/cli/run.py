"""Commands that run something on this machine: `serve`, `worker`, `token`, `demo`."""

from __future__ import annotations

import hashlib
import os
import secrets
import sys
import threading
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from ranksearch.search.errors import InvalidInput, InvalidSettings
from ranksearch.service.cli import options
from ranksearch.service.cli.output import JOB_FAILED, err, print_json, print_lines, say
from ranksearch.service.client import Client
from ranksearch.service.serve import (
    Child,
    Say,
    Supervisor,
    child_environment,
    has_worker,
    listen,
    local_devices,
    python,
    python_environment,
    stop_on_signal,
)
from ranksearch.service.store.settings import Settings, load_settings

START_SECONDS = 120.0


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on [RANKSEARCH_HOST, 127.0.0.1].")] = None,
    port: Annotated[int | None, typer.Option(help="Port, 0 for a free one [RANKSEARCH_PORT, 8000].")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of database and artifacts [RANKSEARCH_DATA_DIR].")
    ] = None,
    no_worker: Annotated[bool, typer.Option("--no-worker", help="API and dashboard only.")] = False,
    device: Annotated[
        list[str] | None, typer.Option(help="Device to work on, e.g. cuda:0; may repeat. Default: each one there is.")
    ] = None,
) -> None:
    """Serve API, dashboard and local workers.

    One worker per device. What crashes is started again; Ctrl-C stops everything.
    """
    given = {"host": host, "port": port, "data_dir": data_dir}
    settings = load_settings(**{name: value for name, value in given.items() if value is not None})
    settings.refuse_exposure()
    if not settings.allowed_paths:
        settings = settings.model_copy(update={"allowed_paths": (Path.cwd(),)})
        say(f"models and texts may be read from {Path.cwd()} (RANKSEARCH_ALLOWED_PATHS names other folders)")
    for path in settings.allowed_paths:
        if not path.exists():
            say(f"warning: RANKSEARCH_ALLOWED_PATHS names {path}, which is not there")
    listener = listen(settings.host, settings.port)
    settings = settings.model_copy(update={"port": listener.getsockname()[1]})
    command = python("-m", "ranksearch.service.listen", str(listener.fileno()))
    children = [Child(name="api", command=command, pass_fds=(listener.fileno(),), attempts=3)]
    children += [
        Child(name=f"worker {name}", command=python("-m", "ranksearch.worker", "--device", name))
        for name in ([] if no_worker else _devices(device))
    ]
    supervisor = Supervisor(children, environment=child_environment(settings), say=_forward(settings))
    threading.Thread(target=_announce, args=(settings,), daemon=True).start()
    with stop_on_signal(supervisor):
        healthy = supervisor.run()
    say("stopped" if healthy else "stopped: the API could not be kept running")
    if not healthy:
        raise typer.Exit(JOB_FAILED)


def _devices(wanted: list[str] | None) -> list[str]:
    if not has_worker():
        say("no workers here: torch and transformers are missing (pip install 'ranksearch[worker]')")
        return []
    return wanted or local_devices()


def _forward(settings: Settings) -> Say:
    """How a child's line reaches the terminal; JSON lines stay what they are."""
    console = err()

    def forward(name: str, line: str) -> None:
        prefix = Text("" if settings.log_format == "json" and name != "serve" else f"[{name}] ", style="dim")
        console.print(Text.assemble(prefix, line), soft_wrap=True)

    return forward


def _announce(settings: Settings) -> None:
    """Say where the service is, once it is there."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    if host in ("0.0.0.0", "[::]"):
        host = "127.0.0.1"
    url = f"http://{host}:{settings.port}"
    deadline = time.monotonic() + START_SECONDS
    with Client(url) as client:
        while not client.healthy():
            if time.monotonic() > deadline:
                say(f"the API at {url} does not answer yet")
                return
            time.sleep(0.2)
    say(f"ready      {url}")
    say(f"dashboard  {url}/dashboard/")
    say(f"data       {settings.data_dir}")


def worker(
    device: Annotated[
        str,
        typer.Option(
            help="torch device; auto: the first GPU, or the CPU. cuda:0,cuda:1: both, for models too large for one."
        ),
    ] = "auto",
    name: Annotated[
        str | None, typer.Option(help="Stands for this host's name, to run a second worker on one device.")
    ] = None,
) -> None:
    """Run one more worker, on any machine.

    It needs the server's database and artifact folder: RANKSEARCH_DATABASE_URL and RANKSEARCH_ARTIFACTS_URL.
    """
    if not has_worker():
        raise InvalidSettings("torch and transformers are missing here: pip install 'ranksearch[worker]'")
    named = ["--name", name] if name else []
    command = python("-m", "ranksearch.worker", "--device", device, *named)
    os.execve(sys.executable, command, python_environment())


def token(as_json: options.AsJson = False) -> None:
    """Make a new bearer token.

    Prints the token for clients and the hash that the server keeps.
    """
    secret = f"rs_{secrets.token_urlsafe(32)}"
    digest = hashlib.sha256(secret.encode()).hexdigest()
    if as_json:
        print_json({"token": secret, "sha256": digest})
        return
    print_lines(f"RANKSEARCH_TOKEN={secret}", f"RANKSEARCH_TOKENS={digest}")
    say("the first line is for the client, shown only now; the second for the server (several hashes: comma between)")


def demo(
    folder: Annotated[Path, typer.Option("--folder", "-o", help="Where everything is left.")] = Path("demo"),
    kept: Annotated[str, typer.Option(help="Budgets of the demo.")] = "0.5,0.25",
    trials: Annotated[int, typer.Option(min=2, help="Trials per budget.")] = 20,
    seconds: Annotated[int, typer.Option(min=1, help="About how long the model is trained.")] = 60,
    keep_running: Annotated[bool, typer.Option("--keep-running", help="Leave the service on until Ctrl-C.")] = False,
) -> None:
    """See the whole thing work in minutes.

    Trains a tiny language model on Python's own documentation, compresses it over REST, loads the checkpoint.
    """
    from ranksearch.service.demo import Demo

    if not has_worker():
        raise InvalidSettings("the demo computes: pip install 'ranksearch[all]'")
    try:
        budgets = [float(part) for part in kept.split(",")]
    except ValueError:
        raise InvalidInput(f"--kept {kept}: write numbers, e.g. --kept 0.5,0.25") from None
    finished = Demo(folder=folder, kept=budgets, trials=trials, seconds=seconds, console=err()).run(
        keep_running=keep_running
    )
    if not finished:
        raise typer.Exit(JOB_FAILED)
