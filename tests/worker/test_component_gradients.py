from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ranksearch.worker import backward
from ranksearch.worker import component_gradients as module
from ranksearch.worker.bank import build_bank
from ranksearch.worker.calibrate import calibrate
from ranksearch.worker.component_gradients import component_gradients
from ranksearch.worker.placement import fetch_blocks
from ranksearch.worker.prefix import PrefixModel
from ranksearch.worker.targets import find_targets


@pytest.fixture(params=["llama", "opt"])
def parts(request, tiny):
    model = tiny(request.param)
    targets = find_targets(model)
    bank = build_bank(model, targets, None, metric="weight", full=True)
    ranks = {t.name: 2 + index % 5 for index, t in enumerate(targets)}
    ranks[targets[3].name] = targets[3].full_rank  # dense
    edges = {t.name: [1, min(ranks[t.name], t.full_rank - 2), t.full_rank - 1] for t in targets[1:]}
    return model, targets, bank, ranks, edges


class Gated(nn.Module):
    """All components of a layer, each times its gate."""

    def __init__(
        self, dense: nn.Linear, left: torch.Tensor, right: torch.Tensor, rank: int, mean: torch.Tensor | None
    ) -> None:
        super().__init__()
        self.dense, self.left, self.right = dense, left, right
        self.mean = torch.zeros(dense.in_features) if mean is None else mean
        self.gates = (torch.arange(len(right)) < rank).float().requires_grad_()

    @property
    def weight(self) -> torch.Tensor:
        return self.dense.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        about = self.dense(self.mean) if self.mean.any() else self.dense.bias
        return F.linear(F.linear(x - self.mean, self.right) * self.gates, self.left.mT, about)


def by_autograd(model, targets, bank, ranks, edges, blocks) -> dict[str, list[float]]:
    gated = {}
    for t in targets:
        dense = model.get_submodule(t.name)
        gated[t.name] = Gated(dense, bank.left[t.name], bank.right[t.name], ranks[t.name], bank.means.get(t.name))
        model.set_submodule(t.name, gated[t.name])
    logits = model(input_ids=blocks).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten()).backward()
    for name, layer in gated.items():
        model.set_submodule(name, layer.dense)
    found = {name: layer.gates.grad for name, layer in gated.items()}
    return {name: [float(found[name][a:b].sum()) for a, b in pairwise(ends)] for name, ends in edges.items()}


def test_they_are_the_gradients_by_gates(parts, blocks, monkeypatch):
    model, targets, bank, ranks, edges = parts
    expected = by_autograd(model, targets, bank, ranks, edges, blocks[:6])
    with PrefixModel(model, bank, targets) as prefix:
        prefix.set_ranks(ranks)
        found = component_gradients(prefix, edges, blocks[:6], batch_tokens=2 * blocks.shape[1])
        assert found.keys() == edges.keys()
        for name, values in expected.items():
            assert found[name] == pytest.approx(values, rel=1e-3, abs=1e-6), name


def test_a_mean_that_the_bias_keeps_is_no_part_of_a_component(tiny, blocks):
    model = tiny()
    targets = find_targets(model)
    calibration = calibrate(model, targets, blocks, pool=2)
    bank = build_bank(model, targets, calibration, metric="centred")
    assert all(bank.means[t.name].abs().max() > 0.01 for t in targets)
    ranks, edges = {t.name: 3 for t in targets}, {t.name: [2, 3, 5] for t in targets}
    expected = by_autograd(model, targets, bank, ranks, edges, blocks[:4])
    with PrefixModel(model, bank, targets) as prefix:
        prefix.set_ranks(ranks)
        found = component_gradients(prefix, edges, blocks[:4])
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-3, abs=1e-6), name


def test_a_fetched_model_gives_the_same_block_by_block(tiny, blocks):
    model = tiny()
    targets = find_targets(model)
    bank = build_bank(model, targets, None, metric="weight")
    ranks, edges = {t.name: 3 for t in targets}, {t.name: [2, 3, 5] for t in targets}
    found = []
    for fetched in (False, True):
        if fetched:
            fetch_blocks(model, "cpu")
        with PrefixModel(model, bank, targets) as prefix:
            prefix.set_ranks(ranks)
            found.append(component_gradients(prefix, edges, blocks[:4]))
    for name in edges:
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4, abs=1e-7)


def test_blocks_are_run_one_at_a_time_where_one_sequence_is_too_much(tiny, blocks, monkeypatch):
    model = tiny()
    targets = find_targets(model)
    bank = build_bank(model, targets, None, metric="weight")
    edges, runs = {t.name: [2, 3, 5] for t in targets}, []

    def sweep_text(model, readout, sections, *rest, **options):
        runs.append([section.parts for section in sections])
        if len(sections) == 1:
            raise torch.OutOfMemoryError
        backward.sweep_text(model, readout, sections, *rest, **options)

    with PrefixModel(model, bank, targets) as prefix:
        prefix.set_ranks({t.name: 3 for t in targets})
        expected = component_gradients(prefix, edges, blocks[:4])
        monkeypatch.setattr(module, "sweep_text", sweep_text)
        found = component_gradients(prefix, edges, blocks[:4])
    assert runs == [[None], [range(index, index + 1) for index in range(model.config.num_hidden_layers)]]
    for name in edges:
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-7)


def test_less_memory_takes_smaller_batches(tiny, blocks, monkeypatch):
    model = tiny()
    targets = find_targets(model)
    bank = build_bank(model, targets, None, metric="weight")
    edges, sizes = {t.name: [2, 3, 5] for t in targets}, []

    class Small(module.SlopeOfLoss):
        def __call__(self, hidden, ids):
            sizes.append(len(ids))
            if len(ids) > 2:
                raise torch.OutOfMemoryError
            return super().__call__(hidden, ids)

    with PrefixModel(model, bank, targets) as prefix:
        prefix.set_ranks({t.name: 3 for t in targets})
        expected = component_gradients(prefix, edges, blocks[:8])
        monkeypatch.setattr(module, "SlopeOfLoss", Small)
        found = component_gradients(prefix, edges, blocks[:8], batch_tokens=8 * blocks.shape[1])
    assert sizes == [8, 4, 2, 2, 2, 2]
    for name in edges:
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-7)
