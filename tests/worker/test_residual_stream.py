from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from ranksearch.worker.calibrate import calibrate
from ranksearch.worker.plain import make_plain
from ranksearch.worker.residual_stream import ResidualStream
from ranksearch.worker.targets import find_targets

NEOX = {
    "vocab_size": 96,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def catch(model, paths, blocks):
    """Path -> first input (where it is a tensor) and first output of each module."""
    seen = {}

    def keep(module, args, kwargs, output, path):
        hidden = args[0] if args else kwargs["hidden_states"]
        seen[path] = hidden.detach().clone(), (output if torch.is_tensor(output) else output[0]).detach().clone()

    hooks = [
        model.get_submodule(path).register_forward_hook(
            lambda module, args, kwargs, output, path=path: keep(module, args, kwargs, output, path), with_kwargs=True
        )
        for path in paths
    ]
    with torch.no_grad():
        model(input_ids=blocks)
    for hook in hooks:
        hook.remove()
    return seen


def cosine(a, b):
    a, b = a.double().flatten(0, -2), b.double().reshape(-1, b.shape[-1])
    return float(F.cosine_similarity(a, b.view_as(a), dim=-1).mean())


def cosines(model, stack, sublayers, blocks, *, followed):
    """`block.sublayer` -> cosine, by hand, sublayers in the order in which they run."""
    found = {}
    for index in range(len(model.get_submodule(stack))):
        block = f"{stack}.{index}"
        seen = catch(model, [block, *(f"{block}.{name}" for name in sublayers)], blocks)
        stream, end = seen[block]
        whole = cosine(stream, end)
        for name in sublayers:
            after = stream + seen[f"{block}.{name}"][1].view_as(stream)
            found[f"{block}.{name}"] = cosine(stream, after) if followed else whole
            stream = after
        assert torch.allclose(stream, end, atol=1e-4) == followed
    return found


CASES = {
    "llama": ("model.layers", ("self_attn", "mlp"), True),
    "gpt_neox": ("gpt_neox.layers", ("attention", "mlp"), True),  # both read the block's input
    "gemma2": ("model.layers", ("self_attn", "mlp"), False),  # what is added is normalised first
    "mixtral": ("model.layers", ("self_attn", "mlp"), True),
    "opt": ("model.decoder.layers", ("self_attn", "fc2"), True),
    "opt, post-norm": ("model.decoder.layers", ("self_attn", "fc2"), False),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tiny, blocks):
    name = request.param
    if name == "gpt_neox":
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **NEOX)).eval()
    else:
        settings = {"do_layer_norm_before": False} if "post" in name else {}
        model = tiny(name.split(",")[0], **settings)
        make_plain(model)
    stack, sublayers, followed = CASES[name]
    return model, cosines(model, stack, sublayers, blocks, followed=followed)


def test_similarity_is_the_cosine_before_and_after_the_sublayer(case, blocks):
    model, expected = case
    targets = find_targets(model)
    found = calibrate(model, targets, blocks, batch_tokens=48).similarity
    for target in targets:
        name = target.name.replace(".fc1", ".fc2")  # one sublayer
        (path,) = (path for path in expected if f"{name}.".startswith(f"{path}."))
        assert found[target.name] == pytest.approx(expected[path], abs=1e-5), target.name
    assert len({round(value, 4) for value in found.values()}) > 1


def test_sections_and_batches_do_not_change_similarities(case, blocks):
    model, _ = case
    targets = find_targets(model)
    whole = calibrate(model, targets, blocks[:8], batch_tokens=4 * 16)
    split = calibrate(model, targets, blocks[:8], gradients=True, batch_tokens=4 * 16, memory_limit=1)
    small = calibrate(model, targets, blocks[:8], batch_tokens=1)
    assert whole.similarity == split.similarity
    assert whole.similarity == pytest.approx(small.similarity, abs=1e-6)


def test_a_sublayer_that_never_runs_is_similar_to_nothing(tiny):
    model = tiny()
    targets = find_targets(model)
    with ResidualStream(model, targets) as stream:
        pass
    assert stream.similarity(targets[0].name) == 0.0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
