"""Whether two model directories hold weights of one model, read from headers and configurations alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from tutelage_client.errors import TutelageError, invalid

# Keys of a configuration that may differ between exports of one model.
_WITHOUT_EFFECT = {
    "_name_or_path", "_attn_implementation", "architectures", "bos_token_id", "dtype", "eos_token_id",
    "pad_token_id", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip

# Saved or not when the head shares the embedding: either way the same model.
_TIED = ("lm_head.weight",)


def tensor_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the directory's safetensors files.

    Raises:
        TutelageError: INVALID_ARGUMENT when there is none, or a file cannot be read.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():  # what it does not list is not loaded
        files = sorted({directory / name for name in json.loads(index.read_text())["weight_map"].values()})
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise invalid(f"weights: got {str(directory)!r}, which has no safetensors file")
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    shapes[name] = tuple(file.get_slice(name).get_shape())
        except Exception as error:
            raise invalid(f"weights: {path} is no whole safetensors file: {error}") from error
    return shapes


@dataclass(frozen=True)
class ModelDescription:
    """What exports of one model have in common."""

    configuration: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]


def describe(directory: Path) -> ModelDescription:
    """Of a directory of safetensors with its config.json."""
    tensors = tensor_shapes(directory)
    return ModelDescription(_configuration(directory), tensors)


def check_same_model(ours: ModelDescription, directory: Path) -> None:
    """Raise FAILED_PRECONDITION unless `directory` has our configuration and our tensors.

    A tensor that is missing would silently keep its old values, and a changed configuration would not count.
    """
    theirs = describe(directory)
    changed = _first_difference(ours.configuration, theirs.configuration)
    if changed is not None:
        raise TutelageError(
            "FAILED_PRECONDITION",
            f"weights: config.json of {directory} has {changed} = {theirs.configuration.get(changed)!r}, "
            f"here it is {ours.configuration.get(changed)!r}",
        )
    tied = _TIED if ours.configuration.get("tie_word_embeddings") else ()
    different = _first_difference(ours.tensors, theirs.tensors, besides=tied)
    if different is not None:
        raise TutelageError(
            "FAILED_PRECONDITION",
            f"weights: {directory} holds another architecture; first differing tensor: {different}",
        )


def _first_difference(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], besides: Sequence[str] = ()
) -> str | None:
    names = (ours.keys() | theirs.keys()) - set(besides)
    return min((name for name in names if ours.get(name) != theirs.get(name)), default=None)


def _configuration(directory: Path) -> dict[str, Any]:
    """What of config.json decides the numbers; flat, because text models of multimodal ones are nested."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory).get_text_config().to_dict()
    except (OSError, ValueError) as error:
        raise invalid(f"weights: {directory} has no config.json that can be read: {error}") from error
    return {key: value for key, value in config.items() if key not in _WITHOUT_EFFECT}
