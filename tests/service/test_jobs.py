from __future__ import annotations

import math
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from ranksearch.search.errors import Conflict, ImpossibleBudget, JobNotFound
from ranksearch.search.spec import JobSpec
from ranksearch.service.store.jobs import Job, Jobs, new_job_id


def kinds(jobs: Jobs, job: Job) -> list[str]:
    return [event.kind for event in jobs.events(job.id)]


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    """Run all at once; results in order."""
    results: list[Any] = [None] * len(calls)
    gate = threading.Barrier(len(calls))

    def run(place: int, call: Callable[[], Any]) -> None:
        gate.wait()
        results[place] = call()

    threads = [threading.Thread(target=run, args=item) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_a_new_job_is_queued_and_can_be_read_back(jobs: Jobs, spec: JobSpec) -> None:
    job = jobs.create(spec)
    assert jobs.get(job.id) == job
    assert (job.status, job.stage, job.progress, job.best, job.error) == ("queued", None, 0.0, {}, None)
    assert job.parsed() == spec
    assert kinds(jobs, job) == ["status"]
    assert job.created.tzinfo is UTC
    assert abs(datetime.now(UTC) - job.created) < timedelta(minutes=1)


def test_ids_can_be_part_of_a_hub_name() -> None:
    ids = {new_job_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(len(i) == 16 and i.startswith("job_") and i[4:].isalnum() and i == i.lower() for i in ids)


def test_a_job_is_lived_through(jobs: Jobs, spec: JobSpec) -> None:
    job = jobs.create(spec)
    assert jobs.set_running(job.id, "w")
    assert jobs.set_stage(job.id, "calibrate", worker="w", cache="hit")
    assert jobs.set_progress(job.id, 0.25, 12.5, worker="w")
    assert jobs.set_best(job.id, 0.5, 30.0, 4, worker="w")
    assert jobs.set_best(job.id, 0.25, 41.0, 7)
    assert jobs.add_event(job.id, "warning", {"message": "careful"})
    half = jobs.get(job.id)
    assert (half.status, half.stage, half.progress, half.eta_seconds) == ("running", "calibrate", 0.25, 12.5)
    assert half.best == {"0.5": {"score": 30.0, "trial": 4}, "0.25": {"score": 41.0, "trial": 7}}
    assert half.started is not None
    assert half.started >= half.created
    assert jobs.succeed(job.id, worker="w")
    done = jobs.get(job.id)
    assert (done.status, done.progress, done.eta_seconds, done.over) == ("succeeded", 1.0, None, True)
    assert done.finished is not None
    assert kinds(jobs, job) == ["status", "status", "stage", "best", "best", "warning", "status"]
    assert jobs.events(job.id)[2].data == {"stage": "calibrate", "cache": "hit"}


@pytest.mark.parametrize("end", ["succeed", "fail", "cancelled"])
def test_a_finished_job_never_goes_back(jobs: Jobs, spec: JobSpec, end: str) -> None:
    job = jobs.create(spec)
    jobs.set_running(job.id, "w")
    assert {"succeed": jobs.succeed, "cancelled": jobs.cancelled, "fail": lambda i: jobs.fail(i, {"code": "x"})}[end](
        job.id
    )
    finished, told = jobs.get(job.id), kinds(jobs, job)
    changes = [
        jobs.set_running(job.id, "v"),
        jobs.set_stage(job.id, "search"),
        jobs.set_progress(job.id, 0.1),
        jobs.set_best(job.id, 0.5, 1.0, 1),
        jobs.add_event(job.id, "warning", {}),
        jobs.release(job.id, "w", "gone"),
        jobs.succeed(job.id),
        jobs.fail(job.id, {}),
        jobs.cancelled(job.id),
    ]
    assert changes == [False] * 9
    assert jobs.get(job.id) == finished
    assert kinds(jobs, job) == told
    assert jobs.cancel_requested(job.id)


def test_only_one_end_wins(jobs: Jobs, spec: JobSpec) -> None:
    for _ in range(3):
        job = jobs.create(spec)
        jobs.set_running(job.id, "w")
        ends: list[Callable[[], Any]] = [
            lambda i=job.id: jobs.succeed(i),
            lambda i=job.id: jobs.fail(i, {"code": "x", "message": "y"}),
            lambda i=job.id: jobs.cancelled(i),
        ]
        assert sorted(in_threads(*ends * 2)) == [False] * 5 + [True]
        assert kinds(jobs, job) == ["status"] * 3


def test_a_queued_job_cannot_succeed_and_can_fail(jobs: Jobs, spec: JobSpec) -> None:
    job = jobs.create(spec)
    assert not jobs.succeed(job.id)
    assert not jobs.set_progress(job.id, 0.5)
    assert jobs.fail(job.id, ImpossibleBudget("too small", kept=0.1))
    error = {"code": "impossible_budget", "message": "too small", "data": {"kept": 0.1}}
    assert jobs.get(job.id).error == error
    assert jobs.events(job.id)[-1].data == {"status": "failed", "error": error}


def test_a_worker_that_lost_the_job_changes_nothing(jobs: Jobs, spec: JobSpec) -> None:
    job = jobs.create(spec)
    jobs.set_running(job.id, "old")
    assert jobs.release(job.id, "old", "no sign of life for 30 s")
    assert not jobs.release(job.id, "old", "again")
    assert jobs.set_running(job.id, "new")
    lost = [
        jobs.set_stage(job.id, "search", worker="old"),
        jobs.set_progress(job.id, 0.5, worker="old"),
        jobs.set_best(job.id, 0.5, 1.0, 1, worker="old"),
        jobs.add_event(job.id, "warning", {}, worker="old"),
        jobs.fail(job.id, {}, worker="old"),
        jobs.succeed(job.id, worker="old"),
        jobs.cancelled(job.id, worker="old"),
    ]
    assert lost == [False] * 7
    assert jobs.get(job.id).status == "running"
    assert jobs.succeed(job.id, worker="new")


def test_cancelling_a_queued_job_ends_it(jobs: Jobs, spec: JobSpec) -> None:
    job = jobs.create(spec)
    assert not jobs.cancel_requested(job.id)
    assert jobs.request_cancel(job.id).status == "cancelled"
    assert jobs.request_cancel(job.id).status == "cancelled"
    assert not jobs.set_running(job.id, "w")


def test_cancelling_a_running_job_asks_its_worker(jobs: Jobs, spec: JobSpec) -> None:
    job = jobs.create(spec)
    jobs.set_running(job.id, "w")
    assert jobs.request_cancel(job.id).status == "running"
    assert jobs.request_cancel(job.id).cancel_requested
    assert jobs.cancel_requested(job.id)
    assert jobs.cancelled(job.id, worker="w")
    assert kinds(jobs, job) == ["status", "status", "cancel_requested", "status"]


def test_what_is_over_cannot_be_cancelled(jobs: Jobs, spec: JobSpec) -> None:
    job = jobs.create(spec)
    jobs.set_running(job.id, "w")
    jobs.succeed(job.id)
    with pytest.raises(Conflict, match="succeeded already"):
        jobs.request_cancel(job.id)


def test_an_unknown_job_is_named(jobs: Jobs) -> None:
    with pytest.raises(JobNotFound, match="'job_x'"):
        jobs.get("job_x")
    with pytest.raises(JobNotFound):
        jobs.request_cancel("job_x")
    with pytest.raises(JobNotFound):
        jobs.save_report("job_x", {})
    assert jobs.cancel_requested("job_x")
    assert not jobs.set_running("job_x", "w")


def test_numbers_that_are_not_finite_become_null(jobs: Jobs, spec: JobSpec) -> None:
    job = jobs.create(spec)
    jobs.set_running(job.id, "w")
    jobs.set_best(job.id, 0.5, math.inf, 1)
    jobs.set_progress(job.id, 7.0)
    assert jobs.get(job.id).best == {"0.5": {"score": None, "trial": 1}}
    assert jobs.get(job.id).progress == 1.0


@pytest.mark.one_database
def test_the_same_best_again_is_no_news(jobs: Jobs, spec: JobSpec) -> None:
    job = jobs.create(spec)
    jobs.set_running(job.id, "w")
    for score in (3.0, 3.0, 2.0):
        jobs.set_best(job.id, 0.5, score, 1)
    assert kinds(jobs, job).count("best") == 2


def test_pages_go_from_new_to_old(jobs: Jobs, spec: JobSpec) -> None:
    made = [jobs.create(spec).id for _ in range(5)]
    first = jobs.page(limit=2)
    rest = jobs.page(limit=9, after=first[-1].number)
    assert [job.id for job in first + rest] == made[::-1]
    jobs.set_running(made[2], "w")
    assert [job.id for job in jobs.page(limit=9, status="running")] == [made[2]]
    assert [job.id for job in jobs.unfinished()] == made


def test_a_report_is_kept_as_it_was_written(jobs: Jobs, spec: JobSpec) -> None:
    job = jobs.create(spec)
    assert jobs.report(job.id) is None
    jobs.save_report(job.id, {"b": 1, "a": [1.5, None, "ä"]})
    jobs.save_report(job.id, {"z": 1, "a": [2.5, None, "ä"]})
    document = jobs.report(job.id)
    assert document == {"z": 1, "a": [2.5, None, "ä"]}
    assert list(document) == ["z", "a"]


def test_a_reader_that_follows_misses_no_event(jobs: Jobs, spec: JobSpec) -> None:
    job = jobs.create(spec)
    jobs.set_running(job.id, "w")
    seen: list[int] = []
    done = threading.Event()

    def follow() -> None:
        while not done.is_set():
            seen.extend(event.id for event in jobs.events(job.id, after=seen[-1] if seen else 0))
        seen.extend(event.id for event in jobs.events(job.id, after=seen[-1] if seen else 0))

    def write(writer: int) -> None:
        for number in range(15):
            jobs.add_event(job.id, "trial", {"writer": writer, "number": number})

    reader = threading.Thread(target=follow)
    reader.start()
    in_threads(*[lambda w=w: write(w) for w in range(4)])
    done.set()
    reader.join(60)
    assert seen == [event.id for event in jobs.events(job.id)]
    assert len(seen) == 62
    assert [event.id for event in jobs.events(job.id, after=seen[9], limit=3)] == seen[10:13]
