"""How fast a model reads and writes on a device, and how much memory it needs: one sequence, with its KV cache.

Prefill is one forward pass over a prompt, decode one token at a time after it; both are medians over repeats. The peak
is the weights plus what a prefill and the first decoded tokens allocate at once: on CUDA by the allocator's own count,
that of each device added up, elsewhere by adding up the tensors that are alive. What else the process holds is not in
it, nor, on a CPU, is the scratch memory inside a kernel.
"""

from __future__ import annotations

import inspect
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ranksearch.worker.spread import devices_of

PROMPT_TOKENS = 512
NEW_TOKENS = 32
FEWEST, MOST = 3, 25  # repeats of a measurement


def measure(
    model: Any, device: str | torch.device, *, prompt: Tensor | None = None, seconds: float = 3.0
) -> dict[str, Any]:
    """Measure one model.

    Args:
        model: A causal language model on `device`, or with some of its blocks on others, in evaluation mode.
        device: Its main device.
        prompt: Token ids to read; by default ids spread over the vocabulary, as the values hardly matter for speed.
        seconds: About how long to measure; a model that is too slow for it is measured once.

    Returns:
        `prefill_tokens_per_second`, `decode_tokens_per_second`, `prompt_tokens`, `new_tokens`, `peak_memory_bytes` and
        `memory_source` (`cuda allocator` or `live tensors`).
    """
    devices = devices_of(model)
    ids = _prompt(model, prompt).to(device)
    new = min(NEW_TOKENS, max(1, _positions(model) - ids.shape[1]))
    with torch.inference_mode():
        peak, source = _peak(model, devices, lambda: _decode(model, *_prefill(model, ids), 2))
        prefill = _median(lambda: _prefill(model, ids), devices, seconds / 2)
        decode = _decode_median(model, ids, new, devices, seconds / 2)
    return {
        "prefill_tokens_per_second": ids.shape[1] / prefill,
        "decode_tokens_per_second": new / decode,
        "prompt_tokens": ids.shape[1],
        "new_tokens": new,
        "peak_memory_bytes": peak,
        "memory_source": source,
    }


def _positions(model: Any) -> int:
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30)


def _prompt(model: Any, prompt: Tensor | None) -> Tensor:
    length = max(1, min(PROMPT_TOKENS, _positions(model) - NEW_TOKENS))
    if prompt is None:
        vocabulary = model.get_input_embeddings().weight.shape[0]
        prompt = torch.arange(length) * 7919 % vocabulary  # a prime stride visits all of it
    return prompt.reshape(1, -1)[:, :length].long()


def _prefill(model: Any, ids: Tensor) -> tuple[Tensor, Any]:
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    output = model(input_ids=ids, use_cache=True, **last)
    return output.logits[:, -1:].argmax(-1), output.past_key_values


def _decode(model: Any, token: Tensor, cache: Any, tokens: int) -> None:
    for _ in range(tokens):
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        token, cache = output.logits[:, -1:].argmax(-1), output.past_key_values


def _median(work: Callable[[], Any], devices: Sequence[torch.device], seconds: float) -> float:
    work()
    return _repeat(lambda: _timed(work, devices), seconds)


def _decode_median(model: Any, ids: Tensor, tokens: int, devices: Sequence[torch.device], seconds: float) -> float:
    def once() -> float:
        token, cache = _prefill(model, ids)  # a fresh cache every time, outside the clock
        return _timed(lambda: _decode(model, token, cache, tokens), devices)

    return _repeat(once, seconds)


def _repeat(once: Callable[[], float], seconds: float) -> float:
    begun, times = time.perf_counter(), [once()]
    while len(times) < MOST and time.perf_counter() - begun < seconds * (2 if len(times) < FEWEST else 1):
        times.append(once())
    return statistics.median(times)


def _timed(work: Callable[[], Any], devices: Sequence[torch.device]) -> float:
    _wait(devices)
    begun = time.perf_counter()
    work()
    _wait(devices)
    return time.perf_counter() - begun


def _wait(devices: Sequence[torch.device]) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _peak(model: nn.Module, devices: Sequence[torch.device], work: Callable[[], Any]) -> tuple[int, str]:
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    weights = {storage.data_ptr(): storage.nbytes() for storage in storages}
    if devices[0].type == "cuda":
        work()  # libraries take their workspaces once
        _wait(devices)
        before = sum(map(torch.cuda.memory_allocated, devices))
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
        work()
        _wait(devices)
        most = sum(map(torch.cuda.max_memory_allocated, devices))
        return sum(weights.values()) + most - before, "cuda allocator"
    with _LiveTensors(set(weights)) as live:
        work()
    return sum(weights.values()) + live.peak, "live tensors"


class _LiveTensors(TorchDispatchMode):
    """Adds up the storages that operations create, until they are freed."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = known
        self._alive: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        place = storage.data_ptr()
        if place in self._known or place in self._alive or not storage.nbytes():
            return
        self._alive.add(place)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, place, storage.nbytes())

    def _free(self, place: int, size: int) -> None:
        self._alive.discard(place)
        self.now -= size
