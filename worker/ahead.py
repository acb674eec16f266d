"""Factoring beside calibration: the targets of one section are factored while the next one's covariances are collected.

The bank is the one that factoring afterwards gives, byte for byte. What fails here for a reason that may be gone
afterwards, such as memory for two things at once, is left to be done then.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

import torch

from ranksearch.search.errors import RanksearchError
from ranksearch.search.targets import Target
from ranksearch.worker.calibrate import Calibration, Progress
from ranksearch.worker.hardware import free_bytes

log = logging.getLogger("ranksearch.worker.ahead")

#: Bytes that factoring a target holds at once, per entry of its two covariances: six matrices in fp64 (45 measured).
BYTES_PER_ENTRY = 48

#: Share of the free memory that a target may take beside a calibration.
SHARE = 0.25

LOOK_SECONDS = 0.2  # how often who waits says how much is done


class Build(Protocol):
    """Makes a bank of parts of a calibration as they come; see `build_bank`."""

    def __call__(self, parts: Iterator[Calibration], *, file: Path, progress: Progress) -> object:
        """Factors all targets."""


class _Dropped(Exception):  # a way out of the thread, not an error
    """Nobody wants this bank any more."""


class Ahead:
    """A factor bank in the making, by one thread that holds one target's matrices at a time.

    Covariances that wait for it stay where the calibration keeps them.

    Example:
        with Ahead(build, targets, model.device, path) as ahead:
            calibrate(model, targets, blocks, gradients=True, file=other, complete=ahead.add)
        made = ahead.finish(bank)  # False after a calibration in one section: then there is no thread at all
    """

    def __init__(self, build: Build, targets: Sequence[Target], device: torch.device, file: str | Path) -> None:
        """Starts nothing yet.

        Args:
            build: Makes the bank.
            targets: All that it is of.
            device: Where the decompositions are computed.
            file: Where it is written; gone unless it became whole.
        """
        self._build, self._targets, self._device, self._file = build, targets, device, Path(file)
        self._parts: SimpleQueue[Calibration | None] = SimpleQueue()
        self._seen: set[str] = set()
        self._thread: threading.Thread | None = None
        self._ready, self._dropped = threading.Event(), threading.Event()
        self._whole, self._fraction = False, 0.0
        self._error: RanksearchError | None = None

    def add(self, part: Calibration) -> None:
        """Takes the covariances of a section.

        Raises:
            RanksearchError: A target of an earlier one cannot be factored; names it.
        """
        if not self._seen.isdisjoint(part.leader):
            self.drop()  # the calibration began again, in smaller batches: its sums may differ in the last digits
        if self._thread is None and not self._dropped.is_set():
            self._start()
        self._raise()
        if self._dropped.is_set():
            return  # nobody takes parts any more
        self._seen |= part.leader.keys()
        self._parts.put(part)

    def finish(self, file: str | Path, progress: Progress = lambda fraction: None) -> bool:
        """Waits for what is left and moves the bank to its place.

        Args:
            file: The place, on the same disk.
            progress: Told the fraction done of what was left.

        Returns:
            Whether there is a bank; otherwise it has to be made of the whole calibration.

        Raises:
            RanksearchError: A target cannot be factored; names it.
        """
        before = self._fraction
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(LOOK_SECONDS)
            progress((self._fraction - before) / (1 - before) if before < 1 else 1.0)
        self._raise()
        if self._whole:
            os.replace(self._file, file)
        return self._whole

    def drop(self) -> None:
        """Gives up, and waits for the thread to end."""
        self._dropped.set()
        self._parts.put(None)
        if self._thread is not None:
            self._thread.join()
        self._whole = False
        self._file.unlink(missing_ok=True)

    def __enter__(self) -> Ahead:
        """Returns itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Gives up after an error; otherwise the thread goes on."""
        if kind is not None:
            self.drop()

    def _start(self) -> None:
        needed = BYTES_PER_ENTRY * max(target.in_features**2 + target.out_features**2 for target in self._targets)
        if needed > SHARE * free_bytes(self._device):
            self.drop()
            return
        self._thread = threading.Thread(target=self._run, args=(torch.get_num_threads(),), name="ahead", daemon=True)
        self._thread.start()
        # no weight may be looked up while the calibration moves blocks to the device and back
        self._ready.wait()

    def _run(self, threads: int) -> None:
        torch.set_num_threads(threads)  # each thread has a number of its own, and sums depend on it
        try:
            with _own_stream(self._device):
                self._build(self._arriving(), file=self._file, progress=self._progress)
            self._whole = True
        except _Dropped:
            pass
        except RanksearchError as error:
            self._error = error.with_traceback(None)  # which holds matrices
        except Exception as error:
            log.warning("factoring beside the calibration broke off, and is done after it: %s", error)
        finally:
            if not self._whole:
                self._file.unlink(missing_ok=True)
            self._ready.set()

    def _arriving(self) -> Iterator[Calibration]:
        self._ready.set()
        left = len(self._targets)
        while left:
            if (part := self._parts.get()) is None:
                raise _Dropped
            left -= len(part.leader)
            yield part

    def _progress(self, fraction: float) -> None:
        self._fraction = fraction
        if self._dropped.is_set():
            raise _Dropped

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


@contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """On CUDA, a stream beside the one that computes already."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.default_stream(device))  # the weights may still be on their way
    with torch.cuda.stream(stream):
        yield
