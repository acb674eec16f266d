"""Models of many structures, each through the whole path from its targets to a checkpoint that is loaded again."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from ranksearch.search.allocate import Allocator
from ranksearch.search.space import RankSpace
from ranksearch.worker.bank import FactorBank, build_bank
from ranksearch.worker.calibrate import Calibration, calibrate
from ranksearch.worker.checkpoint import count, dense_sizes, export
from ranksearch.worker.evaluate import Evaluation
from ranksearch.worker.fused import FusedExperts
from ranksearch.worker.loading import FactoredLinear
from ranksearch.worker.merge import merge_to_dense
from ranksearch.worker.models import load_model
from ranksearch.worker.plain import as_loaded, make_plain
from ranksearch.worker.prefix import PrefixLinear, PrefixModel
from ranksearch.worker.readout import Readout, base_path
from ranksearch.worker.speed import measure
from ranksearch.worker.stream import BlockStream
from ranksearch.worker.targets import block_stack, find_targets
from ranksearch.worker.tiny import train_tokenizer

ROOT = Path(__file__).parents[2]
FUSED = int(transformers.__version__.split(".")[0]) >= 5
VOCABULARY = 120
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": None,
}
MIXTURE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
GPT = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 16,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": COMMON,
    "llama tied": COMMON | {"tie_word_embeddings": True},
    "qwen2": COMMON,
    "qwen3": COMMON | {"head_dim": 6},
    "gemma": COMMON | {"head_dim": 4},
    "gemma2": COMMON | {"head_dim": 4, "query_pre_attn_scalar": 4, "final_logit_softcapping": 3.0},
    "gemma3_text": COMMON | {"head_dim": 4, "query_pre_attn_scalar": 4},
    "mistral": COMMON,
    "phi": COMMON,
    "opt": {"ffn_dim": 28, "word_embed_proj_dim": 16} | COMMON,
    "gpt2": GPT | {"bos_token_id": 0, "eos_token_id": None},
    "gpt_neox": COMMON | {"hidden_act": "gelu"},
    "mixtral": COMMON | MIXTURE,
    "qwen3_moe": COMMON | MIXTURE | {"head_dim": 4},
    "gpt_oss": COMMON | MIXTURE | {"head_dim": 4, "rope_scaling": None},
    "granitemoe": COMMON | MIXTURE,
    "llava": {
        "text_config": COMMON | {"model_type": "llama"},
        "vision_config": VISION,
        "image_token_index": VOCABULARY - 1,
    },
    "fuyu": {"text_config": COMMON | {"model_type": "persimmon"}, "image_token_id": VOCABULARY - 1} | COMMON,
}
ATTENTION = {
    "self_attn.q_proj": (16, 16),
    "self_attn.k_proj": (8, 16),
    "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16),
}
GATED = {"mlp.gate_proj": (28, 16), "mlp.up_proj": (28, 16), "mlp.down_proj": (16, 28)}
LLAMA = ATTENTION | GATED
KINDS: dict[str, dict[str, tuple[int, int]]] = {
    "qwen3": {
        "self_attn.q_proj": (24, 16),
        "self_attn.k_proj": (12, 16),
        "self_attn.v_proj": (12, 16),
        "self_attn.o_proj": (16, 24),
    }
    | GATED,
    "phi": {name.replace("o_proj", "dense"): shape for name, shape in ATTENTION.items()}
    | {"mlp.fc1": (28, 16), "mlp.fc2": (16, 28)},
    "opt": {f"self_attn.{part}_proj": (16, 16) for part in ("k", "v", "q", "out")} | {"fc1": (28, 16), "fc2": (16, 28)},
    "gpt2": {"attn.c_attn": (48, 16), "attn.c_proj": (16, 16), "mlp.c_fc": (64, 16), "mlp.c_proj": (16, 64)},
    "gpt_neox": {
        "attention.query_key_value": (48, 16),
        "attention.dense": (16, 16),
        "mlp.dense_h_to_4h": (28, 16),
        "mlp.dense_4h_to_h": (16, 28),
    },
    "mixtral": ATTENTION | {"mlp.experts.gate_up_proj": (56, 16), "mlp.experts.down_proj": (16, 28)},
    "qwen3_moe": ATTENTION | {"mlp.experts.gate_up_proj": (24, 16), "mlp.experts.down_proj": (16, 12)},
    "gpt_oss": ATTENTION | {"mlp.experts.gate_up_proj": (56, 16), "mlp.experts.down_proj": (16, 28)},
    "fuyu": {
        "self_attn.query_key_value": (48, 16),
        "self_attn.dense": (16, 16),
        "mlp.dense_h_to_4h": (28, 16),
        "mlp.dense_4h_to_h": (16, 28),
    },
}
TOKENS = torch.arange(24 * 12).mul(37).remainder(101).view(24, 12)
FEW = TOKENS[:2]


class NoTokenizer:
    def save_pretrained(self, folder: Path) -> None:
        """Nothing to write: these tests are about the model."""


class Case:
    """One model, plain, with its targets, its calibration and its full bank."""

    def __init__(self, family: str) -> None:
        torch.manual_seed(0)
        self.auto = AutoModelForImageTextToText if family in ("llava", "fuyu") else AutoModelForCausalLM
        config = AutoConfig.for_model(family.split()[0], **FAMILIES[family])
        self.model: Any = self.auto.from_config(config).eval().requires_grad_(False)
        for parameter in self.model.parameters():
            # biases and norms away from their trivial values, too
            parameter.add_(torch.randn_like(parameter) * 0.1)
        self.before = self.logits()
        make_plain(self.model)
        self.targets = find_targets(self.model)
        self.calibration: Calibration = calibrate(self.model, self.targets, TOKENS, gradients=True)
        self.bank: FactorBank = build_bank(self.model, self.targets, self.calibration, metric="two_sided", full=True)

    def logits(self, model: Any = None, ids: torch.Tensor = FEW) -> torch.Tensor:
        with torch.inference_mode():
            return (model or self.model)(input_ids=ids).logits.clone()  # type: ignore[no-any-return]

    def at(self, ranks: dict[str, int]) -> torch.Tensor:
        with PrefixModel(self.model, self.bank, self.targets) as prefix:
            prefix.set_ranks(ranks)
            return self.logits()

    def mixed(self) -> dict[str, int]:
        """Dense and factored targets in turn; one whole expert tensor stays dense."""
        ranks = {t.name: (t.full_rank, 3, 5)[index % 3] for index, t in enumerate(self.targets)}
        whole = {t.name: t.full_rank for t in self.targets if t.depth == 1 and t.kind.endswith("experts.down_proj")}
        return ranks | whole

    def export(self, folder: Path, ranks: dict[str, int], **options: Any) -> Any:
        return export(
            folder,
            model=self.model,
            tokenizer=NoTokenizer(),
            pairs=self.bank.pair,
            ranks=ranks,
            targets=self.targets,
            **options,
        )


@cache
def case_of(family: str) -> Case:
    return Case(family)


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    return case_of(request.param)


@pytest.fixture(params=["mixtral", "gpt_oss", "granitemoe"])
def mixture(request: pytest.FixtureRequest) -> Case:
    return case_of(request.param)


needs_fused = pytest.mark.skipif(not FUSED, reason="transformers 4 keeps experts in lists")


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def stored_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names.update(tensors.keys())
    return names


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_the_matrices_of_the_text_blocks(family: str) -> None:
    if not FUSED and family in ("mixtral", "qwen3_moe", "granitemoe"):
        pytest.skip("other names in transformers 4")
    case = case_of(family)
    kinds = {t.kind: (t.out_features, t.in_features) for t in case.targets}
    if family == "granitemoe":
        assert {kind for kind in kinds if "self_attn" not in kind}
    else:
        assert kinds == KINDS.get(family, LLAMA)
    assert {t.depth for t in case.targets} == {0, 1}
    assert not [t.name for t in case.targets if "vision" in t.name or "projector" in t.name or "head" in t.name]
    heads = (case.model.get_input_embeddings(), case.model.get_output_embeddings())
    assert not {id(case.model.get_submodule(t.name)) for t in case.targets} & {id(module) for module in heads}
    assert sum(t.parameters for t in case.targets) == dense_sizes(case.model, case.targets).targets
    for target in case.targets:
        assert tuple(case.model.get_submodule(target.name).weight.shape) == (target.out_features, target.in_features)


def test_a_plain_model_computes_what_it_did_before(case: Case) -> None:
    assert near(case.logits(), case.before)


def test_all_components_give_the_dense_model_and_the_prior_a_finite_one(case: Case) -> None:
    dense = case.logits()
    with PrefixModel(case.model, case.bank, case.targets):
        for module in case.model.modules():
            if isinstance(module, PrefixLinear):
                module.set_rank(module.stored)
        assert near(case.logits(), dense, 1e-3)
    assert torch.equal(case.logits(), dense)
    space = RankSpace(targets=case.targets)
    prior = Allocator(space, case.bank.spectra).prior(0.6)
    assert space.is_exact(prior, 0.6)
    logits = case.at(space.as_dict(prior))
    assert logits.isfinite().all()
    assert not torch.equal(logits, dense)


def test_a_checkpoint_computes_what_was_exported(case: Case, tmp_path: Path) -> None:
    ranks = case.mixed()
    sizes = case.export(tmp_path / "out", ranks)
    loaded, report = case.auto.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    factored = {t.name for t in case.targets if ranks[t.name] < t.full_rank}
    assert {name for name, m in loaded.named_modules() if isinstance(m, FactoredLinear)} == factored
    assert near(case.logits(loaded), case.at(ranks))
    assert sizes.targets == sum(
        t.parameters if t.name not in factored else ranks[t.name] * t.marginal for t in case.targets
    )
    assert sizes == count(tmp_path / "out", case.targets)
    with_cache, without = (
        loaded.generate(input_ids=FEW[:1], max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False)
    )
    assert with_cache.shape[1] == FEW.shape[1] + 6
    assert torch.equal(with_cache, without)


def test_save_pretrained_writes_a_checkpoint_that_loads_again(case: Case, tmp_path: Path) -> None:
    case.export(tmp_path / "out", case.mixed())
    loaded = case.auto.from_pretrained(tmp_path / "out", dtype="auto")
    loaded.save_pretrained(tmp_path / "again")
    again = case.auto.from_pretrained(tmp_path / "again", dtype="auto")
    assert torch.equal(case.logits(again), case.logits(loaded))
    if FUSED:  # transformers 4 gives some tensors their names of old
        assert stored_names(tmp_path / "again") == stored_names(tmp_path / "out")


def test_multiplied_out_it_is_an_ordinary_model(case: Case, tmp_path: Path) -> None:
    case.export(tmp_path / "out", case.mixed())
    loaded = case.auto.from_pretrained(tmp_path / "out", dtype="auto")
    merge_to_dense(tmp_path / "out", tmp_path / "merged")
    merged, report = case.auto.from_pretrained(tmp_path / "merged", dtype="auto", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    expected = case.logits(loaded)
    assert near(case.logits(merged), expected, 1e-4)
    loaded.dequantize()
    assert near(case.logits(loaded), expected, 1e-4)
    assert {name: tuple(t.shape) for name, t in loaded.state_dict().items()} == {
        name: tuple(t.shape) for name, t in merged.state_dict().items()
    }


@torch.inference_mode()
def test_the_blocks_run_one_by_one_give_what_the_model_gives(case: Case) -> None:
    last: list[torch.Tensor] = []
    block = case.model.get_submodule(block_stack(case.model)[-1])

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        last.append(output if isinstance(output, torch.Tensor) else output[0])

    handle = block.register_forward_hook(keep)
    case.logits(ids=TOKENS[:5])
    handle.remove()
    stream = BlockStream(case.model, TOKENS[:5], rows=2)
    hidden = list(stream.embed())
    for index in range(len(stream.paths)):
        hidden = [stream.run(index, part) for part in hidden]
    assert near(torch.cat(hidden), last[0])
    name = case.targets[-1].name
    reached = stream.input_of(1, next(stream.embed()), name)
    assert reached.shape[-1] == case.targets[-1].in_features


def test_scores_and_speed_are_measured(case: Case, tmp_path: Path) -> None:
    case.export(tmp_path / "out", case.mixed())
    loaded = case.auto.from_pretrained(tmp_path / "out", dtype="auto").eval()
    evaluation = Evaluation(case.model, TOKENS[:8])
    with PrefixModel(case.model, case.bank, case.targets) as prefix:
        prefix.set_ranks(case.mixed())
        ours = evaluation.score(case.model)
    theirs = evaluation.score(loaded)
    assert np.allclose(ours.nll, theirs.nll, rtol=1e-4)
    assert ours.kl == pytest.approx(theirs.kl, rel=1e-3, abs=1e-6)
    assert ours.kl > 0
    with as_loaded(case.model):
        assert measure(case.model, "cpu", seconds=0.0)["decode_tokens_per_second"] > 0
    assert near(case.logits(), case.before)
    assert measure(loaded, "cpu", seconds=0.0)["prefill_tokens_per_second"] > 0


@needs_fused
def test_each_expert_is_calibrated_on_the_tokens_it_got(mixture: Case) -> None:
    experts = [t for t in mixture.targets if isinstance(parent(mixture.model, t.name), FusedExperts)]
    groups: dict[tuple[str, int], list[int]] = {}
    for target in experts:
        groups.setdefault((target.kind, target.depth), []).append(mixture.calibration.tokens[target.name])
    assert len(groups) == 4
    for counts in groups.values():
        assert sum(counts) == 2 * TOKENS.numel()  # two experts per token
        assert len(set(counts)) > 1


@needs_fused
@torch.inference_mode()
def test_an_expert_that_no_token_is_sent_to_is_reached_by_none(mixture: Case) -> None:
    stream = BlockStream(mixture.model, TOKENS[:1, :1], rows=1)
    hidden = next(stream.embed())
    names = [t.name for t in mixture.targets if t.depth == 0 and "self_attn" not in t.name]
    reached = [stream.input_of(0, hidden, name).shape for name in names]
    assert {shape[0] for shape in reached} == {0, 1}


@needs_fused
def test_an_expert_tensor_without_factors_stays_in_one_piece(mixture: Case, tmp_path: Path) -> None:
    mixture.export(tmp_path / "out", {t.name: t.full_rank for t in mixture.targets})
    with as_loaded(mixture.model):
        assert stored_names(tmp_path / "out") == set(mixture.model.state_dict())
        assert not [module for module in mixture.model.modules() if isinstance(module, FusedExperts)]
    loaded = mixture.auto.from_pretrained(tmp_path / "out", dtype="auto")
    assert near(mixture.logits(loaded), mixture.before)


@needs_fused
@pytest.mark.slow
def test_a_fresh_process_loads_and_runs_a_mixture(tmp_path: Path) -> None:
    case = case_of("qwen3_moe")
    case.export(tmp_path / "out", case.mixed())
    code = """
import sys, torch, ranksearch.worker.loading
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
"""
    torch.save(FEW, tmp_path / "ids.pt")
    command = [sys.executable, "-c", code, *(str(tmp_path / name) for name in ("out", "ids.pt", "logits.pt"))]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / ".ns", check=False)
    assert answer.returncode == 0, answer.stderr
    assert near(torch.load(tmp_path / "logits.pt"), case.at(case.mixed()))


def test_a_folder_that_reads_images_too_is_loaded_for_its_text(tmp_path: Path) -> None:
    case = case_of("llava")
    tokenizer = train_tokenizer("some words to learn from, and some more words\n" * 20, 290)
    case.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load_model(tmp_path)
    assert type(model) is type(case.model)
    assert find_targets(model) == case.targets
    assert near(case.logits(model), case.before)


@torch.no_grad()
def test_the_base_model_is_found_by_its_embedding_where_no_name_is_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of("llama")
    readout = Readout(case.model, FEW)
    monkeypatch.setattr(type(case.model), "base_model_prefix", "")
    assert base_path(case.model) == "model"
    assert torch.equal(Readout(case.model, FEW).hidden(FEW), readout.hidden(FEW))


def test_the_config_says_how_a_matrix_was_stored(tmp_path: Path) -> None:
    case = case_of("gpt2")
    case.export(tmp_path / "out", case.mixed())
    entries = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["targets"]
    assert all(entry["transposed"] and entry["bias"] for entry in entries.values())
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.get_slice("transformer.h.0.attn.c_attn.weight").get_shape() == [16, 48]


def parent(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])
