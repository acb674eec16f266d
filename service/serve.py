"""`ranksearch serve`: one supervisor that keeps the API process and one worker process per device running."""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Final

from ranksearch.search.errors import InvalidSettings, RanksearchError
from ranksearch.service.store.settings import Settings

GRACE_SECONDS: Final = 10.0
DEVICES_SECONDS: Final = 120.0
STEADY_SECONDS: Final = 30.0  # who ran this long has started well: the next restart comes at once
LONGEST_PAUSE_SECONDS: Final = 30.0
_PR_SET_PDEATHSIG: Final = 1
_libc = ctypes.CDLL(None, use_errno=True)

Say = Callable[[str, str], None]


def python(*arguments: str) -> list[str]:
    """A Python of this environment; -P keeps modules of the folder the user happens to be in out of it."""
    return [sys.executable, "-P", *arguments]


def listen(host: str, port: int) -> socket.socket:
    """Bind the address of the API; port 0 takes a free one.

    Raises:
        InvalidSettings: The address is taken, or is none of this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InvalidSettings(
                f"port {port} is in use; is a server running already? Choose another with --port {port + 1}, "
                "or any free one with --port 0"
            ) from error
        raise InvalidSettings(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


def has_worker() -> bool:
    """Whether the worker's part is installed here."""
    return importlib.util.find_spec("torch") is not None and importlib.util.find_spec("transformers") is not None


def local_devices() -> list[str]:
    """The devices of this machine, asked of the worker in a process of its own: this one stays free of torch.

    Raises:
        RanksearchError: The worker does not start, or does not answer in time.
    """
    command = python("-m", "ranksearch.worker", "--list-devices")
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=DEVICES_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        reason = f"no answer in {DEVICES_SECONDS:g} s"
    else:
        if answer.returncode == 0:
            return answer.stdout.split()
        reason = (answer.stderr.strip().splitlines() or [_how_it_ended(answer.returncode)])[-1]
    raise RanksearchError(
        f"no worker can list this machine's devices ({reason}); name them with --device, or serve with --no-worker"
    )


def python_environment() -> dict[str, str]:
    """The environment of every Python that computes or serves for us.

    Threads of torch that wait for each other sleep instead of spinning, which beside other busy processes is several
    times faster.
    """
    return {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONSAFEPATH": "1"}


def child_environment(settings: Settings) -> dict[str, str]:
    """The environment that gives child processes the same settings."""
    return {
        **python_environment(),
        "PYTHONUNBUFFERED": "1",
        "RANKSEARCH_DATA_DIR": str(settings.data_dir),
        "RANKSEARCH_HOST": settings.host,
        "RANKSEARCH_PORT": str(settings.port),
        "RANKSEARCH_ALLOWED_PATHS": os.pathsep.join(map(str, settings.allowed_paths)),
    }


@dataclass(kw_only=True)
class Child:
    """A process that should always run.

    Attributes:
        name: Prefix of its log lines.
        command: What to start.
        pass_fds: Open files it inherits.
        attempts: Quick ends in a row after which the supervisor gives up and stops; None: never.
    """

    name: str
    command: Sequence[str]
    pass_fds: tuple[int, ...] = ()
    attempts: int | None = None
    process: subprocess.Popen[str] | None = field(default=None, init=False)
    quick_ends: int = field(default=0, init=False)
    started: float = field(default=0.0, init=False)
    due: float | None = field(default=0.0, init=False)


class Supervisor:
    """Starts children, forwards what they print, restarts those that end, and stops all of them together."""

    def __init__(self, children: Sequence[Child], *, environment: Mapping[str, str], say: Say) -> None:
        self._children = list(children)
        self._environment = dict(environment)
        self._say = say
        self._ended: SimpleQueue[Child | None] = SimpleQueue()
        self._stopping = False

    def stop(self) -> None:
        """Ask `run` to end; may be called from a signal handler or another thread."""
        self._stopping = True
        self._ended.put(None)

    def run(self) -> bool:
        """Keep the children running until `stop`; False when one of them cannot be kept running.

        Children are started by the thread that calls this, and end when it does, even by `kill -9`.
        """
        try:
            while not self._stopping:
                now = time.monotonic()
                for child in self._children:
                    if child.due is not None and child.due <= now:
                        self._start(child)
                due = [child.due for child in self._children if child.due is not None]
                try:
                    ended = self._ended.get(timeout=max(0.0, min(due) - now) if due else None)
                except Empty:
                    continue
                if ended is not None and not self._stopping and not self._reschedule(ended):
                    return False
            return True
        finally:
            self._stopping = True
            self._stop_all()

    def _start(self, child: Child) -> None:
        child.due, child.started = None, time.monotonic()
        child.process = process = subprocess.Popen(
            list(child.command),
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=child.pass_fds,
            start_new_session=True,  # Ctrl-C in a terminal is for the supervisor alone
            preexec_fn=end_with_parent,
        )
        threading.Thread(target=self._forward, args=(child, process), daemon=True).start()
        threading.Thread(target=self._wait, args=(child, process), daemon=True).start()

    def _forward(self, child: Child, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._say(child.name, line.rstrip())

    def _wait(self, child: Child, process: subprocess.Popen[str]) -> None:
        process.wait()
        self._ended.put(child)

    def _reschedule(self, child: Child) -> bool:
        """Plan a restart; False when there is no point in it."""
        assert child.process is not None
        now = time.monotonic()
        child.quick_ends = child.quick_ends + 1 if now - child.started < STEADY_SECONDS else 0
        end = _how_it_ended(child.process.returncode)
        if child.attempts is not None and child.quick_ends >= child.attempts:
            self._say(
                "serve", f"{child.name} {end} {child.quick_ends} times in a row; giving up. Its last words are above."
            )
            return False
        pause = min(LONGEST_PAUSE_SECONDS, 0.5 * 2.0**child.quick_ends) if child.quick_ends else 0.0
        self._say("serve", f"{child.name} {end}; starting it again" + (f" in {pause:g} s" if pause else ""))
        child.due = now + pause
        return True

    def _stop_all(self) -> None:
        running = [child.process for child in self._children if child.process and child.process.poll() is None]
        for process in running:
            process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextmanager
def stop_on_signal(supervisor: Supervisor) -> Iterator[None]:
    """Turn SIGTERM, SIGHUP and Ctrl-C into a clean stop."""

    def handle(_number: int, _frame: FrameType | None) -> None:
        supervisor.stop()

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(number, handle) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def end_with_parent() -> None:
    """For `preexec_fn`: let the child get SIGTERM when the thread that starts it ends, however it ends."""
    # Runs in the child between fork and exec: only one system call, whose library was loaded before the fork.
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _how_it_ended(code: int) -> str:
    if code < 0:
        return f"was killed by signal {-code} ({signal.strsignal(-code)})"
    return f"ended with exit code {code}"
