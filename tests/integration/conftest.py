"""Fixtures of the integration tests: a tiny model, a text, and a machine on each database."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import create_engine, make_url, text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ranksearch.search.spec import JobSpec
from ranksearch.service.store.database import migrate, open_database
from ranksearch.service.store.settings import load_settings
from tests.conftest import DATABASES
from tests.integration.machine import Machine

TTL_SECONDS = 6.0


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one folder that specs may name: `model`, a random LLaMA of two blocks, and `text.txt`."""
    folder = tmp_path_factory.mktemp("material")
    words = [f"word{index % 37} and {index * index % 101}," for index in range(6000)]
    (folder / "text.txt").write_text(" ".join(words))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="session", params=DATABASES)
def machine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, material: Path
) -> Iterator[Machine]:
    """One machine for all tests, on SQLite and then on PostgreSQL."""
    url = "" if request.param == "sqlite" else _new_database(request.getfixturevalue("postgres_url"))
    settings = load_settings(
        data_dir=tmp_path_factory.mktemp("machine"),
        database_url=url,
        allowed_paths=(material,),
        worker_ttl_seconds=TTL_SECONDS,
    )
    engine = open_database(settings)
    migrate(engine)
    engine.dispose()
    machine = Machine(settings)
    yield machine
    machine.close()


@pytest.fixture(scope="session")
def worker(machine: Machine) -> Machine:
    """The machine with one worker, which is shared because it takes seconds to start."""
    machine.start("one")
    machine.ready("one")
    return machine


@pytest.fixture(scope="session")
def done(worker: Machine, spec: Callable[..., JobSpec]) -> str:
    """A job of two budgets that has succeeded, the first on its machine."""
    job_id = worker.submit(spec(kept=[0.5, 0.3], search={"sampler": "ranksearch"}))
    worker.succeeded(job_id)
    return job_id


@pytest.fixture(scope="session")
def spec(material: Path) -> Callable[..., JobSpec]:
    """Builds a small good spec; keyword arguments replace parts of it."""

    def build(*, kept: list[float] | None = None, trials: int = 4, model: Path | None = None, **parts: Any) -> JobSpec:
        data = {"path": "text", "data_files": str(material / "text.txt"), "split": "train"}
        search = {"trials": trials, "sampler": "random", "pruner": "none", **parts.pop("search", {})}
        document = {
            "model": {"source": str(model or material / "model")},
            "calibration": {"dataset": data, "sequences": 16, "sequence_length": 32},
            "evaluation": {"sequences": 16, "test": [{**data, "sequences": 8}]},
            "budget": {"kept": kept or [0.5]},
            "search": search,
        }
        return JobSpec.model_validate({**document, **parts})

    return build


def _new_database(server: str) -> str:
    name = f"machine_{secrets.token_hex(6)}"
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name} TEMPLATE template0"))
    engine.dispose()
    return make_url(server).set(database=name).render_as_string(hide_password=False)
