"""`ranksearch demo`: a whole job over REST on a model trained on the spot, and what a user then does with it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ranksearch.search.errors import RanksearchError, ServerUnreachable
from ranksearch.search.spec import budget_label
from ranksearch.service.client import FINISHED, Client
from ranksearch.service.download import choose, fetch
from ranksearch.service.figures import duration, number, size
from ranksearch.service.plot import plot_search
from ranksearch.service.serve import end_with_parent, python, python_environment
from ranksearch.service.watch import follow

START_SECONDS: Final = 60.0
#: What a user writes to load a checkpoint; run in a process that knows nothing of the service.
LOAD: Final = """
import sys
import ranksearch.worker.loading  # teaches transformers the checkpoint format
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer(sys.argv[2], return_tensors="pt", return_token_type_ids=False)
ids = model.generate(**inputs, max_new_tokens=24, do_sample=False, repetition_penalty=1.3)
print(tokenizer.decode(ids[0], skip_special_tokens=True))
"""
PROMPT: Final = "If the argument is"


@dataclass(kw_only=True)
class Demo:
    """One run of the demo; everything it makes lies in `folder`."""

    folder: Path
    kept: Sequence[float]
    trials: int
    seconds: int
    console: Console

    def run(self, *, keep_running: bool = False) -> bool:
        """Train, serve, submit, watch, fetch, load, show; False when the job did not succeed."""
        began = time.monotonic()
        self.folder = self.folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._step(1, "Train a tiny language model on Python's own documentation")
        self._train()
        self._step(2, "Start the service")
        with self._service() as client:
            self._say(
                f"API {client.url}   dashboard {client.url}/dashboard/   log {self._short(self.folder / 'serve.log')}"
            )
            self._step(3, "Submit a job over REST and follow it")
            job = self._submit(client)
            if job["status"] != "succeeded":
                self._say(f"{job['id']} {job['status']}: {(job.get('error') or {}).get('message', '')}")
                return False
            self._step(4, "Fetch a checkpoint by its URL and load it in a fresh process")
            checkpoint = self._fetch(client, job["id"])
            self._load(checkpoint)
            self._step(5, "What the search found")
            self._show(client, job["id"])
            self._say(f"everything took {duration(time.monotonic() - began)}")
            if keep_running:
                self._wait(client)
            else:
                self._farewell()
        return True

    def _train(self) -> None:
        if (self.folder / "model" / "model.safetensors").exists():
            self._say(f"{self._short(self.folder / 'model')} is there already; delete it to train again")
            return
        command = python("-m", "ranksearch.worker.tiny", str(self.folder), "--seconds", str(self.seconds))
        done = subprocess.run(command, env=python_environment(), preexec_fn=end_with_parent, check=False)
        if done.returncode:
            raise RanksearchError("the tiny model could not be trained; the reason is above")

    @contextmanager
    def _service(self) -> Iterator[Client]:
        """`ranksearch serve` on a free port, for as long as the block runs."""
        log = self.folder / "serve.log"
        environment = {name: value for name, value in python_environment().items() if name[:11] != "RANKSEARCH_"}
        environment["RANKSEARCH_ALLOWED_PATHS"] = str(self.folder)
        command = python(
            "-m", "ranksearch.service.cli", "serve", "--port", "0", "--data-dir", str(self.folder / "data")
        )
        with log.open("w") as out:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,  # Ctrl-C ends the demo, which then stops the service in good order
                preexec_fn=end_with_parent,
            )
        try:
            with Client(self._address(process, log), "") as client:
                yield client
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()

    def _address(self, process: subprocess.Popen[bytes], log: Path) -> str:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            if found := re.search(r"^ready\s+(\S+)", log.read_text(errors="replace"), re.MULTILINE):
                return found[1]
            time.sleep(0.1)
        raise ServerUnreachable(f"the service did not start; the reason is in {log}")

    def spec(self) -> dict[str, Any]:
        """The job: small sequences, both budgets, a test text that the search never sees."""

        def text(name: str) -> dict[str, Any]:
            return {"path": "text", "data_files": str(self.folder / name), "split": "train"}

        return {
            "name": "demo",
            "model": {"source": str(self.folder / "model")},
            "calibration": {"dataset": text("train.txt"), "sequences": 256, "sequence_length": 128},
            "evaluation": {"sequences": 64, "test": [{**text("test.txt"), "sequences": 128}]},
            "budget": {"kept": list(self.kept)},
            "search": {"trials": self.trials},
        }

    def _submit(self, client: Client) -> dict[str, Any]:
        for old in client.jobs():  # of a demo that was interrupted: the folder is ours
            if old["status"] not in FINISHED:
                client.cancel(old["id"])
        (self.folder / "spec.json").write_text(json.dumps(self.spec(), indent=2) + "\n")
        job = client.submit(self.spec())
        self._say(f"POST {client.url}/v1/jobs  with {self._short(self.folder / 'spec.json')}  ->  {job['id']}")
        return follow(client, job["id"], self.console)

    def _fetch(self, client: Client, job_id: str) -> Path:
        """Fetch every budget's checkpoint; the smallest budget's is the one that is loaded."""
        checkpoints = client.checkpoints(job_id)
        for kept in self.kept:
            files = choose(checkpoints, kept)["files"]
            folder = self.folder / f"compressed-{budget_label(kept)}"
            fetch(client, files, folder, lambda _path, _have: None)
            self._say(f"{len(files)} files, {size(sum(file['size'] for file in files))}  ->  {self._short(folder)}")
        weights = next(file for file in files if file["path"].endswith(".safetensors"))
        self._say(f"for example {client.url}{weights['url'].removeprefix(client.url)}")
        return folder

    def _load(self, checkpoint: Path) -> None:
        command = [sys.executable, "-P", "-c", LOAD, str(checkpoint), PROMPT]
        answer = subprocess.run(command, env=python_environment(), capture_output=True, text=True, check=False)
        if answer.returncode:
            raise RanksearchError(f"the checkpoint could not be loaded:\n{answer.stderr}")
        self._say(f"it writes: {answer.stdout.strip()!r}")

    def _show(self, client: Client, job_id: str) -> None:
        report = client.report(job_id)
        (self.folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        picture = self.folder / "search.png"
        plot_search(report, picture)
        self.console.print(result_table(report))
        self._say(f"picture    {self._short(picture)}")
        self._say(f"report     {client.url}/v1/jobs/{job_id}/report  ({self._short(self.folder / 'report.json')})")
        self._say(f"dashboard  {client.url}/dashboard/")

    def _wait(self, client: Client) -> None:
        self._say(f"the service stays at {client.url} until Ctrl-C")
        try:
            signal.pause()
        except KeyboardInterrupt:
            self._farewell()

    def _farewell(self) -> None:
        again = f"ranksearch serve --data-dir {self._short(self.folder / 'data')}"
        self._say(f"the service is stopped now; the same job and dashboard again: {again}")

    def _step(self, place: int, title: str) -> None:
        self.console.print(Text(f"\n{place}. {title}", style="bold"))

    def _say(self, message: str) -> None:
        self.console.print(Text(f"   {message}"), soft_wrap=True)

    def _short(self, path: Path) -> str:
        return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def result_table(report: dict[str, Any]) -> Table:
    """The demo's answer: what each allocation costs in perplexity, bytes and speed."""
    grid = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("kept", "ranks"):
        grid.add_column(heading, no_wrap=True)
    for heading in ("test perplexity", "KL to dense", "bytes on disk", "decode tokens/s"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for place, budget in enumerate(report["budgets"]):
        speed, held = budget.get("speed") or {}, budget["bytes"]
        for row in ("dense", "uniform", "prior", "best", "final"):
            scores = budget["scores"].get(row)
            if scores is None or (row == "dense" and place):
                continue
            test: dict[str, float] = next(iter(scores["test"].values()), {})
            side = {"dense": "before", "final": "after"}.get(row)
            disk = {"dense": held["disk_dense"], "final": held["disk"]}.get(row)
            rate = (speed.get(side) or {}).get("decode_tokens_per_second") if side else None
            grid.add_row(
                "1" if row == "dense" else budget_label(budget["kept"]),
                row,
                number(test.get("perplexity")),
                number(test.get("kl"), 4),
                size(disk) if disk else "",
                number(rate, 0) if rate else "",
                style="bold" if row == "final" else "",
            )
    return grid
