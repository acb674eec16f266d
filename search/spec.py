"""The job spec: what a user submits. Service and workers read the same models; unknown fields are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ranksearch.search.objective import Objective
from ranksearch.search.presets import PRESETS, UNREFINED
from ranksearch.search.targets import Form, Metric


def _share(kept: float) -> float:
    if not 0 < kept <= 1:
        raise ValueError(f"a budget is the share of the parameters to keep, above 0 and at most 1; got {kept:g}")
    return kept


Kept = Annotated[
    float,
    AfterValidator(_share),
    Field(
        description="Kept parameters of the targets / their original parameters.",
        json_schema_extra={"exclusiveMinimum": 0, "maximum": 1},
    ),
]
Positive = Annotated[int, Field(ge=1)]
JobId = Annotated[str, Field(min_length=1, max_length=64)]
Step = Literal["sequential", "distill", "soco"]

#: Tokens that `distill` trains on, and those of text that are set aside for it and for `soco`.
TRAINING_TOKENS = 1_000_000

#: Steps that `soco` trains for, and tokens that these take together, where a sequence is not longer than one's share.
SCORING_STEPS, SCORING_TOKENS = 100, 102_400


def scoring_tokens(length: int) -> int:
    """Tokens that `soco` trains on, in sequences of a length."""
    return max(SCORING_TOKENS, SCORING_STEPS * length)


#: Trials that a budget may have.
MOST_TRIALS = 10_000


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class ModelSource(_Part):
    """The model to compress."""

    source: str = Field(
        min_length=1, max_length=4096, description="Hub id or local folder.", examples=["Qwen/Qwen3-0.6B"]
    )
    revision: str | None = Field(None, description="Hub revision.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: as stored.")
    trust_remote_code: bool = Field(False, description="Needs the server's consent as well.")


class Dataset(_Part):
    """What `datasets.load_dataset` takes, plus the text column and, for a test set, how many blocks to read."""

    path: str = Field(min_length=1, max_length=4096, description="Hub id or builder name such as `text`, `json`.")
    name: str | None = None
    split: str = "train"
    column: str = "text"
    revision: str | None = None
    data_files: str | list[str] | None = Field(None, description="Local files, under an allowed folder.")


class TestSet(Dataset):
    """A test set; read once, at the end."""

    __test__ = False
    sequences: Positive | None = Field(512, description="First blocks to read; null reads all.")


def _wikitext(split: str) -> dict[str, Any]:
    return {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": split, "column": "text"}


class Calibration(_Part):
    """Text whose features and gradients give the metric."""

    dataset: Dataset = Field(default_factory=lambda: Dataset(**_wikitext("train")))
    sequences: Positive = 256
    sequence_length: Annotated[int, Field(ge=2)] = 2048
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class Evaluation(_Part):
    """Text that drives the search, and test sets that are read once."""

    dataset: Dataset | None = Field(None, description="null: the calibration dataset, disjoint blocks.")
    sequences: Positive = 64
    sequence_length: Annotated[int, Field(ge=2)] | None = Field(None, description="null: as in calibration.")
    test: list[TestSet] = Field(default_factory=lambda: [TestSet(**_wikitext("test"))])


class Budget(_Part):
    """One study and one checkpoint for each value.

    A user names `kept` or `bytes`; the server adds the `kept` that bytes come to.
    """

    kept: Annotated[list[Kept], Field(min_length=1, max_length=32)] = Field(default_factory=list)
    bytes: Annotated[list[Positive], Field(min_length=1, max_length=32)] | None = Field(
        None, description="In place of kept: the most that weight files may take, in `export.dtype`."
    )

    of: Literal["parameters", "latency"] = Field(
        "parameters",
        description="What kept is a share of: the targets' parameters, or the time they take to decode a token, "
        "measured on the worker's device.",
    )

    @field_validator("kept", "bytes")
    @classmethod
    def _distinct(cls, budgets: list[float] | list[int] | None) -> list[float] | list[int] | None:
        names = [b if isinstance(b, int) else budget_label(b) for b in budgets or ()]
        if len(set(names)) != len(names):
            raise ValueError("each budget may be named once")
        return budgets

    @model_validator(mode="after")
    def _named(self) -> Budget:
        if not self.kept and self.bytes is None:
            raise ValueError("name a budget: kept, a share of the parameters, or bytes")
        if self.bytes is not None and self.of != "parameters":
            raise ValueError("bytes are of parameters; leave budget.of out")
        return self


class Method(_Part):
    """How a rank becomes a matrix."""

    preset: Literal[
        "ranksearch",
        "soco",
        "uniform",
        "svd-llm",
        "fwsvd",
        "mgaa",
        "d-rank",
        "grasp",
        "asvd",
        "dp-knapsack",
        "evolutionary",
        "bolaco",
        "bolaco-20",
    ] = Field(
        "ranksearch",
        description="How ranks are chosen; the names of published methods bring their own metric and sampler. "
        "`soco`: learned scores choose the components in place of the search; few trials are enough.",
    )
    metric: Metric = "two_sided"
    form: Form = Field(
        "factored",
        description="How a compressed target is stored: `factored` as two thin matrices, `pivoted` as some of its rows "
        "and the other rows as combinations of these, which holds more ranks in the same parameters.",
    )
    rank_multiple: Annotated[int, Field(ge=1, le=4096)] = 1
    keep_dense: list[str] = Field(default_factory=list, description="Shell patterns of target names, e.g. `*.v_proj`.")
    refine: list[Step] = Field(
        default_factory=list,
        description="Steps after the search, in this order: `sequential` solves every matrix again against what the "
        "compressed model feeds it, `distill` trains the factors, `soco` chooses components by learned scores.",
    )

    @model_validator(mode="before")
    @classmethod
    def _own_metric(cls, data: Any) -> Any:
        preset = PRESETS.get(str(data.get("preset"))) if isinstance(data, dict) else None
        return {"metric": preset.metric, **data} if preset and preset.metric else data

    @model_validator(mode="after")
    def _sensible(self) -> Method:
        steps, own = self.steps, PRESETS[self.preset].metric
        if own is not None and self.metric != own:
            raise ValueError(f"preset {self.preset} works in metric {own}; leave method.metric out")
        if steps and own in UNREFINED:
            raise ValueError(f"preset {self.preset} cannot be followed by {steps[0]}; leave method.refine out")
        if steps and self.metric in UNREFINED:
            raise ValueError(
                f"{steps[0]} cannot work in metric {self.metric}; name feature or two_sided, or do without it"
            )
        if len(set(steps)) != len(steps):
            raise ValueError("each step of refine may be named once")
        if "soco" in steps[1:]:
            raise ValueError("soco must be the first step of refine: it chooses components anew")
        if "soco" in steps and self.form != "factored":
            raise ValueError("soco needs form factored")
        return self

    @property
    def steps(self) -> tuple[Step, ...]:
        """What is done between the search and the checkpoint."""
        return (*(("soco",) if self.preset == "soco" else ()), *self.refine)

    @property
    def trains(self) -> bool:
        """Whether a step needs text to train on."""
        return not {"soco", "distill"}.isdisjoint(self.steps)

    @property
    def all_components(self) -> bool:
        """Whether components past the break-even rank of two factors are of use."""
        return self.form == "pivoted" or "soco" in self.steps


class Search(_Part):
    """How rank vectors are proposed."""

    trials: Annotated[int, Field(ge=1, le=MOST_TRIALS)] = Field(
        60,
        description="Per budget. Presets that choose by a formula take one trial, and `asvd` and `dp-knapsack` one for "
        "each target and share and one more, whatever this says.",
    )
    sampler: Literal[
        "ranksearch",
        "random",
        "tpe",
        "gp",
        "cmaes",
        "botorch",
        "turbo",
        "evolutionary",
        "swaps",
        "bolaco",
        "bolaco-20",
    ] = Field("ranksearch", description="A published preset that searches brings its own; others do not use it.")
    objective: Objective = "perplexity"
    pruner: Literal["wilcoxon", "none"] = "wilcoxon"
    parallelism: Annotated[int, Field(ge=1, le=256)] = 1
    timeout_seconds: Annotated[float, Field(gt=0)] | None = Field(None, description="For the trials of each budget.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    learn_from: Annotated[list[JobId], Field(max_length=8)] = Field(
        default_factory=list, description="Earlier jobs on the same model whose trials inform this search."
    )

    @field_validator("learn_from")
    @classmethod
    def _distinct(cls, jobs: list[str]) -> list[str]:
        if len(set(jobs)) != len(jobs):
            raise ValueError("each job may be named once")
        return jobs

    @field_validator("parallelism")
    @classmethod
    def _one_at_a_time(cls, parallelism: int) -> int:
        if parallelism > 1:
            raise ValueError("the trials of a job run one at a time as yet; leave parallelism at 1")
        return parallelism


class Export(_Part):
    """How checkpoints are written."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: as the model is stored."
    )
    max_shard_bytes: Annotated[int, Field(ge=1_000_000)] = 5_000_000_000


class JobSpec(_Part):
    """What a user submits: one model, one calibration, one or more budgets."""

    name: str | None = Field(None, max_length=200)
    model: ModelSource
    calibration: Calibration = Field(default_factory=Calibration)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    budget: Budget
    method: Method = Field(default_factory=Method)
    search: Search = Field(default_factory=Search, validate_default=True)
    export: Export = Field(default_factory=Export)
    webhook: None = Field(None, description="Not available yet.")

    @field_validator("method")
    @classmethod
    def _can_be_timed(cls, method: Method, info: ValidationInfo) -> Method:
        if "soco" in method.steps and "budget" in info.data and info.data["budget"].of == "latency":
            raise ValueError("soco counts parameters; leave budget.of out, or do without soco")
        return method

    @field_validator("search")
    @classmethod
    def _own_sampler(cls, search: Search, info: ValidationInfo) -> Search:
        if "method" not in info.data:  # it was refused
            return search
        preset = info.data["method"].preset
        own = PRESETS[preset].sampler
        if own is not None and search.sampler != own:
            if "sampler" in search.model_fields_set:
                raise ValueError(f"preset {preset} searches with sampler {own}; leave search.sampler out")
            search = search.model_copy(update={"sampler": own})
        if search.learn_from and not (PRESETS[preset].ranks == "search" and search.sampler == "ranksearch"):
            used = f"sampler {search.sampler}" if PRESETS[preset].ranks == "search" else f"preset {preset}"
            raise ValueError(f"{used} does not learn from earlier jobs; leave search.learn_from out")
        return search


def budget_label(kept: float) -> str:
    """The name of a budget in study names, URLs and folders: `0.25` -> `"0.25"`."""
    return f"{kept:g}"
