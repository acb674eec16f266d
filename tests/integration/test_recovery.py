"""Workers that are killed, stopped or frozen: the job goes on, and comes out as if nothing had happened."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest

from ranksearch.search.spec import JobSpec
from ranksearch.worker.attempts import MAX_DEATHS, deaths
from tests.integration.machine import Machine

Spec = Callable[..., JobSpec]
TRIALS = 7


def _result(machine: Machine, job_id: str) -> list[dict[str, Any]]:
    """What two runs of one spec must have in common."""
    shared = ("number", "state", "origin", "kept", "score", "scores", "intermediate", "ranks")
    return [{key: row[key] for key in shared} for row in machine.trials(job_id, 0.5)]


def _other(name: str) -> str:
    return {"one": "two", "two": "one"}[name]


def test_a_killed_worker_goes_on_where_it_was(worker: Machine, spec: Spec) -> None:
    machine = worker
    sampler = "random" if machine.settings.database_url else "ranksearch"  # one database is enough for the slow one
    wanted = spec(trials=TRIALS, search={"sampler": sampler, "pruner": "wilcoxon"})
    undisturbed = machine.submit(wanted)
    machine.succeeded(undisturbed)

    killed = machine.submit(wanted)
    machine.wait_for_trials(killed, 3)
    machine.kill("one")
    before = [row for row in machine.trials(killed, 0.5) if row["state"] != "RUNNING"]
    assert 3 <= len(before) < TRIALS
    machine.start("one")
    machine.succeeded(killed)

    assert machine.trials(killed, 0.5)[: len(before)] == before  # seconds, too: they were not run again
    assert [event.data["number"] for event in machine.events(killed, "trial")] == list(range(TRIALS))
    assert _result(machine, killed) == _result(machine, undisturbed)
    reports = [machine.jobs.report(job_id) for job_id in (killed, undisturbed)]
    scores = [report["budgets"][0]["scores"] for report in reports if report is not None]
    assert scores[0] == scores[1]


def test_a_second_worker_of_the_same_name_is_refused(machine: Machine) -> None:
    machine.ready("one")
    first = machine.processes["one"]
    second = machine.start("one")
    try:
        assert second.wait(60) == 2
        assert "is running already" in machine.log("one")
    finally:
        machine.processes["one"] = first
    assert first.poll() is None


def test_others_take_over_from_a_worker_that_stops(machine: Machine, spec: Spec) -> None:
    machine.start("two")
    machine.ready("two")
    job_id = machine.submit(spec(trials=24))
    stopped = machine.wait_for_trials(job_id, 2)
    machine.processes[stopped].send_signal(signal.SIGTERM)
    assert machine.processes[stopped].wait(30) == 0
    machine.succeeded(job_id)
    assert machine.jobs.get(job_id).worker == f"{_other(stopped)}:cpu"
    assert [event.data["number"] for event in machine.events(job_id, "trial")] == list(range(24))
    machine.start(stopped)
    machine.ready(stopped)


@pytest.mark.slow  # a process frozen inside a transaction keeps its locks, and the wait for them is long and varies
def test_others_take_over_from_a_worker_that_freezes(machine: Machine, spec: Spec) -> None:
    job_id = machine.submit(spec(trials=24))
    frozen = machine.wait_for_trials(job_id, 2)
    machine.freeze(frozen)
    machine.succeeded(job_id)
    assert machine.jobs.get(job_id).worker == f"{_other(frozen)}:cpu"
    assert [event.data["number"] for event in machine.events(job_id, "trial")] == list(range(24))
    assert any("fell silent" in event.data["message"] for event in machine.events(job_id, "warning"))

    machine.processes[frozen].send_signal(signal.SIGCONT)
    machine.wait(lambda: "starts afresh" in machine.log(frozen) or None, 90, "the awakening")
    machine.ready(frozen)
    assert machine.jobs.get(job_id).status == "succeeded"


def test_a_job_that_kills_its_workers_is_given_up(machine: Machine, spec: Spec) -> None:
    job = machine.jobs.create(spec())
    for death in range(MAX_DEATHS):
        assert deaths(machine.jobs, job.id) == death
        machine.jobs.set_running(job.id, "gone:cpu")
        machine.jobs.set_stage(job.id, "calibrate", worker="gone:cpu")
    with machine.engine.begin() as connection:
        machine.queue.enqueue_job(connection, job.id)
    error = machine.finished(job.id, 60).error
    assert error is not None
    assert error["code"] == "worker_died"
    assert f"{MAX_DEATHS} times" in error["message"]


def test_work_that_gets_further_is_not_given_up(machine: Machine, spec: Spec) -> None:
    job = machine.jobs.create(spec())
    for trial in range(MAX_DEATHS + 2):
        machine.jobs.set_running(job.id, "gone:cpu")
        machine.jobs.set_stage(job.id, "search", worker="gone:cpu")
        machine.jobs.add_event(job.id, "trial", {"number": trial}, worker="gone:cpu")
        assert deaths(machine.jobs, job.id) == 1
    machine.jobs.add_event(job.id, "released", {}, worker="gone:cpu")
    assert deaths(machine.jobs, job.id) == 0
    machine.jobs.cancelled(job.id)


def test_a_killed_worker_takes_its_device_process_along(machine: Machine) -> None:
    machine.ready("one")
    device = machine.device_of("one")
    assert device is not None
    machine.kill("one")
    device.wait(10)
