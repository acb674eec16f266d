from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ranksearch.search.space import RankSpace
from ranksearch.search.spec import JobSpec
from ranksearch.search.targets import Form, Target
from ranksearch.worker.report import build_budget, build_report, model_card, write_documents

TARGETS = (
    Target(name="model.layers.0.up", out_features=8, in_features=6, kind="up", depth=0),
    Target(name="model.layers.0.down", out_features=6, in_features=8, kind="down", depth=0),
)
CARD = """---
license: other
license_name: some-licence
license_link: https://example.org/licence
tags:
- text
---
license: not this one
"""
SEQUENTIAL = {"step": "sequential", "strength": 0.75, "tried": {"0": 13.0, "0.5": 12.7, "0.75": 12.5, "1": 12.6}}
DISTILL = {
    "step": "distill",
    "tokens": 1_000_000,
    "history": [
        {"tokens": 0, "kl": 0.3, "perplexity": 13.0},
        {"tokens": 750_000, "kl": 0.2, "perplexity": 12.0},
        {"tokens": 1_000_000, "kl": 0.25, "perplexity": 12.5},
    ],
}
SOCO = {"step": "soco", "tokens": 1_000_000, "history": []}


def scores(perplexity: float, kl: float) -> dict[str, Any]:
    return {
        "evaluation": {"perplexity": perplexity, "kl": kl},
        "test": {"test.txt": {"perplexity": perplexity + 1, "kl": kl}},
    }


def budget(kept: float = 0.7, form: Form = "factored", refine: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    return build_budget(
        kept=kept,
        space=RankSpace(targets=TARGETS, form=form),
        ranks={"model.layers.0.up": 2, "model.layers.0.down": 6},
        spectra={target.name: np.array([3.0, 2.0, 1.0, 0.5, 0.0, 0.0]) for target in TARGETS},
        facts={"model.layers.0.up": {"damping": np.float64(0.5), "tokens": np.int64(100)}},
        scores={
            "final": scores(12.5, 0.25),
            "dense": scores(10, 0.0),
            "uniform": scores(float("inf"), float("nan")),
            "prior": scores(13, 0.3),
            "best": scores(12.5, 0.25),
        },
        parameters={"targets": 76, "targets_dense": 96, "model": 176, "model_dense": 196},
        bytes={"disk": 400, "disk_dense": 440, "loaded": 352, "loaded_dense": 392},
        speed={
            "device": "A | B",
            "before": {"prefill_tokens_per_second": 1000.0, "decode_tokens_per_second": 50.0, "prompt_tokens": 512},
            "after": {"prefill_tokens_per_second": 900.0, "decode_tokens_per_second": 45.0, "prompt_tokens": 512},
        },
        seconds={"search": 1.5},
        history=[{"number": 0, "score": 13.0, "kept": kept, "origin": "prior", "seconds": 0.1, "state": "COMPLETE"}],
        refine=refine,
    )


def report_of(*refine: dict[str, Any], **method: Any) -> dict[str, Any]:
    spec = JobSpec.model_validate({"model": {"source": "someone/model"}, "budget": {"kept": [0.7]}, "method": method})
    marks = {"model": "abc", "dataset": "def", "sequences": "ghi"}
    return build_report(job="job_1", spec=spec.model_dump(), fingerprints=marks, budgets=[budget(0.7, refine=refine)])


@pytest.fixture
def report() -> dict[str, Any]:
    return report_of()


def test_a_budget_says_what_became_of_each_target() -> None:
    found = budget()
    assert found["kept_exact"] == (2 * 14 + 48) / 96
    assert found["targets"]["model.layers.0.up"] == {
        "shape": [8, 6],
        "form": "factored",
        "rank": 2,
        "predicted_loss": 1.25,
        "damping": 0.5,
        "tokens": 100,
    }
    assert found["targets"]["model.layers.0.down"]["form"] == "dense"
    assert found["targets"]["model.layers.0.down"]["predicted_loss"] == 0
    assert list(found["scores"]) == ["dense", "uniform", "prior", "best", "final"]


def test_the_spectrum_predicts_nothing_after_a_step_on_the_factors() -> None:
    found = budget(refine=[SEQUENTIAL])
    assert {target["predicted_loss"] for target in found["targets"].values()} == {None}
    assert found["refine"] == [SEQUENTIAL]


def test_the_bytes_asked_for_stand_beside_those_there_are(report: dict[str, Any]) -> None:
    assert "| weights on disk, bytes | 440 | 400 |" in model_card(report)
    report["budgets"][0]["bytes"]["asked"] = 405
    assert "| weights on disk, bytes | 440 | 400 of at most 405 |" in model_card(report)


def test_a_pivoted_target_says_so() -> None:
    found = budget(form="pivoted")
    assert found["targets"]["model.layers.0.up"]["form"] == "pivoted"
    assert found["targets"]["model.layers.0.down"]["form"] == "dense"
    assert found["kept_exact"] == (2 * (14 - 2) + 48) / 96


def test_the_document_is_json_whatever_the_scores(report: dict[str, Any]) -> None:
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["budgets"][0]["scores"]["uniform"]["evaluation"] == {"perplexity": None, "kl": None}
    assert report["version"] == 1
    assert report["fingerprints"]["model"] == "abc"
    assert report["fingerprints"]["libraries"]["numpy"] == np.__version__


def test_a_checkpoint_carries_its_report_and_a_card(report: dict[str, Any], tmp_path: Path) -> None:
    write_documents(tmp_path, report, source_card=CARD)
    assert json.loads((tmp_path / "ranksearch.json").read_text()) == report
    card = (tmp_path / "README.md").read_text()
    front = card.split("---")[1]
    assert "base_model: someone/model" in front
    assert "license: other\nlicense_name: some-licence\nlicense_link: https://example.org/licence\n" in front
    assert "not this one" not in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "ranksearch.json"]


def test_the_card_shows_the_reports_figures(report: dict[str, Any]) -> None:
    card = model_card(report)
    assert "| dense | 1 | 10.000 | 0.0000 | 11.000 | 0.0000 |" in card
    assert "| uniform | 0.7 | - | - | - | - |" in card
    assert "| final | 0.7 | 12.500 | 0.2500 | 13.500 | 0.2500 |" in card
    assert "| parameters of the compressed matrices | 96 | 76 |" in card
    assert "| writing, tokens/s | 50 | 45 |" in card  # a worse speed is printed like a better one
    assert "A / B" in card
    assert "import ranksearch.worker.loading" in card
    assert "license" not in card.split("---")[1]


def test_the_card_shows_how_sure_the_excess_of_the_checkpoint_is(report: dict[str, Any]) -> None:
    assert "xcess" not in model_card(report)  # a report older than that
    for row, scores_of in report["budgets"][0]["scores"].items():
        for text, excess in ((scores_of["evaluation"], 0.223), (scores_of["test"]["test.txt"], 0.205)):
            text |= {"excess": excess, "excess_interval": None if row == "best" else [excess - 0.01, excess + 0.01]}
    card = model_card(report)
    assert "| evaluation: perplexity | KL | excess | test.txt: perplexity | KL | excess |" in card
    final = "12.500 | 0.2500 | 0.2230 [0.2130, 0.2330] | 13.500 | 0.2500 | 0.2050 [0.1950, 0.2150] |"
    assert f"| final | 0.7 | {final}" in card
    assert "| prior | 0.7 | 13.000 | 0.3000 | 0.2230 | 14.000 | 0.3000 | 0.2050 |" in card
    assert "95% interval" in card


def test_the_card_of_a_searched_checkpoint_speaks_of_the_search_alone(report: dict[str, Any]) -> None:
    card = model_card(report)
    assert "How much each matrix keeps was found by a Bayesian search.\n" in card
    assert not {"trained", "soco", "sequential", "left out"} & set(card.replace("`", " ").split())


def test_the_card_says_what_the_factors_were_trained_on() -> None:
    card = model_card(report_of(SEQUENTIAL, DISTILL, refine=["sequential", "distill"]))
    searched, solved, trained = (card.index(words) for words in ("Bayesian search", "strength 0.75", "750,000 tokens"))
    assert searched < solved < trained


def test_the_card_of_scores_alone_names_no_search() -> None:
    card = model_card(report_of(SOCO, preset="soco"))
    assert "scores trained on 1,000,000 tokens (`soco`)." in card
    assert "Bayesian" not in card


def test_the_card_of_scores_after_a_search_names_both() -> None:
    card = model_card(report_of({**SOCO, "before": 13.0, "after": 12.5}, refine=["soco"]))
    assert "scores trained on 1,000,000 tokens (`soco`), in place of what a Bayesian search had found." in card


@pytest.mark.parametrize(
    "step",
    [
        {**SEQUENTIAL, "strength": 0.0},
        {**SOCO, "before": 12.5, "after": 13.0},
        {**SOCO, "before": 12.5, "after": float("inf")},
        {"step": "distill", "left_out": "A factor to train holds NaN or infinite values."},
        {**DISTILL, "history": [{"tokens": n, "kl": 0.2 + n, "perplexity": 12.0} for n in (0, 1000)]},
    ],
)
def test_the_card_claims_no_step_that_was_left_out(step: dict[str, Any]) -> None:
    card = model_card(report_of(step, refine=[step["step"]]))
    assert "was found by a Bayesian search." in card
    why = step.get("left_out", "It did not pay on the evaluation text.")
    assert f"The step `{step['step']}` was tried and left out: {why}" in card
    assert "tokens (" not in card
    assert "solved again" not in card


def test_a_local_model_is_named_without_its_path(report: dict[str, Any]) -> None:
    report["spec"]["model"]["source"] = "/home/someone/models/mine"
    card = model_card(report)
    assert "# mine, 0.7" in card
    assert "/home" not in card
    assert "base_model" not in card


def test_the_card_names_the_class_that_loads_the_checkpoint(report: dict[str, Any]) -> None:
    assert "AutoModelForCausalLM.from_pretrained" in model_card(report)
    card = model_card(report, auto_class="AutoModelForImageTextToText")
    assert "import AutoModelForImageTextToText, AutoTokenizer" in card
    assert "AutoModelForCausalLM" not in card
