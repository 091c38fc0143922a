"""The model that is trained: loaded in full or with adapters, and written out as a plain model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from services.models.fingerprint import tokenizer_fingerprint
from services.models.load import DTYPES, load_causal_lm
from student_trainer.sections import LoraSettings, StudentSettings

_ADAPTER = "default"


@dataclass(frozen=True)
class Student:
    """A causal LM (wrapped by PEFT with adapters), its tokenizer, and what identifies them."""

    model: Any
    tokenizer: Any
    vocab_size: int
    fingerprint: str
    dtype: torch.dtype  # of the forward pass and of exports
    lora: bool
    revision: str  # of the model before training: a hub commit, or the hash of a directory's content

    @property
    def device(self) -> torch.device:
        return next(iter(self.model.parameters())).device  # type: ignore[no-any-return]

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """Trained parameters by name, each once (tied weights have one name)."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def moving(self) -> Iterator[tuple[str, Tensor]]:
        """What training changes, by the name of the weight: the weights, or what adapters add to them.

        Of a model that is spread over several ranks, all ranks go through this together.
        """
        if not self.lora:
            yield from self.trained()
            return
        for name, module in _adapted(self.model):
            delta, base = module.get_delta_weight(_ADAPTER), module.get_base_layer().weight
            yield (
                f"{name}.weight",
                delta.redistribute(placements=base.placements) if isinstance(delta, DTensor) else delta,
            )

    @torch.no_grad()
    def weights(
        self, averages: Mapping[str, Tensor] | None = None, *, keep: bool = True
    ) -> dict[str, Tensor]:
        """Weights of the whole model in `dtype`, adapters merged in.

        Of a model that is spread over several ranks, all ranks call this together; those that do not
        `keep` the weights get an empty dictionary.

        Args:
            averages: in place of what `moving` yields.
        """
        if self.lora:
            state = _merged(self.model, dict(self.moving() if averages is None else averages))
        else:
            state = self.model.state_dict(keep_vars=True)
            if averages is not None:  # by identity: tied weights have two names there and one here
                instead = {id(p): averages[name] for name, p in self.trained()}
                state = {name: instead.get(id(tensor), tensor) for name, tensor in state.items()}
        return _whole(state, self.dtype, keep)

    def adapter(self, *, keep: bool = True) -> dict[str, Tensor]:
        """The adapters' own weights by name, whole; of several ranks, all call this together."""
        state = self.model.state_dict(keep_vars=True)
        return _whole({name: t for name, t in state.items() if "lora_" in name}, None, keep)

    def export(self, directory: Path, averages: Mapping[str, Tensor] | None = None) -> None:
        """Write a Hugging Face directory that `from_pretrained` loads; adapters are merged in.

        Args:
            averages: see `weights`.
        """
        inner = self.model.get_base_model() if self.lora else self.model
        inner.save_pretrained(directory, state_dict=self.weights(averages))
        if self.dtype != inner.dtype:
            _declare_dtype(directory / "config.json", self.dtype)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)

    def export_adapter(self, directory: Path) -> None:
        """Write the adapters alone, as PEFT loads them."""
        self.model.save_pretrained(directory, state_dict=self.adapter())


def load_student(settings: StudentSettings) -> Student:
    """Load the student before training.

    Every weight is kept in float32 when all are trained; frozen weights under adapters are kept in
    `settings.dtype`. Dropout of the model stays off: the log-probabilities that are trained must be
    those the policy samples with. Only the adapters' own dropout is active.
    """
    base_dtype = settings.dtype if settings.lora else "float32"
    loaded = load_causal_lm(
        settings.model, dtype=base_dtype, device=settings.device, revision=settings.revision
    )
    model = loaded.model if settings.lora is None else _with_adapters(loaded.model, settings.lora)
    return Student(
        model=model,
        tokenizer=loaded.tokenizer,
        vocab_size=loaded.vocab_size,
        fingerprint=tokenizer_fingerprint(loaded.tokenizer),
        dtype=DTYPES[settings.dtype],
        lora=settings.lora is not None,
        revision=loaded.revision,
    )


def _with_adapters(model: Any, settings: LoraSettings) -> Any:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(
        model,
        LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=settings.target_modules,
            task_type="CAUSAL_LM",
        ),
        adapter_name=_ADAPTER,
    )
    wrapped.eval()
    for name, module in wrapped.named_modules():
        if "lora_dropout" in name:
            module.train()
    return wrapped


def _adapted(model: Any) -> Iterator[tuple[str, Any]]:
    """Every layer of the model underneath that has an adapter, by name."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _merged(model: Any, deltas: dict[str, Tensor]) -> dict[str, Tensor]:
    """State of the model underneath with each adapter's product added; nothing is changed in place.

    Merging in place and undoing it would leave rounding in the frozen weights, and a resumed run
    would then differ from an uninterrupted one.

    Args:
        deltas: what is added, by the name of the weight.
    """
    base = model.get_base_model()
    merged: dict[str, Tensor] = {}
    for key, tensor in base.state_dict(keep_vars=True).items():
        if ".lora_" in key:
            continue
        name = key.replace(".base_layer.", ".")
        delta = deltas.pop(name, None)
        merged[name] = tensor if delta is None else (tensor.float() + delta.float()).to(tensor.dtype)
    if deltas:
        raise ValueError(f"adapters on {sorted(deltas)} have no weight to be merged into")
    return merged


def _declare_dtype(config: Path, dtype: torch.dtype) -> None:
    """Say in the configuration what the weights beside it are; transformers wrote the live model's dtype."""
    document = json.loads(config.read_text())
    document["dtype"] = str(dtype).removeprefix("torch.")
    config.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")


def _whole(state: dict[str, Tensor], dtype: torch.dtype | None, keep: bool) -> dict[str, Tensor]:
    """Floating tensors in `dtype` (None: their own), shards put together on the CPU.

    Tensors that share storage still do, so that ties stay ties.
    """
    made: dict[tuple[int, torch.Size], Tensor | None] = {}
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        sharded = isinstance(tensor, DTensor)
        key = (id(tensor) if sharded else tensor.data_ptr(), tensor.shape)
        if key not in made:
            made[key] = _one_whole(tensor.detach(), dtype, keep)
        if (whole := made[key]) is not None:
            result[name] = whole
    return result


def _one_whole(tensor: Tensor, dtype: torch.dtype | None, keep: bool) -> Tensor | None:
    whole = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
    if not keep:
        return None
    return whole.to(dtype) if dtype is not None and whole.is_floating_point() else whole
