"""Models looked at from outside, and what is said about jobs over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from ranksearch.search.errors import UnsupportedModel
from ranksearch.search.probes import planned_trials
from ranksearch.search.space import RankSpace
from ranksearch.service.context import Context
from ranksearch.service.models import Tensor, find_targets, read_folder
from ranksearch.service.store.settings import Settings

from .models import BLOCKS, HIDDEN, INNER, weights, write_model

pytestmark = pytest.mark.one_database


def tensors(*shapes: tuple[str, tuple[int, ...]], dtype: str = "F32") -> dict[str, Tensor]:
    return {name: Tensor(dtype=dtype, shape=shape, size=0) for name, shape in shapes}


def test_targets_are_the_matrices_of_the_blocks(settings: Settings, model: Path) -> None:
    found = find_targets(read_folder(model, settings))
    assert len(found) == 7 * BLOCKS
    assert [t.depth for t in found] == [0] * 7 + [1] * 7
    down = next(t for t in found if t.name == "model.layers.1.mlp.down_proj")
    assert (down.kind, down.out_features, down.in_features) == ("mlp.down_proj", HIDDEN, INNER)


def test_targets_are_those_the_worker_finds(settings: Settings, allowed: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from ranksearch.worker.targets import find_targets as find_in_model

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 11, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    for family in ("Llama", "Qwen3"):
        config = getattr(transformers, f"{family}Config")(**small, **heads, head_dim=4)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        model.save_pretrained(allowed / family)
        assert set(find_targets(read_folder(allowed / family, settings))) == set(find_in_model(model))


@pytest.mark.parametrize("family", ["gpt2", "gpt_oss", "llava"])
def test_files_that_name_or_turn_things_otherwise_tell_the_same_sizes(
    settings: Settings, allowed: Path, family: str
) -> None:
    transformers = pytest.importorskip("transformers")
    from ranksearch.worker.plain import make_plain
    from ranksearch.worker.targets import find_targets as find_in_model

    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 90}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "head_dim": 4}
    vision = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings_of = {
        "gpt2": {"vocab_size": 90, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "gpt_oss": text,
        "llava": {"text_config": text | {"model_type": "llama"}, "vision_config": vision, "image_token_index": 89},
    }
    config = transformers.AutoConfig.for_model(family, **settings_of[family], bos_token_id=0, eos_token_id=1)
    auto = transformers.AutoModelForImageTextToText if family == "llava" else transformers.AutoModelForCausalLM
    model = auto.from_config(config).eval()
    model.save_pretrained(allowed / family)
    make_plain(model)
    sizes = sorted((t.depth, t.parameters, t.marginal) for t in find_in_model(model))
    found = find_targets(read_folder(allowed / family, settings))
    routers = [t for t in found if t.kind == "mlp.router"]  # whose matrix is no layer in the model
    assert sorted((t.depth, t.parameters, t.marginal) for t in found if t not in routers) == sizes


def test_experts_and_towers_are_told_apart() -> None:
    found = find_targets(
        tensors(
            ("model.layers.0.mlp.experts.3.up_proj.weight", (64, 32)),
            ("model.layers.0.mlp.gate.weight", (4, 32)),
            ("vision.blocks.0.fc.weight", (32, 32)),
            ("model.layers.0.mlp.fused.down_proj", (2, 64, 32)),
            ("model.layers.0.mlp.fused.down_proj_bias", (2, 64)),
            ("model.layers.0.conv.weight", (64, 1, 4)),
            ("model.layers.0.score.weight", (1, 32)),
            ("model.layers.0.norm.weight", (32,)),
            ("model.embed_tokens.weight", (100, 32)),
            ("lm_head.weight", (100, 32)),
        )
    )
    assert [(t.name, t.kind) for t in found] == [
        ("model.layers.0.mlp.experts.3.up_proj", "mlp.experts.up_proj"),
        ("model.layers.0.mlp.fused.down_proj.0", "mlp.fused.down_proj"),
        ("model.layers.0.mlp.fused.down_proj.1", "mlp.fused.down_proj"),
        ("model.layers.0.mlp.gate", "mlp.gate"),
    ]


def test_quantized_tensors_are_no_targets() -> None:
    with pytest.raises(UnsupportedModel):
        find_targets(tensors(("model.layers.0.q.weight", (32, 32)), dtype="I8"))


def test_an_estimate_adds_up(client: TestClient, body: dict[str, Any]) -> None:
    answer = client.post("/v1/estimates", json={**body, "budget": {"kept": [0.5, 0.25]}}).json()
    held = weights()
    total = sum(tensor.size for tensor in held.values())
    targets = sum(tensor.size for name, tensor in held.items() if "_proj" in name)
    assert answer["parameters"] == {"model": total, "targets": targets}
    assert answer["model_bytes"] == 4 * total
    half, quarter = answer["budgets"]
    assert half["target_parameters"] == targets // 2
    assert half["model_parameters"] == total - targets + targets // 2
    # two factors in place of each matrix, and a header with a line of about 150 bytes for each tensor
    assert 0 < half["checkpoint_bytes"] - 4 * half["model_parameters"] < 200 * (len(held) + 7 * BLOCKS)
    assert half["checkpoint_bytes"] - quarter["checkpoint_bytes"] == 4 * (targets // 2 - targets // 4)
    ranks = {kind["kind"]: (kind["count"], kind["break_even_rank"]) for kind in answer["break_even"]}
    square, wide = (HIDDEN * HIDDEN - 1) // (2 * HIDDEN), (HIDDEN * INNER - 1) // (HIDDEN + INNER)
    assert ranks["self_attn.q_proj"] == (BLOCKS, square)
    assert ranks["mlp.down_proj"] == (BLOCKS, wide)
    smallest = sum((t.shape[0] + t.shape[1]) for name, t in held.items() if "_proj" in name) / targets
    assert smallest <= answer["minimum_kept"] < smallest * 1.01
    assert answer["disk"]["total_bytes"] == sum(v for k, v in answer["disk"].items() if k != "total_bytes")
    assert answer["memory"]["trial_bytes"] > answer["memory"]["model_bytes"] == 4 * total
    assert answer["minutes"] is None
    assert client.get("/v1/jobs").json()["data"] == []


def test_in_form_pivoted_every_rank_is_worth_storing_and_indices_are_bytes(
    client: TestClient, body: dict[str, Any]
) -> None:
    answers = {
        form: client.post("/v1/estimates", json={**body, "method": {"form": form}}).json()
        for form in ("factored", "pivoted")
    }
    assert {
        (k["break_even_rank"], min(k["in_features"], k["out_features"])) for k in answers["pivoted"]["break_even"]
    } == {(HIDDEN - 1, HIDDEN)}
    (factored,), (pivoted,) = (answers[form]["budgets"] for form in ("factored", "pivoted"))
    rows = sum(kind["count"] * kind["out_features"] for kind in answers["pivoted"]["break_even"])
    assert pivoted["target_parameters"] == factored["target_parameters"]
    assert 0 < pivoted["checkpoint_bytes"] - factored["checkpoint_bytes"] - 4 * rows < 200 * 7 * BLOCKS
    assert answers["pivoted"]["minimum_kept"] <= answers["factored"]["minimum_kept"]


def test_a_budget_of_latency_says_nothing_of_sizes(client: TestClient, context: Context, body: dict[str, Any]) -> None:
    context.workers.register("w", host="h", device="cpu", pid=1, flops=1e9)
    for preset in ("ranksearch", "dp-knapsack"):
        spec = {**body, "budget": {"kept": [0.5, 0.001], "of": "latency"}, "method": {"preset": preset}}
        answer = client.post("/v1/estimates", json=spec).json()
        unknown = {"target_parameters": None, "model_parameters": None, "checkpoint_bytes": None}
        assert answer["budgets"] == [{"kept": 0.5, **unknown}, {"kept": 0.001, **unknown}]
        assert answer["minimum_kept"] is None
        known = client.post("/v1/estimates", json={**spec, "budget": {"kept": [0.5, 0.4]}}).json()
        assert all(answer["disk"][part] >= size for part, size in known["disk"].items())
        assert all(answer["minutes"][stage] >= time for stage, time in known["minutes"].items())
        assert client.post("/v1/jobs", json=spec).json()["spec"]["budget"]["of"] == "latency"


def test_minutes_follow_the_fastest_living_worker(client: TestClient, context: Context, body: dict[str, Any]) -> None:
    for name, flops in (("slow", 1e9), ("fast", 1e10), ("new", None)):
        context.workers.register(name, host="h", device="cpu", pid=1, flops=flops)
    spec = {**body, "search": {"trials": 100}}
    fast = client.post("/v1/estimates", json=spec).json()["minutes"]
    assert set(fast) == {"calibrate", "factor", "search", "finish", "total"}
    context.workers.remove("fast")
    slow = client.post("/v1/estimates", json=spec).json()["minutes"]
    assert slow["search"] == pytest.approx(10 * fast["search"], rel=0.01)
    # a search in another way measures no gradients, so its cost is that of its trials
    once, twice = (
        client.post("/v1/estimates", json={**spec, "search": {"trials": trials, "sampler": "random"}}).json()
        for trials in (100, 200)
    )
    assert twice["minutes"]["search"] == pytest.approx(2 * once["minutes"]["search"], rel=0.01)
    assert once["minutes"]["search"] < slow["search"] < 1.1 * once["minutes"]["search"]
    weight = client.post("/v1/estimates", json={**spec, "method": {"metric": "weight"}}).json()
    assert weight["minutes"]["calibrate"] == 0
    assert weight["disk"]["calibration_bytes"] == 0


def test_probes_of_asvd_cost_a_dense_pass_and_are_run_once_for_all_budgets(
    client: TestClient, context: Context, settings: Settings, model: Path, body: dict[str, Any]
) -> None:
    context.workers.register("w", host="h", device="cpu", pid=1, flops=1e6)

    def minutes(preset: str, *kept: float) -> float:
        spec = {**body, "method": {"preset": preset}, "budget": {"kept": kept}}
        return float(client.post("/v1/estimates", json=spec).json()["minutes"]["search"])

    dense = minutes("uniform", 1.0) / 2  # the dense model, and the trial that is just as dense
    space = RankSpace(targets=tuple(find_targets(read_folder(model, settings))))
    probes = planned_trials("asvd", 1, space, 0.5) - 1
    assert probes > 14
    assert minutes("asvd", 0.5) == pytest.approx(minutes("uniform", 0.5) + probes * dense, rel=1e-3)
    assert minutes("asvd", 0.5, 0.6) == pytest.approx(minutes("uniform", 0.5, 0.6) + probes * dense, rel=1e-3)


def test_an_estimate_refuses_what_a_job_would(client: TestClient, body: dict[str, Any], allowed: Path) -> None:
    small = client.post("/v1/estimates", json={**body, "budget": {"kept": [0.001]}})
    assert (small.status_code, small.json()["code"]) == (422, "impossible_budget")
    write_model(allowed / "flat", {"w": np.zeros((2, 2), np.float32)})
    flat = client.post("/v1/estimates", json={**body, "model": {"source": str(allowed / "flat")}})
    assert (flat.status_code, flat.json()["code"]) == (422, "unsupported_model")


def test_an_estimate_knows_what_each_metric_collects(client: TestClient, body: dict[str, Any]) -> None:
    metrics = ("weight", "activation", "fisher", "feature", "centred", "two_sided", "attribution")
    answers = {m: client.post("/v1/estimates", json={**body, "method": {"metric": m}}).json() for m in metrics}
    collected = {metric: answer["disk"]["calibration_bytes"] for metric, answer in answers.items()}
    assert 0 == collected["weight"] < collected["activation"] < collected["fisher"]
    assert collected["fisher"] < collected["feature"] == collected["centred"] < collected["two_sided"]
    assert collected["attribution"] == 4 * answers["attribution"]["parameters"]["targets"]
    held = {metric: answer["memory"]["calibrate_bytes"] for metric, answer in answers.items()}
    # an average over pools, and the pool that is open
    assert held["centred"] - held["weight"] == 2 * (held["feature"] - held["weight"]) > 0
