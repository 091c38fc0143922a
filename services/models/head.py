"""From hidden rows to logits: the head of a causal LM with its architecture's scale and soft cap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tutelage_client.errors import invalid

from services.models.packed import unwrap


@dataclass(frozen=True)
class Head:
    """logits = cap(scale · (hidden Wᵀ + b)), where cap(x) = softcap · tanh(x / softcap) if there is one.

    weight [V, H], bias [V] or None; both share storage with the model unless cast.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        return int(self.weight.shape[0])

    def cast(self, dtype: torch.dtype) -> Head:
        """The same head in `dtype`; a copy only where the type differs."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return Head(self.weight.to(dtype), bias, self.scale, self.softcap)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden [N, H] to logits [N, V], in the head's dtype; without gradients they may go to `out`."""
        hidden, weight = hidden.to(self.weight.dtype), self.weight.t()
        if self.bias is None:
            logits = torch.mm(hidden, weight, out=out)
        else:
            logits = torch.addmm(self.bias, hidden, weight, out=out)
        if self.scale != 1.0:
            logits = torch.mul(logits, self.scale, out=out)
        if self.softcap is not None:
            logits = torch.tanh(torch.div(logits, self.softcap, out=out), out=out)
            logits = torch.mul(logits, self.softcap, out=out)
        return logits


def head_of(model: Any) -> Head:
    """The head of a transformers causal LM (or one in PEFT); its tensors are the parameters themselves.

    Scales: Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`, Falcon-H1
    multiplies by `lm_head_multiplier`. Soft cap: `final_logit_softcapping` (Gemma 2, Gemma 3).
    """
    inner = unwrap(model)
    output = inner.get_output_embeddings()
    if output is None or getattr(output, "weight", None) is None:
        raise invalid(f"model: got {type(inner).__name__}, which has no linear head to score with")
    if hasattr(output, "base_layer"):
        raise invalid("model: got an adapter on the output head, whose weight alone is not the head")
    config = inner.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(
        output.weight, getattr(output, "bias", None), scale, None if softcap is None else float(softcap)
    )
