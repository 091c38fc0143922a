"""Write a model as a Hugging Face directory of safetensors that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()  # one bar per published policy would drown the log


def export_model(
    model: Any, tokenizer: Any, directory: Path, *, state_dict: Mapping[str, Tensor] | None = None
) -> Path:
    """Save model (and tokenizer, unless None) under `directory`; `from_pretrained` loads it.

    Written beside the target under a hidden temporary name, synced to disk, then renamed. A crash
    leaves at most a hidden directory. `state_dict` replaces the model's own tensors (a snapshot).
    Raises FileExistsError when `directory` exists: a published directory never changes.
    """
    if directory.exists():
        raise FileExistsError(f"{directory} exists; exported weights are never overwritten")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.parent / f".{directory.name}.{uuid.uuid4().hex}.tmp"
    temporary.mkdir()
    try:
        model.save_pretrained(temporary, state_dict=None if state_dict is None else dict(state_dict))
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        sync_tree(temporary)
        temporary.rename(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(directory.parent)
    return directory


def sync_tree(directory: Path) -> None:
    """fsync every file under `directory`, then the directories themselves."""
    for path in sorted(directory.rglob("*"), reverse=True):
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
