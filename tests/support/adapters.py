"""LoRA adapters made by PEFT over tiny models, and the plain models that they make together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from support.tiny_models import SERVABLE, Shape, tiny_model


@dataclass(frozen=True)
class Recipe:
    """An adapter whose both matrices are random, so that it changes every score."""

    seed: int
    rank: int
    targets: str | tuple[str, ...]
    alpha: float = 8.0
    options: tuple[tuple[str, Any], ...] = ()


MATH = Recipe(seed=11, rank=3, targets=("q_proj", "v_proj"), options=(("use_rslora", True),))
CODE = Recipe(seed=12, rank=8, targets="all-linear")


def save_adapter(
    directory: Path, recipe: Recipe = CODE, architecture: str = "qwen3", shape: Shape = SERVABLE
) -> tuple[Path, Any]:
    """An adapter of tiny_model(architecture), and what the two are when PEFT merges them."""
    torch.manual_seed(recipe.seed)
    targets = recipe.targets if isinstance(recipe.targets, str) else list(recipe.targets)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=targets,
        init_lora_weights=False,
        **dict(recipe.options),
    )
    adapted = get_peft_model(tiny_model(architecture, shape=shape), config)
    adapted.save_pretrained(directory)
    return directory, adapted.merge_and_unload().eval()
