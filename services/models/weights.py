"""Which tensors a directory of safetensors holds, read from the headers alone."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from tutelage_client.errors import TutelageError, invalid

# Saved or not when the head shares the embedding: either way the same model.
_TIED = ("lm_head.weight",)


def tensor_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the directory's safetensors files.

    Raises:
        TutelageError: INVALID_ARGUMENT when there is none, or a file cannot be read.
    """
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


def check_same_tensors(current: Path, incoming: Path) -> None:
    """Raise FAILED_PRECONDITION unless both directories hold the same tensors with the same shapes.

    A tensor that is missing would silently keep its old values.
    """
    ours, theirs = tensor_shapes(current), tensor_shapes(incoming)
    different = sorted(
        name
        for name in ours.keys() | theirs.keys()
        if name not in _TIED and ours.get(name) != theirs.get(name)
    )
    if different:
        raise TutelageError(
            "FAILED_PRECONDITION",
            f"weights: {incoming} holds another architecture; first differing tensor: {different[0]}",
        )
