"""Compare methods on one job spec: which job each of them is, and what their reports say as rows."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, get_args

from pydantic import ValidationError

from ranksearch.search.errors import InvalidInput
from ranksearch.search.presets import PRESETS
from ranksearch.search.spec import JobSpec, Step, budget_label
from ranksearch.search.targets import Form
from ranksearch.search.trials import may_be_best

FORMS: Final[tuple[str, ...]] = get_args(Form)
STEPS: Final[tuple[str, ...]] = get_args(Step)
#: What the jobs of one method may differ in, and what its name says already.
APART: Final = ("name", "budget.kept", "budget.bytes", "search.seed", "calibration.seed")
NAMED: Final = ("method.preset", "method.form", "method.refine")

Row = dict[str, Any]


def contenders(
    base: Mapping[str, Any], methods: Sequence[str], kept: Sequence[float] | None, seeds: Sequence[int] | None
) -> list[dict[str, Any]]:
    """The specs of every method with every seed, checked before anything is submitted.

    Args:
        base: The spec that all share; a preset's own metric and sampler take the place of its.
        methods: Their names, `NAME[/FORM][+STEP...]`.
        kept: Budgets in place of the spec's own.
        seeds: Of the search, in place of the spec's own.

    Raises:
        InvalidInput: There is no such method, two of them are the same, or one does not go with the spec.
    """
    found: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for name in methods:
        spec = _with_method(base, name)
        if kept is not None:
            named = spec.get("budget")
            measure = {"of": named["of"]} if isinstance(named, dict) and "of" in named else {}
            spec["budget"] = {**measure, "kept": list(kept)}
        for seed in seeds or [spec["search"].get("seed", 0)]:
            document = {**spec, "search": {**spec["search"], "seed": seed}}
            same = names.setdefault(_checked(name, document).model_dump_json(exclude={"name"}), name)
            if same != name:
                raise InvalidInput(f"--methods: {same} and {name} are the same job with this spec; name one of them")
            found.append(document)
    return found


def names_of(specs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What the method of each job is called: `PRESET[/FORM][+STEP...]`, and where two of that name differ, in what.

    Jobs of one name differ in seeds, budgets and their own names only.

    Args:
        specs: Job id -> its spec, complete.

    Raises:
        InvalidInput: They are of different models or test texts.
    """
    for what, of in (("models", _model), ("test texts", lambda spec: spec["evaluation"]["test"])):
        if any(of(spec) != of(other) for spec in specs.values() for other in specs.values()):
            raise InvalidInput(f"the jobs have different {what}, so their scores cannot be compared; leave some out")
    fields = {job: dict(_fields(spec)) for job, spec in specs.items()}
    names = {job: _name(spec["method"]) for job, spec in specs.items()}
    return {job: " ".join((names[job], *_differing(job, names, fields))) for job in specs}


def _model(spec: Mapping[str, Any]) -> tuple[Any, Any]:
    return spec["model"]["source"], spec["model"]["revision"]


def _name(method: Mapping[str, Any]) -> str:
    form = "" if method["form"] == FORMS[0] else f"/{method['form']}"
    return "+".join((f"{method['preset']}{form}", *method["refine"]))


def _fields(part: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Every field that makes a method, as `--set` takes it: its path and its value."""
    for name, value in part.items():
        path = f"{above}{name}"
        if isinstance(value, Mapping):
            yield from _fields(value, f"{path}.")
        elif path not in (*APART, *NAMED):
            yield path, value if isinstance(value, str) else json.dumps(value)


def _differing(job: str, names: Mapping[str, str], fields: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    others = [fields[other] for other, name in names.items() if name == names[job]]
    for path, value in fields[job].items():
        if any(other.get(path) != value for other in others):
            yield f"{path}={value}"


def _with_method(base: Mapping[str, Any], name: str) -> dict[str, Any]:
    head, *steps = name.split("+")
    preset, slash, form = head.partition("/")
    _known("method", preset, [*PRESETS])
    for step in steps:
        _known("step", step, STEPS)
    method, search = _part(base, "method"), _part(base, "search")
    refine = method.get("refine", [])
    if not isinstance(refine, list):
        raise InvalidInput("method.refine of the spec holds no list of steps; write [] for none")
    if PRESETS[preset].metric:
        method.pop("metric", None)
    if PRESETS[preset].sampler:
        search.pop("sampler", None)
    method |= {"preset": preset, "refine": [*refine, *steps]}
    if slash:
        _known("form", form, FORMS)
        method["form"] = form
    named = f"{base['name']}: {name}" if base.get("name") else name
    return {**copy.deepcopy(dict(base)), "name": named, "method": method, "search": search}


def _known(what: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        raise InvalidInput(f"--methods: there is no {what} {name!r}, only {', '.join(names)}")


def _part(base: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A copy of one part of the spec."""
    part = base.get(name, {})
    if not isinstance(part, dict):
        raise InvalidInput(f"{name} of the spec holds no JSON object")
    return copy.deepcopy(part)


def _checked(name: str, document: Mapping[str, Any]) -> JobSpec:
    try:
        return JobSpec.model_validate(document)
    except ValidationError as error:
        fault = error.errors()[0]
        where = "/".join(str(part) for part in fault["loc"])
        raise InvalidInput(f"{name}: /{where}: {fault['msg'].removeprefix('Value error, ')}") from error


def rows_of(method: str, job: Mapping[str, Any], report: Mapping[str, Any] | None) -> list[Row]:
    """One row for each budget of a job; of one that the report lacks the figures are None, and `error` says why.

    Scores are those of the exported checkpoint. Perplexity (`test_perplexity`), `kl` and `excess`, the perplexity's
    logarithm less that of the dense model, are on the first test text; `seconds` are the search's.
    """
    found = {budget_label(budget["kept"]): budget for budget in (report or {"budgets": ()})["budgets"]}
    seed, rows = job["spec"]["search"]["seed"], []
    for kept in job["spec"]["budget"]["kept"]:
        budget = found.get(budget_label(kept))
        figures = {"error": _why(job)} if budget is None else _figures(budget)
        rows.append(_row(method, kept, **figures, seed=seed, job=job["id"]))
    return rows


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
        "evaluations": sum(_evaluations(trial) for trial in budget["history"]),
        "seconds": budget["seconds"]["search"],
        "total_seconds": round(sum(budget["seconds"].values()), 3),
        "kept_exact": budget["kept_exact"],
        "excess": math.log(perplexity / base) if perplexity and base else None,
        "test_perplexities": tests,
    }


def best_so_far(budget: Mapping[str, Any]) -> list[float]:
    """The best score after each evaluation, not a number before the first; probes count and are never best."""
    best, scores = math.nan, list[float]()
    for trial in budget["history"]:
        if may_be_best(trial["state"], trial["origin"]):
            best = trial["score"] if math.isnan(best) else min(best, trial["score"])
        scores += [best] * _evaluations(trial)
    return scores


def _evaluations(trial: Mapping[str, Any]) -> int:
    """As how many a trial counts; reports of older versions do not say."""
    return int(trial.get("evaluations", 1)) if trial["state"] in ("COMPLETE", "PRUNED", "FAIL") else 0
