"""The student of a trained refinement: its gradient, its teacher, its memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.nn import functional as F

from ranksearch.search.errors import InvalidInput
from ranksearch.worker import student
from ranksearch.worker.placement import fetch_blocks
from ranksearch.worker.readout import Readout
from ranksearch.worker.student import Student, loss_gradient
from ranksearch.worker.targets import find_targets


def half(model, name):
    weight = model.get_submodule(name).weight
    return lambda x: F.linear(x, 0.5 * weight)


def plain_loss(logits, dense, labels, ce_weight):
    log_p, log_q = dense.log_softmax(-1), logits.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum()
    return kl + ce_weight * F.cross_entropy(logits, labels, reduction="sum"), kl


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("ce_weight", [0.0, 0.2])
def test_the_chunked_gradient_equals_autograd_of_the_plain_formula(tiny, blocks, family, ce_weight, monkeypatch):
    model = tiny(family)
    ids = blocks[:3]
    readout = Readout(model, ids)
    with torch.no_grad():
        dense = readout.hidden(ids)
    hidden = (dense * 1.1 + 0.2).requires_grad_()
    logits = torch.stack([readout.logits(h) for h in hidden[:, :-1]]).flatten(0, 1)
    teacher = torch.stack([readout.logits(h) for h in dense[:, :-1]]).flatten(0, 1)
    loss, kl = plain_loss(logits, teacher, ids[:, 1:].flatten(), ce_weight)
    (expected,) = torch.autograd.grad(loss, hidden)
    monkeypatch.setattr(student, "LOGIT_BYTES", 24 * readout.vocabulary * 7)  # seven tokens at a time
    gradient, found = loss_gradient(readout, hidden.detach(), dense, ids, ce_weight=ce_weight)
    assert float(kl.detach()) > 1e-3
    assert torch.allclose(found, kl, rtol=1e-4)
    assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_a_batch_learns_what_autograd_over_the_whole_model_says_however_it_is_cut(tiny, blocks, monkeypatch):
    model = tiny()
    names = [target.name for target in find_targets(model)]
    leaf = torch.tensor(0.8, requires_grad=True)
    weights = {name: model.get_submodule(name).weight.detach() for name in names}
    products = {name: lambda x, w=weights[name]: F.linear(x, leaf * w) for name in names}
    with torch.no_grad():
        teacher = model(input_ids=blocks[:4]).logits[:, :-1].flatten(0, 1)
    gradients = []
    for rows, activations in ((8, 1 << 40), (1, 1 << 40), (8, 0)):
        monkeypatch.setattr(student, "PASS_TOKENS", rows * blocks.shape[1])
        monkeypatch.setattr(student, "ACTIVATION_BYTES", activations)
        with Student(model, products, blocks) as pupil:
            kl = pupil.learn(blocks[:4], [leaf])
        gradients.append(leaf.grad.clone())
    functional = {f"{name}.weight": leaf * weight for name, weight in weights.items()}
    logits = torch.func.functional_call(model, functional, kwargs={"input_ids": blocks[:4]}).logits
    loss, _ = plain_loss(logits[:, :-1].flatten(0, 1), teacher, blocks[:4, 1:].flatten(), 0.0)
    (expected,) = torch.autograd.grad(loss / (4 * 15), leaf)
    assert kl == pytest.approx(float(loss.detach()) / (4 * 15), rel=1e-4)
    for gradient in gradients:
        assert torch.allclose(gradient, expected, rtol=1e-3)
    assert torch.equal(gradients[0], gradients[2])  # run again, not remembered


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_teaches_itself_and_the_model_comes_back_as_it_was(tiny, blocks, dtype):
    model = tiny(dtype=dtype)
    model.model.norm.weight.requires_grad_(True)
    targets = find_targets(model)
    modules = [model.get_submodule(target.name) for target in targets]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places = [parameter.data_ptr() for parameter in model.parameters()]
    with torch.no_grad():
        before = model(input_ids=blocks[:2]).logits
        with Student(model, {t.name: half(model, t.name) for t in targets}, blocks) as pupil:
            assert not torch.allclose(model(input_ids=blocks[:2]).logits.to(before), before, atol=1e-2)
            with pupil.teaching():
                taught = model(input_ids=blocks[:2]).logits
        after = model(input_ids=blocks[:2]).logits
    assert torch.allclose(taught.float(), before.float(), atol=0.1 if dtype == torch.bfloat16 else 0)
    assert torch.equal(after, before)
    assert [model.get_submodule(target.name) for target in targets] == modules
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.model.norm.weight.requires_grad
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_fetched_block_is_still_fetched_after_it_was_made_to_forget(tiny, blocks, monkeypatch):
    model = tiny()
    fetch_blocks(model, "cpu")
    targets = find_targets(model)
    forwards = [vars(layer)["forward"] for layer in model.model.layers]
    monkeypatch.setattr(student, "ACTIVATION_BYTES", 0)
    with Student(model, {t.name: lambda x: None for t in targets}, blocks):
        assert all(vars(layer)["forward"] not in forwards for layer in model.model.layers)
    assert [vars(layer).get("forward") for layer in model.model.layers] == forwards


def test_a_backward_pass_holds_no_copies_of_fetched_blocks(tiny, blocks):
    model = tiny()
    fetch_blocks(model, "cpu")
    leaf, copies = torch.tensor(0.8, requires_grad=True), []
    model.model.layers[0].mlp.act_fn.register_forward_hook(
        lambda *_: copies.append(weakref.ref(model.model.layers[0].mlp.up_proj.weight))
    )
    name = "model.layers.0.self_attn.q_proj"
    with Student(model, {name: lambda x: leaf * x}, blocks) as pupil:
        hidden = pupil.readout.hidden(blocks[:1])
        assert hidden.requires_grad
        gc.collect()
        assert copies[-1]() is None
        hidden.sum().backward()
    assert float(leaf.grad) != 0


def test_batches_are_halved_until_they_fit_into_memory(tiny, blocks):
    model = tiny()
    name = find_targets(model)[0].name
    leaf = torch.ones((), requires_grad=True)
    weight = model.get_submodule(name).weight.detach()
    seen = []

    def needs_memory(x):
        seen.append(len(x))
        if len(x) > 3:
            raise torch.OutOfMemoryError("too many")
        return F.linear(x, 0.9 * leaf * weight)

    with Student(model, {name: needs_memory}, blocks) as pupil:
        pupil.learn(blocks[:12], [leaf])
        halved = leaf.grad.clone()
        assert seen == [12, 6, 3, 3, 3, 3]
    with Student(model, {name: lambda x: F.linear(x, 0.9 * leaf * weight)}, blocks) as pupil:
        pupil.learn(blocks[:12], [leaf])
    assert torch.allclose(leaf.grad, halved, rtol=1e-4)


def test_training_needs_text(tiny, blocks):
    with pytest.raises(InvalidInput, match="at least two tokens"):
        Student(tiny(), {}, blocks[:, :1])
