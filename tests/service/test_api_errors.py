"""Every bad input gets its one clear error, and the service lives on."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from ranksearch.service.app import create_app
from ranksearch.service.requests import MAX_BODY_BYTES
from ranksearch.service.store.settings import load_settings

from .models import weights, write_model

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `allowed`, which specs may name, and a secret beside it."""
    home = tmp_path_factory.mktemp("home")
    (home / "allowed").mkdir()
    write_model(home / "secret")
    return home


@pytest.fixture(scope="module")
def client(home: Path) -> Iterator[TestClient]:
    app = create_app(load_settings(data_dir=home / "data", allowed_paths=[home / "allowed"]))
    with TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def good(home: Path) -> dict[str, Any]:
    """A spec that is accepted."""
    model = write_model(home / "allowed" / "good")
    (home / "allowed" / "text.txt").write_text("words")
    return {
        "model": {"source": str(model)},
        "calibration": {"dataset": {"path": "text", "data_files": str(home / "allowed" / "text.txt")}},
        "evaluation": {"test": []},
        "budget": {"kept": [0.5]},
    }


@pytest.fixture(autouse=True)
def _lives_on(client: TestClient, good: dict[str, Any]) -> Iterator[None]:
    yield
    assert client.post("/v1/jobs", json=good).status_code == 202


def refused(client: TestClient, spec: object, status: int = 422, path: str = "/v1/jobs") -> dict[str, Any]:
    answer = client.post(path, json=spec)
    problem: dict[str, Any] = answer.json()
    assert answer.status_code == status, problem
    assert answer.headers["content-type"] == "application/problem+json"
    assert set(problem) == {"type", "title", "status", "detail", "code", "errors", "data", "request_id"}
    assert problem["status"] == status
    assert problem["request_id"] == answer.headers["x-request-id"]
    return problem


def pointers(problem: dict[str, Any]) -> list[str]:
    return [error["pointer"] for error in problem["errors"]]


@pytest.mark.parametrize("kept", [0, 1.5, -1, "half", None, True and [0.5]])
def test_kept_outside_its_range(client: TestClient, good: dict[str, Any], kept: Any) -> None:
    problem = refused(client, {**good, "budget": {"kept": [kept]}})
    assert problem["code"] == "invalid_spec"
    assert pointers(problem) == ["/budget/kept/0"]


def test_kept_below_rank_one_everywhere(client: TestClient, good: dict[str, Any]) -> None:
    problem = refused(client, {**good, "budget": {"kept": [0.5, 0.01]}})
    assert problem["code"] == "impossible_budget"
    assert pointers(problem) == ["/budget/kept/1"]
    least = problem["data"]["minimum_kept"]
    assert f"{least:g}" in problem["detail"]
    assert client.post("/v1/jobs", json={**good, "budget": {"kept": [least]}}).status_code == 202
    below = round(least - 0.001, 4)
    assert refused(client, {**good, "budget": {"kept": [below]}})["data"]["minimum_kept"] == least


def test_a_budget_below_what_bolaco_keeps_dense(client: TestClient, good: dict[str, Any]) -> None:
    for method in ({"method": {"preset": "bolaco"}}, {"search": {"sampler": "bolaco-20"}}):
        spec = {**good, **method, "budget": {"kept": [0.5, 0.25]}}
        problem = refused(client, spec)
        assert (problem["code"], pointers(problem)) == ("impossible_budget", ["/budget/kept/1"])
        assert "v_proj" in problem["detail"]
        least = problem["data"]["minimum_kept"]
        assert client.post("/v1/jobs", json={**spec, "budget": {"kept": [least]}}).status_code == 202
        estimated = client.post("/v1/estimates", json={**spec, "budget": {"kept": [least]}})
        assert estimated.json()["minimum_kept"] == least
    assert client.post("/v1/jobs", json={**good, "budget": {"kept": [0.25]}}).status_code == 202


def test_more_probes_than_a_budget_may_have(
    client: TestClient, good: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("ranksearch.search.plan.MOST_TRIALS", 20)
        for preset in ("asvd", "dp-knapsack"):
            spec = {**good, "method": {"preset": preset}}
            for path in ("/v1/jobs", "/v1/estimates"):
                problem = refused(client, spec, path=path)
                assert pointers(problem) == ["/method/preset"]
                assert problem["data"]["trials"] > problem["data"]["most"] == 20
            fewer = {**spec, "method": {"preset": preset, "keep_dense": ["*.0.*", "*.mlp.*"]}}
            assert client.post("/v1/jobs", json={**fewer, "budget": {"kept": [0.9]}}).status_code == 202


def test_unknown_fields_are_named(client: TestClient, good: dict[str, Any]) -> None:
    problem = refused(client, {**good, "kept": 0.5, "search": {"trails": 3}, "a/b~c": 1})
    assert problem["code"] == "invalid_spec"
    assert set(pointers(problem)) == {"/kept", "/search/trails", "/a~1b~0c"}
    assert {error["detail"] for error in problem["errors"]} == {"unknown field"}


def test_missing_fields_are_named(client: TestClient) -> None:
    assert set(pointers(refused(client, {}))) == {"/model", "/budget"}
    assert refused(client, {"model": {"source": "x"}})["detail"] == "/budget: required"


@pytest.mark.parametrize(
    "body",
    [b"not json", b"{", b"", b"\xff\xfe\xfd", b"[" * 200_000, b'{"a":' * 5000, b"\x00", b'{"a": 1} x', b"1" * 5000],
    ids=["words", "open", "empty", "not-utf8", "deep-list", "deep-object", "nul", "tail", "long-number"],
)
@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/estimates"])
def test_a_body_that_is_not_json(client: TestClient, body: bytes, path: str) -> None:
    answer = client.post(path, content=body, headers=JSON)
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_json")


@pytest.mark.parametrize("body", ["[]", "1", "null", '"text"', "true", "NaN", "[[[[]]]]"])
def test_a_body_that_is_no_object(client: TestClient, body: str) -> None:
    answer = client.post("/v1/jobs", content=body, headers=JSON)
    assert answer.status_code in (400, 422)
    assert answer.json()["code"] in ("invalid_spec", "invalid_json")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1e-999"])
def test_numbers_that_are_none(client: TestClient, good: dict[str, Any], number: str) -> None:
    body = json.dumps(good).replace("[0.5]", f"[{number}]")
    answer = client.post("/v1/jobs", content=body, headers=JSON)
    assert answer.status_code == 422
    assert pointers(answer.json()) == ["/budget/kept/0"]


@pytest.mark.parametrize("text", [r"a\u0000b", r"\ud800", r"\n", r"\u001b[31m"])
def test_text_that_no_database_takes(client: TestClient, good: dict[str, Any], text: str) -> None:
    for spec in (
        json.dumps({**good, "name": "HERE"}),
        json.dumps({**good, "model": {"source": "HERE"}}),
        json.dumps({**good, "HERE": 1}),
    ):
        answer = client.post("/v1/jobs", content=spec.replace("HERE", text), headers=JSON)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_spec")


def test_a_body_of_another_type(client: TestClient, good: dict[str, Any]) -> None:
    body = json.dumps(good)
    for headers in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}):
        answer = client.post("/v1/jobs", content=body, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")


def test_a_body_that_is_too_large(client: TestClient) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * (MAX_BODY_BYTES // 10)

    for body in (b" " * (MAX_BODY_BYTES + 1), chunks()):
        answer = client.post("/v1/jobs", content=body, headers=JSON)
        assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
    lie = client.post("/v1/jobs", content=b"{}", headers={**JSON, "Content-Length": "9" * 30})
    assert lie.status_code == 413


def test_a_model_that_is_not_there(client: TestClient, good: dict[str, Any], home: Path) -> None:
    problem = refused(client, {**good, "model": {"source": str(home / "allowed" / "nothing")}})
    assert problem["code"] == "model_not_found"
    assert pointers(problem) == ["/model/source"]


def test_a_folder_without_weights(client: TestClient, good: dict[str, Any], home: Path) -> None:
    folder = home / "allowed" / "empty"
    folder.mkdir(exist_ok=True)
    assert "config.json" in refused(client, {**good, "model": {"source": str(folder)}})["detail"]
    (folder / "config.json").write_text("{}")
    problem = refused(client, {**good, "model": {"source": str(folder)}})
    assert problem["code"] == "model_not_found"
    assert "no weights" in problem["detail"]


def test_pickled_weights(client: TestClient, good: dict[str, Any], home: Path) -> None:
    folder = home / "allowed" / "pickled"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    problem = refused(client, {**good, "model": {"source": str(folder)}})
    assert problem["code"] == "unsafe_model"
    assert "pytorch_model.bin" in problem["detail"]
    assert "safetensors" in problem["detail"]


def _header(header: bytes, tail: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + tail


_ENTRY = '{"w": {"dtype": "F32", "shape": %s, "data_offsets": %s}}'

DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda good: b"",
    "short": lambda good: good[:5],
    "cut": lambda good: good[: len(good) // 2],
    "header-cut": lambda good: good[:100],
    "huge-header": lambda good: struct.pack("<Q", 2**63) + good[8:],
    "header-past-end": lambda good: struct.pack("<Q", len(good)) + good[8:],
    "not-json": lambda good: _header(b"{" + b"x" * 50),
    "not-utf8": lambda good: _header(b'{"\xff\xff": 1}'),
    "list": lambda good: _header(b"[1, 2]"),
    "deep": lambda good: _header(b"[" * 100_000),
    "no-shape": lambda good: _header(b'{"w": {"dtype": "F32"}}'),
    "strings": lambda good: _header((_ENTRY % ('["8"]', "[0, 32]")).encode(), b"0" * 32),
    "negative": lambda good: _header((_ENTRY % ("[-8]", "[0, 32]")).encode(), b"0" * 32),
    "backwards": lambda good: _header((_ENTRY % ("[8]", "[32, 0]")).encode(), b"0" * 32),
    "outside": lambda good: _header((_ENTRY % ("[8]", "[0, 32]")).encode(), b"0" * 31),
    "disagree": lambda good: _header((_ENTRY % ("[9]", "[0, 32]")).encode(), b"0" * 32),
    "overflow": lambda good: _header((_ENTRY % (f"[{10**30}, {10**30}]", "[0, 32]")).encode(), b"0" * 32),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_weights(client: TestClient, good: dict[str, Any], home: Path, damage: str) -> None:
    folder = write_model(home / "allowed" / "damaged")
    file = folder / "model.safetensors"
    file.write_bytes(DAMAGED[damage](file.read_bytes()))
    for path in ("/v1/jobs", "/v1/estimates"):
        problem = refused(client, {**good, "model": {"source": str(folder)}}, path=path)
        assert problem["code"] == "broken_weights"
        assert "model.safetensors" in problem["detail"]
        assert pointers(problem) == ["/model/source"]


@pytest.mark.parametrize(
    ("index", "code"),
    [
        ("{", "model_not_found"),
        ("[]", "broken_weights"),
        ('{"weight_map": {}}', "broken_weights"),
        ('{"weight_map": {"w": "../../secret/model.safetensors"}}', "unsafe_model"),
        ('{"weight_map": {"w": "/etc/passwd"}}', "unsafe_model"),
        ('{"weight_map": {"w": 1}}', "unsafe_model"),
        ('{"weight_map": {"w": "model-00002.safetensors"}}', "model_not_found"),
    ],
)
def test_a_bad_index(client: TestClient, good: dict[str, Any], home: Path, index: str, code: str) -> None:
    folder = write_model(home / "allowed" / "indexed")
    (folder / "model.safetensors.index.json").write_text(index)
    assert refused(client, {**good, "model": {"source": str(folder)}})["code"] == code


def test_a_quantized_model(client: TestClient, good: dict[str, Any], home: Path) -> None:
    folder = write_model(home / "allowed" / "quantized", config={"quantization_config": {"quant_method": "gptq"}})
    assert refused(client, {**good, "model": {"source": str(folder)}})["code"] == "unsupported_model"


def test_nothing_to_compress(client: TestClient, good: dict[str, Any], home: Path) -> None:
    folder = write_model(home / "allowed" / "flat", {"embed.weight": np.zeros((4, 4), np.float32)})
    assert refused(client, {**good, "model": {"source": str(folder)}})["code"] == "unsupported_model"


def test_paths_that_climb_out(client: TestClient, good: dict[str, Any], home: Path) -> None:
    allowed = home / "allowed"
    if not (allowed / "link").is_symlink():
        (allowed / "link").symlink_to(home / "secret")
        linked = write_model(allowed / "linked")
        (linked / "model.safetensors").unlink()
        (linked / "model.safetensors").symlink_to(home / "secret" / "model.safetensors")
    sources = ("/etc", str(home / "secret"), f"{allowed}/../secret", f"{allowed}/link", f"{allowed}/linked", "~", "..")
    for source in sources:
        problem = refused(client, {**good, "model": {"source": source}})
        assert (problem["code"], pointers(problem)) == ("path_not_allowed", ["/model/source"])
    text = {"path": "text", "data_files": "/etc/passwd"}
    for part, pointer in (
        ({"calibration": {"dataset": text}}, "/calibration/dataset"),
        ({"evaluation": {"dataset": text, "test": []}}, "/evaluation/dataset"),
        ({"evaluation": {"test": [good["calibration"]["dataset"], text]}}, "/evaluation/test/1"),
    ):
        problem = refused(client, {**good, **part})
        assert (problem["code"], pointers(problem)) == ("path_not_allowed", [pointer])


def test_code_of_the_model_is_not_run(client: TestClient, good: dict[str, Any]) -> None:
    problem = refused(client, {**good, "model": {**good["model"], "trust_remote_code": True}})
    assert (problem["code"], pointers(problem)) == ("unsafe_model", ["/model/trust_remote_code"])


def test_a_pattern_that_matches_nothing(client: TestClient, good: dict[str, Any]) -> None:
    problem = refused(client, {**good, "method": {"keep_dense": ["*.x_proj"]}})
    assert pointers(problem) == ["/method/keep_dense"]
    assert "*.x_proj" in problem["detail"]


def test_a_model_on_a_hub_that_cannot_be_asked_is_left_to_the_worker(client: TestClient, good: dict[str, Any]) -> None:
    spec = {**good, "model": {"source": "someone/some-model"}}
    assert client.post("/v1/jobs", json=spec).status_code == 202
    problem = refused(client, spec, status=503, path="/v1/estimates")
    assert problem["code"] == "hub_unreachable"


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "é"])
def test_a_bad_idempotency_key(client: TestClient, good: dict[str, Any], key: str) -> None:
    answer = client.post("/v1/jobs", json=good, headers={"Idempotency-Key": key.encode()})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_parameter")
    assert pointers(answer.json()) == ["header/idempotency-key"]


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=1001", "limit=x", "after=x", "after=-1", "after=" + "9" * 40, "status=done"]
)
def test_bad_parameters(client: TestClient, query: str) -> None:
    answer = client.get(f"/v1/jobs?{query}")
    assert answer.status_code == 422
    assert pointers(answer.json()) == [f"query/{query.partition('=')[0]}"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nope", 404, "not_found"),
        ("POST", "/v2/jobs", 404, "not_found"),
        ("GET", "/v1/jobs/", 404, "not_found"),
        ("GET", "/dashboardx", 404, "not_found"),
        ("GET", "/api/models/x", 404, "not_found"),
        ("GET", "/v1/jobs/job_\udc80", 404, "job_not_found"),
        ("PUT", "/v1/jobs", 405, "method_not_allowed"),
        ("DELETE", "/v1/workers", 405, "method_not_allowed"),
        ("POST", "/metrics", 405, "method_not_allowed"),
        ("POST", "/dashboard/", 403, "dashboard_read_only"),
        ("OPTIONS", "/api/studies", 403, "dashboard_read_only"),
    ],
)
def test_paths_and_methods_that_are_none(client: TestClient, method: str, path: str, status: int, code: str) -> None:
    answer = client.request(method, path.encode("utf-8", "surrogateescape").decode("latin-1"))
    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_a_crash_is_a_500_that_tells_nothing(home: Path, good: dict[str, Any]) -> None:
    app = create_app(load_settings(data_dir=home / "broken"))

    @app.get("/v1/crash")
    def crash() -> None:
        raise ZeroDivisionError("the secret reason")

    with TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False) as client:
        answer = client.get("/v1/crash")
    assert (answer.status_code, answer.json()["code"]) == (500, "internal")
    assert answer.headers["x-request-id"] in answer.json()["detail"]
    assert "secret" not in answer.text


def test_a_database_that_is_gone_is_a_503(home: Path, good: dict[str, Any]) -> None:
    app = create_app(load_settings(data_dir=home / "gone"))
    with TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False) as client:
        with app.state.context.engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE job RENAME TO job_away")
        answer = client.get("/v1/jobs")
    assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
    assert answer.headers["retry-after"]


_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
_json = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_names = ["name", "model", "calibration", "evaluation", "budget", "method", "search", "export", "webhook"]


@st.composite
def _specs(draw: st.DrawFn) -> dict[str, Any]:
    """Specs that are almost good: one to three places hold something else."""
    model = st.fixed_dictionaries({"source": st.text(max_size=12) | st.just("someone/model")})
    dataset = st.fixed_dictionaries(
        {"path": st.sampled_from(["text", "json", "a/b", "/x", ".."])}, optional={"data_files": _json}
    )
    spec: dict[str, Any] = {
        "model": draw(model),
        "budget": {"kept": draw(st.lists(st.floats(0, 1), max_size=3) | _json)},
    }
    spec["calibration"] = {"dataset": draw(dataset)}
    for name in draw(st.lists(st.sampled_from(_names), max_size=2)):
        spec[name] = draw(_json)
    return spec


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spec=_json | _specs())
def test_no_body_breaks_the_server(client: TestClient, spec: Any) -> None:
    for path in ("/v1/jobs", "/v1/estimates"):
        answer = client.post(path, content=json.dumps(spec), headers=JSON)
        assert answer.status_code < 500 or answer.json()["code"] == "hub_unreachable", answer.text
        if answer.status_code >= 400:
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.json()["detail"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=200))
def test_no_bytes_break_the_server(client: TestClient, body: bytes) -> None:
    answer = client.post("/v1/jobs", content=body, headers=JSON)
    assert 400 <= answer.status_code < 500


def test_sharded_weights_are_read_through_their_index(client: TestClient, good: dict[str, Any], home: Path) -> None:
    folder = write_model(home / "allowed" / "sharded")
    tensors = weights()
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / shard)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    whole = client.post("/v1/estimates", json=good).json()
    assert client.post("/v1/estimates", json={**good, "model": {"source": str(folder)}}).json() == whole


def test_a_search_learns_from_jobs_that_are_there_and_about_the_same_model(
    client: TestClient, good: dict[str, Any], home: Path
) -> None:
    job = client.post("/v1/jobs", json=good).json()["id"]
    other = write_model(home / "allowed" / "other")
    elsewhere = client.post("/v1/jobs", json={**good, "model": {"source": str(other)}}).json()["id"]
    for jobs, said in (([job, "job_nosuch"], "no job 'job_nosuch'"), ([job, elsewhere], "is about model")):
        problem = refused(client, {**good, "search": {"learn_from": jobs}})
        assert (problem["code"], pointers(problem)) == ("invalid_input", ["/search/learn_from/1"])
        assert problem["detail"].startswith("search.learn_from: ")
        assert said in problem["detail"]
    problem = refused(client, {**good, "search": {"learn_from": [job], "sampler": "tpe"}})
    assert "leave search.learn_from out" in problem["detail"]
    assert client.post("/v1/jobs", json={**good, "search": {"learn_from": [job]}}).status_code == 202
