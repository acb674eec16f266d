"""A worker whose device process is this one, and a small job for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import Engine
from torch import nn

from ranksearch.service.store.artifacts import ArtifactStore
from ranksearch.service.store.checkpoints import Checkpoints
from ranksearch.service.store.jobs import Jobs
from ranksearch.service.store.settings import Settings
from ranksearch.worker.device_client import DeviceClient
from ranksearch.worker.running_job import WorkerState
from ranksearch.worker.tiny import train_tokenizer
from ranksearch.worker.workbench import Workbench

WORDS = " ".join(f"word{index % 37} and {index * index % 101}," for index in range(800))


class HereAndNow:
    """A device process in this one, which may crash between two requests.

    Attributes:
        bench: What it works with.
        asked: The operations, in order.
        begun: Trials that it began.
    """

    pid = None

    def __init__(self) -> None:
        self.bench, self.asked, self.begun = Workbench("cpu"), list[str](), 0

    def ask(self, operation: str, *, progress: Any, check: Any, **arguments: Any) -> Any:
        self.asked.append(operation)
        self.begun += operation == "chunk" and arguments["index"] == 0
        return self.bench.do(operation, progress=progress, **arguments)

    def crash(self) -> None:
        self.bench.recover()
        self.bench = Workbench("cpu")


def worker_here(settings: Settings, engine: Engine, device: HereAndNow | DeviceClient) -> WorkerState:
    """A worker that asks `device`."""
    return WorkerState(
        identity="w:cpu",
        settings=settings,
        jobs=Jobs(engine),
        artifacts=ArtifactStore.of(settings, engine),
        checkpoints=Checkpoints(engine),
        device=device,  # type: ignore[arg-type]
    )


def small_spec(folder: Path, model: nn.Module, **parts: Any) -> dict[str, Any]:
    """A spec that reads a model and a text, which it writes into a folder; keyword arguments replace parts of it."""
    model.save_pretrained(folder / "model")  # type: ignore[operator]
    train_tokenizer(WORDS, 300).save_pretrained(folder / "model")
    (folder / "text.txt").write_text(WORDS)
    text = {"path": "text", "data_files": str(folder / "text.txt"), "split": "train"}
    return {
        "model": {"source": str(folder / "model")},
        "calibration": {"dataset": text, "sequences": 4, "sequence_length": 16},
        "evaluation": {"sequences": 4, "test": []},
        **parts,
    }
