"""What a torch device is and how fast it is."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from ranksearch.search.errors import InvalidInput

MEMINFO = Path("/proc/meminfo")

#: Entries of a matrix that is multiplied no faster by several threads.
SMALL_MATRIX = 1 << 18

#: The control group of this process, as a container sees its own.
CGROUP = Path("/sys/fs/cgroup")


def settle(device: str) -> tuple[torch.device, ...]:
    """Choose devices, and make their results repeatable.

    Args:
        device: A torch device, or several GPUs with commas between, the main one first; `auto` is the first CUDA
            device, or the CPU.

    Returns:
        The devices; the first one is torch's current one.

    Raises:
        InvalidInput: This machine has no such device, or several cannot be used together.
    """
    # sums depend on how they are split over threads, so their number is fixed rather than left to the load
    threads = os.environ.get("RANKSEARCH_THREADS") or os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))
    torch.set_num_threads(int(threads))
    if device == "auto":
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    chosen = tuple(_existing(name.strip()) for name in device.split(","))
    if len(chosen) > 1 and (len(set(chosen)) < len(chosen) or any(each.type == "cpu" for each in chosen)):
        raise InvalidInput(
            f"One worker cannot work on {device!r}: name several GPUs, each once, or the CPU alone.", device=device
        )
    if chosen[0].type == "cuda":
        torch.cuda.set_device(chosen[0])
        torch.use_deterministic_algorithms(True, warn_only=True)
    return chosen


def _existing(name: str) -> torch.device:
    try:
        device = torch.device("cuda:0" if name == "cuda" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).splitlines()[0][:200]
        raise InvalidInput(
            f"There is no device {name!r} here ({reason}); --list-devices prints those there are.", device=name
        ) from error
    return device


def threads_for(widest: int, threads: int) -> int:
    """How many threads should multiply by a model's matrices.

    Threads sleep while they wait, and waking them takes longer than a small product: with two of them a model whose
    matrices are below `SMALL_MATRIX` runs 1.2 to 1.9 times as long as with one.

    Args:
        widest: Entries of the largest matrix.
        threads: How many there are.
    """
    return 1 if widest < SMALL_MATRIX else threads


def device_facts(*devices: torch.device) -> dict[str, Any]:
    """Torch's name, product name, memory in bytes, measured fp32 operations per second, and CPU threads.

    Several have their memory added up, and the speed of the first: one computes at a time.
    """
    names = Counter(torch.cuda.get_device_name(each) if each.type == "cuda" else _cpu_name() for each in devices)
    return {
        "device": ",".join(map(str, devices)),
        "name": " + ".join(f"{count} x {name}" if count > 1 else name for name, count in names.items()),
        "memory_bytes": sum(map(memory_bytes, devices)),
        "flops": _measure_flops(devices[0]),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def memory_bytes(device: torch.device) -> int:
    """Memory of a device that this process may use at most: a CUDA process may be held to a fraction of its device."""
    if device.type == "cuda":
        share = torch.cuda.get_per_process_memory_fraction(device)
        return int(share * torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_bytes(device: torch.device) -> int:
    """Memory of a device that this process may still allocate; on the CPU, within the limit of its container."""
    if device.type == "cuda":
        reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        on_device = torch.cuda.mem_get_info(device)[0] + reserved
        return max(0, min(on_device, memory_bytes(device)) - allocated)
    # free pages alone would leave out those of files, which the system drops when memory is asked for
    available = _figures(MEMINFO)["MemAvailable:"] * 1024
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text()) - _figures(CGROUP / "memory.stat")["inactive_file"]
    except (OSError, ValueError):  # no group of version 2, or one without a limit ("max")
        return available
    return max(0, min(available, limit - used))


def _figures(file: Path) -> dict[str, int]:
    return {name: int(figure) for name, figure, *_ in map(str.split, file.read_text().splitlines())}


def _measure_flops(device: torch.device) -> float:
    size = 4096 if device.type == "cuda" else 512
    a = torch.ones(size, size, device=device)
    seconds = float("inf")
    for _ in range(3):  # the first one also pays for starting threads and libraries
        begun = time.perf_counter()
        float((a @ a)[0, 0])
        seconds = min(seconds, time.perf_counter() - begun)
    return 2 * size**3 / seconds


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "CPU"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
