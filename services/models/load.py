"""Load a causal LM of transformers, ready for packed forwards, with its tokenizer and its identity."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import structlog
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar
from tutelage_client.errors import TutelageError, invalid

from services.models.adapters import Adapter, merge_adapter
from services.models.fingerprint import directory_revision
from services.models.head import Head, head_of
from services.models.packed import is_packed
from services.models.place import is_lost
from services.models.selfcheck import check_head, not_packable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")

# While transformers loads a model, torch's default dtype and some of transformers' own functions (tie_weights
# among them) are others for the whole process; two loads at once would leave them so for good.
_LOADING = threading.Lock()

log = structlog.get_logger(__name__)

disable_progress_bar()  # logs are lines


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        model: the transformers causal LM, in eval mode, on its device.
        tokenizer: its tokenizer, or None when the directory has none.
        revision: the hub commit, or for a local directory the hash of its content.
        vocab_size: rows of the head, V.
    """

    model: Any
    tokenizer: Any
    revision: str
    vocab_size: int

    @property
    def packed(self) -> bool:
        """False: the architecture does not pack and takes the slower sequential path."""
        return is_packed(self.model)

    @property
    def head(self) -> Head:
        """The head as the parameters are now."""
        return head_of(self.model)

    @property
    def head_weight(self) -> Tensor:
        """[V, H]."""
        return self.head.weight

    @property
    def head_bias(self) -> Tensor | None:
        """[V], or None."""
        return self.head.bias

    @property
    def logit_softcap(self) -> float | None:
        return self.head.softcap

    @property
    def logit_scale(self) -> float:
        return self.head.scale


def load_causal_lm(
    path_or_id: str | Path,
    *,
    dtype: str = "float32",
    device: str = "auto",
    revision: str | None = None,
    attention: Literal["packed", "plain"] = "packed",
    adapter: Adapter | None = None,
) -> LoadedModel:
    """Load from a local directory or the hub; safetensors only, no code from the repository.

    Args:
        dtype: float32, bfloat16, float16, or "auto": as the model was saved.
        device: a torch device, or "auto" (CUDA when there is one).
        revision: a hub branch, tag or commit; not for local directories.
        attention: "plain" skips packing, for models that only generate.
        adapter: is merged into the model, and counts in the revision.

    Raises TutelageError naming the field for what cannot be loaded, and for a checkpoint in which
    a parameter is missing: it would be random.
    """
    directory = Path(path_or_id)
    local = directory.is_dir()
    if local and revision is not None:
        raise invalid(f"revision: got {revision!r} for the local directory {directory}; its content decides")
    model = _load_model(path_or_id, _dtype(dtype), revision)
    if adapter is not None:
        model = merge_adapter(model, adapter)
    model.to(resolve_device(device)).eval()
    if attention == "packed":
        _install_packing(model)
        check_head(model)
    resolved = directory_revision(directory) if local else _commit(model.config)
    resolved = resolved if adapter is None else adapter.revision(resolved)
    return LoadedModel(model, load_tokenizer(path_or_id, revision), resolved, head_of(model).vocab_size)


@dataclass(frozen=True)
class ModelFiles:
    """Where a model's files lie on this machine, and which revision they are."""

    directory: Path
    revision: str


def model_files(path_or_id: str | Path, revision: str | None = None) -> ModelFiles:
    """The files of a local directory, or of a hub model that has been downloaded already."""
    directory = Path(path_or_id)
    if directory.is_dir():
        return ModelFiles(directory, directory_revision(directory))
    from huggingface_hub import snapshot_download
    from transformers import AutoConfig

    found = snapshot_download(str(path_or_id), revision=revision, local_files_only=True)
    return ModelFiles(Path(found), _commit(AutoConfig.from_pretrained(found)) or Path(found).name)


def load_weights(model: Any, directory: Path) -> str:
    """Replace a model's parameters and buffers by those of an export; returns the new revision.

    Nothing changes unless every tensor is there with its shape: TutelageError (FAILED_PRECONDITION).
    """
    fresh = _load_model(directory, model.dtype, None)
    current, incoming = model.state_dict(), fresh.state_dict()
    if {k: v.shape for k, v in current.items()} != {k: v.shape for k, v in incoming.items()}:
        different = sorted(
            name
            for name in current.keys() | incoming.keys()
            if name not in current or name not in incoming or current[name].shape != incoming[name].shape
        )
        raise TutelageError(
            "FAILED_PRECONDITION",
            f"weights: {directory} holds another architecture; first differing tensor: {different[0]}",
        )
    revision = directory_revision(directory)
    with torch.no_grad():
        for name, tensor in current.items():
            tensor.copy_(incoming[name])
    return revision


def _install_packing(model: Any) -> None:
    reason = not_packable(model)
    if reason is None:
        log.info("packed_attention", architecture=type(model).__name__)
    else:
        log.warning("sequential_forwards", architecture=type(model).__name__, reason=reason)


def _dtype(name: str) -> torch.dtype | Literal["auto"]:
    if name == "auto":
        return "auto"
    if name not in DTYPES:
        raise invalid(f"dtype: got {name!r}, allowed are auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def resolve_device(name: str) -> torch.device:
    """A torch device by its name; "auto" is CUDA when there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise invalid(f"device: got {name!r}, allowed are auto, cpu, cuda and cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise invalid(f"device: got {name!r}, but torch sees no CUDA device")
    return device


def _load_model(path_or_id: str | Path, dtype: torch.dtype | Literal["auto"], revision: str | None) -> Any:
    _check_path(path_or_id)
    try:
        with _LOADING:
            model, info = AutoModelForCausalLM.from_pretrained(
                str(path_or_id),
                dtype=dtype,
                revision=revision or "main",
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError) as error:
        raise invalid(f"model: could not load {_named(path_or_id)}: {error}") from error
    wrong = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if wrong:
        raise TutelageError(
            "FAILED_PRECONDITION",
            f"model: {path_or_id} lacks {len(wrong)} parameters of {type(model).__name__}, first {wrong[0]}",
        )
    if info["unexpected_keys"]:
        log.warning("unused_weights", model=str(path_or_id), first=sorted(info["unexpected_keys"])[:3])
    return model


def _check_path(path_or_id: str | Path) -> None:
    """transformers takes a path that does not exist for an id of the hub, and finds it badly spelled."""
    if is_lost(path_or_id):
        raise invalid(f"model: could not load {str(path_or_id)!r}: there is no such directory")


def _named(path_or_id: str | Path) -> str:
    """A model as messages call it: what is no directory was looked for on the hub."""
    here = Path(path_or_id).is_dir()
    return repr(str(path_or_id)) + ("" if here else ", which is no directory here, from the hub")


def _commit(config: Any) -> str:
    return str(getattr(config, "_commit_hash", None) or "")


def load_tokenizer(path_or_id: str | Path, revision: str | None) -> Any:
    """The tokenizer, or None for a local directory without one; anything half there is an error."""
    directory = Path(path_or_id)
    if directory.is_dir() and not any((directory / name).exists() for name in _TOKENIZER_FILES):
        return None
    _check_path(path_or_id)
    try:
        return AutoTokenizer.from_pretrained(str(path_or_id), revision=revision or "main")
    except (OSError, ValueError, KeyError) as error:
        raise invalid(f"model: could not load the tokenizer of {_named(path_or_id)}: {error}") from error
