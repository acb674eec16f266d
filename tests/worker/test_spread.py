from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ranksearch.search.errors import InvalidInput
from ranksearch.search.space import RankSpace
from ranksearch.worker import hardware, loaded, models, soco, targets
from ranksearch.worker.bank import FactorBank, build_bank
from ranksearch.worker.calibrate import calibrate
from ranksearch.worker.distill import distill
from ranksearch.worker.evaluate import Evaluation
from ranksearch.worker.fused import run_eagerly
from ranksearch.worker.plain import as_loaded, make_plain
from ranksearch.worker.prefix import PrefixModel
from ranksearch.worker.readout import Readout
from ranksearch.worker.sequential import resolve
from ranksearch.worker.spread import device_of, devices_of, lay, spread_blocks
from ranksearch.worker.stages import known_of
from ranksearch.worker.targets import find_targets
from ranksearch.worker.workbench import Workbench

from .here import small_spec
from .pretend import ONE, TWO, pretending

CARDS = [torch.device("cuda:0"), torch.device("cuda:1")]


@pytest.mark.parametrize(
    ("rooms", "beside", "places"),
    [
        ([100, 100], 0, [0, 0, 1, 1]),
        ([100, 100], 20, [0, 1, 1, 1]),
        ([45, 15], 10, [0, 0, 0, 1]),
        ([20, 20], 0, [0, 0, 1, 1]),
        ([45, 15, 100], 42, [2, 2, 2, 2]),
        ([19, 21], 0, None),
        ([9, 100], 10, None),
    ],
)
def test_rooms_are_filled_to_the_same_share(rooms, beside, places):
    assert lay([10] * 4, rooms, beside=beside) == places


def placed(model, devices):
    """The model in plain layers, on one device or its blocks on two, and its targets."""
    make_plain(model.requires_grad_(False))
    found = find_targets(model)
    if len(devices) == 1:
        return model.to(devices[0]), found
    names = [name for name, _ in model.named_parameters()]
    assert spread_blocks(model, devices, [sum(p.nbytes for p in model.parameters())] * 2)
    assert devices_of(model) == devices
    assert [name for name, _ in model.named_parameters()] == names  # what was tied still is
    return model, found


def measured(model, found, blocks) -> dict[str, Any]:
    """What calibration, factoring, trials and the sequential step come to."""
    calibration = calibrate(model, found, blocks, gradients=True)
    sections = calibrate(model, found, blocks, gradients=True, memory_limit=1)
    bank = build_bank(model, found, calibration, metric="two_sided")
    pairs = {target.name: bank.pair(target.name, 1 + target.break_even // 2) for target in found}
    text = Evaluation(model, blocks, batch_tokens=32, chunk_tokens=16)
    with PrefixModel(model, bank, found) as prefix:
        prefix.set_pairs(pairs)
        trial = text.score(model)
        known = {"leader": calibration.leader, "gradients": calibration.gradients}
        resolved = resolve(prefix, pairs, found, blocks, **known, strength=0.5)
        prefix.set_pairs(resolved.pairs)
        after = text.score(model)
    for target in found:
        assert bank.right[target.name].device == device_of(model, target.name)
        assert resolved.pairs[target.name][0].device == device_of(model, target.name)
    with as_loaded(model):  # other modules than those that were placed
        run_eagerly(model)  # the kernel for all experts asks for what a CPU does not have
        logits = model(input_ids=blocks.to(devices_of(model)[0])).logits.cpu()
    return {
        "calibration": calibration,
        "sections": sections,
        "scores": (text.dense, trial, after),
        "facts": resolved.facts,
        "logits": logits,
    }


def tensors(value: Any) -> list[torch.Tensor]:
    parts = [part for name in ("inputs", "gradients") for part in getattr(value, name).values()]
    return [*parts, torch.tensor(list(value.similarity.values()))]


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "settings"), [("gpt2", {"n_layer": 3}), ("mixtral", {"num_local_experts": 2, "num_experts": 2})]
)
def test_two_devices_find_what_one_does(tiny, blocks, family, settings):
    with pretending():
        one = measured(*placed(tiny(family, **settings), [ONE]), blocks[:2])
        two = measured(*placed(tiny(family, **settings), [ONE, TWO]), blocks[:2])
    for part in ("calibration", "sections"):
        assert all(map(torch.equal, tensors(one[part]), tensors(two[part])))
    assert one["scores"] == two["scores"]
    assert one["facts"] == two["facts"]
    assert torch.equal(one["logits"], two["logits"])


@torch.no_grad()
def test_hidden_states_come_from_the_main_device_though_the_last_block_makes_them(tiny, blocks):
    model = tiny("opt", do_layer_norm_before=False, word_embed_proj_dim=24)
    expected = Readout(model, blocks).hidden(blocks[:2])
    with pretending():
        readout = Readout(placed(model, [ONE, TWO])[0], blocks)
        hidden = readout.hidden(blocks[:2])
        assert hidden.device == readout.device == ONE
        assert torch.allclose(hidden.cpu(), expected, atol=1e-5)


def test_two_devices_train_what_one_does(tiny, blocks, monkeypatch):
    monkeypatch.setattr(soco, "STEPS", 4)
    monkeypatch.setattr("ranksearch.worker.student.ACTIVATION_BYTES", 0)  # blocks run again in the backward pass

    def trained(devices):
        model, found = placed(tiny("qwen2"), devices)
        bank = build_bank(model, found, None, metric="weight", full=True)
        chosen = soco.soco(model, bank, RankSpace(targets=found), 0.7, blocks=blocks, tokens=4 * 16)
        pairs = {target.name: bank.pair(target.name, 4) for target in found}
        best = distill(model, pairs, blocks=blocks, evaluation=blocks[:2], tokens=2 * 16)
        return [*(s.cpu() for s in chosen.scores.values()), *(side.cpu() for p in best.pairs.values() for side in p)]

    with pretending():
        assert all(map(torch.equal, trained([ONE]), trained([ONE, TWO])))


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[torch.device, int]:
    """Free bytes of two pretend devices, to be changed, and of the CPU."""
    free = {ONE: 0, TWO: 0, torch.device("cpu"): 1 << 40}
    for module in (models, loaded):
        monkeypatch.setattr(module, "free_bytes", free.__getitem__)
    monkeypatch.setattr(loaded, "memory_bytes", lambda device: 0)
    # these tensors are no plain ones
    monkeypatch.setattr(targets, "_check_unquantized", lambda name, module: None)
    return free


def proven(bench: Workbench, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A job from its text to the proof of its checkpoint."""
    files = {name: str(folder / name) for name in ("blocks", "calibration", "bank")}
    facts = bench.prepare(job, files["blocks"], progress=print)
    job = {**job, **known_of(lambda name: files[name], {**facts, "blocks": "blocks"}), **files}
    bench.calibrate(job, files["calibration"], progress=print)
    bench.factor(job, files["bank"], progress=print)
    ranks = {target["name"]: 5 for target in facts["targets"]}
    losses = bench.chunk(job, 0, ranks, 0, progress=print)["losses"]
    bench.refine(job, ranks, 0.5, str(folder / "refined"), progress=print)
    vectors = dict.fromkeys(("uniform", "prior", "best"), ranks)
    proof = bench.finish(job, vectors, str(folder / "checkpoint"), str(folder / "refined"), progress=print)
    return {"losses": losses, "scores": proof["scores"], "parameters": proof["parameters"]}


def job_of(folder: Path, model: Any) -> dict[str, Any]:
    spec = small_spec(folder, model, budget={"kept": [0.5]}, method={"refine": ["sequential"]})
    job = {"id": "job_a", "spec": spec, "source": str(folder / "model"), "trust_remote_code": False}
    return job | {"cache_dir": str(folder / "cache")}


def test_a_job_runs_on_two_devices_where_one_is_too_small(tiny, tmp_path, monkeypatch, free):
    monkeypatch.setenv("RANKSEARCH_SPEED_SECONDS", "0.01")
    model = tiny(vocab_size=300, tie_word_embeddings=True)
    job, size = job_of(tmp_path, model), sum(p.nbytes for p in model.parameters())
    free |= {ONE: size, TWO: size}  # of which weights may fill the better half
    one = proven(Workbench("cpu"), job, tmp_path)
    with pretending():
        bench = Workbench("meta:0,meta:1")
        two = proven(bench, job, tmp_path)
        assert devices_of(bench.loaded.model(job)[0]) == [ONE, TWO]
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert two["parameters"] == one["parameters"]
        for row, scores in one["scores"].items():
            assert two["scores"][row]["evaluation"]["perplexity"] == pytest.approx(scores["evaluation"]["perplexity"])


def test_factors_lie_beside_their_targets_where_there_is_room(tiny, blocks, tmp_path, free):
    with pretending():
        model, found = placed(tiny(), [ONE, TWO])
        bank = build_bank(model, found, None, metric="weight", file=tmp_path / "bank")
        size = (tmp_path / "bank").stat().st_size
        free |= {ONE: size, TWO: size // 4}
        places = loaded.beside(found, model, size)
        assert {device_of(model, name): place.type for name, place in places.items()} == {ONE: "meta", TWO: "cpu"}
        text, ranks = Evaluation(model, blocks[:2]), {target.name: 3 for target in found}
        scores = []
        for each in (bank, FactorBank.load(tmp_path / "bank", places)):
            with PrefixModel(model, each, found) as prefix:
                prefix.set_ranks(ranks)
                scores.append(text.score(model))
        assert scores[0] == scores[1]


def test_of_a_model_too_large_for_both_devices_blocks_are_fetched(tiny, tmp_path, monkeypatch, free):
    model = tiny(vocab_size=300)
    job, asked = job_of(tmp_path, model), list[torch.device]()
    monkeypatch.setattr(models, "fetch_blocks", lambda model, device: asked.append(device))
    free |= dict.fromkeys((ONE, TWO), sum(p.nbytes for p in model.parameters()) // 2)
    models.load_model(job["source"], device=[ONE, TWO])
    assert asked == [ONE]


@pytest.mark.parametrize("device", ["cpu,cpu", "meta:0,meta:0", "meta:0,cpu", "meta:0,"])
def test_devices_that_cannot_work_together_are_refused(device):
    with pytest.raises(InvalidInput, match=r"several GPUs, each once|no device ''"):
        hardware.settle(device)


def test_several_devices_are_one_to_the_server():
    with pretending():
        facts = hardware.device_facts(*hardware.settle("meta:0, meta:1"))
    assert facts["device"] == "meta:0,meta:1"
    assert facts["name"].startswith("2 x ")
    assert facts["memory_bytes"] == 2 * hardware.memory_bytes(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_cards_find_what_one_does(tiny, blocks):
    one = measured(*placed(tiny("gpt2"), CARDS[:1]), blocks[:4])
    two = measured(*placed(tiny("gpt2"), CARDS), blocks[:4])
    for part in ("calibration", "sections"):
        assert all(map(torch.allclose, tensors(one[part]), tensors(two[part])))
    for a, b in zip(one["scores"], two["scores"], strict=True):
        assert a.nll == pytest.approx(b.nll, rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_job_runs_on_two_cards(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("RANKSEARCH_SPEED_SECONDS", "0.01")
    model = tiny(vocab_size=300, tie_word_embeddings=True)
    job, size = job_of(tmp_path, model), sum(p.nbytes for p in model.parameters())
    one = proven(Workbench("cuda:0"), job, tmp_path)
    monkeypatch.setattr(models, "free_bytes", lambda device: size)
    bench = Workbench("cuda:0,cuda:1")
    two = proven(bench, job, tmp_path)
    assert devices_of(bench.loaded.model(job)[0]) == CARDS
    for row, scores in one["scores"].items():
        expected = scores["evaluation"]["perplexity"]
        assert two["scores"][row]["evaluation"]["perplexity"] == pytest.approx(expected, rel=1e-3)
