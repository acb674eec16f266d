from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ranksearch.worker import hardware
from ranksearch.worker.hardware import free_bytes, threads_for

CPU = torch.device("cpu")
GIB = 1 << 30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 6 GiB available, 1 of them free, and a control group without files."""
    (tmp_path / "meminfo").write_text(
        f"MemTotal:  {16 << 20} kB\nMemFree: {1 << 20} kB\nMemAvailable:  {6 << 20} kB\nHugePages_Total:  0\n"
    )
    monkeypatch.setattr(hardware, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    return tmp_path


def limit(machine: Path, most: str) -> None:
    (machine / "memory.max").write_text(f"{most}\n")
    (machine / "memory.current").write_text(f"{3 * GIB}\n")
    (machine / "memory.stat").write_text(f"anon {GIB}\nfile {2 * GIB}\ninactive_file {GIB}\n")


def test_pages_that_the_system_would_drop_are_free(machine: Path) -> None:
    assert free_bytes(CPU) == 6 * GIB


@pytest.mark.parametrize(("most", "free"), [("max", 6), (str(4 * GIB), 2), (str(12 * GIB), 6), (str(GIB), 0)])
def test_a_container_has_what_its_limit_leaves(machine: Path, most: str, free: int) -> None:
    limit(machine, most)
    assert free_bytes(CPU) == free * GIB


def test_this_machine_has_some() -> None:
    assert 1 << 20 < free_bytes(CPU) <= hardware.memory_bytes(CPU)


def test_small_matrices_are_left_to_one_thread():
    assert threads_for(512 * 192, 8) == 1
    assert threads_for(4096 * 4096, 8) == 8
