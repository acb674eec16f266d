"""The Optuna dashboard behind our guard; what a person sees is in `tests/integration`."""

from __future__ import annotations

import gzip

import optuna
import pytest
from fastapi.testclient import TestClient
from optuna.trial import TrialState

from ranksearch.search.trials import trials_of
from ranksearch.service.context import Context
from ranksearch.service.heatmap import shares_by_layer

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
