from __future__ import annotations

from typing import get_args

import pytest
from pydantic import ValidationError

from ranksearch.search.presets import PRESETS, UNREFINED
from ranksearch.search.spec import JobSpec, Method, Search

BASE = {"model": {"source": "m"}, "budget": {"kept": [0.5]}}


def spec(**parts: object) -> JobSpec:
    return JobSpec.model_validate({**BASE, **parts})


def test_the_spec_knows_every_preset_and_the_metrics_and_samplers_they_bring() -> None:
    choices = {name: get_args(Method.model_fields[name].annotation) for name in ("preset", "metric")}
    assert set(choices["preset"]) == set(PRESETS)
    assert {p.metric for p in PRESETS.values()} - {None} <= set(choices["metric"])
    assert set(UNREFINED) <= set(choices["metric"])
    samplers = get_args(Search.model_fields["sampler"].annotation)
    assert {p.sampler for p in PRESETS.values()} - {None} <= set(samplers)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_brings_its_metric_and_sampler_and_its_dump_is_a_spec(name: str) -> None:
    preset, found = PRESETS[name], spec(method={"preset": name})
    assert found.method.metric == (preset.metric or "two_sided")
    assert found.search.sampler == (preset.sampler or "ranksearch")
    assert JobSpec.model_validate(found.model_dump(mode="json")) == found
    assert JobSpec.model_validate(found.model_dump(mode="json")).model_dump() == found.model_dump()


def test_another_metric_or_sampler_than_the_preset_s_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"preset svd-llm works in metric feature; leave method\.metric out"):
        spec(method={"preset": "svd-llm", "metric": "two_sided"})
    with pytest.raises(ValidationError, match=r"searches with sampler bolaco; leave search\.sampler out"):
        spec(method={"preset": "bolaco"}, search={"sampler": "tpe"})
    assert spec(method={"preset": "bolaco"}, search={"trials": 7}).search == Search(trials=7, sampler="bolaco")
    assert spec(method={"preset": "uniform", "metric": "weight"}, search={"sampler": "tpe"}).method.metric == "weight"


def test_what_a_budget_is_of() -> None:
    assert spec().budget.of == "parameters"
    with pytest.raises(ValidationError, match="soco counts parameters"):
        spec(budget={"kept": [0.5], "of": "latency"}, method={"preset": "soco"})
    with pytest.raises(ValidationError, match="bytes are of parameters"):
        spec(budget={"bytes": [1000], "of": "latency"})
    with pytest.raises(ValidationError, match="kept, a share of the parameters, or bytes"):
        spec(budget={"of": "latency"})


def test_a_preset_that_cannot_be_refined_says_so_itself() -> None:
    with pytest.raises(ValidationError, match=r"preset bolaco cannot be followed by sequential; leave method\.refine"):
        spec(method={"preset": "bolaco", "refine": ["sequential"]})


@pytest.mark.parametrize("metric", UNREFINED)
def test_factors_that_no_step_can_work_with_are_not_refined(metric: str) -> None:
    with pytest.raises(ValidationError, match=f"sequential cannot work in metric {metric}"):
        spec(method={"metric": metric, "refine": ["sequential"]})
    assert spec(method={"preset": "mgaa", "refine": ["sequential"]}).method.steps == ("sequential",)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"search": {"sampler": "tpe"}}, "sampler tpe does not learn"),
        ({"method": {"preset": "bolaco"}}, "sampler bolaco does not learn"),
        ({"method": {"preset": "uniform"}}, "preset uniform does not learn"),
        ({"method": {"preset": "asvd"}}, "preset asvd does not learn"),
    ],
)
def test_only_the_default_sampler_learns_from_earlier_jobs(parts: dict[str, dict[str, str]], said: str) -> None:
    with pytest.raises(ValidationError, match=rf"{said} from earlier jobs; leave search\.learn_from out"):
        spec(**{**parts, "search": {**parts.get("search", {}), "learn_from": ["job_a"]}})


def test_a_search_learns_from_up_to_eight_different_jobs() -> None:
    jobs = [f"job_{number}" for number in range(8)]
    assert spec(method={"preset": "soco"}, search={"learn_from": jobs}).search.learn_from == jobs
    with pytest.raises(ValidationError, match="at most 8"):
        spec(search={"learn_from": [*jobs, "job_8"]})
    with pytest.raises(ValidationError, match="each job may be named once"):
        spec(search={"learn_from": ["job_a", "job_a"]})
