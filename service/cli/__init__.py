"""The `ranksearch` command.

Exit codes: 0 ok, 1 the job failed (or a download arrived broken), 2 bad usage, 3 server unreachable; 130 after Ctrl-C.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ranksearch.search.errors import RanksearchError
from ranksearch.service.cli import compare, files, jobs, run
from ranksearch.service.cli.output import INTERRUPTED, exit_code, print_error, print_lines, say


class _Commands(TyperGroup):
    """Turns the project's errors into one line and an exit code; anything else is a bug and may show its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except RanksearchError as error:
            print_error(error)
            raise typer.Exit(exit_code(error)) from None
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    name="ranksearch",
    cls=_Commands,
    help="Compress language models to low rank: submit a model and a budget, watch the search, fetch the checkpoint.",
    epilog="First steps: ranksearch demo\n\nClients read RANKSEARCH_URL and RANKSEARCH_TOKEN.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def _version(wanted: bool) -> None:
    if wanted:
        print_lines(f"ranksearch {_installed()}")
        raise typer.Exit


def _installed() -> str:
    try:
        return version("ranksearch")
    except PackageNotFoundError:  # a bare checkout
        return "0"


@app.callback()
def _root(
    _show: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Only the options that every command shares."""


def _add(panel: str, command: Any, *examples: str) -> None:
    epilog = "Examples:\n\n" + "\n\n".join(f"  {example}" for example in examples)
    app.command(epilog=epilog, rich_help_panel=panel)(command)


_add("Server", run.serve, "ranksearch serve", "ranksearch serve --port 8080 --no-worker")
_add("Server", run.worker, "ranksearch worker --device cuda:0", "ranksearch worker --device cuda:0,cuda:1")
_add("Server", run.token, "ranksearch token")
_add("Server", run.demo, "ranksearch demo", "ranksearch demo --kept 0.5,0.25 --keep-running")
_add(
    "Jobs",
    jobs.submit,
    "ranksearch submit spec.json --watch",
    "ranksearch submit --model Qwen/Qwen3-0.6B --kept 0.8,0.6 --trials 60",
    "ranksearch submit --model ./model --text train.txt --test test.txt --sequence-length 256 --kept 0.5",
)
_add("Jobs", jobs.watch, "ranksearch watch job_1a2b3c4d5e6f")
_add("Jobs", jobs.jobs, "ranksearch jobs", "ranksearch jobs --limit 5 --json")
_add("Jobs", jobs.show, "ranksearch show job_1a2b3c4d5e6f")
_add("Jobs", jobs.cancel, "ranksearch cancel job_1a2b3c4d5e6f")
_add(
    "Results",
    compare.compare,
    "ranksearch compare spec.json --methods ranksearch,soco --kept 0.4,0.25",
    "ranksearch compare spec.json --methods ranksearch,ranksearch/pivoted,ranksearch/pivoted+sequential",
    "ranksearch compare spec.json --methods ranksearch,soco --seeds 0,1,2 --plot curves.svg",
    "ranksearch compare --jobs job_1a2b3c4d5e6f,job_6f5e4d3c2b1a --json",
)
_add(
    "Results",
    files.report,
    "ranksearch report job_1a2b3c4d5e6f",
    "ranksearch report job_1a2b3c4d5e6f --plot front.svg",
    "ranksearch report job_1a2b3c4d5e6f --json > report.json",
    "ranksearch report job_1a2b3c4d5e6f --heatmap ranks.svg",
)
_add(
    "Results",
    files.fetch,
    "ranksearch fetch job_1a2b3c4d5e6f -o compressed",
    "ranksearch fetch job_1a2b3c4d5e6f --kept 0.8 -o m80",
)
_add(
    "Results",
    files.estimate,
    "ranksearch estimate --model Qwen/Qwen3-0.6B --kept 0.8",
    "ranksearch estimate spec.json --json",
)


def main() -> None:
    """Entry point of the `ranksearch` script."""
    app(prog_name="ranksearch")
