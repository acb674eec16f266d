"""Whole jobs through one worker process, on both databases."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ranksearch.worker.loading
from ranksearch.search.prices import Curve, as_document
from ranksearch.search.space import RankSpace
from ranksearch.search.spec import JobSpec
from ranksearch.service.store.jobs import Job
from ranksearch.worker.fingerprints import prices_fingerprint
from ranksearch.worker.models import load_model
from ranksearch.worker.targets import find_targets
from ranksearch.worker.workbench import Workbench
from tests.integration.machine import Machine

Spec = Callable[..., JobSpec]
#: For what has nothing to do with the kind of database.
on_sqlite = pytest.mark.parametrize("machine", ["sqlite"], indirect=True)


def _folder(machine: Machine, job_id: str, kept: str, folder: Path) -> Path:
    checkpoint = next(c for c in machine.checkpoints.of(job_id) if c.kept == kept)
    for file in checkpoint.files:
        os.link(machine.artifacts.path(file.sha256), folder / file.path)
    return folder


def _sum(scores: dict[str, float], budget: dict[str, Any]) -> float:
    """What a search for both objectives minimizes."""
    dense = budget["scores"]["dense"]["evaluation"]["perplexity"]
    return math.log(scores["perplexity"] / dense) + scores["kl"]


def test_each_budget_gets_a_study_and_a_checkpoint(worker: Machine, done: str, tmp_path: Path) -> None:
    job = worker.jobs.get(done)
    assert job.progress == 1.0
    assert set(job.best) == {"0.5", "0.3"}
    for kept in (0.5, 0.3):
        rows = worker.trials(done, kept)
        assert [row["state"] for row in rows] == ["COMPLETE"] * 4
        assert [row["origin"] for row in rows][:2] == ["prior", "uniform"]
        assert all(row["kept"] <= kept for row in rows)
    assert [checkpoint.kept for checkpoint in worker.checkpoints.of(done)] == ["0.5", "0.3"]
    model = AutoModelForCausalLM.from_pretrained(_folder(worker, done, "0.3", tmp_path))
    assert any(isinstance(module, ranksearch.worker.loading.FactoredLinear) for module in model.modules())


def test_the_report_is_the_checkpoints_own(worker: Machine, done: str) -> None:
    report = worker.jobs.report(done)
    assert report is not None
    assert [budget["kept"] for budget in report["budgets"]] == [0.5, 0.3]
    ids = report["fingerprints"]["sequence_ids"]
    assert len(set(ids["calibration"] + ids["evaluation"])) == 32
    assert ids["test/text.txt"] == list(range(8))
    for budget, checkpoint in zip(report["budgets"], worker.checkpoints.of(done), strict=True):
        scores = budget["scores"]
        assert set(scores) == {"dense", "uniform", "prior", "best", "final"}
        assert scores["final"]["evaluation"]["perplexity"] == pytest.approx(
            scores["best"]["evaluation"]["perplexity"], rel=1e-5
        )
        best = worker.jobs.get(done).best[checkpoint.kept]["score"]
        assert scores["best"]["evaluation"]["perplexity"] == pytest.approx(best, rel=1e-12)
        assert budget["parameters"]["targets"] <= budget["kept"] * budget["parameters"]["targets_dense"]
        assert scores["dense"]["evaluation"]["excess_interval"] == [0, 0]
        final, dense = scores["final"]["test"]["text.txt"], scores["dense"]["test"]["text.txt"]
        low, high = final["excess_interval"]
        assert low < final["excess"] < high
        assert final["excess"] == pytest.approx(math.log(final["perplexity"] / dense["perplexity"]))
        for row in ("uniform", "prior"):
            other, against = scores[row]["test"]["text.txt"], budget["against"][row]
            assert against["gain"] == pytest.approx(other["excess"] - final["excess"], abs=1e-12)
            assert against["interval"][0] <= against["gain"] <= against["interval"][1]
        assert set(budget["seconds"]) == {"prepare", "calibrate", "factor", "search", "finish"}
        file = next(file for file in checkpoint.files if file.path == "ranksearch.json")
        own = json.loads(worker.artifacts.path(file.sha256).read_text())
        assert own == {**report, "budgets": [budget]}


@on_sqlite
def test_a_preset_that_chooses_by_a_formula_takes_one_trial(worker: Machine, spec: Spec) -> None:
    job_id = worker.submit(spec(kept=[0.4], method={"preset": "d-rank"}))
    worker.succeeded(job_id)
    job, (trial,) = worker.jobs.get(job_id), worker.trials(job_id, 0.4)
    assert (trial["origin"], job.best["0.4"]["trial"], job.spec["method"]["metric"]) == ("d-rank", 0, "feature")
    assert [event.data["planned"] for event in worker.events(job_id, "trial")] == [1]
    report = worker.jobs.report(job_id)
    assert report is not None
    assert set(report["budgets"][0]["scores"]) == {"dense", "uniform", "prior", "best", "final"}


def test_the_same_calibration_is_not_done_twice(worker: Machine, spec: Spec) -> None:
    calibration = {**spec().calibration.model_dump(), "seed": 7}
    jobs = [worker.submit(spec(kept=[0.4], trials=2, calibration=calibration)) for _ in range(2)]
    for hits, job_id in enumerate(jobs):
        worker.succeeded(job_id)
        assert len(worker.events(job_id, "calibration.cache_hit")) == hits
        assert len(worker.events(job_id, "bank.cache_hit")) == hits


@on_sqlite
def test_a_job_learns_from_earlier_ones_and_goes_on_without_a_deleted_one(
    worker: Machine, done: str, spec: Spec
) -> None:
    search = {"sampler": "ranksearch", "learn_from": [done]}
    learned = worker.submit(spec(kept=[0.4], trials=3, search=search))
    gone = worker.submit(spec(kept=[0.4], trials=3, search={**search, "learn_from": ["job_deleted"]}))
    for job_id in (learned, gone):
        worker.succeeded(job_id)
    assert not worker.events(learned, "warning")
    (warning,) = worker.events(gone, "warning")
    assert "job_deleted was deleted" in warning.data["message"]
    warm, cold = ([row["ranks"] for row in worker.trials(job_id, 0.4)] for job_id in (learned, gone))
    assert warm[:2] == cold[:2]
    assert warm[2] != cold[2]


@on_sqlite
def test_a_budget_of_one_keeps_everything_dense(worker: Machine, spec: Spec) -> None:
    job_id = worker.submit(spec(kept=[1.0]))
    worker.succeeded(job_id)
    (row,) = worker.trials(job_id, 1.0)
    report = worker.jobs.report(job_id)
    assert report is not None
    (budget,) = report["budgets"]
    assert {target["form"] for target in budget["targets"].values()} == {"dense"}
    assert budget["scores"]["dense"]["evaluation"]["perplexity"] == pytest.approx(row["score"], rel=1e-6)
    assert budget["scores"]["final"]["evaluation"]["kl"] == pytest.approx(0, abs=1e-6)


@on_sqlite
def test_a_checkpoint_in_another_dtype_is_proved(worker: Machine, spec: Spec) -> None:
    budget = {"kept": [0.5], "bytes": [60_000]}
    job_id = worker.submit(spec(trials=2, export={"dtype": "bfloat16"}, budget=budget))
    worker.succeeded(job_id)
    report = worker.jobs.report(job_id)
    assert report is not None
    (budget,) = report["budgets"]
    best, final = (budget["scores"][row]["evaluation"]["perplexity"] for row in ("best", "final"))
    assert final == pytest.approx(best, rel=2e-2)
    assert final != best
    assert budget["bytes"]["asked"] == 60_000
    assert budget["bytes"]["disk"] < 0.51 * budget["bytes"]["disk_dense"]


@on_sqlite
def test_a_budget_of_latency_is_met_by_the_table_that_was_measured(
    worker: Machine, done: str, spec: Spec, material: Path, tmp_path: Path
) -> None:
    model, _ = load_model(material / "model")
    targets, device = find_targets(model), Workbench("cpu").facts()
    # as a device might find it: two products in a row take twice as long as one, and wide matrices are dear
    curves = tuple(
        Curve(ranks=(1, 7, t.full_rank), times=(900, 900 + 40 * t.marginal, 9000 + 70 * t.marginal), dense=20_000)
        for t in targets
    )
    facts = {"targets": [asdict(t) for t in targets], "biased": [], "dtype": "float32"}
    fingerprint = prices_fingerprint(
        facts, form="factored", multiple=1, centred=False, device=device["name"], torch=device["torch"]
    )
    file = tmp_path / "prices"
    file.write_text(json.dumps(as_document([t.name for t in targets], curves)))
    worker.artifacts.save("prices", fingerprint, file, job_id=done)
    space = RankSpace(targets=targets, prices=curves)

    latency = spec(budget={"kept": [0.5], "of": "latency"}, search={"sampler": "ranksearch", "trials": 3})
    first, second = (worker.submit(latency) for _ in range(2))
    for job_id in (first, second):
        worker.succeeded(job_id)
        assert worker.events(job_id, "prices.cache_hit")
    rows = worker.trials(first, 0.5)
    assert [row["ranks"] for row in rows] == [row["ranks"] for row in worker.trials(second, 0.5)]
    for row in rows:
        ranks = space.unpack(row["ranks"])
        assert space.is_exact(ranks, 0.5)
        assert row["kept"] == space.cost(ranks) / (20_000 * len(targets)) <= 0.5
    report = worker.jobs.report(first)
    assert report is not None
    (budget,) = report["budgets"]
    ranks = space.from_dict({name: target["rank"] for name, target in budget["targets"].items()})
    timed = budget["speed"]["targets"]
    assert timed["seconds"] == pytest.approx(1e-12 * space.cost(ranks))
    assert timed["dense_seconds"] == pytest.approx(1e-12 * 20_000 * len(targets))
    assert budget["parameters"]["targets"] == int(space.parameters_of(ranks).sum())
    assert budget["kept"] == 0.5
    assert budget["kept_exact"] == budget["parameters"]["targets"] / space.parameters


@on_sqlite
def test_decode_times_are_measured_once_and_tell_the_smallest_budget(worker: Machine, spec: Spec) -> None:
    budget, method = {"kept": [0.001], "of": "latency"}, {"rank_multiple": 2}
    jobs = [worker.submit(spec(budget=budget, method=method)) for _ in range(2)]
    first, second = (worker.finished(job_id).error for job_id in jobs)
    assert first is not None
    assert (first["code"], first["stage"]) == ("impossible_budget", "factor")
    assert "decode time" in first["message"]
    assert 0.001 < first["data"]["minimum_kept"] <= 1
    assert second == first
    assert [len(worker.events(job_id, "prices.cache_hit")) for job_id in jobs] == [0, 1]

    # one that can be met is done all the same
    both = worker.submit(spec(budget={**budget, "kept": [1.0, 0.001]}, method=method))
    error = worker.finished(both).error
    assert error is not None
    assert (error["code"], error["stage"]) == ("impossible_budget", "search")
    assert first["message"] in error["message"]
    report = worker.jobs.report(both)
    assert report is not None
    assert [found["kept"] for found in report["budgets"]] == [1.0]
    told = [event.data["message"] for event in worker.events(both, "warning")]
    assert f"kept 0.001 failed: {first['message']} The other budgets go on." in told


@on_sqlite
def test_a_job_with_a_step_after_the_search_says_what_it_did(worker: Machine, spec: Spec) -> None:
    method = {"form": "pivoted", "refine": ["sequential"]}
    job_id = worker.submit(spec(trials=2, method=method, search={"objective": "both"}))
    job = worker.succeeded(job_id)
    (event,) = worker.events(job_id, "refined")
    report = worker.jobs.report(job_id)
    assert report is not None
    (budget,) = report["budgets"]
    (step,) = budget["refine"]
    assert step["step"] == "sequential"
    assert {key: event.data[key] for key in step} == step
    assert step["tried"][f"{step['strength']:g}"] == min(step["tried"].values())
    final, best = (_sum(budget["scores"][row]["evaluation"], budget) for row in ("final", "best"))
    assert final == pytest.approx(min(step["tried"].values()), rel=1e-3)
    assert best == pytest.approx(step["tried"]["0"], rel=1e-3)
    rows = worker.trials(job_id, job.spec["budget"]["kept"][0])
    for row in rows:
        assert row["score"] == pytest.approx(_sum(row["scores"], budget), rel=1e-6)
        parts = row["intermediate"].values()
        assert sum(parts) / len(parts) == pytest.approx(
            math.log(row["scores"]["perplexity"]) + row["scores"]["kl"], rel=1e-6
        )
    chosen = min(rows, key=lambda row: row["score"])
    assert list(job.best.values()) == [{"score": chosen["score"], "trial": chosen["number"]}]
    assert chosen["number"] in {point["number"] for point in budget["pareto_front"]}
    assert budget["parameters"]["targets"] <= budget["kept"] * budget["parameters"]["targets_dense"]
    assert {target["form"] for target in budget["targets"].values()} <= {"pivoted", "dense"}
    assert {target["predicted_loss"] for target in budget["targets"].values()} == {None}
    (checkpoint,) = worker.checkpoints.of(job_id)
    card = next(file for file in checkpoint.files if file.path == "README.md")
    assert "`sequential`" in worker.artifacts.path(card.sha256).read_text()


@on_sqlite
def test_no_trial_begins_when_the_time_is_up(worker: Machine, spec: Spec) -> None:
    job_id = worker.submit(spec(kept=[0.4], trials=1000, search={"timeout_seconds": 1e-6}))
    worker.succeeded(job_id)
    assert [row["origin"] for row in worker.trials(job_id, 0.4)] == ["prior", "uniform"]
    (told,) = [event.data["message"] for event in worker.jobs.events(job_id) if event.kind == "warning"]
    assert told.startswith("The search at kept 0.4 ends after 2 of 1000 trials: its 1e-06 s (search.timeout_seconds)")


@on_sqlite
def test_a_cancelled_job_stops_at_once_and_keeps_its_study(worker: Machine, spec: Spec) -> None:
    job_id = worker.submit(spec(trials=5000))
    worker.wait_for_trials(job_id, 3)
    device = worker.device_of("one")
    begun = time.monotonic()
    worker.jobs.request_cancel(job_id)
    job = worker.finished(job_id, seconds=10)
    assert job.status == "cancelled"
    assert time.monotonic() - begun < 2
    assert worker.device_of("one") == device  # it was between two parts of a trial: no need to kill it
    assert len([row for row in worker.trials(job_id, 0.5) if row["state"] == "COMPLETE"]) >= 3


def test_a_job_that_waits_can_be_cancelled(worker: Machine, spec: Spec) -> None:
    first = worker.submit(spec(trials=5000))
    waiting = worker.submit(spec())
    assert worker.jobs.request_cancel(waiting).status == "cancelled"
    worker.queue.cancel_job(waiting)
    worker.wait_for_trials(first, 1)
    worker.jobs.request_cancel(first)
    assert worker.finished(first, 10).status == "cancelled"
    assert not worker.trials(waiting, 0.5)


def _with_nan(folder: Path, copy: Path) -> Path:
    copy.mkdir()
    for path in folder.iterdir():
        if path.name != "model.safetensors":
            os.link(path, copy / path.name)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@on_sqlite
def test_each_bad_input_fails_its_job_alone(worker: Machine, spec: Spec, material: Path, tmp_path: Path) -> None:
    text = {"path": "text", "data_files": str(material / "text.txt"), "split": "train"}

    def with_data(**changes: Any) -> JobSpec:
        sizes = {"sequences": 16, "sequence_length": 32}
        return spec(calibration={"dataset": text, **sizes, **changes})

    broken = _with_nan(material / "model", material / f"nan-{os.urandom(4).hex()}")
    bad = {
        "broken_weights": spec(model=broken),
        "path_not_allowed": spec(model=tmp_path),
        "impossible_budget": spec(kept=[0.001]),
        "dataset_error": with_data(dataset={**text, "column": "nothing"}),
        "invalid_input": with_data(sequence_length=129),
    }
    few = worker.submit(with_data(sequences=2_000_000))
    jobs = {code: worker.submit(spec_) for code, spec_ in bad.items()}
    good = worker.submit(spec(kept=[0.4], trials=2))
    for code, job_id in jobs.items():
        job = worker.finished(job_id)
        assert job.status == "failed"
        assert job.error is not None
        assert job.error["code"] == code, job.error
    named = worker.jobs.get(jobs["broken_weights"]).error
    assert named is not None
    assert "model.layers.1.mlp.up_proj.weight" in named["message"]
    error = worker.finished(few).error
    assert error is not None
    assert error["code"] == "dataset_error"
    worker.succeeded(good)


@on_sqlite
def test_a_killed_device_process_is_replaced(worker: Machine, spec: Spec) -> None:
    job_id = worker.submit(spec(trials=12))
    worker.wait_for_trials(job_id, 3)
    device = worker.device_of("one")
    assert device is not None
    device.kill()
    worker.succeeded(job_id)
    assert [event.data["number"] for event in worker.events(job_id, "trial")] == list(range(12))
    assert [e for e in worker.events(job_id, "warning") if "SIGKILL" in e.data["message"]]


@on_sqlite
def test_a_device_process_that_dies_again_and_again_fails_the_job(worker: Machine, spec: Spec) -> None:
    job_id = worker.submit(spec(trials=5000))
    worker.wait_for_trials(job_id, 1)

    def kill_until_over() -> Job | None:
        if (device := worker.device_of("one")) is not None:
            device.kill()
        job = worker.jobs.get(job_id)
        return job if job.over else None

    job = worker.wait(kill_until_over, 60, "the end of a job whose device dies")
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == "device_died"
    assert worker.processes["one"].poll() is None


@on_sqlite
def test_a_budget_that_fails_does_not_cost_the_others_theirs(worker: Machine, spec: Spec) -> None:
    job_id = worker.submit(spec(kept=[0.5, 0.3], trials=12))
    worker.wait_for_trials(job_id, 1)

    def kill_until_told() -> str | None:
        if (device := worker.device_of("one")) is not None:
            device.kill()
        told = (event.data["message"] for event in worker.events(job_id, "warning"))
        return next((message for message in told if "The other budgets go on" in message), None)

    assert worker.wait(kill_until_told, 60, "the end of the first budget").startswith("kept 0.5 failed: ")
    job = worker.finished(job_id)
    assert (job.status, job.error and job.error["code"]) == ("failed", "device_died")
    assert job.error is not None
    assert job.error["message"].endswith("Report and checkpoints are there for kept 0.3.")
    assert [checkpoint.kept for checkpoint in worker.checkpoints.of(job_id)] == ["0.3"]
    report = worker.jobs.report(job_id)
    assert report is not None
    assert [budget["kept"] for budget in report["budgets"]] == [0.3]
