from __future__ import annotations

import json

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ranksearch.worker.tensor_file import TensorFile

SHAPES = {"a": ((3,), torch.bfloat16), "b": ((2, 2), torch.float64), "c": ((0, 4), torch.float32)}


def test_tensors_written_in_any_order_read_back_with_their_facts(tmp_path):
    tensors = {
        name: torch.arange(torch.Size(shape).numel()).view(shape).to(dtype) for name, (shape, dtype) in SHAPES.items()
    }
    with TensorFile(tmp_path / "f.safetensors", SHAPES, room=200) as file:
        for name in ("c", "a", "b"):
            file.write(name, tensors[name])
        file.describe({"facts": json.dumps({"seen": 3})})
    again = load_file(tmp_path / "f.safetensors")
    assert again.keys() == tensors.keys()
    assert all(
        torch.equal(again[name], tensor) and again[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    with safe_open(tmp_path / "f.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["facts"]) == {"seen": 3}


def test_a_file_whose_writing_broke_off_cannot_be_read(tmp_path):
    with pytest.raises(KeyError), TensorFile(tmp_path / "f", SHAPES, room=0) as file:
        file.write("no such tensor", torch.ones(3))
    with pytest.raises(SafetensorError):
        load_file(tmp_path / "f")


def test_what_does_not_fit_the_layout_is_refused(tmp_path):
    with pytest.raises(ValueError, match="announced"), TensorFile(tmp_path / "f", SHAPES, room=0) as file:
        file.write("a", torch.ones(4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="never written"), TensorFile(tmp_path / "f", SHAPES, room=0):
        pass
    with pytest.raises(ValueError, match="room"), TensorFile(tmp_path / "f", {}, room=10) as file:
        file.describe({"long": "x" * 1000})
