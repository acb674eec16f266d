"""The agent's end of the device process: start it, ask it, watch it, kill it."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import IO, Any

from ranksearch.search.errors import RanksearchError
from ranksearch.worker.device import error_from

POLL_SECONDS = 0.25  # how often a waiting agent looks whether it should stop waiting
FINISH_SECONDS = 0.5  # what a process may take to answer when nobody waits for the answer any more


class DeviceDied(RanksearchError):
    """The device process ended before it answered."""

    code = "device_died"


def _ignore(_: Any = None) -> None:
    return None


class DeviceClient:
    """One device process at a time; a dead one is replaced at the next request."""

    def __init__(self, device: str) -> None:
        """Name the device; nothing is started yet.

        Args:
            device: A torch device, e.g. `cpu` or `cuda:0`.
        """
        self.device = device
        self.hello: dict[str, Any] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self._requests = 0
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """Process id of the running device process."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def start(self, check: Callable[[], None] = _ignore) -> dict[str, Any]:
        """Start the process unless it runs, wait for its greeting, and return the device's facts.

        Args:
            check: Called a few times a second while waiting; it ends the wait by raising.

        Raises:
            DeviceDied: It has ended since the last request, or before it greeted; the next call starts a new one.
            InvalidInput: This machine has no such device.
        """
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                raise self._died()
            if self._process is None:
                self._buffer = b""
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "ranksearch.worker.device", self.device],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    # threads that spin while they wait make a CPU shared with others many times slower
                    env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
                    start_new_session=True,  # Ctrl-C in a terminal is for the agent, which then ends this process
                )
                try:
                    self.hello = _result(self._read(check), "hello")
                except BaseException:
                    self.kill()
                    raise
        return self.hello

    def ask(
        self,
        operation: str,
        *,
        progress: Callable[[float], None] = _ignore,
        check: Callable[[], None] = _ignore,
        **arguments: Any,
    ) -> Any:
        """Carry out one operation in the device process.

        Args:
            operation: A name that the workbench knows.
            progress: Called with fractions in [0, 1] as they arrive.
            check: Called a few times a second while waiting; when it raises, the process has a moment to finish and is
                killed otherwise.
            **arguments: JSON-serializable arguments of the operation.

        Raises:
            DeviceDied: The process ended before it answered.
            RanksearchError: What the operation raised.
        """
        self.start(check)
        self._requests += 1
        self._send({"id": self._requests, "op": operation, **arguments})
        try:
            while "progress" in (reply := self._read(check)):
                progress(reply["progress"])
        except DeviceDied:
            raise
        except BaseException:
            self._let_finish_or_kill()
            raise
        return _result(reply, "result")

    def _let_finish_or_kill(self) -> None:
        """A process that is about to answer is worth more alive: it need not be started again."""
        deadline = time.monotonic() + FINISH_SECONDS

        def check() -> None:
            if time.monotonic() > deadline:
                raise TimeoutError

        try:
            while "progress" in self._read(check):
                continue
        except (TimeoutError, DeviceDied):
            self.kill(grace=0.5)

    def kill(self, grace: float = 1.0) -> None:
        """End the process: SIGTERM, and SIGKILL when `grace` seconds were not enough."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                _pipe(pipe).close()

    def _send(self, request: dict[str, Any]) -> None:
        try:
            stdin = _pipe(self._running().stdin)
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
        except OSError as error:
            raise self._died() from error

    def _read(self, check: Callable[[], None]) -> dict[str, Any]:
        """The next line from the process."""
        stdout = _pipe(self._running().stdout)
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                ready = selector.select(POLL_SECONDS)
                check()
                if ready:
                    chunk = os.read(stdout.fileno(), 1 << 16)
                    if not chunk:
                        raise self._died()
                    self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise DeviceDied("The device process was ended.")
        return self._process

    def _died(self) -> DeviceDied:
        process = self._running()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)  # its pipe closes a moment before it is gone; ended by us it would look like SIGTERM
        self.kill()
        code = process.returncode
        if code is None or code >= 0:
            return DeviceDied(f"The device process on {self.device} ended with exit code {code}.", exit_code=code)
        name = signal.Signals(-code).name
        hint = " (the system's out-of-memory killer does that)" if name == "SIGKILL" else ""
        return DeviceDied(f"The device process on {self.device} was ended by {name}{hint}.", signal=name)


def _result(reply: dict[str, Any], name: str) -> Any:
    if "error" in reply:
        raise error_from(reply["error"])
    return reply[name]


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe
