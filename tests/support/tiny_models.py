"""Random models of many architectures, small enough to build in a test, saved as real directories."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tutelage_client.types import Int32Array

VOCAB = 61


@dataclass(frozen=True)
class Shape:
    """Sizes that an engine may bound; hidden states have heads · head_dim numbers.

    A window of 4 is shorter than almost every sequence that the tests use.
    """

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    intermediate: int = 48
    moe_intermediate: int = 16
    window: int = 4
    layers: int = 2
    vocab: int = VOCAB
    positions: int = 2048
    layer_scaled_attention: bool = True  # GPT-2's option

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim


SMALL = Shape()
SERVABLE = Shape(  # by vLLM on a CPU
    heads=2, kv_heads=1, head_dim=32, intermediate=64, moe_intermediate=32, layer_scaled_attention=False
)


def _common(shape: Shape) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.positions,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }


def _no_head_dim(shape: Shape) -> dict[str, Any]:
    return {name: value for name, value in _common(shape).items() if name != "head_dim"}


_MOE = {"num_experts_per_tok": 2, "num_local_experts": 4}


def _gpt2(shape: Shape) -> Any:
    return transformers.GPT2Config(
        vocab_size=shape.vocab,
        n_embd=shape.hidden,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_positions=shape.positions,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        scale_attn_by_inverse_layer_idx=shape.layer_scaled_attention,
    )


def _gpt_neox(shape: Shape) -> Any:
    return transformers.GPTNeoXConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate,
        initializer_range=0.3,
    )


def _gemma2(shape: Shape) -> Any:
    return transformers.Gemma2Config(
        **_common(shape),
        sliding_window=shape.window,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
    )


def _gemma3(shape: Shape) -> Any:
    return transformers.Gemma3TextConfig(
        **_common(shape),
        sliding_window=shape.window,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"] * (shape.layers // 2),
    )


def _qwen3_moe(shape: Shape) -> Any:
    return transformers.Qwen3MoeConfig(
        **_common(shape), num_experts=4, num_experts_per_tok=2, moe_intermediate_size=shape.moe_intermediate
    )


PACKABLE: dict[str, Callable[[Shape], Any]] = {
    "qwen3": lambda shape: transformers.Qwen3Config(**_common(shape)),
    "llama": lambda shape: transformers.LlamaConfig(**_common(shape), attention_bias=True),
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "mistral": lambda shape: transformers.MistralConfig(**_common(shape), sliding_window=shape.window),
    "gpt2": _gpt2,
    "qwen3_moe": _qwen3_moe,
    "mixtral": lambda shape: transformers.MixtralConfig(**_common(shape), **_MOE),
    "cohere": lambda shape: transformers.CohereConfig(**_no_head_dim(shape)),
    "granite": lambda shape: transformers.GraniteConfig(
        **_no_head_dim(shape), logits_scaling=3.0, attention_multiplier=0.2
    ),
    "gpt_oss": lambda shape: transformers.GptOssConfig(**_common(shape), **_MOE, sliding_window=shape.window),
    "gpt_neox": _gpt_neox,
}

NOT_PACKABLE: dict[str, Callable[[Shape], Any]] = {
    "bloom": lambda shape: transformers.BloomConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, n_layer=2, n_head=shape.heads, initializer_range=0.3
    ),
    "mamba": lambda shape: transformers.MambaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, num_hidden_layers=2, state_size=4
    ),
    "lfm2": lambda shape: transformers.Lfm2Config(
        **_no_head_dim(shape), layer_types=["conv", "full_attention"]
    ),
    "llama4": lambda shape: transformers.Llama4TextConfig(
        **_common(shape),
        num_local_experts=2,
        num_experts_per_tok=1,
        intermediate_size_mlp=48,
        attention_chunk_size=4,
    ),
}


def tiny_config(architecture: str, shape: Shape = SMALL) -> Any:
    return (PACKABLE | NOT_PACKABLE)[architecture](shape)


def tiny_model(architecture: str = "qwen3", seed: int = 0, spread: float = 0.3, shape: Shape = SMALL) -> Any:
    """A random float32 model in eval mode, with eager attention: the plain reference.

    `spread` is the standard deviation of the weights; 0.3 makes logits differ by several nats.
    """
    torch.manual_seed(seed)
    config = tiny_config(architecture, shape)
    config.initializer_range = spread
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # biases start at zero and would hide a forgotten one
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or name.endswith("sinks"):
                parameter.normal_(std=0.3)
    model.set_attn_implementation("eager")
    return model.eval()


def save_tiny_model(
    directory: Path, architecture: str = "qwen3", seed: int = 0, shape: Shape = SMALL
) -> Path:
    tiny_model(architecture, seed, shape=shape).save_pretrained(directory)
    return directory


@torch.no_grad()
def plain_logits(model: Any, context: Int32Array, response: Int32Array) -> torch.Tensor:
    """[R, V]: one sequence, one forward of the model as transformers wrote it."""
    ids = torch.from_numpy(np.concatenate([context, response]).astype(np.int64)).to(model.device)
    logits: torch.Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
    return logits[len(context) - 1 : -1].float()


def random_ids(random: np.random.Generator, length: int) -> Int32Array:
    return random.integers(0, VOCAB, size=length).astype(np.int32)
