"""Text to token blocks, by a protocol that gives the same blocks on every machine.

The column's texts are joined by a blank line (a text file: its content as it is), tokenised once without special tokens
and cut into consecutive blocks. Calibration and evaluation blocks are the first and the next blocks of a seeded
permutation; a test set is the first blocks of its text.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ranksearch.search.errors import DatasetError, UnsupportedModel
from ranksearch.worker.corpus import fingerprint, first_file, label, read_text


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Token blocks of one dataset and where they come from.

    Attributes:
        tokens: `blocks x sequence_length`, int64.
        ids: Index of each block in its dataset.
        fingerprint: sha256 of the dataset's joined text.
        label: Name of the dataset in reports.
    """

    tokens: Tensor
    ids: tuple[int, ...]
    fingerprint: str
    label: str


@dataclass(frozen=True, kw_only=True)
class Material:
    """All text of a job: calibrated on, driving the search, read once at the end, and, if asked for, trained on."""

    calibration: Blocks
    evaluation: Blocks
    test: tuple[Blocks, ...]
    training: Blocks | None = None


def gather(
    calibration: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    tokenizer: Any,
    *,
    cache_dir: str | Path,
    vocabulary: int | None = None,
    training_tokens: int = 0,
) -> Material:
    """Read every dataset of a job.

    Args:
        calibration: `dataset`, `sequences`, `sequence_length`, `seed`, as in the job spec.
        evaluation: `dataset` (None, or one of the same text: disjoint blocks of the calibration one), `sequences`,
            `sequence_length`, `test`.
        tokenizer: The model's tokenizer.
        cache_dir: Folder for downloaded datasets and token ids.
        vocabulary: Rows of the model's embedding; token ids beyond it are refused.
        training_tokens: Also take as many tokens of the calibration dataset to train on, as far as it has them.

    Raises:
        DatasetError: A dataset cannot be read as asked, or holds too few tokens.
    """
    length, seed = calibration["sequence_length"], calibration["seed"]
    evaluation_length = evaluation.get("sequence_length") or length

    def ids_of(dataset: Mapping[str, Any]) -> tuple[Tensor, str, str]:
        text = read_text(dataset, cache_dir=cache_dir)
        ids = tokenize(tokenizer, text, cache_dir=cache_dir, vocabulary=vocabulary)
        return ids, fingerprint(text), label(dataset)

    ids, digest, name = ids_of(calibration["dataset"])
    other = ids_of(evaluation["dataset"]) if evaluation.get("dataset") else None
    if other is not None and other[1] == digest:
        other = None  # the same text, however it was named: take other blocks of it
    wanted = 0 if other else evaluation["sequences"]
    with _naming(name):
        first, following = sample(
            ids, calibration["sequences"], wanted, seed, length=length, next_length=evaluation_length
        )
    calibration_blocks = Blocks(tokens=cut(ids, length)[first], ids=tuple(first), fingerprint=digest, label=name)
    training = None
    if training_tokens:
        used = [] if other else [slice(i * evaluation_length, (i + 1) * evaluation_length) for i in following]
        chosen_ids = apart(ids, used, seed, length=length)[: -(-training_tokens // length)]
        training = Blocks(tokens=cut(ids, length)[chosen_ids], ids=tuple(chosen_ids), fingerprint=digest, label=name)
    if other is not None:
        ids, digest, name = other
        with _naming(name):
            following, _ = sample(ids, evaluation["sequences"], 0, seed, length=evaluation_length)
    chosen = cut(ids, evaluation_length)[following]
    evaluation_blocks = Blocks(tokens=chosen, ids=tuple(following), fingerprint=digest, label=name)
    return Material(
        calibration=calibration_blocks,
        evaluation=evaluation_blocks,
        test=tuple(_tests(evaluation.get("test") or (), ids_of, evaluation_length)),
        training=training,
    )


def _tests(datasets: Any, ids_of: Any, length: int) -> Iterator[Blocks]:
    taken: set[str] = set()
    for dataset in datasets:
        ids, digest, name = ids_of(dataset)
        with _naming(name):
            tokens = cut(ids, length)[: dataset.get("sequences", 512)]
        unique, number = name, 2
        if unique in taken and dataset.get("data_files"):
            unique = name = f"{Path(first_file(dataset['data_files'])).parent.name}/{name}"
        while unique in taken:
            unique, number = f"{name} ({number})", number + 1
        taken.add(unique)
        yield Blocks(tokens=tokens, ids=tuple(range(len(tokens))), fingerprint=digest, label=unique)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except DatasetError as error:
        raise DatasetError(f"Dataset {name}: {error.message}", dataset=name, **error.data) from error


def tokenize(
    tokenizer: Any, text: str, *, cache_dir: str | Path | None = None, vocabulary: int | None = None
) -> Tensor:
    """Token ids of a whole text, without special tokens.

    Args:
        tokenizer: A Hugging Face tokenizer.
        text: The text.
        cache_dir: Keep the ids there and find them again by the sha256 of text and tokenizer.
        vocabulary: Rows of the model's embedding.

    Returns:
        `tokens`, int64.

    Raises:
        UnsupportedModel: The tokenizer gives an id that the model has no embedding for.
    """
    cached = _cache_path(tokenizer, text, cache_dir)
    ids = _read_ids(cached)
    if ids is None:
        ids = np.asarray(_encode(tokenizer, text), dtype=np.int32)
        _write_ids(cached, ids)
    if vocabulary is not None and len(ids) and int(ids.max()) >= vocabulary:
        raise UnsupportedModel(
            f"The tokenizer gives token id {int(ids.max())}, but the model embeds {vocabulary}; they do not match."
        )
    return torch.from_numpy(ids.astype(np.int64))


def _encode(tokenizer: Any, text: str) -> list[int]:
    beginning = text[:20_000]
    ids = _call(tokenizer, beginning)
    if beginning == text:
        return ids
    # the tokenizer's engine, asked directly, keeps no offsets: half the time and two thirds of the memory
    direct = getattr(getattr(tokenizer, "backend_tokenizer", None), "encode_batch_fast", None)
    if direct is not None and direct([beginning], add_special_tokens=False)[0].ids == ids:
        return list(direct([text], add_special_tokens=False)[0].ids)
    return _call(tokenizer, text)


def _call(tokenizer: Any, text: str) -> list[int]:
    encoded: list[int] = tokenizer(
        text,
        add_special_tokens=False,
        truncation=False,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # a notice about texts longer than the model's context means nothing here
    )["input_ids"]
    return encoded


def _cache_path(tokenizer: Any, text: str, cache_dir: str | Path | None) -> Path | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if cache_dir is None or backend is None or not hasattr(backend, "to_str"):
        return None
    key = hashlib.sha256(f"{type(tokenizer).__name__} {fingerprint(backend.to_str())} {fingerprint(text)}".encode())
    return Path(cache_dir) / "tokens" / f"{key.hexdigest()}.npy"


def _read_ids(path: Path | None) -> np.ndarray | None:
    if path is None:
        return None
    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None  # absent or damaged: tokenise again
    return ids if ids.ndim == 1 and ids.dtype == np.int32 else None


def _write_ids(path: Path | None, ids: np.ndarray) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            np.save(file, ids, allow_pickle=False)
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def cut(ids: Tensor, length: int) -> Tensor:
    """Consecutive blocks, `blocks x length`, as a view; what is left at the end is dropped.

    Raises:
        DatasetError: Fewer tokens than one block.
    """
    blocks = len(ids) // length
    if not blocks:
        raise DatasetError(
            f"the text has {len(ids)} tokens, fewer than one block of {length}; take more text or shorter blocks.",
            tokens=len(ids),
            sequence_length=length,
        )
    return ids[: blocks * length].view(blocks, length)


def sample(
    ids: Tensor, first: int, following: int, seed: int, *, length: int, next_length: int | None = None
) -> tuple[list[int], list[int]]:
    """Which blocks to calibrate and which to evaluate on: a seeded permutation's first and next ones.

    Args:
        ids: `tokens` of the dataset.
        first: Number of calibration blocks.
        following: Number of evaluation blocks, which share no token with the calibration blocks.
        seed: Seed of the permutation.
        length: Tokens of a calibration block.
        next_length: Tokens of an evaluation block, if different.

    Returns:
        Indices among the blocks of `length`, and among those of `next_length`.

    Raises:
        DatasetError: Not enough blocks; says how many there are.
    """
    other = next_length or length
    blocks = len(cut(ids, length))
    order = _permutation(blocks, seed)
    chosen = [int(i) for i in order[:first]]
    if other == length:
        rest = [int(i) for i in order[first:]]
    else:
        used = [slice(block * length, (block + 1) * length) for block in chosen]
        rest = apart(ids, used, seed, length=other)
    if len(chosen) < first or len(rest) < following:
        raise DatasetError(
            f"the text has {len(ids)} tokens, which gives {blocks} sequences of {length}; asked for {first}"
            + (
                f" and {following} more of {other} that share no text with them ({len(rest)} are left)"
                if following
                else ""
            )
            + ". Ask for fewer sequences, shorter ones, or take more text.",
            tokens=len(ids),
            available=blocks,
        )
    return chosen, rest[:following]


def apart(ids: Tensor, used: Sequence[slice], seed: int, *, length: int) -> list[int]:
    """The blocks that share no token with what is used already, in the order of the permutation of `sample`.

    Args:
        ids: `tokens` of the dataset.
        used: Places in `ids` that are taken.
        seed: Seed of the permutation.
        length: Tokens of a block.
    """
    taken = np.zeros(len(ids), dtype=bool)
    for place in used:
        taken[place] = True
    order = _permutation(len(cut(ids, length)), seed)
    return [int(i) for i in order if not taken[i * length : (i + 1) * length].any()]


def _permutation(count: int, seed: int) -> np.ndarray:
    # PCG64 named outright: `default_rng` may change its generator one day
    return np.random.Generator(np.random.PCG64(seed)).permutation(count)
