from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.worker.capped import EXCEEDED
from transformers import LlamaConfig

from ranksearch.worker.bank import build_bank
from ranksearch.worker.calibrate import calibrate
from ranksearch.worker.evaluate import Evaluation
from ranksearch.worker.models import load_model
from ranksearch.worker.placement import fetched
from ranksearch.worker.prefix import PrefixModel
from ranksearch.worker.targets import find_targets
from ranksearch.worker.tiny import train_tokenizer

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow  # a watchdog looks every millisecond, and memory is given back at once
WORDS = " ".join(f"word{index % 37} and {index * index % 101}," for index in range(800))


def write_model(folder: Path, *, hidden: int, width: int, blocks: int) -> int:
    """Writes a LLaMA-shaped model in fp32 with random weights, one block at a time; gives their bytes."""
    folder.mkdir()
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 32,
        max_position_embeddings=256,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    config.save_pretrained(folder)
    train_tokenizer(WORDS, 300).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def random(m: int, n: int) -> torch.Tensor:
        return torch.randn(m, n, generator=generator) * n**-0.5

    ones = torch.ones(hidden)
    ends = {"model.embed_tokens.weight": random(300, hidden), "lm_head.weight": random(300, hidden)}
    places, total = {}, 0
    for shard in range(blocks + 1):
        if shard == blocks:
            tensors = {**ends, "model.norm.weight": ones}
        else:
            parts = {f"self_attn.{part}_proj.weight": random(hidden, hidden) for part in "qkvo"}
            parts |= {f"mlp.{part}_proj.weight": random(width, hidden) for part in ("gate", "up")}
            parts |= {"mlp.down_proj.weight": random(hidden, width)}
            parts |= {"input_layernorm.weight": ones, "post_attention_layernorm.weight": ones.clone()}
            tensors = {f"model.layers.{shard}.{name}": tensor for name, tensor in parts.items()}
        file = f"model-{shard + 1:05}-of-{blocks + 1:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def compress(folder: Path, budget: int, section_bytes: int) -> subprocess.CompletedProcess[str]:
    # what is freed is given back at once, as it is with tensors of a large model's sizes
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".ns"), "OMP_NUM_THREADS": "1"}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    command = [sys.executable, str(ROOT / "tests/worker/capped.py"), str(folder), str(budget), str(section_bytes)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("hidden", "width", "blocks"),
    [
        pytest.param(192, 384, 24, id="small"),
        pytest.param(256, 512, 96, id="moderate", marks=pytest.mark.timeout(900)),
    ],
)
def test_a_model_of_three_times_the_memory_is_compressed(tmp_path: Path, hidden: int, width: int, blocks: int) -> None:
    weights = write_model(tmp_path / "model", hidden=hidden, width=width, blocks=blocks)
    done = compress(tmp_path / "model", weights // 3, weights // 8)
    print(done.stdout, done.stderr[-2000:])
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["weights"] == weights
    assert max(facts["anonymous"].values()) <= weights / 3
    assert facts["files"]["calibration"] > weights  # and yet it was never in memory
    assert facts["perplexity"]["final"] == pytest.approx(facts["perplexity"]["trial"], rel=1e-4)


def test_the_cap_ends_a_process_that_holds_all_covariances(tmp_path: Path) -> None:
    weights = write_model(tmp_path / "model", hidden=128, width=512, blocks=12)
    done = compress(tmp_path / "model", weights // 3, 1 << 40)
    assert done.returncode == EXCEEDED
    assert "calibrate: " in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_of_three_times_the_memory_of_a_gpu_is_compressed(tmp_path: Path) -> None:
    weights = write_model(tmp_path / "model", hidden=512, width=1024, blocks=64)
    device = torch.device("cuda:0")
    share = weights / 3 / torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(share, device)
    try:
        model, _ = load_model(tmp_path / "model", device=device)
        assert fetched(model)
        targets = find_targets(model)
        text = torch.arange(8 * 64).mul(37).remainder(101).view(8, 64)
        ways = {"batch_tokens": 128, "memory_limit": weights // 8, "scratch": tmp_path}
        calibration = calibrate(model, targets, text, gradients=True, file=tmp_path / "calibration", **ways)
        bank = build_bank(model, targets, calibration, metric="two_sided", device=device, file=tmp_path / "bank")
        evaluation = Evaluation(model, text, batch_tokens=128, chunk_tokens=128, scratch=tmp_path)
        with PrefixModel(model, bank, targets) as prefix:
            prefix.set_ranks({target.name: target.break_even // 2 for target in targets})
            assert evaluation.score(model).kl > 0
        assert torch.cuda.max_memory_allocated(device) <= weights / 3
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
