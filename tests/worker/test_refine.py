"""The steps between a search and its checkpoint, as a device process runs them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ranksearch.search.allocate import Allocator
from ranksearch.search.errors import NumericalError
from ranksearch.search.space import RankSpace
from ranksearch.search.spec import JobSpec, scoring_tokens
from ranksearch.search.targets import Target
from ranksearch.worker import refine, soco
from ranksearch.worker.bank import FactorBank
from ranksearch.worker.blocks import load_blocks
from ranksearch.worker.models import load_model
from ranksearch.worker.refine import Refined
from ranksearch.worker.stages import known_of
from ranksearch.worker.tiny import train_tokenizer
from ranksearch.worker.workbench import Workbench

WORDS = " ".join(f"word{index % 37} and {index * index % 101}," for index in range(3000))
KEPT = 0.5


class Job:
    """A job up to its search, on the CPU."""

    def __init__(self, tmp_path: Path, tiny: Callable[..., nn.Module], family: str, method: dict[str, Any]) -> None:
        source = tmp_path / "model"
        tiny(family, vocab_size=300).save_pretrained(source)
        train_tokenizer(WORDS, 300).save_pretrained(source)
        (tmp_path / "text.txt").write_text(WORDS)
        text = {"path": "text", "data_files": str(tmp_path / "text.txt"), "split": "train"}
        self.spec = {
            "model": {"source": str(source)},
            "calibration": {"dataset": text, "sequences": 16, "sequence_length": 16},
            "evaluation": {"sequences": 8, "test": []},
            "budget": {"kept": [KEPT]},
            "method": method,
            "search": {"objective": "kl"},  # random weights predict nothing, so perplexity says nothing
        }
        self.context: dict[str, Any] = {"id": "job_a", "spec": self.spec, "source": str(source)}
        self.context |= {"trust_remote_code": False, "cache_dir": str(tmp_path / "cache")}
        self.bench, self.folder = Workbench("cpu"), tmp_path
        files = {name: tmp_path / name for name in ("blocks", "calibration", "bank")}
        facts = self.bench.prepare(self.context, str(files["blocks"]), progress=print)
        self.context |= known_of(lambda name: files[name], {**facts, "blocks": "blocks"})
        self.context |= {name: str(path) for name, path in files.items()}
        if JobSpec.model_validate(self.spec).method.metric != "weight":
            self.bench.calibrate(self.context, str(files["calibration"]), progress=print)
        else:
            del self.context["calibration"]
        self.bench.factor(self.context, str(files["bank"]), progress=print)
        self.targets = tuple(Target(**target) for target in facts["targets"])

    @property
    def space(self) -> RankSpace:
        return RankSpace.of(JobSpec.model_validate(self.spec).method, self.targets)

    def prior(self) -> dict[str, int]:
        bank = FactorBank.load(self.context["bank"])
        return self.space.as_dict(Allocator(self.space, bank.spectra).prior(KEPT))

    def refined(self) -> tuple[Refined, dict[str, Any]]:
        output = str(self.folder / "refined")
        said = self.bench.refine(self.context, self.prior(), KEPT, output, progress=print)
        return Refined.load(output), said

    def finished(self, refined: bool) -> dict[str, Any]:
        return self.bench.finish(
            self.context,
            {"best": self.prior()},
            str(self.folder / "checkpoint"),
            str(self.folder / "refined") if refined else None,
            progress=print,
        )


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine, "TRAINING_TOKENS", 4000)
    monkeypatch.setattr(refine, "scoring_tokens", lambda length: 4000)
    monkeypatch.setattr("ranksearch.worker.workbench.TRAINING_TOKENS", 4000)


def test_an_estimate_knows_the_steps_that_soco_takes() -> None:
    assert scoring_tokens(10_000) == soco.STEPS * 10_000


@pytest.fixture
def job(tmp_path: Path, tiny: Callable[..., nn.Module]) -> Callable[..., Job]:
    return lambda family="llama", **method: Job(tmp_path, tiny, family, method)


@pytest.mark.parametrize("form", ["factored", "pivoted"])
def test_each_step_makes_the_checkpoint_better_or_leaves_it(job: Callable[..., Job], form: str) -> None:
    work = job(form=form, refine=["sequential", "distill"])
    refined, said = work.refined()
    scores = work.finished(refined=True)["scores"]
    assert scores["final"]["evaluation"]["kl"] < scores["best"]["evaluation"]["kl"]
    assert [step["step"] for step in said["steps"]] == ["sequential", "distill"]
    tried = said["steps"][0]["tried"]
    assert said["steps"][0]["strength"] == min((loss, float(strength)) for strength, loss in tried.items())[1]
    assert refined.ranks == work.prior() == said["ranks"]


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])  # transposed weights; experts in one tensor
@pytest.mark.parametrize("method", [{"form": "pivoted", "refine": ["sequential", "distill"]}, {"preset": "soco"}])
def test_every_structure_goes_through_every_step(job: Callable[..., Job], family: str, method: dict[str, Any]) -> None:
    work = job(family, **method)
    work.refined()
    finished = work.finished(refined=True)
    assert finished["parameters"]["targets"] <= KEPT * finished["parameters"]["targets_dense"]
    if "refine" in method:
        assert finished["scores"]["final"]["evaluation"]["kl"] < finished["scores"]["best"]["evaluation"]["kl"]


def test_what_is_exported_is_what_the_last_step_made(job: Callable[..., Job]) -> None:
    work = job(refine=["sequential"])
    refined, _ = work.refined()
    work.finished(refined=True)
    model, _ = load_model(work.folder / "checkpoint")
    assert refined.pairs
    for name, (left, right) in refined.pairs.items():
        module: Any = model.get_submodule(name)
        assert torch.equal(module.left.weight, left)
        assert torch.equal(module.right.weight, right)


def test_a_training_has_the_room_of_the_bank(job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    work = job(refine=["sequential", "distill"])
    load, distill, banks, left = FactorBank.load, refine.distill, list[Any](), list[Any]()

    def loaded(*args: Any) -> FactorBank:
        banks.append(weakref.ref(bank := load(*args)))
        return bank

    def distilled(*args: Any, **settings: Any) -> Any:
        gc.collect()
        left.extend(bank() for bank in banks)
        return distill(*args, **settings)

    prior = work.prior()
    monkeypatch.setattr(FactorBank, "load", loaded)
    monkeypatch.setattr(refine, "distill", distilled)
    work.bench.refine(work.context, prior, KEPT, str(work.folder / "refined"), progress=print)
    assert left == [None]


def test_learned_scores_choose_the_ranks_within_the_budget(job: Callable[..., Job]) -> None:
    work = job(preset="soco")
    refined, _ = work.refined()
    ranks = work.space.from_dict(dict(refined.ranks))
    assert work.space.is_exact(ranks, KEPT)
    finished = work.finished(refined=True)
    assert finished["parameters"]["targets"] <= KEPT * finished["parameters"]["targets_dense"]


@pytest.mark.parametrize("after", [0.5, 2.0])
def test_scores_after_a_search_are_kept_only_if_they_are_better(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, after: float
) -> None:
    monkeypatch.setattr(refine.Refinement, "_losses", lambda self, *candidates: [1.0, after])
    work = job(refine=["soco"])
    refined, said = work.refined()
    (step,) = said["steps"]
    bank = FactorBank.load(work.context["bank"])
    untouched = all(torch.equal(right, bank.pair(name, len(right))[1]) for name, (_, right) in refined.pairs.items())
    assert (step["before"], step["after"]) == (1.0, after)
    assert untouched == (after > 1)
    assert refined.ranks == work.prior() or after < 1


def test_a_step_that_fails_is_left_out_and_said_so(job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise NumericalError("The loss was not finite.")

    monkeypatch.setattr(refine, "distill", broken)
    monkeypatch.setattr(refine, "resolve", broken)
    work = job(refine=["sequential", "distill"])
    refined, said = work.refined()
    sequential, distilled = said["steps"]
    assert sequential["strength"] == 0
    assert set(sequential["tried"]) == {"0", "0.5", "0.75", "0.25"}
    assert distilled == {"step": "distill", "left_out": "The loss was not finite."}
    bank = FactorBank.load(work.context["bank"])
    for name, (left, right) in refined.pairs.items():
        assert torch.equal(right, bank.pair(name, len(right))[1])
        assert torch.equal(left, bank.pair(name, len(right))[0])


def test_what_a_step_came_to_is_not_done_again(job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    work = job(refine=["sequential", "distill"])
    first, _ = work.refined()
    monkeypatch.setattr(refine, "distill", None)
    monkeypatch.setattr(refine, "resolve", None)
    again, said = work.refined()
    assert [step["step"] for step in said["steps"]] == ["sequential", "distill"]
    for name, pair in first.pairs.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, again.pairs[name], strict=True))


@pytest.mark.parametrize("metric", ["weight", "feature"])
def test_a_sweep_needs_no_calibration_with_gradients(job: Callable[..., Job], metric: str) -> None:
    _, said = job(metric=metric, refine=["sequential"]).refined()
    assert set(said["steps"][0]["tried"]) >= {"0", "0.5", "0.75"}


def test_nothing_is_done_where_everything_is_dense(job: Callable[..., Job]) -> None:
    work = job(refine=["sequential", "distill"])
    dense = {target.name: target.full_rank for target in work.targets}
    said = work.bench.refine(work.context, dense, 1.0, str(work.folder / "refined"), progress=print)
    assert said == {"ranks": dense, "steps": []}


def test_training_text_shares_nothing_with_the_evaluation(job: Callable[..., Job]) -> None:
    work = job(refine=["distill"])
    blocks = load_blocks(work.context["blocks"])
    training = {tuple(block) for block in blocks["training"].tolist()}
    assert not training & {tuple(block) for block in blocks["evaluation"].tolist()}
    assert {tuple(block) for block in blocks["calibration"].tolist()} <= training


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"refine": ["distill", "distill"]}, "once"),
        ({"refine": ["sequential", "soco"]}, "first step"),
        ({"refine": ["soco"], "preset": "soco"}, "once"),
        ({"refine": ["soco"], "form": "pivoted"}, "form factored"),
        ({"refine": ["polish"]}, "sequential"),
    ],
)
def test_steps_that_make_no_sense_are_refused(method: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        JobSpec.model_validate({"model": {"source": "a/b"}, "budget": {"kept": [0.5]}, "method": method})
