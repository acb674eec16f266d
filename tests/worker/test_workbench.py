from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ranksearch.search.errors import InvalidInput
from ranksearch.worker.stages import known_of
from ranksearch.worker.tiny import train_tokenizer
from ranksearch.worker.workbench import Workbench

WORDS = " ".join(f"word{index % 37} and {index * index % 101}," for index in range(800))


@pytest.fixture
def folder(tiny: Callable[..., nn.Module], tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny("llama", vocab_size=300).save_pretrained(folder)
    train_tokenizer(WORDS, 300).save_pretrained(folder)
    return folder


@pytest.fixture
def job(folder: Path, tmp_path: Path) -> dict[str, Any]:
    """The context of a job as a device process gets it first."""
    (tmp_path / "text.txt").write_text(WORDS)
    text = {"path": "text", "data_files": str(tmp_path / "text.txt"), "split": "train"}
    spec = {
        "model": {"source": str(folder)},
        "calibration": {"dataset": text, "sequences": 4, "sequence_length": 16},
        "evaluation": {"sequences": 4, "test": []},
        "budget": {"kept": [0.5]},
    }
    cache = str(tmp_path / "cache")
    return {"id": "job_a", "spec": spec, "source": str(folder), "trust_remote_code": False, "cache_dir": cache}


def change(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def prepared(job: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The context of the job's later stages, after a first process has prepared it."""
    blocks = tmp_path / "blocks.safetensors"
    facts = Workbench("cpu").prepare(job, str(blocks), progress=print)
    return {**job, **known_of(lambda _: blocks, {**facts, "blocks": "sha256"})}


def calibrate(job: dict[str, Any], path: Path) -> dict[str, torch.Tensor]:
    Workbench("cpu").calibrate(job, str(path), progress=print)
    return load_file(path)


def test_a_model_that_changes_under_a_job_is_refused(job: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    later = prepared(job, tmp_path)
    assert calibrate(later, tmp_path / "moments")
    change(folder)
    with pytest.raises(InvalidInput, match="has changed"):
        calibrate(later, tmp_path / "moments")


def test_a_job_stays_with_the_commit_it_began_with(
    job: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    hub = tmp_path / "hub" / "models--someone--some-model"
    first, second = hub / "snapshots" / ("a" * 40), hub / "snapshots" / ("b" * 40)
    for snapshot in (first, second):
        shutil.copytree(folder, snapshot)
    change(second)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(first.name)
    later = prepared({**job, "source": "someone/some-model"}, tmp_path)
    assert later["revision"] == first.name
    before = calibrate(later, tmp_path / "before")
    (hub / "refs" / "main").write_text(second.name)
    after = calibrate(later, tmp_path / "after")
    assert all(torch.equal(before[name], after[name]) for name in before)
