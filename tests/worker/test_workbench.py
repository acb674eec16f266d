from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ranksearch.search.allocate import Allocator
from ranksearch.search.errors import InvalidInput
from ranksearch.search.prices import read_prices
from ranksearch.search.space import RankSpace, uniform
from ranksearch.search.spec import JobSpec
from ranksearch.search.targets import Target
from ranksearch.worker.bank import FactorBank
from ranksearch.worker.checkpoint import count
from ranksearch.worker.models import load_model
from ranksearch.worker.prefix import PrefixModel
from ranksearch.worker.stages import known_of
from ranksearch.worker.targets import find_targets
from ranksearch.worker.tiny import train_tokenizer
from ranksearch.worker.workbench import Workbench

WORDS = " ".join(f"word{index % 37} and {index * index % 101}," for index in range(800))


@pytest.fixture
def folder(tiny: Callable[..., nn.Module], tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny("llama", vocab_size=300).save_pretrained(folder)
    train_tokenizer(WORDS, 300).save_pretrained(folder)
    return folder


@pytest.fixture
def job(folder: Path, tmp_path: Path) -> dict[str, Any]:
    """The context of a job as a device process gets it first."""
    (tmp_path / "text.txt").write_text(WORDS)
    text = {"path": "text", "data_files": str(tmp_path / "text.txt"), "split": "train"}
    spec = {
        "model": {"source": str(folder)},
        "calibration": {"dataset": text, "sequences": 4, "sequence_length": 16},
        "evaluation": {"sequences": 4, "test": []},
        "budget": {"kept": [0.5]},
    }
    cache = str(tmp_path / "cache")
    return {"id": "job_a", "spec": spec, "source": str(folder), "trust_remote_code": False, "cache_dir": cache}


def change(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def prepared(job: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The context of the job's later stages, after a first process has prepared it."""
    blocks = tmp_path / "blocks.safetensors"
    facts = Workbench("cpu").prepare(job, str(blocks), progress=print)
    return {**job, **known_of(lambda _: blocks, {**facts, "blocks": "sha256"})}


def calibrate(job: dict[str, Any], path: Path) -> dict[str, torch.Tensor]:
    Workbench("cpu").calibrate(job, str(path), progress=print)
    return load_file(path)


def test_a_model_that_changes_under_a_job_is_refused(job: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    later = prepared(job, tmp_path)
    assert calibrate(later, tmp_path / "moments")
    change(folder)
    with pytest.raises(InvalidInput, match="has changed"):
        calibrate(later, tmp_path / "moments")


def test_a_job_stays_with_the_commit_it_began_with(
    job: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    hub = tmp_path / "hub" / "models--someone--some-model"
    first, second = hub / "snapshots" / ("a" * 40), hub / "snapshots" / ("b" * 40)
    for snapshot in (first, second):
        shutil.copytree(folder, snapshot)
    change(second)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(first.name)
    later = prepared({**job, "source": "someone/some-model"}, tmp_path)
    assert later["revision"] == first.name
    before = calibrate(later, tmp_path / "before")
    (hub / "refs" / "main").write_text(second.name)
    after = calibrate(later, tmp_path / "after")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["factored", "pivoted"])
def test_the_checkpoint_computes_what_the_search_scored(
    form: str, dtype: str, job: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    job["spec"] |= {"method": {"form": form}}
    job["spec"]["model"]["dtype"] = dtype
    bench, files = Workbench("cpu"), {name: str(tmp_path / name) for name in ("blocks", "calibration", "bank")}
    targets = tuple(Target(**t) for t in bench.prepare(job, files["blocks"], progress=print)["targets"])
    job |= files
    bench.calibrate(job, files["calibration"], progress=print)
    bench.factor(job, files["bank"], progress=print)
    bank, space = FactorBank.load(files["bank"]), RankSpace.of(JobSpec.model_validate(job["spec"]).method, targets)
    best = space.as_dict(Allocator(space, bank.spectra).prior(0.5))
    if form == "pivoted":
        assert any(t.break_even < best[t.name] < t.full_rank for t in targets)
    scored = bench.chunk(job, 0, best, 0, progress=print)
    vectors = {"uniform": space.as_dict(uniform(space, 0.5)), "prior": best, "best": best}
    proof = bench.finish(job, vectors, str(tmp_path / "out"), progress=print)

    loaded, _ = load_model(tmp_path / "out")
    dense, _ = load_model(folder, dtype=dtype)
    ids = torch.arange(48).view(3, 16)
    with torch.inference_mode(), PrefixModel(dense, bank, targets) as prefix:
        prefix.set_ranks(best)
        searched, found = dense(ids).logits.double(), loaded(ids).logits.double()
    assert (found - searched).norm() < 8 * torch.finfo(getattr(torch, dtype)).eps * searched.norm()
    assert count(tmp_path / "out", targets).targets == space.cost(space.from_dict(best)) <= space.budget(0.5)
    assert proof["parameters"]["targets"] == space.cost(space.from_dict(best))
    perplexities = [proof["scores"][row]["evaluation"]["perplexity"] for row in ("best", "final")]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-5 if dtype == "float32" else 0.02)
    assert all(loss > 0 for loss in scored["losses"])


def test_factoring_after_trials_gives_the_same_bank(job: dict[str, Any], tmp_path: Path) -> None:
    later, bench = prepared(job, tmp_path), Workbench("cpu")
    for operation, kind in ((bench.calibrate, "calibration"), (bench.factor, "bank")):
        operation(later, str(tmp_path / kind), progress=print)
        later[kind] = str(tmp_path / kind)
    bank = FactorBank.load(tmp_path / "bank")
    bench.chunk(later, 0, {name: len(values) for name, values in bank.spectra.items()}, 0, progress=print)
    bench.factor(later, str(tmp_path / "again"), progress=print)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "bank").read_bytes()


@pytest.mark.parametrize("form", ["factored", "pivoted"])
def test_what_was_measured_prices_a_space_whose_budgets_are_met(
    form: str, job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKSEARCH_SPEED_SECONDS", "0.01")
    job["spec"] |= {"method": {"form": form, "rank_multiple": 2}, "budget": {"kept": [0.5], "of": "latency"}}
    later, bench, file = prepared(job, tmp_path), Workbench("cpu"), tmp_path / "prices"
    bench.prices(later, str(file), progress=print)
    targets = find_targets(load_model(Path(job["source"]))[0])
    method = JobSpec.model_validate(job["spec"]).method
    space, again = (RankSpace.of(method, targets, read_prices(str(file))) for _ in range(2))
    assert space == again
    assert space.prices is not None
    for target, curve in zip(targets, space.prices, strict=True):
        assert curve.ranks[0] == 2
        assert curve.ranks[-1] == target.largest_rank(method.form) // 2 * 2
        assert 0 < curve.times[0] <= curve.times[-1]
        assert list(curve.times) == sorted(curve.times)
    same = {(t.out_features, t.in_features): c for t, c in zip(targets, space.prices, strict=True)}
    assert [same[t.out_features, t.in_features] for t in targets] == list(space.prices)
    for kept in (space.minimum_kept, 1.0):
        assert space.is_exact(uniform(space, kept), kept)


def test_more_trials_than_a_budget_may_have_are_refused_in_prepare(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ranksearch.search.plan.MOST_TRIALS", 20)
    job["spec"] |= {"method": {"preset": "asvd"}}
    with pytest.raises(InvalidInput, match="asvd would take"):
        prepared(job, tmp_path)


@pytest.mark.parametrize("metric", ["centred", "activation", "fisher", "attribution"])
def test_a_checkpoint_of_a_published_metric_scores_like_its_trial(
    job: dict[str, Any], tmp_path: Path, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKSEARCH_SPEED_SECONDS", "0.01")
    spec = {**job["spec"], "method": {"metric": metric}}
    later, bench = prepared({**job, "spec": spec}, tmp_path), Workbench("cpu")
    for operation, kind in ((bench.calibrate, "calibration"), (bench.factor, "bank")):
        operation(later, str(tmp_path / kind), progress=print)
        later[kind] = str(tmp_path / kind)
    bank = FactorBank.load(tmp_path / "bank")
    assert all(0 < fact["similarity"] <= 1 for fact in bank.facts.values())
    targets = bench.prepare(later, str(tmp_path / "again"), progress=print)["targets"]
    space = RankSpace.of(JobSpec.model_validate(spec).method, (Target(**target) for target in targets))
    vectors = {"best": space.as_dict(uniform(space, 0.5))}
    proof = bench.finish(later, vectors, str(tmp_path / "checkpoint"), progress=print)
    best, final = (proof["scores"][row]["evaluation"] for row in ("best", "final"))
    assert final["perplexity"] == pytest.approx(best["perplexity"], rel=1e-4)
    assert final["kl"] == pytest.approx(best["kl"], rel=1e-4)
