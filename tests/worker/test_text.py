from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ranksearch.search.errors import DatasetError, StorageFull, UnsupportedModel
from ranksearch.worker import text
from ranksearch.worker.corpus import fingerprint, read_text
from ranksearch.worker.tiny import train_tokenizer

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu")
CORPUS = " ".join(WORDS[i * i % len(WORDS)] + ("\n\n" if i % 11 == 0 else ".") for i in range(3000))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(CORPUS, 300)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text(CORPUS)
    return path


def from_text(*files: Path, **more: Any) -> dict[str, Any]:
    names = [str(file) for file in files]
    return {"path": "text", "data_files": names[0] if len(names) == 1 else names, "split": "train", **more}


def gather(tmp_path: Path, tokenizer: Any, dataset: dict[str, Any], evaluation: Any = None, **calibration: Any) -> Any:
    wanted = {"dataset": dataset, "sequences": 20, "sequence_length": 16, "seed": 3, **calibration}
    return text.gather(wanted, evaluation or {"sequences": 8, "test": []}, tokenizer, cache_dir=tmp_path / "cache")


def test_blocks_follow_the_protocol_to_the_digit(tmp_path: Path, tokenizer: Any, corpus: Path) -> None:
    ids = tokenizer(CORPUS, add_special_tokens=False)["input_ids"]
    blocks = torch.tensor(ids[: len(ids) // 16 * 16]).view(-1, 16)
    order = np.random.default_rng(3).permutation(len(blocks))
    test = {"sequences": 8, "test": [from_text(corpus, sequences=5), from_text(corpus, sequences=None)]}
    material = gather(tmp_path, tokenizer, from_text(corpus), test)
    assert material.calibration.ids == tuple(order[:20])
    assert torch.equal(material.calibration.tokens, blocks[order[:20]])
    assert torch.equal(material.evaluation.tokens, blocks[order[20:28]])
    assert torch.equal(material.test[0].tokens, blocks[:5])
    assert torch.equal(material.test[1].tokens, blocks)
    assert [part.label for part in material.test] == ["corpus.txt", f"{tmp_path.name}/corpus.txt"]
    assert material.calibration.fingerprint == fingerprint(CORPUS)


def test_evaluation_on_the_calibration_text_takes_other_blocks_of_it(tmp_path: Path, tokenizer: Any) -> None:
    for name in ("corpus.txt", "copy.txt"):
        (tmp_path / name).write_text(CORPUS)
    calibration = {"dataset": from_text(tmp_path / "corpus.txt"), "sequences": 4, "sequence_length": 16, "seed": 3}
    found = [
        text.gather(calibration, {"dataset": dataset, "sequences": 3}, tokenizer, cache_dir=tmp_path / "cache")
        for dataset in (None, from_text(tmp_path / "copy.txt"))
    ]
    assert found[0].evaluation.ids == found[1].evaluation.ids
    assert not set(found[1].evaluation.ids) & set(found[1].calibration.ids)


def test_the_permutation_does_not_move_with_a_release() -> None:
    first, following = text.sample(torch.zeros(80, dtype=torch.long), 4, 3, 0, length=8)
    assert (first, following) == ([4, 6, 2, 7], [3, 5, 9])


def test_an_own_evaluation_dataset_has_its_own_permutation(tmp_path: Path, tokenizer: Any, corpus: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(CORPUS[::-1])
    evaluation = {"dataset": from_text(other), "sequences": 6, "sequence_length": 24, "test": [from_text(corpus)]}
    material = gather(tmp_path, tokenizer, from_text(corpus), evaluation)
    ids = text.tokenize(tokenizer, CORPUS[::-1])
    order = np.random.default_rng(3).permutation(len(ids) // 24)
    assert torch.equal(material.evaluation.tokens, text.cut(ids, 24)[order[:6]])
    assert material.test[0].tokens.shape[1] == 24


def test_evaluation_of_another_length_shares_no_token_with_calibration() -> None:
    ids = torch.arange(1000)
    first, following = text.sample(ids, 30, 5, 1, length=16, next_length=24)
    used = set(text.cut(ids, 16)[first].flatten().tolist())
    seen = text.cut(ids, 24)[following].flatten().tolist()
    assert len(following) == 5
    assert not used & set(seen)


def test_text_files_are_read_as_they_are_and_joined_by_a_blank_line(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second\n\n\n  end ")
    (tmp_path / "a.txt").write_text("first\n")
    found = read_text(from_text(tmp_path / "b.txt", tmp_path / "a.txt"), cache_dir=tmp_path / "cache")
    assert found == "second\n\n\n  end \n\nfirst\n"


def test_a_columns_rows_are_joined_by_a_blank_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"body": body, "n": 1}) + "\n" for body in ("one", "", " two\n")))
    dataset = {"path": "json", "data_files": str(path), "column": "body", "split": "train"}
    assert read_text(dataset, cache_dir=tmp_path / "cache") == "one\n\n\n\n two\n"


def no_column(folder: Path) -> dict[str, Any]:
    (folder / "rows.jsonl").write_text('{"body": "x", "title": "y"}\n')
    return {"path": "json", "data_files": str(folder / "rows.jsonl"), "column": "text"}


def numbers(folder: Path) -> dict[str, Any]:
    (folder / "rows.jsonl").write_text('{"text": 1}\n{"text": 2}\n')
    return {"path": "json", "data_files": str(folder / "rows.jsonl")}


def holes(folder: Path) -> dict[str, Any]:
    (folder / "rows.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    return {"path": "json", "data_files": str(folder / "rows.jsonl")}


def blank(folder: Path) -> dict[str, Any]:
    (folder / "blank.txt").write_text(" \n\n")
    return from_text(folder / "blank.txt")


def latin(folder: Path) -> dict[str, Any]:
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    return from_text(folder / "latin.txt")


def other_split(folder: Path) -> dict[str, Any]:
    (folder / "a.txt").write_text("a")
    return from_text(folder / "a.txt", split="validation")


def other_config(folder: Path) -> dict[str, Any]:
    (folder / "set").mkdir()
    (folder / "set" / "a.txt").write_text("a")
    (folder / "set" / "README.md").write_text("---\nconfigs:\n- config_name: small\n  data_files: a.txt\n---\n")
    return {"path": str(folder / "set"), "name": "large"}


def script(folder: Path) -> dict[str, Any]:
    (folder / "evil").mkdir()
    (folder / "evil" / "evil.py").write_text(f"open({str(folder / 'executed')!r}, 'w').close()\n")
    return {"path": str(folder / "evil" / "evil.py")}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (no_column, ["no column 'text'", "body, title"]),
        (numbers, ["'text'", "must hold text", "row 0"]),
        (holes, ["row 1", "NoneType"]),
        (blank, ["no text"]),
        (latin, ["UTF-8"]),
        (other_split, ["validation", "train"]),
        (other_config, ["large", "small"]),
        (script, ["script"]),
        (lambda folder: from_text(folder / "absent.txt"), ["absent.txt", "not there"]),
        (lambda _: {"path": "text"}, ["data_files"]),
        (
            lambda _: {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"},
            ["Salesforce/wikitext", "local files"],
        ),
    ],
)
def test_a_dataset_that_cannot_be_read_says_why(
    tmp_path: Path, make: Callable[[Path], dict[str, Any]], says: list[str]
) -> None:
    with pytest.raises(DatasetError) as caught:
        read_text(make(tmp_path), cache_dir=tmp_path / "cache")
    for words in says:
        assert words in caught.value.message
    assert not (tmp_path / "executed").exists()


def test_too_little_text_says_how_much_there_is(tmp_path: Path, tokenizer: Any, corpus: Path) -> None:
    tokens = len(text.tokenize(tokenizer, CORPUS))
    with pytest.raises(DatasetError, match=f"has {tokens} tokens, fewer than one block of 100000") as caught:
        gather(tmp_path, tokenizer, from_text(corpus), sequence_length=100_000)
    assert caught.value.message.startswith("Dataset corpus.txt:")
    blocks = tokens // 64
    with pytest.raises(DatasetError, match=f"{blocks} sequences of 64; asked for {blocks + 1}"):
        gather(tmp_path, tokenizer, from_text(corpus), sequence_length=64, sequences=blocks + 1)
    with pytest.raises(DatasetError, match=r"8 more of 64 .*\(7 are left\)"):
        gather(tmp_path, tokenizer, from_text(corpus), sequence_length=64, sequences=blocks - 7)
    short = tmp_path / "short.txt"
    short.write_text("alpha")
    with pytest.raises(DatasetError, match=r"Dataset short\.txt"):
        gather(tmp_path, tokenizer, from_text(corpus), {"sequences": 2, "test": [from_text(short)]})


def test_token_ids_are_kept_and_a_damaged_file_is_made_again(tmp_path: Path, tokenizer: Any) -> None:
    ids = text.tokenize(tokenizer, CORPUS, cache_dir=tmp_path)
    (file,) = (tmp_path / "tokens").iterdir()
    np.save(file, np.array([5, 6], dtype=np.int32))
    assert text.tokenize(tokenizer, CORPUS, cache_dir=tmp_path).tolist() == [5, 6]  # read, not computed
    file.write_bytes(b"\x93NUMPY")
    assert torch.equal(text.tokenize(tokenizer, CORPUS, cache_dir=tmp_path), ids)
    assert torch.equal(torch.from_numpy(np.load(file)).long(), ids)
    text.tokenize(train_tokenizer(CORPUS, 280), CORPUS, cache_dir=tmp_path)
    assert len(list((tmp_path / "tokens").iterdir())) == 2


def test_a_long_text_gives_the_same_ids_as_one_call(tokenizer: Any) -> None:
    long = CORPUS * 3
    assert len(long) > 20_000
    assert text.tokenize(tokenizer, long).tolist() == tokenizer(long, add_special_tokens=False)["input_ids"]


def test_test_sets_of_one_name_are_told_apart(tmp_path: Path, tokenizer: Any, corpus: Path) -> None:
    files = [tmp_path / name / "test.txt" for name in ("one", "two", "two")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text(CORPUS)
    material = gather(
        tmp_path, tokenizer, from_text(corpus), {"sequences": 2, "test": [from_text(file) for file in files]}
    )
    assert [part.label for part in material.test] == ["test.txt", "two/test.txt", "two/test.txt (2)"]


def test_special_tokens_are_not_added(tokenizer: Any) -> None:
    assert not {0, 1} & set(text.tokenize(tokenizer, CORPUS).tolist())


def test_a_tokenizer_of_another_model_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UnsupportedModel, match="embeds 10"):
        text.tokenize(tokenizer, CORPUS, vocabulary=10)


def test_a_full_disk_is_not_the_datasets_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise RuntimeError("An error occurred while generating the dataset") from OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(StorageFull):
        read_text(from_text(tmp_path / "a.txt"), cache_dir=tmp_path / "cache")
