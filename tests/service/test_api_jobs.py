from __future__ import annotations

import hashlib
import threading
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text, update

from ranksearch.service.app import create_app
from ranksearch.service.context import Context
from ranksearch.service.store import tables
from ranksearch.service.store.clock import ago
from ranksearch.service.store.database import reading, writing
from ranksearch.service.store.settings import Settings


def queued(context: Context) -> set[str]:
    """Ids of the workflows in the queue."""
    with reading(context.engine) as connection:
        query = text(f"SELECT workflow_uuid FROM {workflow_table(context)} WHERE status = 'ENQUEUED'")
        return set(connection.execute(query).scalars())


def dequeue(context: Context, job_id: str, executor: str) -> None:
    """What the engine of a worker does when it takes a job."""
    statement = f"UPDATE {workflow_table(context)} SET status = 'PENDING', executor_id = :e WHERE workflow_uuid = :j"
    with writing(context.engine) as connection:
        connection.execute(text(statement), {"e": executor, "j": job_id})


def workflow_table(context: Context) -> str:
    return "dbos.workflow_status" if context.engine.dialect.name == "postgresql" else "workflow_status"


def test_a_job_is_taken_in(client: TestClient, context: Context, body: dict[str, Any]) -> None:
    answer = client.post("/v1/jobs", json=body)
    job = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == job["links"]["self"] == f"http://127.0.0.1:8000/v1/jobs/{job['id']}"
    assert (job["status"], job["stage"], job["progress"], job["best"], job["error"]) == ("queued", None, 0.0, {}, None)
    assert job["spec"]["search"]["trials"] == 60
    assert job["created_at"].endswith("Z")
    assert queued(context) == {job["id"]}
    assert client.get(f"/v1/jobs/{job['id']}").json() == job
    for name, link in job["links"].items():
        if name not in ("events", "cancel", "report"):
            assert client.get(link).status_code == 200, name


def test_the_same_key_gives_the_same_job(client: TestClient, context: Context, body: dict[str, Any]) -> None:
    headers = {"Idempotency-Key": "key-1"}
    first = client.post("/v1/jobs", json=body, headers=headers)
    client.post(first.json()["links"]["cancel"])
    again = client.post("/v1/jobs", json={**body, "name": None}, headers=headers)
    assert (again.status_code, again.json(), again.headers["location"]) == (
        *(202, first.json(), first.headers["location"]),
    )
    other = client.post("/v1/jobs", json={**body, "name": "other"}, headers=headers)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    assert client.post("/v1/jobs", json=body, headers={"Idempotency-Key": "key-2"}).json()["id"] != first.json()["id"]
    assert len(client.get("/v1/jobs").json()["data"]) == 2
    with writing(context.engine) as connection:
        connection.execute(update(tables.idempotency).values(created=ago(24 * 3600 + 1)))
    late = client.post("/v1/jobs", json=body, headers=headers)
    assert late.json()["id"] != first.json()["id"]


@pytest.mark.one_database
def test_a_key_belongs_to_its_token(settings: Settings, body: dict[str, Any]) -> None:
    hashes = tuple(hashlib.sha256(token).hexdigest() for token in (b"one", b"two"))
    with TestClient(create_app(settings.model_copy(update={"tokens": hashes}))) as client:
        headers = [{"Idempotency-Key": "k", "Authorization": f"Bearer {token}"} for token in ("one", "two", "one")]
        ids = [client.post("/v1/jobs", json=body, headers=each).json()["id"] for each in headers]
    assert ids[0] == ids[2] != ids[1]


def test_the_same_key_at_the_same_time_makes_one_job(client: TestClient, body: dict[str, Any]) -> None:
    answers: list[Any] = []
    gate = threading.Barrier(4)

    def post() -> None:
        gate.wait()
        answers.append(client.post("/v1/jobs", json=body, headers={"Idempotency-Key": "k"}))

    threads = [threading.Thread(target=post) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(client.get("/v1/jobs").json()["data"]) == 1


@pytest.mark.one_database
def test_a_refused_job_leaves_nothing(client: TestClient, context: Context, body: dict[str, Any]) -> None:
    refused = client.post("/v1/jobs", json={**body, "budget": {"kept": [1e-6]}}, headers={"Idempotency-Key": "k"})
    assert refused.status_code == 422
    assert client.get("/v1/jobs").json() == {"data": [], "next": None}
    assert queued(context) == set()
    assert client.post("/v1/jobs", json=body, headers={"Idempotency-Key": "k"}).status_code == 202


def test_jobs_are_listed_page_by_page(client: TestClient, context: Context, body: dict[str, Any]) -> None:
    ids = [client.post("/v1/jobs", json=body).json()["id"] for _ in range(5)]
    context.jobs.set_running(ids[1], "w")
    found, after = [], None
    while True:
        page = client.get("/v1/jobs", params={"limit": 2, **({"after": after} if after else {})}).json()
        assert len(page["data"]) <= 2
        found += [job["id"] for job in page["data"]]
        after = page["next"]
        if after is None:
            break
    assert found == ids[::-1]
    running = client.get("/v1/jobs", params={"status": "running"}).json()
    assert [job["id"] for job in running["data"]] == [ids[1]]
    assert running["next"] is None


def test_a_queued_job_is_cancelled_at_once(client: TestClient, context: Context, body: dict[str, Any]) -> None:
    job = client.post("/v1/jobs", json=body).json()
    cancelled = client.post(job["links"]["cancel"])
    assert (cancelled.status_code, cancelled.json()["status"]) == (202, "cancelled")
    assert cancelled.json()["finished_at"] is not None
    assert queued(context) == set()
    assert client.post(job["links"]["cancel"]).status_code == 202


def test_a_running_job_is_asked_to_stop(client: TestClient, context: Context, body: dict[str, Any]) -> None:
    job = client.post("/v1/jobs", json=body).json()
    context.workers.register("w", host="h", device="cpu", pid=1)
    context.jobs.set_running(job["id"], "w")
    context.jobs.set_best(job["id"], 0.5, 27.5, 3)
    answer = client.post(job["links"]["cancel"]).json()
    assert (answer["status"], answer["cancel_requested"], answer["worker"]) == ("running", True, "w")
    context.jobs.cancelled(job["id"])
    kept = client.get(job["links"]["self"]).json()
    assert (kept["status"], kept["best"]) == ("cancelled", {"0.5": {"score": 27.5, "trial": 3}})


@pytest.mark.parametrize("released", [True, False])
def test_a_job_whose_worker_is_gone_is_cancelled_at_once(
    client: TestClient, context: Context, body: dict[str, Any], released: bool
) -> None:
    job = client.post("/v1/jobs", json=body).json()
    context.jobs.set_running(job["id"], "gone")
    if released:
        context.jobs.release(job["id"], "gone", "it was stopped")
    else:
        dequeue(context, job["id"], "gone")
    answer = client.post(job["links"]["cancel"]).json()
    assert (answer["status"], answer["cancel_requested"]) == ("cancelled", True)
    assert queued(context) == set()
    assert client.delete(job["links"]["self"]).status_code == 204


def test_a_name_that_no_database_takes_names_nothing(
    client: TestClient, context: Context, body: dict[str, Any]
) -> None:
    job = client.post("/v1/jobs", json=body).json()["id"]
    for path in ("job_%00", f"{job}%00", f"{job}%0a/events", f"{job}/checkpoints/0.5/files/config.json%00"):
        answer = client.get(f"/v1/jobs/{path}")
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), path
    assert client.post("/v1/jobs/%00/cancel").status_code == client.delete("/v1/jobs/%00").status_code == 404


@pytest.mark.one_database
def test_what_is_over_is_not_cancelled(client: TestClient, context: Context, body: dict[str, Any]) -> None:
    job = client.post("/v1/jobs", json=body).json()
    context.jobs.fail(job["id"], {"code": "out_of_memory", "message": "too big", "data": {"device": "cpu"}})
    answer = client.post(job["links"]["cancel"])
    assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
    error = client.get(job["links"]["self"]).json()["error"]
    assert error == {"code": "out_of_memory", "message": "too big", "data": {"device": "cpu"}}


def test_a_job_is_deleted_with_all_it_had(client: TestClient, context: Context, body: dict[str, Any]) -> None:
    import optuna

    job = client.post("/v1/jobs", json=body, headers={"Idempotency-Key": "k"}).json()
    here = job["links"]["self"]
    assert client.delete(here).json()["code"] == "conflict"
    context.jobs.set_running(job["id"], "w")
    assert client.delete(here).status_code == 409
    optuna.create_study(storage=context.studies, study_name=f"{job['id']}/0.5").add_trial(
        optuna.trial.create_trial(value=1.0)
    )
    optuna.create_study(storage=context.studies, study_name="another/0.5")
    blob = context.artifacts.put([b"weights"], job_id=job["id"])
    assert client.get(here).json()["links"]["dashboard"].rpartition("/")[0].endswith("/dashboard/studies")
    context.jobs.succeed(job["id"])
    assert client.delete(here).status_code == 204
    assert not context.artifacts.path(blob.sha256).exists()
    assert optuna.get_all_study_names(context.studies) == ["another/0.5"]
    assert client.get(here).json()["code"] == "job_not_found"
    assert client.delete(here).status_code == 404
    assert client.post("/v1/jobs", json=body, headers={"Idempotency-Key": "k"}).json()["id"] != job["id"]


@pytest.mark.one_database
def test_workers_are_listed(client: TestClient, context: Context) -> None:
    context.workers.register("host:cpu", host="host", device="cpu", pid=1, memory_bytes=10**11)
    context.workers.heartbeat("host:cpu", pid=1, job_id="job_a", trial=7)
    (worker,) = client.get("/v1/workers").json()["data"]
    assert (worker["id"], worker["memory_bytes"], worker["job"], worker["trial"]) == ("host:cpu", 10**11, "job_a", 7)
    assert worker["alive"] is True
    assert worker["last_seen"].endswith("Z")
    context.workers.register("other:cpu", host="other", device="cpu", pid=1)
    first = client.get("/v1/workers", params={"limit": 1}).json()
    second = client.get("/v1/workers", params={"limit": 1, "after": first["next"]}).json()
    assert [page["data"][0]["id"] for page in (first, second)] == ["host:cpu", "other:cpu"]
    assert second["next"] is None


def test_metrics_tell_what_the_database_knows(client: TestClient, context: Context, body: dict[str, Any]) -> None:
    import optuna

    ids = [client.post("/v1/jobs", json=body).json()["id"] for _ in range(3)]
    context.jobs.set_running(ids[0], "w")
    context.workers.register("w", host="h", device="cpu", pid=1)
    study = optuna.create_study(storage=context.studies, study_name="x")
    study.add_trials([optuna.trial.create_trial(value=1.0)] * 2)
    with writing(context.engine) as connection:
        connection.execute(update(tables.job).where(tables.job.c.id == ids[1]).values(created=ago(100)))
    lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if not line.startswith("#"))
    assert float(lines['ranksearch_jobs{status="queued"}']) == 2
    assert float(lines['ranksearch_jobs{status="running"}']) == 1
    assert 100 <= float(lines["ranksearch_queue_age_seconds"]) < 160
    assert float(lines['ranksearch_workers{state="alive"}']) == 1
    assert float(lines['ranksearch_trials{state="complete"}']) == 2


def test_readiness_needs_the_newest_schema(client: TestClient, context: Context) -> None:
    assert client.get("/readyz").status_code == 200
    with writing(context.engine) as connection:
        connection.execute(text("UPDATE ranksearch_version SET version_num = 'old'"))
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["code"]) == (503, "schema_outdated")
    assert client.get("/healthz").status_code == 200


@pytest.mark.one_database
def test_a_request_keeps_its_id(client: TestClient) -> None:
    assert client.get("/healthz", headers={"X-Request-ID": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = client.get("/nope", headers={"X-Request-ID": "a b\t"})
    assert made.headers["x-request-id"] == made.json()["request_id"] != "a b"


@pytest.mark.one_database
def test_the_description_of_the_api_can_be_read(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.")
    assert document["components"]["schemas"]["JobSpec"]["required"] == ["model", "budget"]
    assert document["components"]["schemas"]["JobSpec"]["additionalProperties"] is False


@pytest.mark.one_database
@pytest.mark.parametrize("path", ["/v1/jobs/job_x", "/v1/jobs/job_x/trials", "/v1/jobs/job_x/events"])
def test_an_unknown_job_is_404(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert (answer.status_code, answer.json()["code"]) == (404, "job_not_found")
