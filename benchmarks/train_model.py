"""Train a small language model of another architecture than the one at hand, to see whether a step pays there, too.

    python benchmarks/train_model.py --text train.txt --tokenizer MODEL --architecture gpt2 --out OUT --steps 1500

The tokenizer is taken from a model folder, so that perplexities per token can be set side by side.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ranksearch.worker.text import cut, read_text, tokenize
from ranksearch.worker.tiny import fit, perplexity

#: What each architecture calls its sizes. Between them: biases and none, LayerNorm and RMSNorm, learned, rotary and no
#: positions, transposed weights, fused and separate projections, a parallel block.
SIZES = {
    "gpt2": {"n_embd": "hidden", "n_layer": "layers", "n_head": "heads", "n_positions": "positions"},
    "opt": {
        "hidden_size": "hidden",
        "word_embed_proj_dim": "hidden",
        "ffn_dim": "wide",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "max_position_embeddings": "positions",
    },
    "gpt_neox": {
        "hidden_size": "hidden",
        "intermediate_size": "wide",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "max_position_embeddings": "positions",
    },
    "qwen3": {
        "hidden_size": "hidden",
        "intermediate_size": "wide",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "num_key_value_heads": "groups",
        "head_dim": "head",
        "max_position_embeddings": "positions",
    },
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="text file to train on")
    parser.add_argument("--held-out", help="text file to score at the end")
    parser.add_argument("--tokenizer", required=True, help="model folder or hub id")
    parser.add_argument("--architecture", choices=sorted(SIZES), default="gpt2")
    parser.add_argument("--out", required=True, type=Path, help="folder of the model")
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    heads = args.hidden // 32
    sizes = {
        "hidden": args.hidden,
        "wide": 4 * args.hidden,
        "layers": args.layers,
        "heads": heads,
        "groups": heads // 2,
        "head": 32,
        "positions": 2 * args.sequence_length,
    }
    named = {key: sizes[size] for key, size in SIZES[args.architecture].items()}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(
        args.architecture, vocab_size=len(tokenizer), tie_word_embeddings=True, **ends, **named
    )
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_config(config)
    blocks = _blocks(tokenizer, args.text, args.sequence_length)
    begun = time.perf_counter()
    loss = fit(model, blocks, steps=args.steps, seed=args.seed, batch=args.batch, show=True)
    model = model.to(torch.bfloat16).eval()
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    facts = {
        "architecture": args.architecture,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": args.steps * args.batch * args.sequence_length,
        "training_loss": loss,
        "seconds": time.perf_counter() - begun,
    }
    if args.held_out:
        facts["held_out_perplexity"] = perplexity(model, _blocks(tokenizer, args.held_out, args.sequence_length)[:256])
    (args.out / "training.json").write_text(json.dumps(facts, indent=1))
    print("  ".join(f"{name} {value}" for name, value in facts.items()))


def _blocks(tokenizer: object, file: str, length: int) -> torch.Tensor:
    text = read_text({"path": "text", "data_files": file}, cache_dir=".")
    return cut(tokenize(tokenizer, text), length)


if __name__ == "__main__":
    main()
