"""Micro-batches and their outcomes as bytes, for the ranks of a run: safetensors, so nothing is unpickled.

Names inside are "0/sampled_ids" or "0/view/top_ids/teacher": micro-batch, field, and the view it is of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from services.models.packed import PackedLayout, build_layout
from student_trainer.batch import MicroBatch
from student_trainer.objective.batch import TokenBatch, ViewTensors

_TOKEN_FIELDS = tuple(
    field.name for field in fields(TokenBatch) if field.name not in ("views", "view_factors")
)
_SUMMARY = "summary"


@dataclass(frozen=True)
class Outcome:
    """What one micro-batch came to.

    `diverged` says why the student's numbers were not finite; the other fields then hold nothing.
    """

    loss: float
    sums: Mapping[str, float]
    per_token: dict[str, Tensor]  # empty unless traces were asked for
    diverged: str | None = None


def encode_micro_batches(micro_batches: Sequence[MicroBatch]) -> bytes:
    """Everything that a forward and backward pass needs; `members` stay behind."""
    tensors: dict[str, Tensor] = {}
    for number, micro_batch in enumerate(micro_batches):
        parts = _layout_tensors(micro_batch.layout) | _token_tensors(micro_batch.tokens)
        tensors |= {f"{number}/{name}": tensor.contiguous() for name, tensor in parts.items()}
    data: bytes = save(tensors)
    return data


def decode_micro_batches(data: bytes) -> list[MicroBatch]:
    """The micro-batches, without `members`."""
    return [
        MicroBatch(layout=_layout(tensors), tokens=_tokens(tensors), members=())
        for _, tensors in sorted(_by_number(load(data)).items())
    ]


def encode_outcomes(outcomes: Sequence[Outcome]) -> bytes:
    """Figures and per-token values; floats survive exactly."""
    summary = [{"loss": o.loss, "sums": dict(o.sums), "diverged": o.diverged} for o in outcomes]
    tensors = {
        f"{number}/{name}": tensor.cpu().contiguous()
        for number, outcome in enumerate(outcomes)
        for name, tensor in outcome.per_token.items()
    }
    text = bytearray(json.dumps(summary).encode())
    data: bytes = save(tensors | {_SUMMARY: torch.frombuffer(text, dtype=torch.uint8)})
    return data


def decode_outcomes(data: bytes) -> list[Outcome]:
    """As they were encoded; tensors are on the CPU."""
    tensors = load(data)
    summary = json.loads(tensors.pop(_SUMMARY).numpy().tobytes())
    per_token = _by_number(tensors)
    return [
        Outcome(each["loss"], each["sums"], per_token.get(number, {}), each["diverged"])
        for number, each in enumerate(summary)
    ]


def _by_number(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    found: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition("/")
        found.setdefault(int(number), {})[name] = tensor
    return found


def _layout_tensors(layout: PackedLayout) -> dict[str, Tensor]:
    contexts = {row: size for row, size, _, _ in layout.sequence_parts}
    places = {row: place for place, row in enumerate(contexts)}
    return {
        "context_ids": torch.cat([layout.input_ids[row : row + size] for row, size in contexts.items()]),
        "context_lengths": torch.tensor(list(contexts.values())),
        "owners": torch.tensor([places[row] for row, _, _, _ in layout.sequence_parts]),
        "response_ids": layout.response_ids,
        "response_lengths": torch.from_numpy(np.diff(layout.offsets)),
    }


def _layout(tensors: Mapping[str, Tensor]) -> PackedLayout:
    contexts = _split(tensors["context_ids"], tensors["context_lengths"])
    responses = _split(tensors["response_ids"], tensors["response_lengths"])
    return build_layout(contexts, list(zip(tensors["owners"].tolist(), responses, strict=True)))


def _split(ids: Tensor, lengths: Tensor) -> list[np.ndarray[tuple[int], np.dtype[np.int32]]]:
    return [part.numpy().astype(np.int32) for part in torch.split(ids, lengths.tolist())]


def _token_tensors(tokens: TokenBatch) -> dict[str, Tensor]:
    whole = {name: getattr(tokens, name) for name in _TOKEN_FIELDS}
    views = {
        f"view/{field.name}/{view}": getattr(scores, field.name)
        for view, scores in tokens.views.items()
        for field in fields(ViewTensors)
    }
    factors = {f"factor/{view}": factor for view, factor in tokens.view_factors.items()}
    return {name: tensor for name, tensor in (whole | views | factors).items() if tensor is not None}


def _tokens(tensors: Mapping[str, Tensor]) -> TokenBatch:
    views: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("view/"):
            _, name, view = key.split("/", 2)
            views.setdefault(view, {})[name] = tensor
    whole = {name: tensors[name] for name in _TOKEN_FIELDS if name in tensors}
    return TokenBatch(
        views={view: ViewTensors(**scores) for view, scores in views.items()},
        view_factors={
            key.removeprefix("factor/"): tensor
            for key, tensor in tensors.items()
            if key.startswith("factor/")
        },
        **whole,
    )
