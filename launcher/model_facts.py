"""What can be known about a model without loading its weights: tokenizer, vocabulary, length, size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.lost_files import hint
from services.models.place import is_lost


class NotHere(Exception):
    """The model's files are not on this machine, so its facts cannot be checked."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Read from config.json and the tokenizer's files."""

    name: str
    architecture: str
    parameters: int
    vocab_size: int
    max_tokens: int | None
    tokenizer_size: int | None  # ids the tokenizer can produce; None without a tokenizer
    fingerprint: str | None
    layers: int = 0
    width: int = 0  # numbers of a hidden state


def read_facts(model: str, revision: str | None, *, download: bool) -> ModelFacts:
    """Facts of a local directory or a hub model.

    Args:
        download: fetch configuration and tokenizer (never weights) of a hub model that is not cached.

    Raises:
        NotHere: a hub model that is not in the local cache and may not or cannot be fetched.
        FileNotFoundError: a path that does not exist, or a directory without config.json.
    """
    directory = Path(model)
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise FileNotFoundError(f"{model} has no config.json; it is no model in Hugging Face layout")
    elif is_lost(model):
        raise FileNotFoundError(f"{model}: there is no such directory{hint(model)}")
    config = _configuration(model, revision, download)
    tokenizer = read_tokenizer(model, revision, download=download)
    text = config.get_text_config()
    from services.models.fingerprint import tokenizer_fingerprint

    return ModelFacts(
        name=model,
        architecture=(config.architectures or [config.model_type])[0],
        parameters=_parameters(config),
        vocab_size=int(text.vocab_size),
        max_tokens=getattr(text, "max_position_embeddings", None),
        tokenizer_size=None if tokenizer is None else max(tokenizer.get_vocab().values()) + 1,
        fingerprint=None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        layers=int(getattr(text, "num_hidden_layers", 0)),
        width=int(getattr(text, "hidden_size", 0)),
    )


def _configuration(model: str, revision: str | None, download: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, revision=revision, local_files_only=not download)
    except OSError as error:
        if Path(model).is_dir():
            raise
        reason = "could not be fetched" if download else "is not here, nor in the local Hugging Face cache"
        raise NotHere(f"{model} {reason}") from error


def read_tokenizer(model: str, revision: str | None, *, download: bool) -> Any:
    """The tokenizer, or None for a local directory without one; raises NotHere."""
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if Path(model).is_dir() and not any((Path(model) / name).is_file() for name in names):
        return None
    try:
        return AutoTokenizer.from_pretrained(model, revision=revision, local_files_only=not download)
    except OSError as error:
        raise NotHere(f"the tokenizer of {model} is not on this machine") from error


def _parameters(config: Any) -> int:
    """Counted on a model without storage."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())
