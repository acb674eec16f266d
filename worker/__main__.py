"""`python -m ranksearch.worker`: run one worker until it is told to stop."""

from __future__ import annotations

import argparse
import sys

from ranksearch.search.errors import RanksearchError
from ranksearch.service.store.logs import configure_logging
from ranksearch.service.store.settings import load_settings
from ranksearch.worker.agent import Agent


def main() -> int:
    """Parse the command line and work; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ranksearch.worker", description="Run jobs, one at a time.")
    devices = "cpu, cuda:0, ...; auto: the first GPU, or the CPU; cuda:0,cuda:1: both for each job"
    parser.add_argument("--device", default="auto", help=devices)
    parser.add_argument("--name", help="stands for the host's name, to run a second worker on one device")
    parser.add_argument("--list-devices", action="store_true", help="print this machine's devices and end")
    arguments = parser.parse_args()
    if arguments.list_devices:
        sys.stdout.write("\n".join(_devices()) + "\n")
        return 0
    try:
        settings = load_settings()
        configure_logging(settings.log_format)
        Agent(settings, arguments.device, arguments.name).run()
    except RanksearchError as error:
        sys.stderr.write(f"{error.message}\n")
        return 2
    return 0


def _devices() -> list[str]:
    import torch

    return [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]


if __name__ == "__main__":
    sys.exit(main())
