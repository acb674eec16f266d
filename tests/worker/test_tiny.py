from __future__ import annotations

import ast
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


def test_documents_are_parsed_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first", "second", "tests/third", "package/__init__"):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{f'About {name}. ' * 30!r}\nraise SystemExit('this was imported')\n")
    monkeypatch.setattr(tiny.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.syspath_prepend(tmp_path)
    found = tiny.documents()
    assert [name for name, _ in found] == ["first", "package.__init__", "second"]
    assert found[0][1] == ("About first. " * 30).strip()
    assert found[:2] == tiny.documents(limit=2)


def test_every_python_carries_enough_of_them() -> None:
    found = tiny.documents(limit=90)
    assert len({name for name, _ in found}) == 90
    assert sum(len(text) for _, text in found) > 200_000


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
