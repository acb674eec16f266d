from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ranksearch.worker.speed import _LiveTensors, measure


def test_a_model_is_measured_within_its_context(tiny: Callable[..., nn.Module]) -> None:
    model = tiny(vocab_size=300)
    found = measure(model, "cpu", seconds=0.2)
    assert found["prefill_tokens_per_second"] > 0
    assert found["decode_tokens_per_second"] > 0
    assert found["prompt_tokens"] + found["new_tokens"] <= 64
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    cache = 2 * 2 * found["prompt_tokens"] * 12 * 4  # keys and values, two layers, two heads of six, fp32
    assert found["peak_memory_bytes"] > weights + cache
    assert found["peak_memory_bytes"] == measure(model, "cpu", seconds=0.1)["peak_memory_bytes"]


def test_a_prompt_of_ones_own_is_used(tiny: Callable[..., nn.Module]) -> None:
    assert measure(tiny(), "cpu", prompt=torch.tensor([3, 4, 5]), seconds=0.1)["prompt_tokens"] == 3


def test_live_tensors_are_added_up_until_they_go() -> None:
    with _LiveTensors(set()) as live:
        first = torch.zeros(1000)
        second = first + 1
        del first
        view = second.view(10, 100)
        third = view * 2
        del second, view
        third.add_(1)
        assert live.now == 4000
    assert live.peak == 8000
