"""Who a worker is. Its id is also its name in the queue, so at most one live process may carry it."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Any

from ranksearch.search.errors import Conflict
from ranksearch.service.store.workers import Workers


def worker_id(device: str, name: str | None = None) -> str:
    """`host:device`, e.g. `gpu-box:cuda:0`; the same after every restart on the same machine.

    Args:
        device: A torch device, or several as `device_facts` names them.
        name: Stands for the host's name, to run a second worker on one device.
    """
    host = re.sub(r"[^a-z0-9.-]+", "-", (name or socket.gethostname()).lower()).strip("-.") or "worker"
    return f"{host[: min(200, 254 - len(device))]}:{device}"  # the store has room for 255 characters


def process_facts() -> dict[str, Any]:
    """What tells this process from any other: machine boot, process namespace, and start time beside the process id."""
    pid = os.getpid()
    return {"place": _place(), "start": _start_time(pid)}


def refuse_twins(workers: Workers, identity: str) -> None:
    """Refuse an id that a live process holds.

    A row whose process is known to be gone (same machine, no such process) is no obstacle: that is a restart. A row
    from elsewhere counts as alive while its heartbeat is fresh.

    Raises:
        Conflict: The id is taken.
    """
    held = workers.get(identity)
    if held is None:
        return
    if held.facts.get("place") == _place():
        taken = held.pid != os.getpid() and _start_time(held.pid) == held.facts.get("start")
    else:
        taken = held.alive
    if taken:
        raise Conflict(
            f"worker {identity} is running already (process {held.pid} on {held.host}); "
            "name this one with --name, or choose another --device",
            worker=identity,
        )


def _place() -> str:
    """Names this machine since its last start, and the namespace its process ids belong to."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _start_time(pid: int) -> str | None:
    """Clock ticks from boot to the start of a process; None when there is none, or only a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]
