"""The attention function `tutelage_packed`: packed segments under a layout, plain attention otherwise.

Registered with transformers twice. As a *mask* function it turns a layer's masking rule into a
`PackedMask` (layout and sliding window) while a layout is active; transformers hands that object
to the layer's attention, where the *attention* function reads it. The layout therefore travels
with the layer's arguments, which keeps gradient checkpointing correct.
Whatever it does not know for certain to be causal or sliding-window attention it refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from services.models.layout import PackedLayout

PACKED_ATTENTION = "tutelage_packed"

# Arguments that change what a query may see or how much, and that a packed batch does not carry.
_REFUSED_ARGUMENTS = (
    "position_bias",
    "indices",
    "topk_indices",
    "sparse_indices",
    "prev_topk_indices",
    "cache",
)

_active: ContextVar[PackedLayout | None] = ContextVar("packed_layout", default=None)


class NotPackableError(Exception):
    """This architecture's attention cannot be proved to respect packed segments."""


@dataclass(frozen=True)
class PackedMask:
    """Stands where a layer expects its attention mask."""

    layout: PackedLayout
    window: int | None


@contextmanager
def packing(layout: PackedLayout) -> Iterator[None]:
    """While open, masks made by transformers in this context describe `layout`."""
    token = _active.set(layout)
    try:
        yield
    finally:
        _active.reset(token)


def packed_mask(*, mask_function: Callable[..., Any], local_size: int | None = None, **kwargs: Any) -> Any:
    """transformers' mask interface: a PackedMask while a layout is active, SDPA's mask otherwise."""
    layout = _active.get()
    if layout is None:
        return sdpa_mask(mask_function=mask_function, local_size=local_size, **kwargs)
    if kwargs.get("use_vmap"):
        raise NotPackableError("the mask has an overlay of the architecture's own")
    if local_size is None:
        if mask_function is not causal_mask_function:
            raise NotPackableError("the mask is not causal")
        return PackedMask(layout, None)
    if not _is_sliding_window(mask_function, local_size, layout.input_ids.device):
        raise NotPackableError("the local mask is not a sliding window (chunked attention?)")
    return PackedMask(layout, local_size)


def _is_sliding_window(mask_function: Callable[..., Any], window: int, device: torch.device) -> bool:
    """Probe the rule at the four corners where a sliding window differs from chunks, causality and none."""
    probes = torch.tensor([[window, 1], [window, 0], [window, window], [window, window + 1]], device=device)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    seen = [bool(mask_function(zero, zero, query, key)) for query, key in probes]
    return seen == [window > 0, False, True, False]


def packed_attention(  # noqa: PLR0917 – the signature is transformers' own
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | PackedMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; query [1, heads, T, D], answer [1, T, heads, Dv].

    `softcap` is Gemma 2's tanh cap of the scores, `s_aux` a sink logit per head. The
    `sliding_window` argument that layers also pass is ignored, as eager and SDPA do: masks decide.
    """
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    for name in _REFUSED_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise NotPackableError(f"the attention takes {name}")
    attend = _Attend(scaling, dropout, softcap, s_aux)
    if not isinstance(attention_mask, PackedMask):
        if _active.get() is not None:
            raise NotPackableError("the layer did not receive the mask that transformers made for it")
        out = attend(query, key, value, attention_mask, causal and attention_mask is None)
        return out.transpose(1, 2).contiguous(), None
    if not causal:
        raise NotPackableError("the layer's attention is not causal")
    return _attend_blocks(attend, query, key, value, attention_mask), None


def _attend_blocks(attend: _Attend, query: Tensor, key: Tensor, value: Tensor, packed: PackedMask) -> Tensor:
    planned = packed.layout.blocks(packed.window, explicit=attend.needs_scores)
    query_rows, key_rows, value_rows = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    outputs = []
    for block in planned.blocks:
        parts = (
            _gather(query_rows, block.query_index),
            _gather(key_rows, block.key_index),
            _gather(value_rows, block.key_index),
        )
        out = attend(*parts, block.mask, block.mask is None)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    rows = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return rows.index_select(0, planned.gather).unsqueeze(0)


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """rows [T, heads, D] at index [n, L] as [n, heads, L, D]."""
    return rows.index_select(0, index.flatten()).view(*index.shape, *rows.shape[1:]).transpose(1, 2)


@dataclass(frozen=True)
class _Attend:
    """Scaled dot-product attention of [n, heads, L, D] tensors, with grouped key-value heads."""

    scaling: float
    dropout: float
    softcap: float | None
    sinks: Tensor | None

    @property
    def needs_scores(self) -> bool:
        """Fused kernels know neither soft caps nor sinks."""
        return self.softcap is not None or self.sinks is not None

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
    ) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        fused_groups = mask is None and not self.needs_scores and key.shape[-1] == value.shape[-1] <= 256
        if groups > 1 and not fused_groups:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        causal = causal and query.shape[2] > 1
        if self.needs_scores:
            return self._with_scores(query, key, value, mask, causal)
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout,
            is_causal=causal,
            scale=self.scaling,
            enable_gqa=groups > 1 and fused_groups,
        )

    def _with_scores(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
    ) -> Tensor:
        scores = query @ key.transpose(2, 3) * self.scaling
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        elif mask is not None:
            scores = scores + mask
        if self.sinks is not None:
            sink = self.sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
            scores = torch.cat([scores, sink.to(scores.dtype)], dim=-1)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
        weights = torch.nn.functional.dropout(weights, self.dropout)
        return weights[..., : key.shape[2]] @ value


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, packed_mask)
