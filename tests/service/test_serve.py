"""The supervisor with real processes: what crashes comes back, what is stopped is gone."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from ranksearch.search.errors import InvalidSettings, RanksearchError
from ranksearch.service.serve import Child, Supervisor, listen, local_devices

ROOT = Path(__file__).parents[2]


def wait_until(true: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


class Watched:
    """A supervisor in a thread, and what it says."""

    def __init__(self, *children: Child) -> None:
        self.lines: list[tuple[str, str]] = []
        self.children = children
        self.supervisor = Supervisor(children, environment=os.environ, say=lambda *line: self.lines.append(line))
        self.healthy: bool | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        self.healthy = self.supervisor.run()

    def said(self, words: str) -> int:
        return sum(words in line for _, line in self.lines)

    def stop(self) -> None:
        self.supervisor.stop()
        self.thread.join(30)
        assert not self.thread.is_alive()


def script(name: str, code: str, **options: int) -> Child:
    return Child(name=name, command=[sys.executable, "-u", "-c", code], **options)


def test_a_killed_child_is_started_again_and_all_end_together() -> None:
    forever = "import os, time\nprint('here', os.getpid())\ntime.sleep(600)"
    watched = Watched(script("one", forever), script("two", forever))
    wait_until(lambda: watched.said("here") == 2)
    first = watched.children[0].process
    assert first is not None
    first.kill()
    wait_until(lambda: watched.said("here") == 3)
    assert watched.said("one was killed by signal 9") == 1
    pids = [int(line.split()[1]) for name, line in watched.lines if line.startswith("here")]
    watched.stop()
    assert watched.healthy is True
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_child_that_cannot_start_ends_the_service_with_its_last_words() -> None:
    watched = Watched(
        script("api", "raise SystemExit('no database')", attempts=2), script("other", "import time; time.sleep(600)")
    )
    watched.thread.join(30)
    assert watched.healthy is False
    assert watched.said("no database") == 2
    assert watched.said("giving up") == 1
    other = watched.children[1].process
    assert other is not None
    assert other.returncode is not None


def test_a_child_that_ignores_the_request_to_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ranksearch.service.serve.GRACE_SECONDS", 0.2)
    code = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf')\ntime.sleep(600)"
    watched = Watched(script("deaf", code))
    wait_until(lambda: watched.said("deaf"))
    watched.stop()
    process = watched.children[0].process
    assert process is not None
    assert process.returncode == -signal.SIGKILL


def test_children_do_not_outlive_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import os\nfrom ranksearch.service.serve import Child, Supervisor\n"
        "child = Child(name='x', command=['sleep', '600'])\n"
        "import threading, time\n"
        "def tell():\n"
        "    while child.process is None: time.sleep(0.01)\n"
        "    print(child.process.pid, flush=True)\n"
        "threading.Thread(target=tell).start()\n"
        "Supervisor([child], environment=os.environ, say=print).run()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".ns")}
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


@pytest.fixture
def broken_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that processes started from here import as torch."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT / '.ns'}")
    file = tmp_path / "torch.py"
    file.write_text("raise ImportError('libcudart is missing')\n")
    return file


def test_a_worker_that_cannot_start_is_no_cpu_worker(broken_torch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RanksearchError, match=r"ImportError: libcudart is missing.*--device"):
        local_devices()
    monkeypatch.setattr("ranksearch.service.serve.DEVICES_SECONDS", 0.5)
    broken_torch.write_text("import time\ntime.sleep(60)\n")
    with pytest.raises(RanksearchError, match="no answer in 0"):
        local_devices()


def test_a_demo_that_fails_is_no_bad_usage(broken_torch: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ranksearch.service.cli", "demo", "--folder", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    assert "libcudart is missing" in done.stderr
    assert "could not be trained" in done.stderr


def test_a_port_in_use_names_the_way_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InvalidSettings, match="--port"):
        listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(InvalidSettings, match="cannot listen"):
        listen("192.0.2.1", 0)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """`ranksearch serve --no-worker` as users start it: its process, its address, its lines."""
    command = [sys.executable, "-m", "ranksearch.service.cli", "serve", "--no-worker", "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".ns")}
    process = subprocess.Popen(
        [*command, "--data-dir", str(tmp_path / "data")],
        env=environment,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines: list[str] = []
    assert process.stderr is not None
    stream = process.stderr
    threading.Thread(target=lambda: lines.extend(iter(stream.readline, "")), daemon=True).start()
    try:
        wait_until(lambda: process.poll() is not None or any(line.startswith("data") for line in lines), 60)
        address = re.search(r"^ready\s+(\S+)", "".join(lines), re.MULTILINE)
        assert address, lines
        yield process, address[1], lines
    finally:
        process.kill()
        process.wait()


def test_serve_from_start_to_stop(served: tuple[subprocess.Popen[str], str, list[str]], tmp_path: Path) -> None:
    process, url, lines = served
    assert f"models and texts may be read from {tmp_path}" in lines[0]
    assert httpx.get(f"{url}/v1/jobs").json() == {"data": [], "next": None}
    (api,) = psutil.Process(process.pid).children()
    api.kill()
    # The supervisor holds the socket, so this waits for the new API process instead of being refused.
    assert httpx.get(f"{url}/healthz", timeout=30).status_code == 200
    assert psutil.Process(process.pid).children() != [api]
    assert (tmp_path / "data" / "ranksearch.db").exists()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/healthz")


@pytest.mark.parametrize(
    ("arguments", "variables", "words"),
    [
        (["--host", "0.0.0.0"], {}, "RANKSEARCH_TOKENS"),
        (["--port", "1"], {"RANKSEARCH_TOKENS": "plain"}, "sha256"),
        ([], {"RANKSEARCH_DATABASE_URL": "mysql://x"}, "RANKSEARCH_DATABASE_URL"),
        ([], {"RANKSEARCH_ARTIFACTS_URL": "s3://x"}, "RANKSEARCH_ARTIFACTS_URL"),
    ],
)
def test_serve_refuses_bad_settings(
    tmp_path: Path, arguments: list[str], variables: dict[str, str], words: str
) -> None:
    command = [sys.executable, "-m", "ranksearch.service.cli", "serve", "--no-worker", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".ns"), **variables}
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
