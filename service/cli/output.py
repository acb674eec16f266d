"""What the commands print: answers go to standard output, everything said beside them to standard error."""

from __future__ import annotations

import json
import sys
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ranksearch.search.errors import BrokenDownload, InvalidInput, RanksearchError, RequestRefused, ServerUnreachable

JOB_FAILED: Final = 1
BAD_USAGE: Final = 2
UNREACHABLE: Final = 3
INTERRUPTED: Final = 130

#: Tables that go into a file or a pipe are not folded at 80 columns.
WIDE: Final = 240

STATUS_STYLES: Final = {
    "succeeded": "green",
    "failed": "red",
    "cancelled": "yellow",
    "running": "cyan",
    "queued": "dim",
}


def out() -> Console:
    """Standard output, as it is now."""
    return Console(width=None if sys.stdout.isatty() else WIDE, highlight=False, soft_wrap=not sys.stdout.isatty())


def err() -> Console:
    """Standard error, as it is now."""
    return Console(stderr=True, width=None if sys.stderr.isatty() else WIDE, highlight=False)


def say(message: str) -> None:
    """One line beside the answer."""
    err().print(Text(message), soft_wrap=True)


def print_json(document: Any) -> None:
    """The answer for programs: one JSON document."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def print_lines(*lines: str) -> None:
    """The answer for shells: bare lines."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def print_error(error: RanksearchError) -> None:
    """One line for the person, and one for each field that is wrong."""
    console = err()
    console.print(Text.assemble(("error: ", "bold red"), error.message), soft_wrap=True)
    problem = error.data.get("problem")
    for fault in problem.get("errors", []) if isinstance(problem, dict) else []:
        where, detail = str(fault.get("pointer", "")).strip("/").replace("/", "."), str(fault.get("detail", ""))
        if detail not in error.message:
            console.print(Text.assemble("  ", (where or "body", "bold"), ": ", detail), soft_wrap=True)
        elif where and str(fault["pointer"]) not in error.message:
            console.print(Text.assemble("  at ", (where, "bold")), soft_wrap=True)


def exit_code(error: RanksearchError) -> int:
    """The command's exit code for an error."""
    if isinstance(error, ServerUnreachable):
        return UNREACHABLE
    if isinstance(error, RequestRefused | InvalidInput) and not isinstance(error, BrokenDownload):
        return BAD_USAGE
    return JOB_FAILED


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table in the house's look; columns named in `right` hold numbers."""
    grid = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        grid.add_column(Text(column), justify="right" if column in right else "left", no_wrap=True)
    return grid


def status_text(status: str) -> Text:
    return Text(status, style=STATUS_STYLES.get(status, ""))
