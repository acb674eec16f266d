"""The client against servers that break: what it repeats, where it goes on, and what it refuses to believe."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from ranksearch.search.errors import BrokenDownload, InvalidInput, RequestRefused, ServerUnreachable
from ranksearch.service.client import Client
from ranksearch.service.download import choose, fetch
from tests.service.faulty import Answer, faulty_server, hang_up, reply

JOB = json.dumps({"id": "job_x", "status": "queued"}).encode()
DONE = json.dumps({"id": "job_x", "status": "succeeded"}).encode()
CONTENT = bytes(range(256)) * 40


def test_a_lost_connection_is_tried_again_with_the_same_key() -> None:
    with faulty_server([hang_up, reply(b"", status="503 Busy"), reply(JOB)]) as (url, heads), Client(url) as client:
        assert client.submit({"model": {}})["id"] == "job_x"
    keys = {line for head in heads for line in head.splitlines() if line.lower().startswith("idempotency-key")}
    assert len(heads) == 3
    assert len(keys) == 1


def test_no_server_is_said_in_one_sentence() -> None:
    with Client("http://127.0.0.1:9", attempts=1) as client, pytest.raises(ServerUnreachable, match="ranksearch serve"):
        client.job("job_x")


@pytest.mark.parametrize("url", ["nonsense", "ftp://host/", "http://[", "http://host:port"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(ServerUnreachable), Client(url, attempts=1) as client:
        client.job("job_x")


def test_no_proxy_stands_before_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with faulty_server([reply(JOB)]) as (url, _), Client(url, attempts=1) as client:
        assert client.job("job_x")["id"] == "job_x"
    with Client("http://other.invalid", attempts=1) as client, pytest.raises(ServerUnreachable):
        client.job("job_x")


def test_another_kind_of_server_is_noticed() -> None:
    with (
        faulty_server([reply(b"<html>", kind="text/html")]) as (url, _),
        Client(url) as client,
        pytest.raises(ServerUnreachable, match="not as a ranksearch server"),
    ):
        client.job("job_x")


def test_a_problem_becomes_its_detail() -> None:
    body = json.dumps({"detail": "kept 2 is too much", "code": "invalid_spec"}).encode()
    with (
        faulty_server([reply(body, status="422 No")]) as (url, _),
        Client(url) as client,
        pytest.raises(RequestRefused, match="kept 2 is too much") as caught,
    ):
        client.submit({})
    assert caught.value.data["problem"]["code"] == "invalid_spec"


def test_a_job_id_cannot_climb_out_of_its_path() -> None:
    with faulty_server([reply(JOB)]) as (url, heads), Client(url) as client:
        client.job("../../healthz?x#y")
    assert heads[0].startswith("GET /v1/jobs/..%2F..%2Fhealthz%3Fx%23y HTTP")


def test_events_go_on_after_the_last_one_that_came() -> None:
    first = b'retry: 2000\n\nid: 7\nevent: stage\ndata: {"stage": "search"}\n\n: ping\n\nid: 8\nevent: trial\nda'
    second = b'id: 8\nevent: trial\ndata: {"number": 3}\n\n'
    stream = "text/event-stream"
    answers = [reply(first, kind=stream, length=10_000), reply(second, kind=stream), reply(DONE)]
    with faulty_server(answers) as (url, heads), Client(url) as client:
        events = list(client.events("job_x"))
    assert [(event.id, event.kind) for event in events] == [(7, "stage"), (8, "trial")]
    assert "last-event-id" not in heads[0].lower()
    assert "last-event-id: 7" in heads[1].lower()


def test_a_server_that_was_there_is_waited_for() -> None:
    stream, events = "text/event-stream", b'id: 1\nevent: stage\ndata: {"stage": "search"}\n\n'
    away = [hang_up, reply(b"", status="502 Bad Gateway")]
    answers = [reply(JOB), *away, reply(events, kind=stream, length=10_000), *away, reply(b"", kind=stream)]
    with faulty_server([*answers, *away, reply(DONE)]) as (url, heads), Client(url, attempts=1) as client:
        assert client.job("job_x")["status"] == "queued"
        assert [event.id for event in client.events("job_x")] == [1]
    assert len(heads) == 10
    with faulty_server([reply(JOB), hang_up]) as (url, _), Client(url, attempts=1, patience=0.0) as client:
        client.job("job_x")
        with pytest.raises(ServerUnreachable):
            list(client.events("job_x"))


def file_of(url: str, content: bytes = CONTENT, **changes: Any) -> dict[str, Any]:
    facts = {"path": "model.safetensors", "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return {**facts, "url": f"{url}/v1/jobs/job_x/checkpoints/0.5/files/model.safetensors", **changes}


def partial(offset: int, length: int | None = None) -> Answer:
    body = CONTENT[offset : None if length is None else offset + length]
    return reply(body, status="206 Partial Content", length=len(CONTENT) - offset)


def fetch_quietly(client: Client, file: dict[str, Any], folder: Path) -> Path:
    fetch(client, [file], folder, lambda _path, _have: None)
    return folder / file["path"]


def test_a_broken_download_goes_on_where_it_stopped(tmp_path: Path) -> None:
    answers = [reply(CONTENT[:1000], length=len(CONTENT)), hang_up, partial(1000, 500), partial(1500)]
    with faulty_server(answers) as (url, heads), Client(url) as client:
        assert fetch_quietly(client, file_of(url), tmp_path).read_bytes() == CONTENT
    asked = [line.split("=")[1] for head in heads for line in head.splitlines() if line.lower().startswith("range")]
    assert asked == ["1000-", "1000-", "1500-"]
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_new_process_goes_on_from_the_part_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.part").write_bytes(CONTENT[:4000])
    with faulty_server([partial(4000)]) as (url, heads), Client(url) as client:
        assert fetch_quietly(client, file_of(url), tmp_path).read_bytes() == CONTENT
    assert "range: bytes=4000-" in heads[0].lower()


def test_a_server_that_cannot_resume_sends_everything(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.part").write_bytes(CONTENT[:4000])
    with faulty_server([reply(CONTENT)]) as (url, _), Client(url) as client:
        assert fetch_quietly(client, file_of(url), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("left", [b"x" * 4000, b"x" * len(CONTENT), b"x" * (len(CONTENT) + 1)])
def test_a_spoiled_part_file_is_fetched_afresh(tmp_path: Path, left: bytes) -> None:
    (tmp_path / "model.safetensors.part").write_bytes(left)
    answers = [partial(4000), reply(CONTENT)] if len(left) == 4000 else [reply(CONTENT)]
    with faulty_server(answers) as (url, _), Client(url) as client:
        assert fetch_quietly(client, file_of(url), tmp_path).read_bytes() == CONTENT


def test_wrong_content_is_never_kept(tmp_path: Path) -> None:
    with (
        faulty_server([reply(CONTENT)] * 2) as (url, _),
        Client(url) as client,
        pytest.raises(BrokenDownload, match="sha256"),
    ):
        fetch_quietly(client, file_of(url, sha256="0" * 64), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_not_fetched_again(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(CONTENT)
    with Client("http://127.0.0.1:9") as client:
        fetch_quietly(client, file_of("http://127.0.0.1:9"), tmp_path)


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "a\\..\\x", ""])
def test_a_hostile_server_cannot_write_elsewhere(tmp_path: Path, path: str) -> None:
    with Client("http://127.0.0.1:9") as client, pytest.raises(BrokenDownload, match="outside"):
        fetch_quietly(client, file_of("http://127.0.0.1:9", path=path), tmp_path / "target")


def test_files_come_from_the_server_that_was_asked_whatever_it_calls_itself(tmp_path: Path) -> None:
    with faulty_server([reply(CONTENT)]) as (url, heads), Client(f"{url}/below", "secret") as client:
        fetch_quietly(client, file_of("https://inside:8000/elsewhere"), tmp_path)
    assert heads[0].startswith("GET /below/v1/jobs/job_x/checkpoints/0.5/files/model.safetensors HTTP")
    assert "authorization: bearer secret" in heads[0].lower()


def test_choosing_a_checkpoint() -> None:
    both = [{"kept": 0.5}, {"kept": 0.25}]
    assert choose(both, 0.250) == both[1]
    assert choose(both[:1], None) == both[0]
    refused = [(both, None, "--kept"), (both, 0.3, "only for 0.5, 0.25"), ([], None, "no checkpoint")]
    for checkpoints, kept, words in refused:
        with pytest.raises(InvalidInput, match=words):
            choose(checkpoints, kept)
