"""Compare methods on one job spec: which job each of them is, and what their reports say as rows."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, get_args

from pydantic import ValidationError

from ranksearch.search.errors import InvalidInput
from ranksearch.search.presets import PROBE
from ranksearch.search.spec import JobSpec, Method, Step
from ranksearch.search.targets import Form

PRESETS: Final[tuple[str, ...]] = get_args(Method.model_fields["preset"].annotation)
FORMS: Final[tuple[str, ...]] = get_args(Form)
STEPS: Final[tuple[str, ...]] = get_args(Step)
#: What a preset may bring with it, and then refuses in a spec.
BROUGHT: Final = (("method", "metric"), ("search", "sampler"))

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One method with one seed, and the spec of its job.

    Attributes:
        method: As it was asked for: `NAME[/FORM][+STEP...]`.
        seed: Of the search.
        spec: What is submitted.
    """

    method: str
    seed: int
    spec: dict[str, Any]


def contenders(
    base: Mapping[str, Any], methods: Sequence[str], kept: Sequence[float] | None, seeds: Sequence[int] | None
) -> list[Contender]:
    """Every method with every seed, checked before anything is submitted.

    Args:
        base: The spec that all share.
        methods: Their names, `NAME[/FORM][+STEP...]`.
        kept: Budgets in place of the spec's own.
        seeds: Of the search, in place of the spec's own.

    Raises:
        InvalidInput: There is no such method, one is named twice, or it does not go with the spec.
    """
    if not methods or len(set(methods)) < len(methods):
        raise InvalidInput("--methods: name at least one method, and each of them once")
    found = []
    for name in methods:
        changed = _with_method(base, name)
        if kept is not None:
            changed["budget"] = {"kept": list(kept)}
        search = _part(base, "search")
        for seed in seeds or [search.get("seed", 0)]:
            document = {**changed, "search": {**search, "seed": seed}}
            document["name"] = f"{base['name']}: {name}" if base.get("name") else name
            found.append(Contender(method=name, seed=seed, spec=_fitting(name, document)))
    return found


def name_of(spec: Mapping[str, Any]) -> str:
    """The method of a job that was submitted before, written as `contenders` reads it."""
    method = spec["method"]
    form = "" if method["form"] == FORMS[0] else f"/{method['form']}"
    return "+".join((f"{method['preset']}{form}", *method["refine"]))


def _with_method(base: Mapping[str, Any], name: str) -> dict[str, Any]:
    head, *steps = name.split("+")
    preset, slash, form = head.partition("/")
    _known("method", preset, PRESETS)
    for step in steps:
        _known("step", step, STEPS)
    own = _part(base, "method")
    method = {**own, "preset": preset, "refine": [*own.get("refine", ()), *steps]}
    if slash:
        _known("form", form, FORMS)
        method["form"] = form
    return {**copy.deepcopy(dict(base)), "method": method}


def _known(what: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        raise InvalidInput(f"--methods: there is no {what} {name!r}, only {', '.join(names)}")


def _part(base: Mapping[str, Any], name: str) -> dict[str, Any]:
    part = base.get(name, {})
    if not isinstance(part, dict):
        raise InvalidInput(f"{name} of the spec holds no JSON object")
    return part


def _fitting(name: str, document: dict[str, Any]) -> dict[str, Any]:
    """The spec without what its preset brings itself.

    Raises:
        InvalidInput: The method does not go with the spec, whatever is left out.
    """
    why: ValidationError | None = None
    for left_out in ((), BROUGHT[:1], BROUGHT[1:], BROUGHT):
        fitting = copy.deepcopy(document)
        for part, field in left_out:
            fitting.get(part, {}).pop(field, None)
        try:
            JobSpec.model_validate(fitting)
        except ValidationError as error:
            why = error
        else:
            return fitting
    assert why is not None
    fault = why.errors()[0]
    where = "/".join(str(part) for part in fault["loc"])
    raise InvalidInput(f"{name}: /{where}: {fault['msg'].removeprefix('Value error, ')}")


def rows_of(method: str, job: Mapping[str, Any], report: Mapping[str, Any] | None) -> list[Row]:
    """One row for each budget of a job; without a report its figures are None and `error` says why.

    Scores are those of the exported checkpoint. Perplexity (`test_perplexity`), `kl` and `excess`, the perplexity's
    logarithm less that of the dense model, are on the first test text; `seconds` are the search's.
    """
    seed = job["spec"]["search"]["seed"]
    if report is None:
        kept = job["spec"]["budget"]["kept"]
        return [_row(method, budget, seed=seed, job=job["id"], error=_why(job)) for budget in kept]
    return [_row(method, budget["kept"], **_figures(budget), seed=seed, job=job["id"]) for budget in report["budgets"]]


def _row(method: str, kept: float, **figures: Any) -> Row:
    """A row with the keys that every row has."""
    named = ("test_perplexity", "evaluation_perplexity", "kl", "evaluations", "seconds")
    return {"method": method, "kept": kept, **dict.fromkeys(named), **figures}


def _why(job: Mapping[str, Any]) -> str:
    error = job.get("error") or {}
    return str(error.get("message") or error.get("detail") or error.get("code") or f"the job is {job['status']}")


def _figures(budget: Mapping[str, Any]) -> dict[str, Any]:
    final, dense = budget["scores"]["final"], budget["scores"]["dense"]
    tests = {label: scores["perplexity"] for label, scores in (final.get("test") or {}).items()}
    first = next(iter(tests), None)
    perplexity = None if first is None else tests[first]
    base = None if first is None else dense["test"][first]["perplexity"]
    text = final["evaluation"] if first is None else final["test"][first]
    return {
        "test_perplexity": perplexity,
        "evaluation_perplexity": final["evaluation"]["perplexity"],
        "kl": text["kl"],
        "evaluations": sum(trial["state"] in ("COMPLETE", "PRUNED", "FAIL") for trial in budget["history"]),
        "seconds": budget["seconds"]["search"],
        "total_seconds": round(sum(budget["seconds"].values()), 3),
        "kept_exact": budget["kept_exact"],
        "excess": math.log(perplexity / base) if perplexity and base else None,
        "test_perplexities": tests,
    }


def best_so_far(budget: Mapping[str, Any]) -> list[float]:
    """The best score after each evaluation, not a number before the first; probes count and are never best."""
    best, scores = math.nan, []
    for trial in budget["history"]:
        if trial["state"] not in ("COMPLETE", "PRUNED", "FAIL"):
            continue
        if trial["state"] == "COMPLETE" and trial["origin"] != PROBE:
            best = trial["score"] if math.isnan(best) else min(best, trial["score"])
        scores.append(best)
    return scores
