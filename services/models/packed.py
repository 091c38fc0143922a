"""Padding-free forward over packed, prefix-shared sequences: one call, each context computed once.

`build_layout` packs, `hidden_states` runs the trunk. Models loaded without packed attention (or
whose architecture cannot pack) take the sequential path: one plain forward per sequence, the same
rows in the same places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from services.models.attention import PACKED_ATTENTION, NotPackableError, packing
from services.models.layout import PackedLayout, build_layout

__all__ = [
    "NotPackableError",
    "PackedLayout",
    "build_layout",
    "hidden_states",
    "is_packed",
    "layer_states",
    "packed_positions",
]

_LAST = 0  # no layer's number: the trunk's output


def hidden_states(model: Any, layout: PackedLayout) -> Tensor:
    """The trunk's output [T, H] for every packed row: after the final norm, before the head.

    Differentiable. `model` is a causal LM of transformers, or one wrapped by PEFT.
    """
    return layer_states(model, layout, ())[0]


def layer_states(model: Any, layout: PackedLayout, layers: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """`hidden_states`, and the output [T, H] of each of `layers`, numbered from 1.

    The last layer's is taken after the final norm, where the trunk ends. Differentiable.
    """
    inner = unwrap(model)
    run = _packed if computes_packed(inner, layout) else _sequential
    return run(inner, layout, layers)


def computes_packed(model: Any, layout: PackedLayout) -> bool:
    """Whether `hidden_states` takes this layout in one forward; otherwise contexts are not shared."""
    return is_packed(model) and layout.max_position < packed_positions(model.config)


def unwrap(model: Any) -> Any:
    """The transformers model inside a PEFT model; other models as they are."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trunk(model: Any) -> Any:
    """The part of an unwrapped causal LM that ends with the final norm."""
    # Where the declared prefix names no child (Llama 4's text model), the trunk is called `model`.
    return model.base_model if model.base_model is not model else model.model


def is_packed(model: Any) -> bool:
    """Whether the model computes packed batches in one forward."""
    return bool(model.config._attn_implementation == PACKED_ATTENTION)


def packed_positions(config: Any) -> float:
    """Below this position id packing is exact; infinity for most models.

    Dynamic and long rotary scalings choose their frequencies by the longest sequence of the
    *batch*, so beyond the original length neighbours would change the score.
    """
    ropes = getattr(config, "rope_parameters", None) or {}
    entries = [ropes, *(value for value in ropes.values() if isinstance(value, dict))]
    if not any(entry.get("rope_type") in ("dynamic", "longrope") for entry in entries):
        return float("inf")
    originals = [
        entry["original_max_position_embeddings"]
        for entry in entries
        if "original_max_position_embeddings" in entry
    ]
    return float(min([*originals, config.max_position_embeddings]))


def _packed(model: Any, layout: PackedLayout, layers: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
    input_ids = layout.input_ids[None]
    with packing(layout):
        # An explicit all-ones mask keeps transformers from guessing sequences out of position_ids.
        output = trunk(model)(
            input_ids=input_ids,
            position_ids=layout.position_ids[None],
            attention_mask=torch.ones_like(input_ids),
            use_cache=False,
            output_hidden_states=bool(layers),
        )
    return _taken(output, layers)


def _sequential(model: Any, layout: PackedLayout, layers: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """One forward per sequence; a shared context's rows come from its first sequence."""
    pieces: dict[int, dict[int, Tensor]] = {}  # packed row of the piece's first token -> rows by layer
    for context, size, response, length in layout.sequence_parts:
        ids = torch.cat(
            [layout.input_ids[context : context + size], layout.input_ids[response : response + length]]
        )
        output = trunk(model)(input_ids=ids[None], use_cache=False, output_hidden_states=bool(layers))
        last, found = _taken(output, layers)
        rows = {_LAST: last, **found}
        pieces.setdefault(context, {layer: states[:size] for layer, states in rows.items()})
        if length:
            pieces[response] = {layer: states[size:] for layer, states in rows.items()}
    whole = {layer: torch.cat([pieces[row][layer] for row in sorted(pieces)]) for layer in (_LAST, *layers)}
    return whole.pop(_LAST), whole


def _taken(output: Any, layers: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """The states of the only sequence of a forward pass; the embeddings stand before the layers."""
    last = output.last_hidden_state[0]
    count = len(output.hidden_states) - 1 if layers else 0
    return last, {layer: last if layer == count else output.hidden_states[layer][0] for layer in layers}
