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

from ranksearch.search.errors import BrokenWeights, OutOfMemory, RanksearchError, StorageFull
from ranksearch.worker.device import as_known_error, error_from
from ranksearch.worker.device_client import DeviceClient, DeviceDied
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


def test_an_error_crosses_the_pipe_as_itself() -> None:
    error = error_from({"code": "broken_weights", "message": "NaN in a", "data": {"tensor": "a"}})
    assert type(error) is BrokenWeights
    assert (error.message, error.data) == ("NaN in a", {"tensor": "a"})
