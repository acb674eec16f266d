"""`ranksearch compare` against a real server whose jobs are finished by a thread that writes made-up reports."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from ranksearch.search.errors import InvalidInput
from ranksearch.search.presets import PRESETS
from ranksearch.search.spec import JobSpec
from ranksearch.service.cli.compare import comparison
from ranksearch.service.compare import best_so_far, contenders
from ranksearch.service.store.jobs import Job, Jobs

Run = Callable[..., Any]

pytestmark = pytest.mark.one_database
DENSE = {"evaluation": {"perplexity": 20.0, "kl": 0.0}, "test": {"t.txt": {"perplexity": 25.0, "kl": 0.0}}}


def report_of(job: Job, *lost: float) -> dict[str, Any]:
    """A report in which the seed and the form show: perplexity is 30 + seed + 10 x kept, one less if pivoted."""
    spec, budgets = job.parsed(), []
    for kept in sorted({*spec.budget.kept} - {*lost}, reverse=True):
        perplexity = 30.0 + spec.search.seed + 10 * kept - (spec.method.form == "pivoted")
        texts = {"perplexity": perplexity, "kl": perplexity / 100}
        trials = [("COMPLETE", 40.0), ("PRUNED", None), ("COMPLETE", 38.0 + spec.search.seed), ("RUNNING", None)]
        budgets.append(
            {
                "kept": kept,
                "kept_exact": kept - 0.001,
                "scores": {"dense": DENSE, "final": {"evaluation": texts, "test": {"t.txt": texts}}},
                "seconds": {"prepare": 1.0, "search": 2.5, "finish": 0.5},
                "history": [{"state": state, "score": score, "origin": "search"} for state, score in trials],
            }
        )
    return {"spec": job.spec, "budgets": budgets}


@pytest.fixture
def worker(jobs: Jobs) -> Iterator[None]:
    """Finishes every job; those of preset soco fail, and have a report of all budgets but 0.5."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(0.05):
            for job in jobs.page(limit=20):
                if job.status == "queued" and jobs.set_running(job.id, "host:cpu"):
                    if job.parsed().method.preset == "soco":
                        if job.parsed().budget.kept != [0.5]:
                            jobs.save_report(job.id, report_of(job, 0.5))
                        jobs.fail(job.id, {"code": "numerical_error", "message": "A loss is NaN."})
                    else:
                        jobs.save_report(job.id, report_of(job))
                        jobs.succeed(job.id)

    thread = threading.Thread(target=work)
    thread.start()
    yield
    over.set()
    thread.join()


@pytest.fixture
def file(body: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(body))
    return path


@pytest.mark.usefixtures("url", "worker")
def test_every_method_and_seed_is_a_job_and_every_budget_a_row(
    run: Run, file: Path, jobs: Jobs, tmp_path: Path
) -> None:
    plot = tmp_path / "curves.svg"
    methods = "ranksearch,ranksearch/pivoted+sequential"
    arguments = ["compare", file, "--methods", methods, "--kept", "0.4,0.25", "--seeds", "0,2"]
    result = run(*arguments, "--json", "--plot", plot)
    assert result.exit_code == 0, result.stderr
    (rows,) = json.loads(result.stdout).values()
    wanted = [(m, seed, kept) for m in methods.split(",") for seed in (0, 2) for kept in (0.4, 0.25)]
    assert [(row["method"], row["seed"], row["kept"]) for row in rows] == wanted
    for row in rows:
        spec = jobs.get(row["job"]).parsed()
        pivoted = row["method"] != "ranksearch"
        assert (spec.method.form == "pivoted", spec.method.refine) == (pivoted, ["sequential"] if pivoted else [])
        perplexity = 30 + row["seed"] + 10 * row["kept"] - pivoted
        assert row["test_perplexity"] == row["evaluation_perplexity"] == perplexity
        assert row["excess"] == pytest.approx(math.log(perplexity / 25))
        assert (row["kl"], row["evaluations"], row["seconds"]) == (perplexity / 100, 3, 2.5)
        assert (row["kept_exact"], row["total_seconds"]) == (row["kept"] - 0.001, 4.0)
    assert len(jobs.page(limit=20)) == 4
    drawn = plot.read_text()
    assert drawn.startswith("<?xml")

    shown = run("compare", "--jobs", ",".join(dict.fromkeys(row["job"] for row in rows)))
    assert shown.exit_code == 0
    assert len(jobs.page(limit=20)) == 4
    first, second = (re.sub(" +", " ", part) for part in shown.stdout.split("\n\n"))
    assert first.splitlines()[0] == "kept 0.4"
    assert first.splitlines()[2].split() == ["dense", "1", "25.000", "20.000", "0.0000"]
    assert [line.split()[0] for line in first.splitlines()[3:]] == methods.split(",")
    assert "ranksearch 0.39900 35.000 ± 1.414 35.000 ± 1.414 0.3500 ± 0.0141 3 2.5 s 4.0 s" in first
    assert "ranksearch/pivoted+sequential 0.24900 32.500 ± 1.414" in second


@pytest.mark.usefixtures("url", "worker")
def test_a_failed_job_is_said_and_the_others_are_still_printed(run: Run, file: Path) -> None:
    result = run("compare", file, "--methods", "soco,ranksearch")
    assert result.exit_code == 1
    shown = re.sub(" +", " ", result.stdout)
    assert "soco failed" in shown
    assert "ranksearch 0.49900 35.000 35.000 0.3500 3 2.5 s 4.0 s" in shown
    assert "failed: A loss is NaN." in result.stderr
    exact = run("compare", file, "--methods", "soco,ranksearch", "--json")
    failed, good = json.loads(exact.stdout)["rows"]
    assert (exact.exit_code, failed["error"], failed["test_perplexity"]) == (1, "A loss is NaN.", None)
    assert good["test_perplexity"] == 35.0


@pytest.mark.usefixtures("url", "worker")
def test_a_job_that_failed_in_one_budget_has_figures_for_the_other(run: Run, file: Path) -> None:
    result = run("compare", file, "--methods", "soco", "--kept", "0.5,0.25", "--json")
    lost, found = json.loads(result.stdout)["rows"]
    assert (result.exit_code, result.stderr.count("A loss is NaN.")) == (1, 1)
    assert (lost["kept"], lost["error"], lost["test_perplexity"]) == (0.5, "A loss is NaN.", None)
    assert (found["kept"], "error" in found, found["test_perplexity"]) == (0.25, False, 32.5)


@pytest.mark.usefixtures("url", "worker")
def test_the_same_jobs_have_the_same_names_in_both_tables(run: Run, body: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "pivoted.json"
    file.write_text(json.dumps({**body, "method": {"form": "pivoted", "refine": ["sequential"]}}))
    first = run("compare", file, "--methods", "ranksearch,svd-llm,ranksearch/factored", "--json")
    rows = json.loads(first.stdout)["rows"]
    names = ["ranksearch/pivoted+sequential", "svd-llm/pivoted+sequential", "ranksearch+sequential"]
    assert [row["method"] for row in rows] == names
    again = run("compare", "--jobs", ",".join(row["job"] for row in rows), "--json")
    assert again.stdout == first.stdout


@pytest.mark.usefixtures("url", "worker")
def test_only_seeds_are_one_method(run: Run, body: dict[str, Any], jobs: Jobs) -> None:
    def job(**parts: Any) -> str:
        return jobs.create(JobSpec.model_validate({**body, **parts})).id

    parts: list[dict[str, Any]] = [{}, {"search": {"seed": 1}, "calibration": {**body["calibration"], "seed": 1}}]
    parts += [{"search": {"sampler": "tpe"}}, {"method": {"metric": "feature"}}, {"method": {"preset": "svd-llm"}}]
    shown = run("compare", "--jobs", ",".join(job(**part) for part in parts), "--json")
    default, tpe = "search.sampler=ranksearch", "search.sampler=tpe"
    assert [row["method"] for row in json.loads(shown.stdout)["rows"]] == [
        f"ranksearch method.metric=two_sided {default}",
        f"ranksearch method.metric=two_sided {default}",
        f"ranksearch method.metric=two_sided {tpe}",
        f"ranksearch method.metric=feature {default}",
        "svd-llm",
    ]


@pytest.mark.usefixtures("url")
def test_jobs_of_other_models_or_test_texts_are_refused(run: Run, body: dict[str, Any], jobs: Jobs) -> None:
    test = [{"path": "text", "data_files": "/t.txt"}]
    for part, words in (({"model": {"source": "a/b"}}, "models"), ({"evaluation": {"test": test}}, "test texts")):
        pair = [jobs.create(JobSpec.model_validate(spec)).id for spec in (body, {**body, **part})]
        result = run("compare", "--jobs", ",".join(pair))
        assert (result.exit_code, result.stdout) == (2, "")
        assert f"the jobs have different {words}" in result.stderr


@pytest.mark.parametrize(
    ("part", "method", "words"),
    [
        ({"method": {"metric": "two-sided"}}, "ranksearch", r"/method/metric: .*'two_sided'"),
        ({"search": {"sampler": "tpee"}}, "ranksearch", r"/search/sampler: .*'tpe'"),
        ({"search": {"sampler": "tpee"}}, "svd-llm", r"/search/sampler: .*'tpe'"),
        ({"method": {"metric": "centred"}}, "ranksearch+sequential", "sequential cannot work in metric centred"),
        ({"method": {"refine": None}}, "ranksearch", "method.refine of the spec holds no list"),
        ({"method": {"refine": "sequential"}}, "ranksearch", "method.refine of the spec holds no list"),
        ({"method": {"form": "pivoted"}}, "ranksearch,ranksearch/pivoted", "ranksearch and ranksearch/pivoted are the"),
    ],
)
def test_what_is_wrong_in_the_spec_is_said_and_not_dropped(
    body: dict[str, Any], part: dict[str, Any], method: str, words: str
) -> None:
    with pytest.raises(InvalidInput, match=words):
        contenders({**body, **part}, method.split(","), None, [0, 1])


def test_the_name_of_a_text_is_no_markup() -> None:
    console = Console(width=200, file=StringIO(), record=True)
    figures = dict.fromkeys(("kept_exact", "evaluation_perplexity", "kl", "evaluations", "seconds", "total_seconds"), 1)
    console.print(comparison([{"method": "[/m]", "test_perplexities": {"a[/b].txt": 2.0}, **figures}], None))
    assert "a[/b].txt perplexity" in console.export_text(clear=False)
    assert "[/m]" in console.export_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "ranksearch,ranksaerch"], "no method 'ranksaerch', only ranksearch"),
        (["--methods", "ranksearch/thin"], "no form 'thin', only factored, pivoted"),
        (["--methods", "ranksearch+polish"], "no step 'polish', only sequential"),
        (["--methods", "ranksearch,ranksearch"], "each of them once"),
        (["--methods", "ranksearch,soco/pivoted"], "soco/pivoted: /method: soco needs form factored"),
        (["--methods", "ranksearch", "--kept", "0"], "above 0 and at most 1"),
        (["--methods", "ranksearch", "--seeds", "0,1.5"], "write whole numbers"),
        (["--methods", "ranksearch", "--plot", "curves.txt"], ".svg, .png, .pdf"),
        (["--methods", "ranksearch", "--jobs", "job_a"], "takes the place"),
        ([], "--methods uniform,ranksearch"),
    ],
)
@pytest.mark.usefixtures("url")
def test_what_cannot_be_compared_is_refused_before_anything_is_submitted(
    run: Run, file: Path, jobs: Jobs, arguments: list[str], words: str
) -> None:
    result = run("compare", file, *arguments)
    assert (result.exit_code, result.stdout, jobs.page(limit=5)) == (2, "", [])
    assert words in result.stderr


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_gives_way_to_the_spec_only_where_it_may(body: dict[str, Any], preset: str) -> None:
    def accepted(**parts: Any) -> bool:
        try:
            JobSpec.model_validate({**body, **parts})
        except ValidationError:
            return False
        return True

    base = {**body, "method": {"metric": "feature"}, "search": {"sampler": "random"}}
    (found,) = contenders(base, [preset], None, None)
    own_metric = not all(accepted(method={"preset": preset, "metric": metric}) for metric in ("feature", "two_sided"))
    own_sampler = not accepted(method={"preset": preset}, search={"sampler": "random"})
    assert found["method"].get("metric") == (None if own_metric else "feature")
    assert found["search"].get("sampler") == (None if own_sampler else "random")
    assert accepted(**found)
    assert base["method"] == {"metric": "feature"}


def test_probes_are_evaluations_but_never_the_best() -> None:
    def trial(state: str, origin: str, score: float | None) -> dict[str, Any]:
        return {"state": state, "origin": origin, "score": score}

    history = [trial("COMPLETE", "probe", 1.0), trial("FAIL", "search", None), trial("COMPLETE", "search", 9.0)]
    history += [trial("COMPLETE", "search", 9.5), trial("COMPLETE", "probe", 2.0), trial("COMPLETE", "search", 8.0)]
    scores = best_so_far({"history": history})
    assert all(map(math.isnan, scores[:2]))
    assert scores[2:] == [9.0, 9.0, 9.0, 8.0]

    # one with gradients counts as several, one whose scores were known as none
    counted = [{**trial, "evaluations": count} for trial, count in zip(history, (0, 1, 4, 1, 1, 1), strict=True)]
    scores = best_so_far({"history": counted})
    assert math.isnan(scores[0])
    assert scores[1:] == [9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 8.0]


def test_ctrl_c_leaves_the_jobs_and_says_how_to_go_on(file: Path, jobs: Jobs, url: str) -> None:
    command = [sys.executable, "-m", "ranksearch.service.cli", "compare", str(file), "--methods", "ranksearch"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / ".ns"), "PYTHONUNBUFFERED": "1"}
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as process:
        assert process.stderr is not None
        while "queued" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    (job,) = jobs.page(limit=5)
    assert process.returncode == 130
    assert f"ranksearch compare --jobs {job.id}" in said
    assert (job.status, jobs.cancel_requested(job.id)) == ("queued", False)
