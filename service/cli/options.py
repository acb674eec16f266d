"""The options that describe a job, shared by `submit` and `estimate`, and the spec they make."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import typer

from ranksearch.search.errors import InvalidInput
from ranksearch.search.presets import PRESETS

SPEC = "Job spec"
_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?) ?(?P<unit>[KMGT]i?)?B?", re.IGNORECASE | re.ASCII)

SpecFile = Annotated[str | None, typer.Argument(metavar="SPEC.json", help="Job spec as JSON; - reads standard input.")]
Model = Annotated[str | None, typer.Option("--model", help="Hub id or local folder.", rich_help_panel=SPEC)]
Kept = Annotated[
    str | None,
    typer.Option(
        "--kept", metavar="K,K,...", help="Budgets: kept share of the parameters, e.g. 0.8,0.6.", rich_help_panel=SPEC
    ),
]
Bytes = Annotated[
    str | None,
    typer.Option(
        "--bytes",
        metavar="B,B,...",
        help="Budgets in place of --kept: the most that the weight files may take, e.g. 5GB,900MiB.",
        rich_help_panel=SPEC,
    ),
]
Of = Annotated[
    str | None,
    typer.Option(
        "--of",
        help="What kept is a share of: parameters, or latency, the decode time measured on the worker's device.",
        rich_help_panel=SPEC,
    ),
]
Name = Annotated[str | None, typer.Option("--name", help="A name for people.", rich_help_panel=SPEC)]
Dtype = Annotated[str | None, typer.Option("--dtype", help="auto, float32, bfloat16, float16.", rich_help_panel=SPEC)]
DatasetName = Annotated[
    str | None,
    typer.Option("--dataset", help="Calibration dataset: hub id, or id:configuration.", rich_help_panel=SPEC),
]
TextFile = Annotated[
    str | None,
    typer.Option("--text", metavar="FILE", help="Calibration text from a local file instead.", rich_help_panel=SPEC),
]
TestFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--test", metavar="FILE", help="Local test text, read once at the end; may repeat.", rich_help_panel=SPEC
    ),
]
Sequences = Annotated[int | None, typer.Option("--sequences", help="Calibration sequences.", rich_help_panel=SPEC)]
Length = Annotated[int | None, typer.Option("--sequence-length", help="Tokens per sequence.", rich_help_panel=SPEC)]
Preset = Annotated[
    str | None, typer.Option("--preset", help=f"The method: {', '.join(PRESETS)}.", rich_help_panel=SPEC)
]
Metric = Annotated[
    str | None,
    typer.Option(
        "--metric", help="two_sided, feature, weight, centred, activation, fisher, attribution.", rich_help_panel=SPEC
    ),
]
Form = Annotated[str | None, typer.Option("--form", help="factored or pivoted.", rich_help_panel=SPEC)]
Refine = Annotated[
    str | None,
    typer.Option(
        "--refine", help="Steps after the search, comma separated: sequential, distill, soco.", rich_help_panel=SPEC
    ),
]
Multiple = Annotated[
    int | None, typer.Option("--rank-multiple", help="Ranks are multiples of this.", rich_help_panel=SPEC)
]
Dense = Annotated[
    list[str] | None,
    typer.Option(
        "--keep-dense", metavar="PATTERN", help="Pattern of targets left alone; may repeat.", rich_help_panel=SPEC
    ),
]
Trials = Annotated[int | None, typer.Option("--trials", help="Trials per budget.", rich_help_panel=SPEC)]
Sampler = Annotated[
    str | None,
    typer.Option(
        "--sampler",
        help="ranksearch, random, tpe, gp, cmaes, botorch, turbo, evolutionary, swaps, bolaco, bolaco-20.",
        rich_help_panel=SPEC,
    ),
]
Objective = Annotated[str | None, typer.Option("--objective", help="perplexity, kl or both.", rich_help_panel=SPEC)]
Seed = Annotated[
    int | None, typer.Option("--seed", help="Seed of the data draw and of the search.", rich_help_panel=SPEC)
]
LearnFrom = Annotated[
    list[str] | None,
    typer.Option(
        "--learn-from",
        metavar="JOB",
        help="Earlier job on the same model whose trials inform the search; may repeat.",
        rich_help_panel=SPEC,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="Any other field, e.g. search.pruner=none.", rich_help_panel=SPEC
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]


def read_spec(source: str | None) -> dict[str, Any]:
    """The JSON object in a file or on standard input; empty without a source.

    Raises:
        InvalidInput: It cannot be read, or is no JSON object.
    """
    if source is None:
        return {}
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"cannot read {source}: {getattr(error, 'strerror', None) or error}") from error
    try:
        spec = json.loads(text)
    except ValueError as error:
        raise InvalidInput(f"{source} is not JSON: {error}") from error
    if not isinstance(spec, dict):
        raise InvalidInput(f"{source} holds no JSON object, but {type(spec).__name__}")
    return spec


def build_spec(source: str | None, **flags: Any) -> dict[str, Any]:
    """A job spec from a file with flags on top; fields that nobody named are left to the server's defaults.

    Raises:
        InvalidInput: A flag cannot be understood, or neither file nor flags say what to compress.
    """
    spec = read_spec(source)
    if flags["kept"] and flags["bytes"]:
        raise InvalidInput("--kept and --bytes exclude each other")
    for named, other in (("kept", "bytes"), ("bytes", "kept")):
        if flags[named] and isinstance(spec.get("budget"), dict):
            spec["budget"].pop(other, None)
    for path, value in _values(flags).items():
        _put(spec, path, value)
    for assignment in flags["set"] or []:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise InvalidInput(f"--set {assignment}: write FIELD=VALUE, e.g. search.pruner=none")
        _put(spec, path, _literal(text))
    if source is None and not flags["model"]:
        raise InvalidInput("name a model: --model HUB_ID_OR_FOLDER, or give a SPEC.json")
    if source is None and not (flags["kept"] or flags["bytes"]):
        raise InvalidInput("name a budget: --kept 0.8 keeps 80% of the parameters, --bytes 5GB what fits into 5 GB")
    try:
        json.dumps(spec, allow_nan=False)
    except ValueError as error:
        raise InvalidInput("a number of the job spec is NaN or infinite; write finite ones") from error
    return spec


def _values(flags: Mapping[str, Any]) -> dict[str, Any]:
    seed, dataset = flags["seed"], _dataset(flags["dataset"], flags["text"])
    tests = [_text_dataset(path) for path in flags["test"] or []]
    values = {
        "name": flags["name"],
        "model.source": flags["model"] and local(flags["model"]),
        "model.dtype": flags["dtype"],
        "calibration.dataset": dataset,
        "calibration.sequences": flags["sequences"],
        "calibration.sequence_length": flags["length"],
        "calibration.seed": seed,
        "evaluation.test": tests or ([] if flags["text"] else None),
        "budget.kept": None if flags["kept"] is None else _numbers(flags["kept"]),
        "budget.bytes": None if flags["bytes"] is None else [_bytes(size) for size in _words(flags["bytes"])],
        "budget.of": flags["of"],
        "method.preset": flags["preset"],
        "method.metric": flags["metric"],
        "method.form": flags["form"],
        "method.refine": None if flags["refine"] is None else _words(flags["refine"]),
        "method.rank_multiple": flags["multiple"],
        "method.keep_dense": flags["dense"] or None,
        "search.trials": flags["trials"],
        "search.sampler": flags["sampler"],
        "search.objective": flags["objective"],
        "search.seed": seed,
        "search.learn_from": flags["learn_from"] or None,
    }
    return {path: value for path, value in values.items() if value is not None}


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def local(path: str) -> str:
    """An existing local path made absolute, since the server runs in a folder of its own; anything else as it is."""
    found = Path(path).expanduser()
    return str(found.absolute()) if found.exists() else path


def _dataset(name: str | None, text: str | None) -> dict[str, Any] | None:
    if name and text:
        raise InvalidInput("--dataset and --text exclude each other")
    if text:
        return _text_dataset(text)
    if name:
        path, _, configuration = name.partition(":")
        return {"path": path, **({"name": configuration} if configuration else {})}
    return None


def _text_dataset(path: str) -> dict[str, Any]:
    return {"path": "text", "data_files": local(path), "split": "train"}


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InvalidInput(f"--kept {text}: write numbers, e.g. --kept 0.8,0.6") from None


def _bytes(text: str) -> int:
    amount = _SIZE.fullmatch(text)
    if amount is None:
        raise InvalidInput(f"--bytes {text}: write a number with a unit, e.g. --bytes 5GB,900MiB")
    unit = (amount["unit"] or "").lower()
    return int(Decimal(amount["number"]) * (1024 if "i" in unit else 1000) ** "_kmgt".index(unit[0] if unit else "_"))


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _put(spec: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        inner = spec.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise InvalidInput(f"{path}: {parent} holds a value, no fields")
        spec = inner
    spec[last] = value
