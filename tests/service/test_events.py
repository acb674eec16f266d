"""Server-sent events over a real connection."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from ranksearch.service.context import Context, open_context
from ranksearch.service.routes import events as events_module
from ranksearch.service.store.settings import Settings


@pytest.fixture
def url(serve: Callable[[Settings], str], settings: Settings) -> str:
    return serve(settings)


@pytest.fixture
def context(settings: Settings) -> Iterator[Context]:
    """Another process's view of the same database."""
    context = open_context(settings)
    yield context
    context.close()


@pytest.fixture
def job(url: str, body: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.post(f"{url}/v1/jobs", json=body).json()
    return answer


def read(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The events of a stream, with ids as numbers and data as values."""
    fields: dict[str, Any] = {}
    for line in response.iter_lines():
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif fields:
            if "data" in fields:
                yield {"id": int(fields["id"]), "event": fields["event"], **json.loads(fields["data"])}
            fields = {}


def listen(url: str, **headers: str) -> list[dict[str, Any]]:
    with httpx.stream("GET", url, headers=headers, timeout=30) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        return list(read(response))


def test_a_job_is_followed_to_its_end(url: str, context: Context, job: dict[str, Any]) -> None:
    seen: list[dict[str, Any]] = []
    follower = threading.Thread(target=lambda: seen.extend(listen(job["links"]["events"])))
    follower.start()
    context.jobs.set_running(job["id"], "w")
    context.jobs.set_stage(job["id"], "calibrate", cache="hit")
    for number in range(3):
        context.jobs.add_event(job["id"], "trial", {"number": number, "text": "zwei\nZeilen"})
    context.jobs.succeed(job["id"])
    follower.join(20)
    assert not follower.is_alive(), "the stream did not end with the job"
    told = [(event["event"], event.get("status") or event.get("stage") or event.get("number")) for event in seen]
    assert told == [
        *(("status", "queued"), ("status", "running"), ("stage", "calibrate")),
        *(("trial", 0), ("trial", 1), ("trial", 2), ("status", "succeeded")),
    ]
    assert seen[3]["text"] == "zwei\nZeilen"
    assert all(event["time"].endswith("Z") for event in seen)
    assert [event["id"] for event in seen] == sorted({event["id"] for event in seen})


@pytest.mark.one_database
def test_a_stream_goes_on_where_it_broke(url: str, context: Context, job: dict[str, Any]) -> None:
    context.jobs.set_running(job["id"], "w")
    with httpx.stream("GET", job["links"]["events"], timeout=30) as response:
        events = read(response)
        last = [next(events), next(events)][-1]
    context.jobs.add_event(job["id"], "warning", {"message": "missed"})
    context.jobs.succeed(job["id"])
    rest = listen(job["links"]["events"], **{"Last-Event-ID": str(last["id"])})
    assert [event["event"] for event in rest] == ["warning", "status"]
    assert [event["event"] for event in listen(f"{job['links']['events']}?after={rest[0]['id']}")] == ["status"]
    over = httpx.get(job["links"]["events"], headers={"Last-Event-ID": str(rest[-1]["id"])})
    assert (over.status_code, over.content) == (204, b"")


@pytest.mark.one_database
def test_silence_is_filled_with_pings(url: str, job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "PING_SECONDS", 0.1)
    monkeypatch.setattr(events_module, "POLL_SECONDS", 0.05)
    with httpx.stream("GET", job["links"]["events"], timeout=30) as response:
        lines = response.iter_lines()
        assert any(line == ": ping" for line in lines)


@pytest.mark.one_database
def test_many_followers_do_not_block_the_server(url: str, job: dict[str, Any]) -> None:
    """More than the server has threads."""
    with httpx.Client(timeout=30, limits=httpx.Limits(max_connections=None)) as client:
        streams = [client.stream("GET", job["links"]["events"]) for _ in range(60)]
        for stream in streams:
            stream.__enter__()
        begun = time.monotonic()
        assert client.get(job["links"]["self"]).status_code == 200
        assert time.monotonic() - begun < 5
        for stream in streams:
            stream.__exit__(None, None, None)


@pytest.mark.one_database
def test_the_same_events_as_a_list(url: str, context: Context, job: dict[str, Any]) -> None:
    context.jobs.set_running(job["id"], "w")
    context.jobs.set_stage(job["id"], "prepare")
    accept = {"Accept": "application/json"}
    first = httpx.get(job["links"]["events"], params={"limit": 2}, headers=accept).json()
    assert [event["kind"] for event in first["data"]] == ["status", "status"]
    rest = httpx.get(job["links"]["events"], params={"after": first["next"]}, headers=accept).json()
    assert [(event["kind"], event["data"]) for event in rest["data"]] == [("stage", {"stage": "prepare"})]
    assert rest["next"] is None


@pytest.mark.one_database
@pytest.mark.parametrize("last", ["x", "-1", "1.5", "9" * 30])
def test_a_last_event_id_that_is_none(url: str, job: dict[str, Any], last: str) -> None:
    answer = httpx.get(job["links"]["events"], headers={"Last-Event-ID": last})
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "header/last-event-id")
