"""LoRA adapters in PEFT's layout: what a directory holds, which can be served exactly, merging one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from tutelage_client.errors import TutelageError, invalid

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# What a plain LoRA leaves out, by PEFT's names; each changes scores in a way that not every engine knows.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "modules_to_save": (),
    "trainable_token_indices": (),
    "layer_replication": (),
    "alora_invocation_tokens": (),
    "target_parameters": (),
    "use_bdlora": (False,),
    "use_qalora": (False,),
}
_HEADS = ("lm_head", "embed_out", "output")
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings")
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Adapter:
    """A plain LoRA adapter that lies on this machine.

    Attributes:
        name: of the teacher that it makes of its base.
        rank: the largest of its modules.
        modules: names of the base's modules that it changes, as PEFT writes them.
        digest: SHA-256 over its configuration and its weights.
    """

    name: str
    directory: Path
    rank: int
    modules: tuple[str, ...]
    digest: str

    @property
    def targets(self) -> set[str]:
        """Last words of the names of its modules, as `q_proj`."""
        return {module.rpartition(".")[2] for module in self.modules}

    def model(self, base: str) -> str:
        """What an identity calls the two together."""
        return f"{base}+{self.directory}"

    def revision(self, base: str) -> str:
        """Of the two together; changes with either."""
        return hashlib.sha256(f"{base}\0{self.digest}\n".encode()).hexdigest()


def read_adapter(name: str, directory: Path) -> Adapter:
    """Read configuration and tensor names.

    Raises:
        TutelageError: INVALID_ARGUMENT for a directory that holds no adapter, for one that is more than a
            LoRA of linear layers, and for one that changes the output head or the embedding: those decide
            every logit of every teacher that shares the base, and engines do not agree about them.
    """
    where = f"adapters.{name}"
    configuration = _configuration(where, directory)
    kind = configuration.get("peft_type")
    if kind != "LORA":
        raise invalid(f"{where}: got peft_type {kind!r} in {directory / CONFIG}, allowed is 'LORA'")
    for key, plain in _PLAIN.items():
        got = configuration.get(key)
        if got and got not in plain:
            raise invalid(
                f"{where}: got {key} = {got!r} in {directory / CONFIG}, which only PEFT itself knows"
            )
    ranks = _ranks(where, directory / WEIGHTS)
    for module in ranks:
        if module.rpartition(".")[2] in _HEADS + _EMBEDDINGS:
            raise invalid(
                f"{where}: got a change of {module!r}; adapters of the output head or of the embedding are "
                "not served: merge it into a model of its own"
            )
    digest = hashlib.sha256()
    for file in (CONFIG, WEIGHTS):
        with (directory / file).open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return Adapter(name, directory, max(ranks.values()), tuple(sorted(ranks)), digest.hexdigest())


def read_adapters(directories: Mapping[str, Path]) -> tuple[Adapter, ...]:
    """`read_adapter` of each, by teacher name."""
    return tuple(read_adapter(name, directory) for name, directory in directories.items())


def merge_adapter(model: Any, adapter: Adapter) -> Any:
    """The plain model that base and adapter make together; `model` is changed.

    Raises:
        TutelageError: FAILED_PRECONDITION when the adapter was not made for this model.
    """
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ModuleNotFoundError as error:
        raise TutelageError(
            "FAILED_PRECONDITION", "adapters: PEFT is not installed; pip install 'tutelage[trainer]'"
        ) from error
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter.directory))
    except (RuntimeError, ValueError) as error:
        raise _unfit(adapter, str(error)) from error
    applied = set(get_peft_model_state_dict(adapted))
    expected = {f"{_PREFIX}{module}.lora_{side}.weight" for module in adapter.modules for side in "AB"}
    if applied != expected:
        raise _unfit(adapter, f"first differing tensor: {min(applied ^ expected)}")
    return adapted.merge_and_unload(safe_merge=True)


def _unfit(adapter: Adapter, reason: str) -> TutelageError:
    return TutelageError(
        "FAILED_PRECONDITION", f"adapters.{adapter.name}: {adapter.directory} is for another model: {reason}"
    )


def _configuration(where: str, directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    if not path.is_file():
        raise invalid(f"{where}: got {str(directory)!r}, which has no {CONFIG}")
    try:
        configuration: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise invalid(f"{where}: {path} is not JSON: {error}") from error
    return configuration


def _ranks(where: str, path: Path) -> dict[str, int]:
    """Rank of every module's A [r, in] and B [out, r]."""
    if not path.is_file():
        raise invalid(f"{where}: got {str(path.parent)!r}, which has no {WEIGHTS}")
    ranks: dict[str, dict[str, int]] = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                module, side = _parsed(where, name)
                shape = file.get_slice(name).get_shape()
                ranks.setdefault(module, {})[side] = shape[0 if side == "A" else 1]
    except (OSError, SafetensorError) as error:
        raise invalid(f"{where}: {path} cannot be read: {error}") from error
    if not ranks:
        raise invalid(f"{where}: {path} holds no tensor")
    for module, sides in ranks.items():
        if set(sides) != {"A", "B"} or sides["A"] != sides["B"]:
            raise invalid(f"{where}: {path} has no whole pair of tensors for {module}")
    return {module: sides["A"] for module, sides in ranks.items()}


def _parsed(where: str, tensor: str) -> tuple[str, str]:
    """Module and side of "base_model.model.MODULE.lora_A.weight"."""
    module, _, side = tensor.removesuffix(".weight").rpartition(".lora_")
    if not (tensor.startswith(_PREFIX) and tensor.endswith(".weight") and module and side in ("A", "B")):
        raise invalid(
            f"{where}: got a tensor {tensor!r}; served are the two matrices of linear layers, "
            f"{_PREFIX}MODULE.lora_A.weight and …lora_B.weight"
        )
    return module.removeprefix(_PREFIX), side
