from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import delete
from torch import nn

from ranksearch.search.errors import NumericalError
from ranksearch.search.spec import JobSpec
from ranksearch.service.store import tables
from ranksearch.service.store.database import open_database, writing
from ranksearch.service.store.settings import Settings
from ranksearch.worker import stages
from ranksearch.worker.ahead import Ahead
from ranksearch.worker.bank import build_bank
from ranksearch.worker.calibrate import Calibration, calibrate
from ranksearch.worker.running_job import RunningJob
from ranksearch.worker.targets import find_targets

from .here import HereAndNow, small_spec, worker_here

CPU = torch.device("cpu")


def begun_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ahead"]


@pytest.fixture(autouse=True)
def threads_end() -> Iterator[None]:
    yield
    assert not begun_threads()


@pytest.fixture(params=["llama", "mixtral"])
def model(request: pytest.FixtureRequest, tiny: Callable[..., nn.Module]) -> nn.Module:
    return tiny(request.param, num_hidden_layers=3)


def collect(model: nn.Module, blocks: torch.Tensor, **more: Any) -> Calibration:
    return calibrate(model, find_targets(model), blocks, gradients=True, memory_limit=1, **more)


def begin(model: nn.Module, file: Path) -> Ahead:
    targets = find_targets(model)
    return Ahead(partial(build_bank, model, targets, metric="two_sided"), targets, CPU, file)


@pytest.mark.parametrize("on_disk", [True, False])
def test_the_bank_is_the_one_that_factoring_afterwards_gives(
    model: nn.Module, blocks: torch.Tensor, tmp_path: Path, on_disk: bool
) -> None:
    file = tmp_path / "calibration" if on_disk else None
    with begin(model, tmp_path / "ahead") as ahead:
        calibration = collect(model, blocks, file=file, complete=ahead.add)
    if file is not None:
        file.rename(tmp_path / "stored")  # as a job does meanwhile
    told: list[float] = []
    assert ahead.finish(tmp_path / "bank", told.append)
    assert told == sorted(told)
    build_bank(model, find_targets(model), calibration, metric="two_sided", file=tmp_path / "afterwards")
    assert (tmp_path / "bank").read_bytes() == (tmp_path / "afterwards").read_bytes()
    assert not (tmp_path / "ahead").exists()


def test_one_section_starts_no_thread(tiny: Callable[..., nn.Module], blocks: torch.Tensor, tmp_path: Path) -> None:
    model = tiny()
    with begin(model, tmp_path / "ahead") as ahead:
        calibrate(model, find_targets(model), blocks, gradients=True, complete=ahead.add)
        assert not begun_threads()
    assert not ahead.finish(tmp_path / "bank")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("broken", [0, 2])  # found when the calibration is over, and while it is under way
def test_a_target_that_cannot_be_factored_is_named(
    tiny: Callable[..., nn.Module], blocks: torch.Tensor, tmp_path: Path, broken: int
) -> None:
    model = tiny(num_hidden_layers=3)
    ahead = begin(model, tmp_path / "ahead")

    def add(part: Calibration) -> None:
        name = f"model.layers.{broken}.mlp.up_proj"
        if name in part.gradients:
            part.gradients[name][0, 0] = float("nan")
        ahead.add(part)
        if name in part.gradients and broken:
            ahead._thread.join()

    def run() -> None:
        with ahead:
            collect(model, blocks, complete=add)
        ahead.finish(tmp_path / "bank")

    with pytest.raises(NumericalError) as caught:
        run()
    assert caught.value.data["target"] == f"model.layers.{broken}.mlp.up_proj"
    assert not list(tmp_path.iterdir())


def test_what_may_work_afterwards_is_left_to_be_done_then(
    tiny: Callable[..., nn.Module], blocks: torch.Tensor, tmp_path: Path
) -> None:
    model = tiny(num_hidden_layers=3)
    with begin(model, tmp_path / "no such folder" / "bank") as ahead:
        collect(model, blocks, complete=ahead.add)
    assert not ahead.finish(tmp_path / "bank")


def test_a_calibration_that_begins_again_is_factored_afterwards(
    tiny: Callable[..., nn.Module], blocks: torch.Tensor, tmp_path: Path
) -> None:
    model, runs_out = tiny(num_hidden_layers=3), [True]

    def run_out(*_: object) -> None:
        if torch.is_grad_enabled() and runs_out:
            runs_out.pop()
            raise torch.OutOfMemoryError

    model.model.layers[0].mlp.register_forward_pre_hook(run_out)
    with begin(model, tmp_path / "ahead") as ahead:
        collect(model, blocks, complete=ahead.add)
    assert not runs_out
    assert not ahead.finish(tmp_path / "bank")
    assert not list(tmp_path.iterdir())


def test_nothing_is_queued_that_nobody_takes(
    tiny: Callable[..., nn.Module], blocks: torch.Tensor, tmp_path: Path
) -> None:
    model = tiny(num_hidden_layers=3)
    ahead = begin(model, tmp_path / "ahead")
    ahead.drop()
    collect(model, blocks, complete=ahead.add)
    assert ahead._parts.get_nowait() is None
    assert ahead._parts.empty()


@pytest.mark.one_database
def test_a_job_finds_the_bank_that_was_begun_and_makes_it_after_a_crash(
    settings: Settings, allowed: Path, tiny: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ranksearch.worker.sections.MOST_ON_DEVICE", 1)
    engine, device = open_database(settings), HereAndNow()
    worker = worker_here(settings, engine, device)
    spec = small_spec(
        allowed,
        tiny(num_hidden_layers=3, vocab_size=300),
        budget={"kept": [0.5]},
    )

    def job(*, crashes: bool) -> tuple[dict[str, Any], dict[str, Any], bool]:
        created = worker.jobs.create(JobSpec.model_validate(spec))
        worker.jobs.set_running(created.id, worker.identity)
        run = RunningJob(worker, created)
        run.enter("prepare")
        prepared = stages.prepare(run)
        run.known = stages.known_of(worker.artifacts.path, prepared)
        calibrated = stages.calibrate(run, prepared)
        run.known = stages.known_of(worker.artifacts.path, prepared, calibrated)
        begun = device.bench.loaded.ahead({"id": created.id}) is not None
        if crashes:
            device.crash()
        factored = stages.factor(run, prepared, calibrated)
        run.put_away()
        return calibrated, factored, begun

    def forget(kind: str) -> None:
        with writing(engine) as connection:
            connection.execute(delete(tables.artifact).filter_by(kind=kind))

    calibrated, factored, begun = job(crashes=False)
    assert begun
    assert not calibrated["cache_hit"]
    assert not factored["cache_hit"]
    again = job(crashes=False)
    assert again[0]["cache_hit"]
    assert again[1]["cache_hit"]
    forget("bank")
    _, afterwards, _ = job(crashes=False)  # of a calibration that was there
    assert not afterwards["cache_hit"]
    forget("bank")
    forget("calibration")
    crashed, made_again, begun = job(crashes=True)
    assert begun
    assert afterwards["bank"] == made_again["bank"] == factored["bank"]
    assert crashed["calibration"] == calibrated["calibration"]
    assert device.asked.count("calibrate") == 2
    assert device.asked.count("factor") == 3
    device.bench.recover()
    engine.dispose()
