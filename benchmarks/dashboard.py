"""How long the dashboard's page of a study takes to open: a real server, real Chromium.

    python benchmarks/dashboard.py --data /tmp/dashboard --json dashboard.json

The studies have 224 targets, and 10 or 300 trials with losses of eight parts; they are made once and kept in `--data`.
A page is open when its four plots are drawn. The rows are, each with a new profile of the browser but the last:

* a blank page, the yardstick for the browser alone;
* the page of each study, from a server that has shown it before;
* "first": the page of the large study as the first one that a server shows, asked for when the server answers;
* "first, cached": the same, with a profile whose cache holds the script.

The table holds medians of wall time, of the CPU time of the browser's main thread (the whole, and what was before the
first answer is used: mostly the script) and of the server, which depend far less on what else the machine does, the
number of requests, the bytes sent and the load average of the machine before.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from ranksearch.search.spec import Search
from ranksearch.search.study import RankStudy
from ranksearch.service.store.database import migrate, open_database, optuna_storage
from ranksearch.service.store.settings import load_settings

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.search import synthetic

STUDIES = {"job_small": 10, "job_large": 300}
PARTS, SEQUENCES, KEPT, PLOTS = 8, 32, 0.4, 4
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--window-size=1400,1600"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"),
)
DRAWN = "document.querySelectorAll('.js-plotly-plot .main-svg').length"
TICK = 1 / os.sysconf("SC_CLK_TCK")


def make_studies(data: Path) -> dict[str, int]:
    """The studies' ids by job; made in this folder unless they are there."""
    settings = load_settings(data_dir=data)
    engine = open_database(settings)
    migrate(engine)
    engine.dispose()
    storage = optuna_storage(settings)
    problem = synthetic.problem(0, blocks=32)
    rng = np.random.default_rng(0)
    for job, trials in STUDIES.items():
        study = RankStudy(
            storage=storage,
            job_id=job,
            kept=KEPT,
            space=problem.space,
            spectra=problem.spectra,
            spec=Search(trials=trials, sampler="random"),
            dense_score=synthetic.DENSE,
        )
        while (proposal := study.ask()) is not None:
            score = problem.score(proposal.ranks)
            losses = np.log(score) + 0.3 * rng.standard_normal((PARTS, SEQUENCES))
            if any(study.report(proposal.number, step, part.tolist()) for step, part in enumerate(losses)):
                study.tell_pruned(proposal.number, seconds=1.0, worker="host:cpu")
            else:
                study.tell(proposal.number, score=score, scores={"perplexity": score}, seconds=1.5, worker="host:cpu")
    ids = {job: storage.get_study_id_from_name(f"{job}/{KEPT}") for job in STUDIES}
    storage.engine.dispose()
    return ids


@contextmanager
def server(data: Path, listener: socket.socket) -> Iterator[int]:
    """The API process on this socket as `ranksearch serve` starts it; its process id once it answers."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ranksearch.service.listen", str(listener.fileno())],
        pass_fds=(listener.fileno(),),
        env={**os.environ, "RANKSEARCH_DATA_DIR": str(data)},
    )
    try:
        httpx.get(f"{address(listener)}/healthz", timeout=120).raise_for_status()
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def address(listener: socket.socket) -> str:
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def new_profile() -> tempfile.TemporaryDirectory[str]:
    """A folder for a profile of the browser, which may still write there when it is removed."""
    return tempfile.TemporaryDirectory(ignore_cleanup_errors=True)


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far, all threads, s."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK


class Browser:
    """Headless Chromium with this profile, spoken to by the DevTools protocol over a pipe."""

    def __init__(self, profile: str) -> None:
        from_us, self._to = os.pipe()
        self._from, from_it = os.pipe()
        command = [shutil.which("chromium") or "chromium", *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        # Chromium reads from 3 and writes to 4
        shell = ["sh", "-c", f'exec "$@" 3<&{from_us} 4>&{from_it}', "sh", *command]
        self._process = subprocess.Popen(shell, pass_fds=(from_us, from_it), stderr=subprocess.DEVNULL)
        os.close(from_us)
        os.close(from_it)
        self._buffer, self._calls = b"", 0
        self.received = 0
        self.requests = 0
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Network.enable")
        self.call("Performance.enable", timeDomain="threadTicks")

    _session: str | None = None

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method and wait for its result; counts finished requests that are told of meanwhile."""
        self._calls += 1
        session = {} if self._session is None else {"sessionId": self._session}
        message = {"id": self._calls, "method": method, "params": params, **session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                if not select.select([self._from], [], [], 60)[0]:
                    raise TimeoutError(method)
                self._buffer += os.read(self._from, 1 << 20)
            raw, _, self._buffer = self._buffer.partition(b"\0")
            answer: dict[str, Any] = json.loads(raw)
            if answer.get("id") == self._calls:
                return answer["result"]
            if answer.get("method") == "Network.loadingFinished" and (size := answer["params"]["encodedDataLength"]):
                self.received += int(size)
                self.requests += 1

    def metrics(self) -> dict[str, float]:
        """Of the page's main thread; durations are CPU seconds."""
        return {metric["name"]: metric["value"] for metric in self.call("Performance.getMetrics")["metrics"]}

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def close(self) -> None:
        """End it."""
        self.call("Browser.close")
        self._process.wait(30)
        os.close(self._to)
        os.close(self._from)


def open_page(url: str, layers: int, profile: str) -> dict[str, float]:
    """Open a page until this many layers of plots (three a plot) are there."""
    browser = Browser(profile)
    begun = time.perf_counter()
    browser.call("Page.navigate", url=url)
    script = 0.0
    while True:
        time.sleep(0.05)
        drawn, now = browser.evaluate(DRAWN), browser.metrics()
        if not drawn:
            script = now["TaskDuration"]
        if drawn is not None and drawn >= layers:
            break
        if time.perf_counter() - begun > 120:
            raise TimeoutError(url)
    found = {
        "wall": time.perf_counter() - begun,
        "main thread": now["TaskDuration"],
        "before plots": script,
        "layout": now["LayoutDuration"] + now["RecalcStyleDuration"],
        "requests": browser.requests,
        "kB": browser.received / 1000,
    }
    browser.close()
    return found


def measure(data: Path, repeats: int) -> list[dict[str, Any]]:
    """One row per page, the medians of its rounds."""
    ids = make_studies(data)
    rounds: dict[str, list[dict[str, float]]] = {}

    def visit(page: str, url: str, pid: int, profile: str | None = None) -> None:
        load, before = os.getloadavg()[0], cpu_seconds(pid)
        with new_profile() as fresh:
            found = open_page(url, 0 if page == "blank" else 3 * PLOTS, profile or fresh)
        found |= {"server": cpu_seconds(pid) - before, "load": load}
        print(f"{page:14}", *(f"{key} {value:.2f}" for key, value in found.items()), flush=True)
        rounds.setdefault(page, []).append(found)

    with socket.create_server(("127.0.0.1", 0)) as listener, new_profile() as kept:
        urls = {job: f"{address(listener)}/dashboard/studies/{ids[job]}" for job in STUDIES}
        with server(data, listener) as pid:
            for url in urls.values():
                open_page(url, 3 * PLOTS, kept)
            for _ in range(repeats):
                visit("blank", "about:blank", pid)
                for job, url in urls.items():
                    time.sleep(6)  # the dashboard itself keeps trials for five seconds
                    visit(job, url, pid)
        for _ in range(repeats):
            for page, profile in (("first", None), ("first, cached", kept)):
                with server(data, listener) as pid:
                    visit(page, urls["job_large"], pid, profile)
    return [
        {"page": page, **{key: statistics.median(found[key] for found in all_found) for key in all_found[0]}}
        for page, all_found in rounds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the database")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    rows = measure(options.data, options.repeats)
    options.json.write_text(json.dumps(rows, indent=1))
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(value if isinstance(value, str) else f"{value:.2f}" for value in row.values()) + " |")


if __name__ == "__main__":
    main()
