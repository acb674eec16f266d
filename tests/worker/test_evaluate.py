from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from ranksearch.search.errors import InvalidInput, NumericalError, UnsupportedModel
from ranksearch.worker.bank import build_bank
from ranksearch.worker.evaluate import Evaluation, Scores
from ranksearch.worker.prefix import PrefixModel
from ranksearch.worker.readout import Readout
from ranksearch.worker.targets import find_targets


@torch.no_grad()
def naive(dense, model, blocks):
    """Perplexity and KL from whole logits."""
    p, q = (m(input_ids=blocks).logits[:, :-1].double().log_softmax(-1) for m in (dense, model))
    nll = F.nll_loss(q.flatten(0, 1), blocks[:, 1:].flatten())
    return math.exp(nll), float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gemma2", "granite", "mixtral"])
def test_scores_equal_those_from_whole_logits(tiny, blocks, family):
    model = tiny(family)
    targets = find_targets(model)
    evaluation = Evaluation(model, blocks, batch_tokens=80, chunk_tokens=7)
    expected, _ = naive(model, model, blocks)
    assert evaluation.dense.perplexity == pytest.approx(expected, rel=1e-5)
    assert evaluation.dense.kl == 0
    with PrefixModel(model, build_bank(model, targets, None, metric="weight"), targets) as prefix:
        prefix.set_ranks({target.name: 1 for target in targets})
        scores = evaluation.score(model)
        perplexity, kl = naive(tiny(family), model, blocks)
    assert scores.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert scores.kl == pytest.approx(kl, rel=1e-4, abs=1e-6)
    assert kl > 1e-3
    assert len(scores.nll) == 40
    assert scores.tokens == 40 * 15


@pytest.mark.parametrize(("family", "linear"), [("llama", True), ("opt", True), ("gemma2", False), ("granite", False)])
def test_logits_that_are_not_a_product_are_noticed(tiny, blocks, family, linear):
    model = tiny(family)
    readout = Readout(model, blocks)
    assert readout.linear == linear
    with torch.no_grad():
        hidden = readout.hidden(blocks[:2])
        found = readout.logits(hidden.flatten(0, 1)).view(2, 16, -1)
        assert torch.allclose(found, model(input_ids=blocks[:2]).logits, atol=1e-6)


@pytest.mark.parametrize(("dtype", "cap"), [(torch.bfloat16, 15.0), (torch.float16, 30.0)])
def test_a_soft_cap_that_moves_no_logit_far_is_noticed(tiny, blocks, dtype, cap):
    model = tiny("gemma2", dtype=dtype, final_logit_softcapping=cap)
    readout = Readout(model, blocks)
    with torch.no_grad():
        plain = model.lm_head(readout.hidden(blocks[:1, :8])).float()
        capped = model(input_ids=blocks[:1, :8]).logits.float()
    assert (plain - capped).abs().max() < 8 * torch.finfo(dtype).eps * capped.abs().max()
    assert not readout.linear


def test_logits_that_depend_on_more_than_the_hidden_state_are_refused(tiny, blocks):
    model = tiny()
    forward = model.forward

    def moody(input_ids, **kwargs):
        output = forward(input_ids=input_ids, **kwargs)
        output.logits = output.logits + input_ids.unsqueeze(-1)
        return output

    model.forward = moody
    with pytest.raises(UnsupportedModel, match="do not follow"):
        Readout(model, blocks[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_single(tiny, blocks, dtype):
    model, half = tiny(), tiny(dtype=dtype)
    targets = find_targets(model)
    bank = build_bank(model, targets, None, metric="weight")
    ranks = {target.name: 6 for target in targets}
    single, low = Evaluation(model, blocks), Evaluation(half, blocks)
    assert low.dense.kl == 0
    with PrefixModel(model, bank, targets) as prefix, PrefixModel(half, bank, targets) as rounded:
        prefix.set_ranks(ranks)
        rounded.set_ranks(ranks)
        a, b = single.score(model), low.score(half)
    assert b.perplexity == pytest.approx(a.perplexity, rel=2e-2)
    assert b.kl == pytest.approx(a.kl, rel=5e-2)


@pytest.mark.parametrize("chunks", [1, 3, 8, 100])
def test_the_union_of_the_parts_is_the_whole_to_the_last_bit(tiny, blocks, chunks):
    model = tiny(dtype=torch.bfloat16)
    targets = find_targets(model)
    evaluation = Evaluation(model, blocks, batch_tokens=48)
    with PrefixModel(model, build_bank(model, targets, None, metric="weight"), targets) as prefix:
        prefix.set_ranks({target.name: 4 for target in targets})
        whole = evaluation.score(model)
        parts = []
        for part in evaluation.score_chunks(model, chunks):
            assert not torch.is_inference_mode_enabled()
            parts.append(part)
        assert evaluation.score(model) == whole
    assert len(parts) == min(chunks, 14)
    union = Scores.union(parts)
    assert (union.nll, union.tokens, union.perplexity) == (whole.nll, whole.tokens, whole.perplexity)
    assert union.kl == pytest.approx(whole.kl, rel=1e-12)


def test_another_model_with_the_same_head_is_scored_and_one_with_another_head_is_not(tiny, blocks):
    model, other = tiny(), tiny()
    evaluation = Evaluation(model, blocks)
    assert evaluation.score(other) == evaluation.dense
    other.lm_head.weight = torch.nn.Parameter(other.lm_head.weight * 2)
    with pytest.raises(InvalidInput, match="another output head"):
        evaluation.score(other)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize(("first", "second"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_head_in_another_dtype_is_the_same_head(tiny, blocks, family, first, second):
    evaluation = Evaluation(tiny(family, dtype=torch.bfloat16).to(first), blocks)
    scores = evaluation.score(tiny(family, dtype=torch.bfloat16).to(second))
    assert scores.perplexity == pytest.approx(evaluation.dense.perplexity, rel=2e-2)
    assert scores.kl == pytest.approx(0, abs=1e-2)


def test_a_head_that_was_rounded_is_the_same_head(tiny, blocks):
    model = tiny()
    evaluation = Evaluation(model, blocks)
    scores = evaluation.score(tiny(dtype=torch.bfloat16))
    assert scores.perplexity == pytest.approx(evaluation.dense.perplexity, rel=2e-2)


def test_a_pruner_gets_its_parts_however_much_fits_into_a_batch(tiny, blocks):
    model = tiny()
    evaluation = Evaluation(model, blocks, batch_tokens=1 << 20)
    assert len(list(evaluation.score_chunks(model))) == 8


def test_scores_that_are_not_finite_are_an_error(tiny, blocks):
    model = tiny()
    evaluation = Evaluation(model, blocks)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="not finite"):
        evaluation.score(model)
    with pytest.raises(NumericalError, match="not finite"):
        Evaluation(model, blocks)


@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (8,)])
def test_sequences_without_a_predicted_token_are_refused(tiny, shape):
    with pytest.raises(InvalidInput, match="at least two tokens"):
        Evaluation(tiny(), torch.zeros(shape, dtype=torch.long))


def peak_bytes(run) -> int:
    """Most bytes that torch held at once during `run`, above what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert peak > 0
    return peak


def test_a_trial_and_its_reference_need_less_than_a_third_of_the_model_and_its_bank(tiny, tmp_path):
    width = {"vocab_size": 2048, "hidden_size": 192, "intermediate_size": 512, "head_dim": 32, "num_key_value_heads": 6}
    depth = {"num_attention_heads": 6, "num_hidden_layers": 6, "max_position_embeddings": 128}
    model = tiny(dtype=torch.bfloat16, **width, **depth, tie_word_embeddings=True)
    targets = find_targets(model)
    bank = build_bank(model, targets, None, metric="weight")
    held = sum(p.nbytes for p in model.parameters()) + bank.nbytes
    blocks = torch.arange(128 * 128).remainder(2048).view(128, 128)

    def trial():
        evaluation = Evaluation(model, blocks, scratch=tmp_path)
        with PrefixModel(model, bank, targets) as prefix:
            prefix.set_ranks({target.name: target.break_even // 2 for target in targets})
            evaluation.score(model)
        assert not list(tmp_path.iterdir())

    assert blocks.numel() * 192 * 2 > 0.5 * held  # what is kept of the dense model is too much for memory
    assert held + peak_bytes(trial) <= 1.3 * held
