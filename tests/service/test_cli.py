"""The commands against a real server whose jobs are written by hand: what they print, and how they end."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from ranksearch.search.spec import JobSpec
from ranksearch.service import watch
from ranksearch.service.cli import app
from ranksearch.service.store.artifacts import ArtifactStore
from ranksearch.service.store.checkpoints import CheckpointFile, Checkpoints
from ranksearch.service.store.jobs import Jobs
from ranksearch.service.store.settings import Settings
from ranksearch.service.summary import budget_line
from ranksearch.service.watch import Progress

Run = Callable[..., Any]

pytestmark = pytest.mark.one_database  # the commands see no database


@pytest.fixture
def running(jobs: Jobs, body: dict[str, Any], url: str) -> str:
    """The id of a job that a worker has begun."""
    job = jobs.create(JobSpec.model_validate(body))
    assert jobs.set_running(job.id, "host:cpu")
    return job.id


def finish(jobs: Jobs, job_id: str) -> None:
    """What a worker writes while it works, in short."""
    jobs.set_stage(job_id, "calibrate")
    jobs.add_event(job_id, "calibration.cache_hit", {"fingerprint": "f"})
    jobs.set_stage(job_id, "search")
    for trial in ({"number": 0, "origin": "prior", "score": 30.5}, {"number": 1, "origin": "uniform", "score": 41.0}):
        jobs.add_event(job_id, "trial", {"kept": 0.5, "state": "COMPLETE", "planned": 60, **trial})
    jobs.set_best(job_id, 0.5, 30.5, 0)
    jobs.succeed(job_id)


def test_submit_prints_the_id_and_nothing_else(
    run: Run, url: str, model: Path, body: dict[str, Any], jobs: Jobs
) -> None:
    text = Path(body["calibration"]["dataset"]["data_files"])
    result = run(
        "submit",
        "--model",
        model,
        "--text",
        text,
        "--kept",
        "0.5,0.75",
        "--trials",
        7,
        "--seed",
        3,
        "--preset",
        "bolaco",
    )
    assert (result.exit_code, len(result.stdout.split())) == (0, 1)
    assert "ranksearch watch" in result.stderr
    spec = jobs.get(result.stdout.strip()).parsed()
    assert spec.budget.kept == [0.5, 0.75]
    assert (spec.search.trials, spec.search.seed, spec.calibration.seed) == (7, 3, 3)
    assert (spec.method.preset, spec.search.sampler) == ("bolaco", "bolaco")
    assert spec.evaluation.test == []


def test_a_search_is_told_which_jobs_to_learn_from(
    run: Run, url: str, body: dict[str, Any], tmp_path: Path, jobs: Jobs
) -> None:
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(body))
    earlier = [run("submit", file).stdout.strip() for _ in range(2)]
    result = run("submit", file, *(part for job in earlier for part in ("--learn-from", job)))
    assert jobs.get(result.stdout.strip()).parsed().search.learn_from == earlier


def test_flags_win_over_the_file(run: Run, url: str, body: dict[str, Any], tmp_path: Path, jobs: Jobs) -> None:
    file = tmp_path / "spec.json"
    file.write_text(json.dumps({**body, "name": "from file", "search": {"trials": 9, "seed": 1}}))
    result = run("submit", file, "--kept", "0.7", "--set", "search.trials=5", "--set", "search.pruner=none", "--json")
    assert result.exit_code == 0
    answer = json.loads(result.stdout)
    spec = jobs.get(answer["id"]).parsed()
    assert (spec.name, spec.budget.kept) == ("from file", [0.7])
    assert (spec.search.trials, spec.search.pruner, spec.search.seed) == (5, "none", 1)


def test_a_budget_in_bytes_takes_the_place_of_the_files(
    run: Run, url: str, body: dict[str, Any], tmp_path: Path, jobs: Jobs
) -> None:
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(body))
    budget = jobs.get(run("submit", file, "--bytes", "8.5KiB, 0.0085MB,9000").stdout.strip()).parsed().budget
    assert budget.bytes == [8704, 8500, 9000]
    assert 0 < budget.kept[1] < budget.kept[0] < budget.kept[2] < 1
    shown = run("show", run("submit", file, "--bytes", "8.5kib").stdout.strip())
    assert "8.5 KiB" in shown.stdout


def test_local_paths_are_made_absolute(
    run: Run, url: str, model: Path, body: dict[str, Any], jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    text = Path(body["calibration"]["dataset"]["data_files"]).name
    result = run("submit", "--model", model.name, "--text", text, "--test", text, "--kept", "0.5")
    spec = jobs.get(result.stdout.strip()).parsed()
    assert spec.model.source == str(model)
    assert spec.calibration.dataset.data_files == spec.evaluation.test[0].data_files == str(model.parent / text)


def test_the_same_key_makes_one_job(run: Run, url: str, body: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(body))
    ids = {run("submit", file, "--idempotency-key", "once").stdout for _ in range(2)}
    assert len(ids) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["submit", "--kept", "0.5"], "--model"),
        (["submit", "--model", "MODEL"], "--kept 0.8"),
        (["submit", "--model", "MODEL", "--kept", "half"], "write numbers"),
        (["submit", "--model", "MODEL", "--kept", "nan"], "NaN or infinite"),
        (["estimate", "--model", "MODEL", "--kept", "0.5", "--set", "search.timeout_seconds=1e999"], "NaN or infinite"),
        (["submit", "--model", "MODEL", "--bytes", "5 apples"], "write a number with a unit"),
        (["submit", "--model", "MODEL", "--bytes", "5GB", "--kept", "0.5"], "exclude"),
        (["submit", "--model", "MODEL", "--kept", "0"], "/budget/kept/0"),
        (["submit", "--model", "MODEL", "--kept", "80"], "above 0 and at most 1; got 80"),
        (["submit", "--model", "MODEL", "--kept", "0.5", "--set", "bogus"], "FIELD=VALUE"),
        (["submit", "--model", "MODEL", "--kept", "0.5", "--set", "bogus=1"], "unknown field"),
        (["submit", "--model", "MODEL", "--kept", "0.5", "--set", "model.source.x=1"], "no fields"),
        (["submit", "--model", "MODEL", "--kept", "0.5", "--text", "a", "--dataset", "b"], "exclude"),
        (["submit", "--model", "/etc", "--kept", "0.5"], "/etc"),
        (["submit", "missing.json"], "cannot read missing.json"),
        (["submit", __file__], "is not JSON"),
        (["show", "job_nobody"], "no job 'job_nobody'"),
        (["watch", "job_nobody"], "no job 'job_nobody'"),
        (["report", "job_nobody"], "no job 'job_nobody'"),
        (["fetch", "job_nobody"], "no job 'job_nobody'"),
        (["cancel", "job_nobody"], "no job 'job_nobody'"),
    ],
)
def test_bad_usage_is_one_line_and_code_2(run: Run, url: str, model: Path, arguments: list[str], words: str) -> None:
    result = run(*[str(model) if argument == "MODEL" else argument for argument in arguments])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert words in result.stderr
    assert len(result.stderr.splitlines()) <= 2, result.stderr


@pytest.mark.parametrize(
    "arguments", [["--nonsense"], ["nonsense"], ["submit", "--trials", "many"], ["show"], ["jobs", "--limit", "0"]]
)
def test_an_unknown_option_is_code_2(run: Run, arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


@pytest.mark.parametrize(
    "command", [["jobs"], ["show", "x"], ["watch", "x"], ["report", "x"], ["fetch", "x"], ["cancel", "x"]]
)
def test_no_server_is_code_3(run: Run, command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKSEARCH_URL", "http://127.0.0.1:9")
    result = run(*command)
    assert result.exit_code == 3
    assert result.stderr.startswith("error: No server answers at http://127.0.0.1:9")
    assert len(result.stderr.splitlines()) == 1


def test_a_wrong_token_is_code_2_and_the_right_one_works(
    run: Run, serve: Callable[[Settings], str], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = json.loads(run("token", "--json").stdout)
    assert hashlib.sha256(made["token"].encode()).hexdigest() == made["sha256"]
    monkeypatch.setenv("RANKSEARCH_URL", serve(settings.model_copy(update={"tokens": (made["sha256"],)})))
    for wrong in (None, "rs_wrong"):
        monkeypatch.setenv("RANKSEARCH_TOKEN", wrong or "")
        result = run("jobs")
        assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
        assert "RANKSEARCH_TOKEN" in result.stderr
    monkeypatch.setenv("RANKSEARCH_TOKEN", made["token"])
    assert run("jobs").exit_code == 0


def test_jobs_and_show_say_where_things_stand(run: Run, running: str, jobs: Jobs, url: str) -> None:
    jobs.set_stage(running, "search")
    jobs.set_progress(running, 0.5, 90.0)
    jobs.set_best(running, 0.5, 30.5, 4)
    listed, shown = run("jobs"), run("show", running)
    assert running in listed.stdout
    assert "50%" in listed.stdout
    for words in (
        "running",
        "search, 50%, 1 min 30 s left",
        "30.500 perplexity, trial 4",
        f"{url}/v1/jobs/{running}/events",
    ):
        assert words in shown.stdout
    assert json.loads(run("show", running, "--json").stdout)["best"] == {"0.5": {"score": 30.5, "trial": 4}}
    assert [job["id"] for job in json.loads(run("jobs", "--json").stdout)] == [running]


def test_jobs_come_page_by_page(run: Run, url: str, jobs: Jobs, spec: JobSpec) -> None:
    made = [jobs.create(spec).id for _ in range(105)]
    assert [job["id"] for job in json.loads(run("jobs", "--json", "--limit", "103").stdout)] == made[:1:-1]


def test_no_jobs_is_no_error(run: Run, url: str) -> None:
    assert (run("jobs").exit_code, run("jobs").stdout) == (0, "")
    assert json.loads(run("jobs", "--json").stdout) == []


def test_cancel(run: Run, url: str, running: str, jobs: Jobs, spec: JobSpec) -> None:
    queued = jobs.create(spec).id
    assert "cancelled" in run("cancel", queued).stdout
    assert "stops as soon as" in run("cancel", running).stderr
    assert jobs.cancel_requested(running)
    finish(jobs, running)
    refused = run("cancel", running)
    assert (refused.exit_code, len(refused.stderr.splitlines())) == (2, 1)


def test_watch_follows_to_the_end(run: Run, running: str, jobs: Jobs) -> None:
    thread = threading.Thread(target=finish, args=(jobs, running))
    thread.start()
    result = run("watch", running)
    thread.join()
    assert result.exit_code == 0
    for words in (
        "running on host:cpu",
        "used again",
        "1/60",
        "prior: perplexity 30.500",
        "2/60",
        "uniform: perplexity 41.000",
    ):
        assert words in result.stderr
    assert f"{running} succeeded" in result.stderr
    assert json.loads(run("watch", running, "--json").stdout)["status"] == "succeeded"


def test_watch_says_that_there_is_nobody_to_work(
    run: Run, url: str, jobs: Jobs, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LONELY_SECONDS", 0.0)
    waiting = jobs.create(spec).id
    ending = threading.Timer(3.0, jobs.cancelled, args=(waiting,))
    ending.start()
    result = run("watch", waiting)
    ending.join()
    assert result.stderr.count("no worker is running") == 1


@pytest.mark.parametrize("end", ["failed", "cancelled"])
def test_watch_ends_with_code_1_when_the_job_did_not_succeed(run: Run, running: str, jobs: Jobs, end: str) -> None:
    if end == "failed":
        jobs.fail(running, {"code": "broken_weights", "message": "weight q_proj is not finite"})
    else:
        jobs.cancelled(running)
    result = run("watch", running)
    assert result.exit_code == 1
    assert f"{running} {end}" in result.stderr
    assert ("q_proj is not finite" in result.stderr) == (end == "failed")
    assert run("show", running).exit_code == 0


def test_ctrl_c_leaves_the_job_running(running: str, jobs: Jobs, url: str) -> None:
    command = [sys.executable, "-m", "ranksearch.service.cli", "watch", running]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / ".ns"), "PYTHONUNBUFFERED": "1"}
    # a test run started in the background ignores SIGINT, and children would inherit that
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as process:
        assert process.stderr is not None
        assert "queued" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130
    assert f"no longer watching, {running} goes on" in said
    assert "Traceback" not in said
    assert jobs.get(running).status == "running"
    assert not jobs.cancel_requested(running)


def test_watch_survives_events_it_does_not_know() -> None:
    progress = Progress({"search": {"objective": "kl"}, "budget": {"kept": [0.5]}})
    from ranksearch.service.client import Event

    assert progress.tell(Event(id=1, kind="new_thing", data={"depth": 3, "time": "x"})) == "new thing: depth 3"
    pruned = Event(id=2, kind="trial", data={"number": 5, "kept": 0.5, "state": "PRUNED"})
    assert progress.tell(pruned) == "trial 1       kept 0.5: pruned"


def test_watch_takes_the_number_of_trials_from_them_and_no_probe_for_the_best() -> None:
    from ranksearch.service.client import Event

    progress = Progress({"search": {"objective": "perplexity", "trials": 60}, "budget": {"kept": [0.5, 0.3]}})
    assert progress.done(*progress.budgets.values()) == "0"
    trial = {"kept": 0.5, "planned": 2, "state": "COMPLETE"}
    probe = Event(id=1, kind="trial", data={**trial, "number": 0, "origin": "probe", "score": 26.0})
    found = Event(id=2, kind="trial", data={**trial, "number": 1, "origin": "asvd", "score": 30.0})
    assert progress.tell(probe) == "trial 1/2     kept 0.5 probe: perplexity 26.000"
    assert progress.tell(found) == "trial 2/2     kept 0.5 asvd: perplexity 30.000, best 30.000"
    assert progress.done(*progress.budgets.values()) == "2/4"


def test_watch_and_report_name_what_a_search_for_both_compares() -> None:
    from ranksearch.service.client import Event

    progress = Progress({"search": {"objective": "both"}, "budget": {"kept": [0.5]}})
    trial = {"kept": 0.5, "planned": 2, "state": "COMPLETE", "number": 0, "origin": "prior", "score": 1.25}
    assert progress.tell(Event(id=1, kind="trial", data=trial)) == (
        "trial 1/2     kept 0.5 prior: excess + KL 1.250, best 1.250"
    )
    points = [{"number": 4, "perplexity": 30.5, "kl": 0.51}, {"number": 1, "perplexity": 31.0, "kl": 0.5}]
    budget = REPORT["budgets"][0]
    assert budget_line({**budget, "pareto_front": points[:1]}) == budget_line(budget)
    assert (
        budget_line({**budget, "pareto_front": points})
        .splitlines()[-1]
        .endswith("trial 4 30.500 0.5100, trial 1 31.000 0.5000")
    )


SEQUENTIAL: dict[str, Any] = {"step": "sequential", "strength": 0.75}
SEQUENTIAL |= {"tried": {"0": 37.63, "0.5": 34.1, "0.75": 33.84, "1": None}}
DISTILL: dict[str, Any] = {"step": "distill", "tokens": 1_000_000}
SOCO: dict[str, Any] = {"step": "soco", "tokens": 1_000_000}


@pytest.mark.parametrize(
    ("step", "line"),
    [
        (SEQUENTIAL, "sequential  strength 0.75: perplexity 37.630 -> 33.840"),
        (SEQUENTIAL | {"strength": 0.0}, "sequential  left out: it does not lower perplexity 37.630"),
        (DISTILL, "distill     1,000,000 tokens"),
        ({"step": "distill", "left_out": "A loss is NaN."}, "distill     left out: A loss is NaN."),
        (SOCO, "soco        1,000,000 tokens"),
        (SOCO | {"before": 40.0, "after": 38.0}, "soco        1,000,000 tokens: perplexity 40.000 -> 38.000"),
        (SOCO | {"before": 40.0, "after": 41.0}, "soco        left out: it does not lower perplexity 40.000"),
        (SOCO | {"before": 40.0, "after": None}, "soco        left out: it does not lower perplexity 40.000"),
    ],
)
def test_watch_says_what_a_step_after_the_search_did(step: dict[str, Any], line: str) -> None:
    from ranksearch.service.client import Event

    search, event = {"objective": "perplexity", "trials": 2}, Event(id=1, kind="refined", data={"kept": 0.5, **step})
    assert Progress({"search": search, "budget": {"kept": [0.5]}}).tell(event) == line
    assert Progress({"search": search, "budget": {"kept": [0.5, 0.3]}}).tell(event) == f"{line}, kept 0.5"


REPORT: dict[str, Any] = {
    "version": 1,
    "spec": {"search": {"objective": "perplexity"}},
    "budgets": [
        {
            "kept": 0.5,
            "kept_exact": 0.49987,
            "scores": {
                row: {
                    "evaluation": {"perplexity": 20 + n, "kl": n / 10},
                    "test": {"t": {"perplexity": 25 + n, "kl": n / 10}},
                }
                for n, row in enumerate(("dense", "uniform", "prior", "best", "final"))
            },
            "parameters": {"targets": 500, "targets_dense": 1000, "model": 700, "model_dense": 1200},
            "bytes": {"disk": 1 << 20, "disk_dense": 2 << 20, "loaded": 1 << 20, "loaded_dense": 2 << 20},
            "speed": {
                "device": "cpu",
                "before": {"prefill_tokens_per_second": 1000.0, "decode_tokens_per_second": 100.0},
                "after": {"prefill_tokens_per_second": 900.0, "decode_tokens_per_second": 90.0},
            },
            "refine": [
                SEQUENTIAL,
                DISTILL
                | {
                    "history": [
                        {"tokens": 0, "kl": 0.3, "perplexity": 33.9},
                        {"tokens": 750_000, "kl": 0.1, "perplexity": 30.2},
                        {"tokens": 1_000_000, "kl": 0.2, "perplexity": 31.0},
                    ]
                },
            ],
        }
    ],
}


def test_report(run: Run, running: str, jobs: Jobs) -> None:
    assert run("report", running).exit_code == 2  # not yet
    jobs.save_report(running, REPORT)
    assert json.loads(run("report", running, "--json").stdout) == REPORT
    shown = run("report", running).stdout
    for words in ("uniform", "t perplexity", "29.000", "targets 500 of 1,000", "1.0 MiB, dense 2.0 MiB", "0.90 times"):
        assert words in shown
    assert "  sequential  strength 0.75: perplexity 37.630 -> 33.840\n" in shown
    assert "  distill     750,000 tokens: perplexity 33.900 -> 30.200\n" in shown


def test_a_report_draws_what_each_matrix_keeps(run: Run, running: str, jobs: Jobs, tmp_path: Path) -> None:
    targets = {
        "model.layers.0.mlp.up_proj": {"shape": [40, 20], "rank": 4},  # 4 x 60 of 800
        "model.layers.0.mlp.experts.0.w<1>": {"shape": [20, 20], "rank": 20},  # dense
        "model.layers.0.mlp.experts.1.w<1>": {"shape": [20, 20], "rank": 2},  # 2 x 40 of 400
        "model.layers.11.mlp.up_proj": {"shape": [40, 20], "rank": 20},
    }
    budgets = [{**REPORT["budgets"][0], "kept": kept, "targets": targets} for kept in (0.5, 0.3)]
    spec = {"method": {"form": "factored"}, "search": {"objective": "perplexity"}}
    jobs.save_report(running, {"job": running, "spec": spec, "budgets": budgets})
    picture = tmp_path / "ranks.svg"
    result = run("report", running, "--heatmap", picture)
    assert (result.exit_code, f"heat map: {picture}" in result.stderr) == (0, True)
    drawn = [element.text for element in ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}title")]
    cells = ["mlp.up_proj, layer 0: 30.0%", "mlp.up_proj, layer 11: 100.0%", "mlp.experts.w<1>, layer 0: 60.0%"]
    assert drawn == 2 * cells
    assert run("report", running, "--heatmap", tmp_path / "no" / "ranks.svg").exit_code == 2


def test_a_report_without_steps_after_the_search_has_no_line_of_them(run: Run, running: str, jobs: Jobs) -> None:
    jobs.save_report(running, {**REPORT, "budgets": [{**REPORT["budgets"][0], "refine": []}]})
    assert "sequential" not in run("report", running).stdout


def test_a_report_of_several_budgets_ends_with_their_front(run: Run, running: str, jobs: Jobs, tmp_path: Path) -> None:
    (budget,) = REPORT["budgets"]
    jobs.save_report(running, REPORT)
    assert "front on" not in run("report", running).stdout
    report = {**REPORT, "budgets": [budget, {**budget, "kept": 0.25}]}  # older than intervals
    jobs.save_report(running, report)
    picture = tmp_path / "front.png"
    result = run("report", running, "--plot", picture)
    assert "front on t: " in result.stdout
    assert result.stdout.splitlines()[-1].split()[0] == "0.25"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(run("report", running, "--json").stdout) == report
    refused = run("report", running, "--plot", "front.txt")
    assert (refused.exit_code, ".svg, .png, .pdf" in refused.stderr) == (2, True)


@pytest.fixture
def published(running: str, jobs: Jobs, settings: Settings, tmp_path: Path) -> dict[str, bytes]:
    """Files of a checkpoint of the running job."""
    files = {
        "config.json": b"{}",
        "model.safetensors": bytes(range(256)) * 5000,
        "sub/notes.txt": b"",
        "a b%2F#.txt": b"odd",
    }
    store = ArtifactStore.of(settings, jobs.engine)
    rows = []
    for name, content in files.items():
        blob = store.put([content], job_id=running)
        rows.append(CheckpointFile(path=name, size=blob.size, sha256=blob.sha256))
    Checkpoints(jobs.engine).add(running, 0.5, rows)
    return files


def read(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_fetch_brings_every_file(run: Run, running: str, published: dict[str, bytes], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    result = run("fetch", running, "-o", folder)
    assert (result.exit_code, result.stdout) == (0, f"{folder}\n")
    assert read(folder) == published
    again = json.loads(run("fetch", running, "--kept", "0.50", "-o", folder, "--json").stdout)
    assert again == {"folder": str(folder), "files": 4, "bytes": sum(map(len, published.values()))}


def test_fetch_goes_on_from_what_is_there(run: Run, running: str, published: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.part").write_bytes(published["model.safetensors"][:-10])
    assert run("fetch", running, "-o", tmp_path / "").exit_code == 0
    assert (tmp_path / "model.safetensors").read_bytes() == published["model.safetensors"]


def test_fetch_finds_a_blob_that_rotted_on_the_server(
    run: Run, running: str, published: dict[str, bytes], settings: Settings, jobs: Jobs, tmp_path: Path
) -> None:
    good = published["model.safetensors"]
    ArtifactStore.of(settings, jobs.engine).path(hashlib.sha256(good).hexdigest()).write_bytes(good[:-1] + b"!")
    result = run("fetch", running, "-o", tmp_path / "out")
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    assert "model.safetensors" in result.stderr
    assert "model.safetensors" not in read(tmp_path / "out")


def test_fetch_asks_which_budget(
    run: Run, running: str, published: dict[str, bytes], jobs: Jobs, tmp_path: Path
) -> None:
    row = CheckpointFile(path="config.json", size=2, sha256=hashlib.sha256(b"{}").hexdigest())
    Checkpoints(jobs.engine).add(running, 0.25, [row])
    assert "--kept" in run("fetch", running, "-o", tmp_path / "x").stderr
    assert "only for 0.5, 0.25" in run("fetch", running, "--kept", "0.4", "-o", tmp_path / "x").stderr
    assert run("fetch", running, "--kept", "0.25", "-o", tmp_path / "x").exit_code == 0
    assert read(tmp_path / "x") == {"config.json": b"{}"}


def test_estimate_makes_no_job(run: Run, url: str, body: dict[str, Any], tmp_path: Path, jobs: Jobs) -> None:
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(body))
    shown, exact = run("estimate", file), run("estimate", file, "--json")
    assert (shown.exit_code, exact.exit_code) == (0, 0)
    assert "disk, total" in shown.stdout
    assert json.loads(exact.stdout)["budgets"][0]["kept"] == 0.5
    assert jobs.page(limit=5) == []
    timed = run("estimate", file, "--of", "latency")
    assert timed.exit_code == 0
    assert "measured by the worker" in timed.stdout


@pytest.mark.parametrize(
    "command", [command.callback.__name__ for command in app.registered_commands if command.callback]
)
def test_every_command_explains_itself(run: Run, command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"ranksearch {command}" in result.stdout.split("Examples:")[1]
