from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {
    "vocab_size": 96,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 16}
OPT = {
    "vocab_size": 96,
    "hidden_size": 24,
    "ffn_dim": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 16,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": 96, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}
SETTINGS = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"final_logit_softcapping": 0.5},
    "granite": {"logits_scaling": 3.0},
    "mixtral": MIXTURE,
}


def fill(model: nn.Module) -> nn.Module:
    """Gives every parameter fixed values, without a random number generator."""
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            # the square makes rows and columns linearly independent
            wave = torch.arange(parameter.numel(), dtype=torch.float64).square().mul(0.7 + 0.1 * index).sin()
            centre = 1.0 if parameter.ndim == 1 and "norm" in type(model).__name__.lower() else 0.0
            parameter.copy_((wave * 0.4 + centre).view(parameter.shape))
    return model


@pytest.fixture(scope="session")
def tiny() -> Callable[..., nn.Module]:
    """Builds a tiny causal language model of a family, in fp32 unless told otherwise, with fixed weights."""

    def build(family: str = "llama", dtype: torch.dtype = torch.float32, **settings: object) -> nn.Module:
        if family == "gpt2":
            config = AutoConfig.for_model("gpt2", **GPT2 | settings)
        elif family == "opt":
            config = AutoConfig.for_model("opt", **OPT | settings)
        else:
            config = AutoConfig.for_model(family, **SMALL | SETTINGS.get(family, {}) | settings)
        return fill(AutoModelForCausalLM.from_config(config)).to(dtype).eval()

    return build


@pytest.fixture(scope="session")
def blocks() -> torch.Tensor:
    """Token ids, `40 x 16`: more than one pool."""
    return (torch.arange(40 * 16).mul(37).remainder(101).view(40, 16)) % 96
