"""The report of a job: the proof that comes with its checkpoints, as one JSON document and as a model card.

Plain functions on plain values; nothing here needs torch. `ranksearch.json` of a checkpoint is the job's report with
that checkpoint's budget alone.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ranksearch.search.prices import PICOSECONDS
from ranksearch.search.space import RankSpace
from ranksearch.search.spec import budget_label
from ranksearch.search.steps import outcome_of

VERSION = 1
ROWS = ("dense", "uniform", "prior", "best", "final")
LIBRARIES = (
    "ranksearch",
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "safetensors",
    "numpy",
    "optuna",
    "botorch",
)


def build_report(
    *, job: str, spec: Mapping[str, Any], fingerprints: Mapping[str, Any], budgets: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """The document of `GET /v1/jobs/{id}/report`.

    Args:
        job: The job's id.
        spec: Its spec.
        fingerprints: `model`, `dataset`, `sequences`, `sequence_ids`; the versions of the libraries are added.
        budgets: One `build_budget` each.
    """
    document: dict[str, Any] = _plain(
        {
            "version": VERSION,
            "job": job,
            "spec": spec,
            "fingerprints": {**fingerprints, "libraries": libraries()},
            "budgets": list(budgets),
        }
    )
    return document


def build_budget(
    *,
    kept: float,
    space: RankSpace,
    ranks: Mapping[str, int],
    spectra: Mapping[str, np.ndarray[Any, Any]],
    facts: Mapping[str, Mapping[str, Any]],
    scores: Mapping[str, Mapping[str, Any]],
    parameters: Mapping[str, int],
    bytes: Mapping[str, int],
    speed: Mapping[str, Any],
    seconds: Mapping[str, float],
    history: Sequence[Mapping[str, Any]],
    pareto_front: Sequence[Mapping[str, Any]] = (),
    refine: Sequence[Mapping[str, Any]] = (),
    against: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What one budget of a job came to.

    Args:
        kept: The budget asked for.
        space: The job's rank space.
        ranks: Rank of each target in the checkpoint.
        spectra: Singular values of each target in the metric, descending; the predicted loss of the search's vector is
            the sum of the squares of those left out. After a step of `refine` the checkpoint holds other components or
            other factors, of which they predict nothing: the figure is null then.
        facts: What factoring says about each target (damping, effective rank, tokens, ...).
        scores: Row (dense, uniform, prior, best, final) to `evaluation` and `test` scores.
        parameters: `targets`, `targets_dense`, `model`, `model_dense`.
        bytes: `disk`, `disk_dense`, `loaded`, `loaded_dense`; and `asked`, the most that disk may be, if it was named.
        speed: `device`, `before`, `after`; where the space has prices, `targets` is added, what they say.
        seconds: Of each stage.
        history: The trials.
        pareto_front: Of a search for both perplexity and KL; `number`, `perplexity` and `kl` of each of its trials.
        refine: What each step after the search did.
        against: What `final` gains on other rows.
    """
    document: dict[str, Any] = _plain(
        {
            "kept": kept,
            "kept_exact": int(space.parameters_of(space.from_dict(dict(ranks))).sum()) / space.parameters,
            "targets": {
                target.name: {
                    **facts.get(target.name, {}),
                    "shape": [target.out_features, target.in_features],
                    "form": "dense" if ranks[target.name] >= target.full_rank else space.form,
                    "rank": ranks[target.name],
                    "predicted_loss": None
                    if refine
                    else float(np.square(spectra[target.name][ranks[target.name] :]).sum()),
                }
                for target in space.targets
            },
            "scores": {row: scores[row] for row in ROWS if row in scores},
            "against": against or {},
            "parameters": parameters,
            "bytes": bytes,
            "speed": {**speed, **_timed(space, ranks)},
            "seconds": seconds,
            "history": history,
            "pareto_front": pareto_front,
            "refine": refine,
        }
    )
    return document


def _timed(space: RankSpace, ranks: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """What the targets take to decode a token by the prices of the space, dense and at these ranks, s."""
    if space.prices is None:
        return {}
    prices = {"dense_seconds": space.whole, "seconds": space.cost(space.from_dict(dict(ranks)))}
    return {"targets": {name: price / PICOSECONDS for name, price in prices.items()}}


def libraries() -> dict[str, str]:
    """Versions of what the figures depend on."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def write_documents(
    folder: str | Path,
    report: Mapping[str, Any],
    *,
    source_card: str | None = None,
    auto_class: str = "AutoModelForCausalLM",
) -> None:
    """Put `ranksearch.json` and `README.md` into a checkpoint's folder.

    Args:
        folder: The checkpoint.
        report: A report with one budget.
        source_card: Text of the original model's README, for its licence.
        auto_class: Name of the class of transformers that loads the checkpoint.
    """
    _write(Path(folder) / "ranksearch.json", json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    _write(Path(folder) / "README.md", model_card(report, source_card=source_card, auto_class=auto_class))


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text(text, "utf-8")
    os.replace(draft, path)


def model_card(
    report: Mapping[str, Any], *, source_card: str | None = None, auto_class: str = "AutoModelForCausalLM"
) -> str:
    """The README of a checkpoint: where it comes from, how to load it, what it lost and what it saves."""
    (budget,) = report["budgets"]
    spec = report["spec"]
    source = spec["model"]["source"]
    local = Path(source).is_absolute() or source.startswith((".", "~"))
    name = Path(source).name if local else source
    return "\n".join(
        [
            *_front_matter(None if local else source, source_card),
            "",
            f"# {name}, {budget_label(budget['kept'])} of its {_measure(spec)} kept",
            "",
            f"Low-rank version of `{name}` made by ranksearch: the weight matrices of its decoder blocks keep "
            f"{budget['kept_exact']:.4f} of their parameters, most of them at a lower rank (form "
            f"`{spec['method']['form']}`). {_how(spec, budget['refine'])}",
            "",
            *_usage(auto_class),
            *_scores(budget),
            *_sizes(budget),
            *_origin(report, budget),
        ]
    )


def _measure(spec: Mapping[str, Any]) -> str:
    return "decode time" if spec["budget"].get("of") == "latency" else "parameters"


def _front_matter(base: str | None, source_card: str | None) -> list[str]:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if base is not None:
        lines += [f"base_model: {base}"]
    lines += _licence(source_card)
    return [*lines, "tags:", "- ranksearch", "- low-rank", "- compressed", "---"]


def _licence(card: str | None) -> list[str]:
    """The licence lines of a model card's front matter; they hold for what is derived from the model."""
    block = re.match(r"---\s*\n(.*?)\n---", card or "", re.DOTALL)
    if block is None:
        return []
    return re.findall(r"^license(?:_name|_link)?:[ \t]*[^\s\[{&*|>].*$", block[1], re.MULTILINE)


def _how(spec: Mapping[str, Any], steps: Iterable[Mapping[str, Any]]) -> str:
    """What chose the ranks and the factors: the search, and each step after it."""
    said = ["How much each matrix keeps was found by a Bayesian search."]
    for step in steps:
        found, name = outcome_of(step, spec["search"]["objective"]), step["step"]
        if not found.adopted:
            why = step.get("left_out", "It did not pay on the evaluation text.")
            said.append(f"The step `{name}` was tried and left out: {why}")
        elif name == "soco":
            instead = "" if spec["method"]["preset"] == "soco" else ", in place of what a Bayesian search had found"
            said = [
                f"Which components each matrix keeps, and how many, was chosen by scores trained on {found.tokens:,} "
                f"tokens (`soco`){instead}."
            ]
        elif name == "sequential":
            said.append(
                "Every compressed matrix was then solved again, without training, against what the compressed model "
                f"feeds it (`sequential`, strength {step['strength']:g})."
            )
        else:
            said.append(
                f"The factors were then trained on {found.tokens:,} tokens to predict what the original model predicts "
                f"(`{name}`)."
            )
    return " ".join(said)


def _usage(auto_class: str) -> list[str]:
    return [
        "## Use",
        "",
        "```python",
        "import ranksearch.worker.loading  # pip install ranksearch; needs no trust_remote_code",
        f"from transformers import {auto_class}, AutoTokenizer",
        "",
        f'model = {auto_class}.from_pretrained("PATH_OR_ID", dtype="auto")',
        'tokenizer = AutoTokenizer.from_pretrained("PATH_OR_ID")',
        "```",
        "",
    ]


def _scores(budget: Mapping[str, Any]) -> list[str]:
    rows = budget["scores"]
    texts = list(dict.fromkeys(label for row in rows.values() for label in row.get("test", {})))
    columns = ["evaluation", *texts]
    measured = "excess" in (rows.get("final", {}).get("evaluation") or {})
    figures = ("perplexity", "KL", "excess") if measured else ("perplexity", "KL")
    head = " | ".join(f"{_cell(column)}: {' | '.join(figures)}" for column in columns)
    lines = ["## Quality", "", f"| | kept | {head} |", "|---|---|" + "---:|" * (len(figures) * len(columns))]
    for row, scores in rows.items():
        found = [scores.get("evaluation") or {}, *((scores.get("test") or {}).get(text) or {} for text in texts)]
        cells = [cell for each in found for cell in _figures(each, row)[: len(figures)]]
        kept = "1" if row == "dense" else budget_label(budget["kept"])
        lines.append(f"| {row} | {kept} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "*dense* is the original model; *uniform* keeps the same share of every matrix; *prior* is the closed-form "
        "allocation that the search starts from; *best* is what the search found; *final* is this checkpoint, read "
        "back from its files. KL is the mean divergence from the dense model per token, in nats. The evaluation text "
        "drove the search; the other texts were read once, at the end.",
        *([_EXCESS] if measured else []),
        "",
    ]


_EXCESS = (
    "Excess is ln(perplexity / dense perplexity), in nats per token; in brackets its 95% interval, from the paired "
    "differences of the sequences' losses."
)


def _figures(scores: Mapping[str, Any], row: str) -> tuple[str, str, str]:
    """Perplexity, KL and excess; that of the checkpoint with its interval."""
    excess, interval = _number(scores.get("excess"), 4), scores.get("excess_interval")
    if row == "final" and interval:
        excess += f" [{', '.join(_number(end, 4) for end in interval)}]"
    return _number(scores.get("perplexity"), 3), _number(scores.get("kl"), 4), excess


def _sizes(budget: Mapping[str, Any]) -> list[str]:
    parameters, held, speed = budget["parameters"], budget["bytes"], budget.get("speed") or {}
    before, after = speed.get("before") or {}, speed.get("after") or {}
    lines = [
        "## Size and speed",
        "",
        "| | original | this checkpoint |",
        "|---|---:|---:|",
        f"| parameters of the compressed matrices | {parameters['targets_dense']:,} | {parameters['targets']:,} |",
        f"| parameters of the model | {parameters['model_dense']:,} | {parameters['model']:,} |",
        f"| weights on disk, bytes | {held['disk_dense']:,} | {held['disk']:,}{_asked(held)} |",
        f"| weights in memory, bytes | {held['loaded_dense']:,} | {held['loaded']:,} |",
    ]
    for key, words in (
        ("prefill_tokens_per_second", "reading, tokens/s"),
        ("decode_tokens_per_second", "writing, tokens/s"),
        ("peak_memory_bytes", "peak memory, bytes"),
    ):
        if key in before and key in after:
            lines.append(f"| {words} | {_number(before[key], 0)} | {_number(after[key], 0)} |")
    if timed := speed.get("targets"):
        cells = (f"{1e6 * timed[key]:,.1f}" for key in ("dense_seconds", "seconds"))
        lines.append(f"| compressed matrices by the table of ranks, us/token | {' | '.join(cells)} |")
    if before:
        length = f"prompt of {before['prompt_tokens']} tokens" if "prompt_tokens" in before else "one prompt"
        lines += ["", f"Speed: one sequence, {length}, both models on the same {_cell(speed.get('device', 'device'))}."]
    return [*lines, ""]


def _asked(held: Mapping[str, int]) -> str:
    return f" of at most {held['asked']:,}" if "asked" in held else ""


def _origin(report: Mapping[str, Any], budget: Mapping[str, Any]) -> list[str]:
    spec, fingerprints = report["spec"], report["fingerprints"]
    calibration, method, search = spec["calibration"], spec["method"], spec["search"]
    versions = ", ".join(f"{name} {version}" for name, version in fingerprints["libraries"].items())
    done = sum(1 for trial in budget["history"] if trial["state"] == "COMPLETE")
    return [
        "## Origin",
        "",
        f"Job `{report['job']}`: metric `{method['metric']}`, {calibration['sequences']} calibration sequences of "
        f"{calibration['sequence_length']} tokens, {done} trials completed by sampler `{search['sampler']}`, seed "
        f"{search['seed']}. Model fingerprint `{str(fingerprints.get('model'))[:16]}`. {versions}.",
        "",
        "`ranksearch.json` beside this file holds the whole spec, every matrix's rank and the search history.",
        "",
    ]


def _number(value: Any, digits: int) -> str:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "-"
    return f"{value:,.{digits}f}" if abs(value) < 1e7 or digits == 0 else f"{value:.3e}"


def _cell(text: Any) -> str:
    return " ".join(str(text).replace("|", "/").split())


def _plain(value: Any) -> Any:
    """The value as JSON knows it: numpy's numbers as Python's, and what is not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
