"""Random models of many architectures, small enough to build in a test, saved as real directories."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tutelage_client.types import Int32Array

VOCAB = 61

# Windows of 4 are shorter than almost every sequence that the tests use.
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_NO_HEAD_DIM = {name: value for name, value in _COMMON.items() if name != "head_dim"}
_MOE = {"num_experts_per_tok": 2, "num_local_experts": 4}


def _gpt2() -> Any:
    return transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=2048,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        scale_attn_by_inverse_layer_idx=True,
    )


PACKABLE: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: transformers.Qwen3Config(**_COMMON),
    "llama": lambda: transformers.LlamaConfig(**_COMMON, attention_bias=True),
    "gemma2": lambda: transformers.Gemma2Config(
        **_COMMON,
        sliding_window=4,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_COMMON,
        sliding_window=4,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "mistral": lambda: transformers.MistralConfig(**_COMMON, sliding_window=4),
    "gpt2": _gpt2,
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **_COMMON, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "mixtral": lambda: transformers.MixtralConfig(**_COMMON, **_MOE),
    "cohere": lambda: transformers.CohereConfig(**_NO_HEAD_DIM),
    "granite": lambda: transformers.GraniteConfig(**_NO_HEAD_DIM, logits_scaling=3.0),
    "gpt_oss": lambda: transformers.GptOssConfig(**_COMMON, **_MOE, sliding_window=4),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        initializer_range=0.3,
    ),
}

NOT_PACKABLE: dict[str, Callable[[], Any]] = {
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3
    ),
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4
    ),
    "lfm2": lambda: transformers.Lfm2Config(**_NO_HEAD_DIM, layer_types=["conv", "full_attention"]),
    "llama4": lambda: transformers.Llama4TextConfig(
        **_COMMON,
        num_local_experts=2,
        num_experts_per_tok=1,
        intermediate_size_mlp=48,
        attention_chunk_size=4,
    ),
}


def tiny_config(architecture: str) -> Any:
    return (PACKABLE | NOT_PACKABLE)[architecture]()


def tiny_model(architecture: str = "qwen3", seed: int = 0, spread: float = 0.3) -> Any:
    """A random float32 model in eval mode, with eager attention: the plain reference.

    `spread` is the standard deviation of the weights; 0.3 makes logits differ by several nats.
    """
    torch.manual_seed(seed)
    config = tiny_config(architecture)
    config.initializer_range = spread
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # biases start at zero and would hide a forgotten one
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or name.endswith("sinks"):
                parameter.normal_(std=0.3)
    model.set_attn_implementation("eager")
    return model.eval()


def save_tiny_model(directory: Path, architecture: str = "qwen3", seed: int = 0) -> Path:
    tiny_model(architecture, seed).save_pretrained(directory)
    return directory


@torch.no_grad()
def plain_logits(model: Any, context: Int32Array, response: Int32Array) -> torch.Tensor:
    """[R, V]: one sequence, one forward of the model as transformers wrote it."""
    ids = torch.from_numpy(np.concatenate([context, response]).astype(np.int64)).to(model.device)
    logits: torch.Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
    return logits[len(context) - 1 : -1].float()


def random_ids(random: np.random.Generator, length: int) -> Int32Array:
    return random.integers(0, VOCAB, size=length).astype(np.int32)
