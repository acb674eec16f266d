"""A real language model in about a minute: LLaMA-shaped, trained from scratch on text that every Python carries.

    python -m ranksearch.worker.tiny OUT_DIR --seconds 60

writes `OUT_DIR/model` (a Hugging Face folder), `OUT_DIR/train.txt` and `OUT_DIR/test.txt`. The text is Python's own
documentation: the topics of `help()` and the docstrings of the standard library, which is parsed, never imported. The
number of steps is fixed beforehand, so the same seed on the same machine gives the same model; `--seconds` is what they
take on an ordinary core. One core, because matrices this small are multiplied no faster by several.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import math
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from ranksearch.worker.text import cut, tokenize

VOCABULARY = 2048
LENGTH = 128  # tokens per sequence
BATCH = 8  # sequences per step
STEPS_PER_SECOND = 6.5  # on an ordinary core
SKIPPED = ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What training came to: final training loss (nats), test perplexity, tokens seen, parameters."""

    loss: float
    test_perplexity: float
    tokens: int
    parameters: int


def documents(limit: int | None = None) -> list[tuple[str, str]]:
    """Name and text of each document, in a fixed order: one per help topic and one per module.

    Args:
        limit: Stop after so many.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found: list[tuple[str, str]] = []
    for name, text in _all_documents(root):
        if limit is not None and len(found) >= limit:
            break
        if len(text) > 200:
            found.append((name, text))
    return found


def _all_documents(root: Path) -> Iterator[tuple[str, str]]:
    topics = root / "pydoc_data" / "topics.py"
    if topics.is_file():
        for node in ast.walk(ast.parse(topics.read_text("utf-8"))):
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                        yield f"topic {key.value!s}", str(value.value).strip()
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        parts = path.relative_to(root).with_suffix("").parts
        if not set(parts) & set(SKIPPED):
            yield ".".join(parts), _docstrings(path)


def _docstrings(path: Path) -> str:
    try:
        tree = ast.parse(path.read_text("utf-8"))
    except (SyntaxError, ValueError, OSError):
        return ""
    parts = [ast.get_docstring(tree) or ""]
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (doc := ast.get_docstring(node)):
            parts.append(f"{_heading(node)}\n{doc}")
    return "\n\n".join(part.strip() for part in parts if part.strip())


def _heading(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}"
    return f"{node.name}({ast.unparse(node.args)})"


def split(found: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """Training and test text; about one document in twelve is for testing, chosen by its name."""
    parts: tuple[list[str], list[str]] = ([], [])
    for name, text in found:
        parts[hashlib.sha256(name.encode()).digest()[0] < 21].append(f"{name}\n\n{text}")
    return "\n\n\n".join(parts[0]) + "\n", "\n\n\n".join(parts[1]) + "\n"


def train_tokenizer(text: str, vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with `<s>` and `</s>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def train(
    out: str | Path,
    *,
    steps: int,
    seed: int = 0,
    hidden: int = 128,
    layers: int = 4,
    limit: int | None = None,
    show: bool = False,
) -> Trained:
    """Train and save tokenizer, model and texts.

    Args:
        out: Folder for `model`, `train.txt` and `test.txt`.
        steps: Optimizer steps of `BATCH * LENGTH` tokens.
        seed: Of weights and batches.
        hidden: Width of the model, a multiple of 32.
        layers: Decoder blocks.
        limit: Use only so many documents.
        show: Draw a progress bar.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    texts = dict(zip(("train", "test"), split(documents(limit)), strict=True))
    for name, text in texts.items():
        (out / f"{name}.txt").write_text(text, "utf-8", newline="\n")
    tokenizer = train_tokenizer(texts["train"])
    blocks = {name: cut(tokenize(tokenizer, text), LENGTH) for name, text in texts.items()}
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_config(len(tokenizer), hidden, layers))
    loss = fit(model, blocks["train"], steps=steps, seed=seed, show=show)
    model = model.to(torch.bfloat16).eval()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=out) as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        (out / "model").mkdir(exist_ok=True)
        for path in sorted(Path(draft).iterdir()):
            path.replace(out / "model" / path.name)
    return Trained(
        loss=loss,
        test_perplexity=perplexity(model, blocks["test"]),
        tokens=steps * BATCH * LENGTH,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def _config(vocabulary: int, hidden: int, layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.02,
    )


def fit(model: Any, blocks: Tensor, *, steps: int, seed: int = 0, batch: int = BATCH, show: bool = False) -> float:
    """Train over shuffled epochs, with a warm-up and a cosine decay; returns the mean loss of the last tenth.

    The matrices inside the blocks take orthogonal steps (Muon: Jordan et al., 2024; torch 2.9 has it). That reaches in
    half the steps what AdamW reaches, and uses the matrices' whole spectrum as long training does.

    Args:
        model: A causal language model.
        blocks: Token ids, `sequences x length`.
        steps: Optimizer steps.
        seed: Of the order of the sequences.
        batch: Sequences per step.
        show: Draw a progress bar.
    """
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)] + [
        model.get_output_embeddings()
    ]
    outside = {id(p) for module in tables for p in module.parameters()}
    inside = {id(p) for p in model.parameters() if p.ndim == 2 and id(p) not in outside}
    optimizers: list[Any] = [
        torch.optim.Muon([p for p in model.parameters() if id(p) in inside], lr=0.02, adjust_lr_fn="original"),
        torch.optim.AdamW(
            [p for p in model.parameters() if id(p) not in inside], lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0
        ),
    ]
    warm = max(1, steps // 20)

    def rate(step: int) -> float:
        return min((step + 1) / warm, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    model.train()
    losses: list[float] = []
    with tqdm(total=steps, desc="training", unit="step", disable=None if show else True, leave=False) as bar:
        for ids in _batches(blocks, steps, seed, batch):
            model.zero_grad(set_to_none=True)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for part in (*optimizers, *schedules):
                part.step()
            losses.append(loss.item())
            bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
            bar.update()
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def _batches(blocks: Tensor, steps: int, seed: int, rows: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < rows:
            order = torch.cat([order, torch.randperm(len(blocks), generator=generator)])
        yield blocks[order[:rows]]
        order = order[rows:]


@torch.inference_mode()
def perplexity(model: Any, blocks: Tensor) -> float:
    """exp of the mean negative log-likelihood over the predicted tokens of all blocks, logits in fp32."""
    total = 0.0
    for batch in blocks.split(16):
        logits = model(input_ids=batch).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (blocks.shape[0] * (blocks.shape[1] - 1)))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m ranksearch.worker.tiny", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--seconds", type=float, default=60, help="about how long an ordinary core takes (default 60)")
    parser.add_argument("--steps", type=int, help="exact number of steps, instead of --seconds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    steps = options.steps or max(1, round(options.seconds * STEPS_PER_SECOND))
    trained = train(options.out, steps=steps, seed=options.seed, show=True)
    sys.stdout.write(
        f"trained {trained.parameters / 1e6:.2f} M parameters on {trained.tokens:,} tokens of Python's documentation: "
        f"train loss {trained.loss:.3f}, test perplexity {trained.test_perplexity:.2f}\n"
    )


if __name__ == "__main__":
    main()
