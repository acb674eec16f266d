from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ranksearch.worker import tiny
from ranksearch.worker.models import load_model


def small(out: Path) -> tiny.Trained:
    return tiny.train(out, steps=40, hidden=32, layers=1, limit=60)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tiny.Trained]:
    folder = tmp_path_factory.mktemp("tiny")
    return folder, small(folder)


def test_it_leaves_a_model_that_learned_and_its_texts(trained: tuple[Path, tiny.Trained]) -> None:
    folder, result = trained
    assert sorted(path.name for path in folder.iterdir()) == ["model", "test.txt", "train.txt"]
    model, tokenizer = load_model(folder / "model")
    assert model.dtype == torch.bfloat16
    ids = tiny.tokenize(tokenizer, (folder / "test.txt").read_text())
    assert tiny.perplexity(model, tiny.cut(ids, tiny.LENGTH)) == pytest.approx(result.test_perplexity, rel=1e-3)
    assert result.test_perplexity < 0.8 * len(tokenizer)  # an untrained model guesses among all tokens
    assert tokenizer.decode(tokenizer("raise ValueError")["input_ids"]) == "raise ValueError"


def test_the_same_seed_gives_the_same_model(trained: tuple[Path, tiny.Trained], tmp_path: Path) -> None:
    folder, result = trained
    assert small(tmp_path) == result
    first, second = (load_file(f / "model" / "model.safetensors") for f in (folder, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_documents_are_parsed_not_imported() -> None:
    before = set(sys.modules)
    found = tiny.documents(limit=150)
    assert not {name for name in set(sys.modules) - before if name.startswith(("asyncio", "antigravity", "ctypes"))}
    names = [name for name, _ in found]
    assert len(names) == len(set(names))
    assert "asyncio.events" in names
    assert sum(len(text) for _, text in found) > 300_000
    assert found[:100] == tiny.documents(limit=100)


def test_train_and_test_share_no_document() -> None:
    found = [(f"name{i}", f"text number {i}") for i in range(200)]
    train, test = tiny.split(found)
    assert 5 <= test.count("text number") <= 35
    assert all((text in train) != (text in test) for text in (f"{name}\n\n{body}\n" for name, body in found))


def test_docstrings_come_with_their_headings(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text(ast.unparse(ast.parse('"""Top."""\nclass A:\n  """Of A."""\n  def f(self, x=1):\n    """Of f."""')))
    assert tiny._docstrings(path) == "Top.\n\nclass A\nOf A.\n\nf(self, x=1)\nOf f."
    path.write_text("def broken(:")
    assert tiny._docstrings(path) == ""
