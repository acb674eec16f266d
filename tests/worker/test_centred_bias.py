"""Factors of centred features: the bias that goes with them, in a trial and in a checkpoint."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from ranksearch.search.errors import UnsupportedModel
from ranksearch.worker.bank import build_bank
from ranksearch.worker.calibrate import calibrate
from ranksearch.worker.checkpoint import export
from ranksearch.worker.evaluate import Evaluation
from ranksearch.worker.merge import merge_to_dense
from ranksearch.worker.models import load_model
from ranksearch.worker.plain import make_plain
from ranksearch.worker.prefix import PrefixModel
from ranksearch.worker.targets import find_targets
from ranksearch.worker.tiny import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer("some words to learn from, and some more words\n" * 20, 290)


def centred(model, blocks):
    targets = find_targets(model)
    return targets, build_bank(model, targets, calibrate(model, targets, blocks, pool=32), metric="centred", full=True)


def input_of(model, name, blocks):
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(input_ids=blocks)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # without and with biases of their own
@torch.no_grad()
def test_the_mean_output_is_exact_at_every_rank(tiny, blocks, family):
    model = tiny(family)
    targets, bank = centred(model, blocks)
    for target in targets:
        x, dense = input_of(model, target.name, blocks), model.get_submodule(target.name)
        with PrefixModel(model, bank, [target]) as prefix:
            layer = model.get_submodule(target.name)
            for rank in range(1, target.full_rank):
                prefix.set_ranks({target.name: rank})
                found, expected = (run(x).flatten(0, 1).mean(0) for run in (layer, dense))
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            prefix.set_dense()
            assert layer.bias is dense.bias
        assert model.get_submodule(target.name) is dense


@pytest.mark.parametrize(
    ("family", "form"),
    [("llama", "factored"), ("llama", "pivoted"), ("qwen2", "pivoted"), ("gpt2", "factored"), ("mixtral", "factored")],
)
def test_a_checkpoint_scores_like_the_trial(tiny, blocks, tokenizer, tmp_path, family, form):
    model = tiny(family, vocab_size=300)
    make_plain(model)
    targets, bank = centred(model, blocks)
    ranks = {target.name: 3 + index % 3 for index, target in enumerate(targets)}
    ranks[targets[1].name] = targets[1].full_rank
    evaluation = Evaluation(model, blocks[:8])
    with PrefixModel(model, bank, targets) as prefix:
        prefix.set_ranks(ranks)
        trial = evaluation.score(model)
    parts = {"model": model, "tokenizer": tokenizer, "pairs": bank.pair, "ranks": ranks, "targets": targets}
    biases = partial(_bias, model, bank)
    sizes = export(tmp_path / "out", **parts, biases=biases, form=form)
    bare = export(tmp_path / "bare", **parts, form=form)
    final, _ = load_model(tmp_path / "out")
    scores = evaluation.score(final)
    assert scores.perplexity == pytest.approx(trial.perplexity, rel=1e-4)
    assert scores.kl == pytest.approx(trial.kl, rel=1e-3, abs=1e-6)
    assert evaluation.score(load_model(tmp_path / "bare")[0]).perplexity != pytest.approx(trial.perplexity, rel=1e-3)
    entries = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["targets"]
    below = [target for target in targets if ranks[target.name] < target.full_rank]
    own = {target.name for target in targets if model.get_submodule(target.name).bias is not None}
    for target in targets:
        assert entries[target.name]["bias"] is (target in below or target.name in own)
        assert entries[target.name].get("bias_added", False) is (target in below and target.name not in own)
    assert sizes.targets == bare.targets
    assert sizes.model - bare.model == sum(target.out_features for target in below if target.name not in own)


def test_biases_without_a_place_in_the_model_cannot_be_multiplied_out(tiny, blocks, tokenizer, tmp_path):
    for family in ("llama", "gpt2"):
        model = tiny(family, vocab_size=300)
        make_plain(model)
        targets, bank = centred(model, blocks)
        ranks = {target.name: 3 for target in targets}
        parts = {"tokenizer": tokenizer, "pairs": bank.pair, "ranks": ranks, "targets": targets}
        export(tmp_path / family, model=model, **parts, biases=partial(_bias, model, bank))
    with pytest.raises(UnsupportedModel, match="has no place"):
        merge_to_dense(tmp_path / "llama", tmp_path / "dense")
    merge_to_dense(tmp_path / "gpt2", tmp_path / "dense")
    evaluation = Evaluation(model, blocks[:8])
    merged, factored = (load_model(tmp_path / name)[0] for name in ("dense", "gpt2"))
    assert evaluation.score(merged).perplexity == pytest.approx(evaluation.score(factored).perplexity, rel=1e-4)


def _bias(model, bank, name, rank):
    return bank.bias(name, rank, model.get_submodule(name))
