"""The Optuna dashboard behind our guard; what a person sees is in `tests/integration`."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from typing import Any

import optuna
import pytest
from fastapi.testclient import TestClient
from optuna.trial import TrialState

from ranksearch.search.trials import trials_of
from ranksearch.service.context import Context
from ranksearch.service.heatmap import shares_by_layer
from ranksearch.service.shown import DRAWN
from ranksearch.service.store.settings import Settings

from . import studies
from .studies import run_study

pytestmark = pytest.mark.one_database


@pytest.fixture
def study_id(client: TestClient, context: Context) -> int:
    run_study(context.studies, "job_a", kept=0.5, trials=3)
    return context.studies.get_study_id_from_name("job_a/0.5")


def test_the_dashboard_has_its_paths_and_no_others(client: TestClient, study_id: int) -> None:
    assert client.get("/", follow_redirects=False).headers["location"] == "/dashboard/"
    for path in ("/dashboard", "/dashboard/", f"/dashboard/studies/{study_id}", "/static/bundle.js", "/favicon.ico"):
        assert client.get(path).status_code == 200, path
    for path in ("/api/meta", "/api/studies", f"/api/studies/{study_id}", f"/csv/{study_id}"):
        assert client.get(path).status_code == 200, path
    for path in ("/api/llm/x", "/incompatible-rdb-schema", "/api", "/dashboards"):
        answer = client.get(path)
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), path


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("DELETE", "/api/studies/{id}"),
        ("POST", "/api/studies"),
        ("POST", "/api/studies/{id}/rename"),
        ("PUT", "/api/studies/{id}/note"),
        ("POST", "/api/trials/1/tell"),
        ("POST", "/api/trials/1/user-attrs"),
        ("DELETE", "/api/artifacts/{id}/1"),
        ("PATCH", "/dashboard/"),
    ],
)
def test_the_dashboard_changes_nothing(
    client: TestClient, context: Context, study_id: int, method: str, path: str
) -> None:
    answer = client.request(method, path.format(id=study_id), json={"study_name": "gone", "state": "Fail"})
    assert (answer.status_code, answer.json()["code"]) == (403, "dashboard_read_only")
    assert optuna.get_all_study_names(context.studies) == ["job_a/0.5"]
    assert client.get(f"/api/studies/{study_id}").status_code == 200


def test_large_answers_are_compressed(client: TestClient, study_id: int) -> None:
    with client.stream("GET", f"/api/studies/{study_id}", headers={"Accept-Encoding": "gzip"}) as answer:
        raw = b"".join(answer.iter_raw())
    assert answer.headers["content-encoding"] == "gzip"
    assert len(gzip.decompress(raw)) > 2 * len(raw)
    del client.headers["accept-encoding"]
    assert client.get("/static/bundle.js").status_code == 200


def test_the_page_of_a_study_says_what_it_will_ask_for(client: TestClient, study_id: int) -> None:
    links = client.get(f"/dashboard/studies/{study_id}").headers.get_list("link")
    paths = [link[1 : link.index(">")] for link in links]
    assert paths[0] == f"/api/studies/{study_id}?after=0"
    assert [client.get(path).status_code for path in paths] == [200] * 3
    assert "link" not in client.get("/dashboard/").headers


def test_the_dashboard_is_served_without_what_it_does_not_ask(settings: Settings, study_id: int) -> None:
    program = f"""
import importlib.util
import sys
from fastapi.testclient import TestClient
from ranksearch.service.app import create_app
from ranksearch.service.store.settings import load_settings
settings = load_settings(data_dir={str(settings.data_dir)!r}, database_url={settings.database!r})
with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
    assert client.get("/dashboard/").status_code == 200
    (importances,) = client.get("/api/studies/{study_id}/param_importances").json()["param_importances"]
assert abs(sum(row["importance"] for row in importances) - 1) < 1e-6
assert "optuna_dashboard" in sys.modules
for module in ("torch", "sklearn", "pandas"):
    assert module not in sys.modules
assert importlib.util.find_spec("sklearn") is not None
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=120)


def test_finished_trials_are_kept_and_the_rest_is_read_again(client: TestClient, context: Context) -> None:
    writer, study = context.studies, optuna.create_study(storage=context.studies, study_name="job_a/0.5")
    ids = [writer.create_new_trial(study._study_id) for _ in range(DRAWN + 2)]
    for number, trial_id in enumerate(ids):
        writer.set_trial_intermediate_value(trial_id, 0, float(number))
    writer.set_trial_state_values(ids[0], TrialState.COMPLETE, [1.0])
    first = context.shown.get_all_trials(study._study_id, deepcopy=False)
    writer.set_trial_state_values(ids[-1], TrialState.COMPLETE, [0.5])
    again = context.shown.get_all_trials(study._study_id, deepcopy=False)
    assert [trial.number for trial in again] == [*range(DRAWN + 2)]
    assert [first[-1].state, again[-1].state, again[0].values] == [TrialState.RUNNING, TrialState.COMPLETE, [1.0]]
    assert [trial.intermediate_values for trial in again] == [{}, {}, *({0: float(n)} for n in range(2, DRAWN + 2))]
    assert context.shown.get_best_trial(study._study_id).number == DRAWN + 1
    assert context.shown.get_trial(ids[0]).intermediate_values == {0: 0.0}  # as it was read


def test_a_study_with_the_id_of_a_deleted_one_shows_its_own_trials(
    client: TestClient, context: Context, body: dict[str, Any]
) -> None:
    job = client.post("/v1/jobs", json=body).json()
    study_id = run_study(context.studies, job["id"], kept=0.5, trials=3)._study_id
    assert len(context.shown.get_all_trials(study_id)) == 3
    context.jobs.set_running(job["id"], "w")
    context.jobs.succeed(job["id"])
    assert client.delete(job["links"]["self"]).status_code == 204
    assert run_study(context.studies, "job_b", kept=0.5, trials=2, seed=1)._study_id == study_id
    vectors = [trial.user_attrs["ranks"] for trial in context.shown.get_all_trials(study_id)]
    assert vectors == [row["ranks"] for row in trials_of(context.studies, "job_b", 0.5)]


def test_a_study_shows_the_ranks_of_its_best_trial_drawn_when_they_are_looked_at(
    client: TestClient, context: Context, study_id: int
) -> None:
    (artifact,) = client.get(f"/api/studies/{study_id}").json()["artifacts"]
    assert artifact["mimetype"] == "image/svg+xml"
    at = f"/artifacts/{study_id}/{artifact['artifact_id']}"
    first = client.get(at)
    assert (first.status_code, first.headers["content-type"]) == (200, "image/svg+xml")
    best = min(trials_of(context.studies, "job_a", 0.5), key=lambda row: row["score"])
    assert f"job_a/0.5, trial {best['number']}:" in first.text
    ranks = studies.SPACE.unpack(best["ranks"])
    kinds, shares = shares_by_layer(studies.SPACE, ranks)
    assert kinds == ["self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"]
    for target, cost in zip(studies.SPACE.targets, studies.SPACE.costs(ranks), strict=True):
        share = cost / target.parameters
        assert shares[kinds.index(target.kind), target.depth] == share
        assert f"<title>{target.kind}, layer {target.depth}: {100 * share:.1f}%</title>" in first.text
    assert client.get(f"/artifacts/{study_id}/{study_id + 1}").status_code == 404
    assert client.post(f"/api/artifacts/{study_id}", json={"file": "data:,x"}).status_code == 403


def test_every_trial_has_a_picture_of_its_own_ranks(client: TestClient, context: Context, study_id: int) -> None:
    rows = trials_of(context.studies, "job_a", 0.5)
    for trial, row in zip(client.get(f"/api/studies/{study_id}").json()["trials"], rows, strict=True):
        (artifact,) = trial["artifacts"]
        drawn = client.get(f"/artifacts/{study_id}/{trial['trial_id']}/{artifact['artifact_id']}")
        assert (drawn.status_code, drawn.headers["content-type"]) == (200, "image/svg+xml")
        assert f"job_a/0.5, trial {row['number']}:" in drawn.text
        ranks = studies.SPACE.unpack(row["ranks"])
        for target, cost in zip(studies.SPACE.targets, studies.SPACE.costs(ranks), strict=True):
            share = 100 * cost / target.parameters
            assert f"<title>{target.kind}, layer {target.depth}: {share:.1f}%</title>" in drawn.text
    assert client.get(f"/artifacts/{study_id}/{trial['trial_id']}/{study_id}-0").status_code == 404  # another's
    stored = context.studies.get_all_trials(study_id)
    assert not any(key.startswith("artifacts") for kept in stored for key in kept.system_attrs)


def test_a_study_of_both_objectives_is_served_with_its_front(client: TestClient, context: Context) -> None:
    run_study(context.studies, "job_b", kept=0.5, trials=4, objective="both")
    study_id = context.studies.get_study_id_from_name("job_b/0.5")
    stopped = context.studies.create_new_trial(study_id)
    context.studies.set_trial_intermediate_value(stopped, 0, 4.5)
    context.studies.set_trial_state_values(stopped, TrialState.PRUNED)
    shown = client.get(f"/api/studies/{study_id}").json()
    rows = trials_of(context.studies, "job_b", 0.5)
    assert shown["directions"] == ["minimize", "minimize"]
    assert shown["objective_names"] == ["perplexity", "kl"]
    assert [trial.get("values") for trial in shown["trials"][:-1]] == [[*row["scores"].values()] for row in rows[:-1]]
    assert (shown["trials"][-1]["state"], rows[-1]["score"]) == ("Pruned", None)
    assert [trial["number"] for trial in shown["best_trials"]] == [0, 1, 2, 3]  # KL falls where perplexity rises
    assert client.get(f"/csv/{study_id}").status_code == 200
    assert client.get("/api/studies").status_code == 200
    best = min(rows[:-1], key=lambda row: row["score"])
    (artifact,) = shown["artifacts"]
    assert f"trial {best['number']}:" in client.get(f"/artifacts/{study_id}/{artifact['artifact_id']}").text
