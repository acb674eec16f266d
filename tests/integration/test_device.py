"""The device process and the agent's end of it."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch

from ranksearch.search.errors import BrokenWeights, InvalidInput, OutOfMemory, RanksearchError, StorageFull
from ranksearch.worker.device import error_from
from ranksearch.worker.device_client import DeviceClient, DeviceDied
from ranksearch.worker.hardware import settle
from ranksearch.worker.known_errors import as_known_error
from tests.integration.machine import ROOT


@pytest.fixture(scope="module")
def client() -> Iterator[DeviceClient]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(ROOT / ".ns"))
        environment.setenv("OMP_NUM_THREADS", "1")
        client = DeviceClient("auto" if torch.cuda.is_available() else "cpu")
        yield client
        client.kill()


def test_it_says_what_it_is(client: DeviceClient) -> None:
    facts = client.start()
    assert torch.device(facts["device"]).type in ("cpu", "cuda")
    assert facts["memory_bytes"] > 1e8
    assert facts["flops"] > 1e6


def test_a_defect_is_told_and_survived(client: DeviceClient) -> None:
    client.start()
    before = client.pid
    with pytest.raises(RanksearchError, match="no_such_operation failed: KeyError"):
        client.ask("no_such_operation", job={})
    assert client.ask("close", job={}) == {}
    assert client.pid == before


def test_a_wait_can_be_broken_off(client: DeviceClient) -> None:
    client.start()
    pid = client.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)  # as a long computation, it neither answers nor heeds SIGTERM

    def enough() -> None:
        raise TimeoutError

    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        client.ask("close", job={}, check=enough)
    assert time.monotonic() - begun < 2
    assert not psutil.pid_exists(pid)


def test_its_death_is_told_once_and_then_repaired(client: DeviceClient) -> None:
    client.start()
    assert client.pid is not None
    psutil.Process(client.pid).kill()
    with pytest.raises(DeviceDied, match="SIGKILL"):
        client.ask("close", job={})
    assert client.ask("close", job={}) == {}


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), StorageFull),
        (RuntimeError("I/O error: No space left on device (os error 28)"), StorageFull),
        (MemoryError(), OutOfMemory),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), OutOfMemory),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."), OutOfMemory),
        (BrokenWeights("The weight a holds NaN.", tensor="a"), BrokenWeights),
        (ValueError("something else"), type(None)),
    ],
)
def test_errors_a_user_can_act_on_are_named(error: Exception, known: type[Any]) -> None:
    assert type(as_known_error(error, "calibrate")) is known
    wrapped = RuntimeError("a library's own words")
    wrapped.__cause__ = error
    assert type(as_known_error(wrapped, "calibrate")) is known


@pytest.mark.parametrize("device", ["cuda:97", "no such device"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(InvalidInput, match="--list-devices"):
        settle(device)


def test_its_refusal_crosses_the_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / ".ns"))
    with pytest.raises(InvalidInput, match="cuda:97"):
        DeviceClient("cuda:97").start()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_alone_is_the_first_gpu() -> None:
    client = DeviceClient("cuda")
    try:
        assert client.start()["device"] == "cuda:0"
    finally:
        client.kill()


def test_an_error_crosses_the_pipe_as_itself() -> None:
    error = error_from({"code": "broken_weights", "message": "NaN in a", "data": {"tensor": "a"}})
    assert type(error) is BrokenWeights
    assert (error.message, error.data) == ("NaN in a", {"tensor": "a"})
