"""The benchmark's models: random, of the shapes that workloads name, written once and kept."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path

from benchmarks.scoring.workloads import ModelShape

ARTIFACTS = Path("artifacts") / "scoring"
SPREAD = 0.05  # standard deviation of the weights


def model_directory(shape: ModelShape) -> Path:
    """The saved model of a shape; made when it is not there yet."""
    described = json.dumps({**asdict(shape), "spread": SPREAD}, sort_keys=True)
    directory = ARTIFACTS / f"{shape.name}-{hashlib.sha256(described.encode()).hexdigest()[:8]}"
    if not directory.exists():
        unfinished = directory.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        _save(shape, unfinished)
        unfinished.rename(directory)
    return directory.resolve()


def _save(shape: ModelShape, directory: Path) -> None:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_positions,
        initializer_range=SPREAD,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
