"""How long a target takes to decode a token, at a few ranks: measured with the very modules of a checkpoint.

One token at batch 1, called as `generate` calls a layer. What a model has read since its last token has driven a matrix
out of the cache, so calls go round copies. On CUDA a call takes what launching or running it takes, whichever is more;
on a CPU it is the time of one thread.

Isotonic regression (pool adjacent violators [Barlow1972]_) then makes times rise with the rank: what falls is noise.

.. [Barlow1972] R. E. Barlow, D. J. Bartholomew, J. M. Bremner, H. D. Brunk, Statistical inference under order
   restrictions, Wiley, 1972
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ranksearch.search.prices import PICOSECONDS, Curve
from ranksearch.search.targets import Form, Target
from ranksearch.search.threads import one_thread
from ranksearch.worker.modules import FactoredLinear, PivotedLinear

RANKS, JUMPS = 16, 8  # measured, spread evenly; and then one by one where the time rises most
TILE, TILES = 64, 32  # of a matrix product on CUDA; at most so many multiples are measured as well
FEWEST, MOST = 7, 100  # repeats of a measurement
CALLS = {"cpu": 8, "cuda": 64}  # of a layer in a repeat, at least
MOST_COPIES = 512
CACHE_BYTES = 32 << 20  # where the system does not say

Seconds = Callable[[Callable[[], None]], float]
_MODULES: dict[Form, type[FactoredLinear] | type[PivotedLinear]] = {
    "factored": FactoredLinear,
    "pivoted": PivotedLinear,
}


def measure_curves(
    model: Any,
    targets: Sequence[Target],
    *,
    form: Form,
    multiple: int,
    centred: bool,
    device: torch.device,
    progress: Callable[[float], None],
) -> list[Curve]:
    """Measure every shape once.

    Args:
        model: The dense model, its targets plain.
        targets: All targets; those of one shape, with or without bias, share a curve.
        form: How targets below full rank are stored.
        multiple: Ranks are multiples of it.
        centred: Whether a target below full rank has a bias in any case.
        device: Where to measure.
        progress: Told the fraction done.

    Returns:
        One curve for each target.
    """
    biased = {t.name: model.get_submodule(t.name).bias is not None for t in targets}
    shapes = {(t.out_features, t.in_features, biased[t.name]): t for t in targets}
    total = sum(t.parameters for t in targets) * model.dtype.itemsize
    streamed = min(2 * _cache_bytes(device), total)
    budget = float(os.environ.get("RANKSEARCH_SPEED_SECONDS") or 10.0)
    seconds, found = budget / (len(shapes) * (RANKS + JUMPS)), {}
    where: Any = {"device": "meta", "dtype": model.dtype}
    with one_thread(), torch.inference_mode():
        for done, ((m, n, bias), target) in enumerate(shapes.items(), start=1):

            def timed(module: nn.Module, n: int = n) -> float:
                return _step(_copies(module, device, streamed), n, device, seconds)

            def below(rank: int, m: int = m, n: int = n, bias: bool = bias or centred) -> nn.Module:
                return _MODULES[form](in_features=n, out_features=m, rank=rank, bias=bias, **where)

            times = {rank: timed(below(rank)) for rank in _ranks(target.largest_rank(form), multiple, device)}
            for _ in range(JUMPS):
                if (rank := jump(times, multiple)) is not None:
                    times[rank] = timed(below(rank))
            ranks = sorted(times)
            found[m, n, bias] = Curve(
                ranks=tuple(ranks),
                times=tuple(round(PICOSECONDS * t) for t in rising(times[rank] for rank in ranks)),
                dense=round(PICOSECONDS * timed(nn.Linear(n, m, bias=bias, **where))),
            )
            progress(done / len(shapes))
    return [found[t.out_features, t.in_features, biased[t.name]] for t in targets]


def rising(values: Iterable[float]) -> list[float]:
    """The nearest values, in least squares, that never fall: pool adjacent violators."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (second, b), (first, a) = pools.pop(), pools.pop()
            pools.append(((a * first + b * second) / (a + b), a + b))
    return [mean for mean, count in pools for _ in range(count)]


def jump(times: Mapping[int, float], multiple: int) -> int | None:
    """The rank in the middle of the two measured ones between which the time rises most; None if none is left.

    A kernel takes over from another at some rank, and a line drawn across that would be far off.
    """
    pairs = [pair for pair in itertools.pairwise(sorted(times)) if pair[1] - pair[0] > multiple]
    if not pairs:
        return None
    low, high = max(pairs, key=lambda pair: times[pair[1]] - times[pair[0]])
    return low + (high - low) // (2 * multiple) * multiple


def _ranks(largest: int, multiple: int, device: torch.device) -> list[int]:
    """What is measured below dense: the smallest and the largest rank and some between, ascending."""
    top = largest // multiple
    if top == 0:
        return []
    ranks = {multiple * round(step) for step in np.linspace(1, top, RANKS)}
    if device.type == "cuda":
        tile = math.lcm(TILE, multiple)
        ranks |= set(range(tile, largest + 1, tile * max(1, math.ceil(largest / tile / TILES))))
    return sorted(ranks)


def _copies(module: nn.Module, device: torch.device, streamed: int) -> list[nn.Module]:
    """As many of a module, from the meta device, as fill the bytes that the model reads between two of its tokens."""
    size = sum(tensor.nbytes for tensor in module.state_dict().values())
    return [_filled(module, device) for _ in range(min(MOST_COPIES, math.ceil(streamed / size)))]


def _filled(module: nn.Module, device: torch.device) -> nn.Module:
    made = copy.deepcopy(module).to_empty(device=device)
    for tensor in made.state_dict().values():
        if tensor.is_floating_point():
            tensor.fill_(1 / tensor.shape[-1])
        else:
            tensor.copy_(torch.arange(len(tensor)).flip(0))  # the order of rows
    return made


def _step(modules: Sequence[nn.Module], columns: int, device: torch.device, seconds: float) -> float:
    """Seconds of one call: the least of repeats, each a few times round the copies; what else runs only adds to it."""
    token = torch.ones(1, 1, columns, device=device, dtype=next(modules[0].parameters()).dtype)
    calls = list(itertools.chain.from_iterable([modules] * math.ceil(CALLS[device.type] / len(modules))))
    clock: Seconds = _on_cuda if device.type == "cuda" else _on_cpu

    def work() -> None:
        for module in calls:
            module(token)

    clock(work)
    begun, times = time.perf_counter(), [clock(work)]
    while len(times) < FEWEST or (len(times) < MOST and time.perf_counter() - begun < seconds):
        times.append(clock(work))
    return min(times) / len(calls)


def _on_cpu(work: Callable[[], None]) -> float:
    begun = time.thread_time()
    work()
    return time.thread_time() - begun


def _on_cuda(work: Callable[[], None]) -> float:
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    work()
    ended.record()
    ended.synchronize()
    return float(begun.elapsed_time(ended)) / 1000


def _cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    try:
        return max(os.sysconf("SC_LEVEL3_CACHE_SIZE"), 0) or CACHE_BYTES
    except (ValueError, OSError):
        return CACHE_BYTES
