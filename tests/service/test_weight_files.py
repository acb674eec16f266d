"""Budgets in bytes, held against checkpoints that are really written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from ranksearch.search.space import uniform
from ranksearch.search.spec import JobSpec
from ranksearch.service.context import Context
from ranksearch.service.estimate import rank_space, with_kept
from ranksearch.service.models import read_folder
from ranksearch.service.store.settings import Settings

pytestmark = pytest.mark.one_database

LLAMA = {
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}
GPT2 = {"n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 300}


@pytest.mark.parametrize(
    ("family", "most", "options"),
    [
        ("llama", 1_500_000, {}),
        ("llama", 800_000, {"method": {"form": "pivoted"}, "export": {"dtype": "bfloat16"}}),
        ("llama", 800_000, {"method": {"metric": "centred", "keep_dense": ["*.v_proj"]}, "dtype": "float16"}),
        ("llama", 2_000_000, {"method": {"metric": "centred", "form": "pivoted"}}),
        ("gpt2", 1_500_000, {"method": {"metric": "centred"}}),
        ("gpt2", 1_300_000, {"method": {"form": "pivoted"}, "export": {"max_shard_bytes": 1_000_000}}),
    ],
)
def test_a_checkpoint_takes_the_bytes_asked_for_and_hardly_less(
    settings: Settings, allowed: Path, family: str, most: int, options: dict[str, Any]
) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    from ranksearch.worker.checkpoint import export
    from ranksearch.worker.models import load_model
    from ranksearch.worker.targets import find_targets
    from ranksearch.worker.tiny import train_tokenizer

    config = AutoConfig.for_model(family, **(GPT2 if family == "gpt2" else LLAMA), bos_token_id=0, eos_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(allowed / "model")
    train_tokenizer("some words to learn from\n" * 20, 290).save_pretrained(allowed / "model")
    tensors = read_folder(allowed / "model", settings)
    parts = {key: value for key, value in options.items() if key != "dtype"}
    source = {"source": str(allowed / "model"), "dtype": options.get("dtype", "auto")}
    spec = with_kept(JobSpec.model_validate({"model": source, "budget": {"bytes": [most]}, **parts}), tensors)
    (kept,) = spec.budget.kept
    assert float(f"{kept:.4g}") == kept < 1
    assert with_kept(spec, tensors) == spec

    model, tokenizer = load_model(allowed / "model", dtype=spec.model.dtype)
    targets, space = {t.name: t for t in find_targets(model)}, rank_space(spec, tensors)
    ranks = space.as_dict(uniform(space, kept))
    sizes = export(
        allowed / "out",
        model=model,
        tokenizer=tokenizer,
        pairs=lambda name, r: (torch.randn(targets[name].out_features, r), torch.randn(r, targets[name].in_features)),
        ranks={name: next(rank for stored, rank in ranks.items() if stored.endswith(name)) for name in targets},
        targets=targets.values(),
        biases=(lambda name, _: torch.zeros(targets[name].out_features)) if spec.method.metric == "centred" else None,
        form=spec.method.form,
        dtype=spec.export.dtype,
        max_shard_bytes=spec.export.max_shard_bytes,
    )
    assert 0.99 * most < sizes.disk <= most


def test_a_job_in_bytes_is_stored_with_the_kept_it_comes_to(
    client: TestClient, context: Context, body: dict[str, Any]
) -> None:
    shares = {**body, "budget": {"kept": [0.5, 0.4]}}
    wanted = [budget["checkpoint_bytes"] for budget in client.post("/v1/estimates", json=shares).json()["budgets"]]
    spec = {**body, "budget": {"bytes": wanted}}
    found = client.post("/v1/estimates", json=spec).json()["budgets"]
    assert [budget["kept"] for budget in found] == [0.5, 0.4]
    assert [budget["checkpoint_bytes"] for budget in found] == wanted
    headers = {"Idempotency-Key": "once"}
    job = client.post("/v1/jobs", json=spec, headers=headers).json()
    assert job["spec"]["budget"] == {"kept": [0.5, 0.4], "bytes": wanted, "of": "parameters"}
    assert context.jobs.get(job["id"]).spec == job["spec"]
    assert client.post("/v1/jobs", json=spec, headers=headers).json()["id"] == job["id"]
    again = client.post("/v1/jobs", json=job["spec"])  # what the server shows it also takes
    assert (again.status_code, again.json()["spec"]) == (202, job["spec"])


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/estimates"])
def test_bytes_that_do_not_work(client: TestClient, body: dict[str, Any], path: str) -> None:
    def refused(**budget: Any) -> tuple[list[str], dict[str, Any]]:
        answer = client.post(path, json={**body, "budget": budget})
        assert answer.status_code == 422
        return [error["pointer"] for error in answer.json()["errors"]], answer.json()

    enough = client.post("/v1/estimates", json=body).json()["budgets"][0]["checkpoint_bytes"]
    pointers, problem = refused(bytes=[enough, 1000])
    assert (pointers, problem["code"]) == (["/budget/bytes/1"], "impossible_budget")
    least = problem["data"]["minimum_bytes"]
    assert str(least) in problem["detail"]
    assert client.post(path, json={**body, "budget": {"bytes": [least]}}).status_code < 300
    assert refused(bytes=[least - 200])[1]["data"]["minimum_bytes"] == least
    pointers, problem = refused(bytes=[10**9])
    assert pointers == ["/budget/bytes/0"]
    assert "nothing compressed" in problem["detail"]
    whole = problem["data"]["dense_bytes"]
    assert whole > Path(body["model"]["source"], "model.safetensors").stat().st_size
    assert refused(bytes=[whole])[1]["data"]["dense_bytes"] == whole
    pointers, problem = refused(bytes=[enough, enough + 1])
    assert (pointers, "both come to kept 0.5" in problem["detail"]) == (["/budget/bytes/1"], True)
    assert refused(bytes=[enough], kept=[0.25])[0] == ["/budget/kept"]
    assert refused(bytes=[enough, enough])[0] == ["/budget/bytes"]
    assert refused()[0] == ["/budget"]
    assert refused(bytes=[0])[0] == ["/budget/bytes/0"]


def test_bytes_of_a_model_that_cannot_be_seen(client: TestClient, body: dict[str, Any]) -> None:
    unseen = {**body, "model": {"source": "someone/some-model"}}
    assert client.post("/v1/jobs", json=unseen).status_code == 202
    answer = client.post("/v1/jobs", json={**unseen, "budget": {"bytes": [1000]}})
    assert answer.status_code == 422
    assert [error["pointer"] for error in answer.json()["errors"]] == ["/budget/bytes"]
    assert "name kept instead" in answer.json()["detail"]
