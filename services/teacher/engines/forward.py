"""One forward pass for a batch of units: pack, run the trunk, score the rows, hand each unit its part."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from tutelage_client.types import Sequence, SequenceScore, Signal

from services.models.layout import PackedLayout
from services.models.load import LoadedModel
from services.models.packed import build_layout, computes_packed, layer_states
from services.teacher.engines.batching import Unit
from services.teacher.engines.scoring_head import RowScores, RowSignal, ScoringHead


@dataclass(frozen=True)
class UnitScores:
    """Scores by sequence index of the unit's request, and what they cost; none of a unit given up."""

    sequences: dict[int, SequenceScore]
    tokens_computed: int
    tokens_reused: int
    positions: int
    invalid_positions: int


GIVEN_UP = UnitScores({}, 0, 0, positions=0, invalid_positions=0)  # nobody waits for it any more


@dataclass(frozen=True)
class BatchScores:
    units: list[UnitScores]

    @property
    def tokens_computed(self) -> int:
        return sum(unit.tokens_computed for unit in self.units)


@dataclass(frozen=True)
class _Entry:
    """One sequence of the batch."""

    unit: int
    index: int
    sequence: Sequence
    signal: Signal

    @property
    def row_signal(self) -> RowSignal:
        ids = self.sequence.candidate_ids if self.signal.candidates else None
        columns = 0 if ids is None else ids.shape[1]
        return RowSignal(self.signal.top_k, columns, self.signal.entropy, self.signal.temperature)


@dataclass(frozen=True)
class PackedScorer:
    """A loaded model with the head that scores its rows."""

    loaded: LoadedModel
    head: ScoringHead

    @torch.inference_mode()
    def score(self, batch: list[Unit]) -> BatchScores:
        """Score every sequence of every unit; equal contexts are computed once for the whole batch."""
        entries = [
            _Entry(position, index, unit.job.request.sequences[index], unit.job.request.signal)
            for position, unit in enumerate(batch)
            for index in unit.sequences
        ]
        contexts, places = _distinct_contexts(batch)
        layout = build_layout(
            contexts,
            [(places[entry.unit], entry.sequence.response_ids) for entry in entries],
            device=self.loaded.model.device,
        )
        layers = sorted({layer for entry in entries for layer in entry.signal.hidden_layers})
        hidden, by_layer = layer_states(self.loaded.model, layout, layers)
        scores = self._score_rows(hidden, layout, entries)
        for number, entry in enumerate(entries):
            if entry.signal.hidden_layers:
                rows = layout.score_rows[layout.offsets[number] : layout.offsets[number + 1]]
                states = [by_layer[layer][rows] for layer in entry.signal.hidden_layers]
                scores[number] = replace(scores[number], hidden=_directions(states))
        packed = computes_packed(self.loaded.model, layout)
        return BatchScores(_share_out(batch, places, entries, scores, packed=packed))

    def _score_rows(
        self, hidden: torch.Tensor, layout: PackedLayout, entries: list[_Entry]
    ) -> list[SequenceScore]:
        """One pass per distinct signal; rows of one signal are scored together across requests."""
        groups: dict[RowSignal, list[int]] = {}
        for number, entry in enumerate(entries):
            groups.setdefault(entry.row_signal, []).append(number)
        scores: list[SequenceScore | None] = [None] * len(entries)
        for signal, members in groups.items():
            positions = np.concatenate([np.arange(layout.offsets[n], layout.offsets[n + 1]) for n in members])
            select = torch.from_numpy(positions).to(hidden.device)
            candidates = None
            if signal.candidates:
                ids = np.concatenate([_candidates(entries[n].sequence) for n in members]).astype(np.int64)
                candidates = torch.from_numpy(ids).to(hidden.device)
            rows = self.head.score(
                hidden, layout.score_rows[select], layout.response_ids[select], candidates, signal
            )
            start = 0
            for number in members:
                end = start + len(entries[number].sequence.response_ids)
                scores[number] = _sequence_score(entries[number], rows, slice(start, end))
                start = end
        return [score for score in scores if score is not None]


def _directions(states: list[torch.Tensor]) -> npt.NDArray[np.float16]:
    """[R, L, H]: unit vectors, which float16 holds whatever the states' size."""
    stacked = torch.stack(states, dim=1).float()
    unit: npt.NDArray[np.float16] = torch.nn.functional.normalize(stacked, dim=-1).half().cpu().numpy()
    return unit


def _candidates(sequence: Sequence) -> npt.NDArray[np.int32]:
    assert sequence.candidate_ids is not None
    return sequence.candidate_ids


def _distinct_contexts(batch: list[Unit]) -> tuple[list[npt.NDArray[np.int32]], list[int]]:
    """Contexts without repeats, and for each unit the place of its own."""
    found: dict[bytes, int] = {}
    contexts: list[npt.NDArray[np.int32]] = []
    places: list[int] = []
    for unit in batch:
        ids = unit.job.request.contexts[unit.context]
        key = ids.tobytes()
        if key not in found:
            found[key] = len(contexts)
            contexts.append(ids)
        places.append(found[key])
    return contexts, places


def _sequence_score(entry: _Entry, rows: RowScores, part: slice) -> SequenceScore:
    return SequenceScore(
        id=entry.sequence.id,
        sampled=rows.sampled[part] if entry.signal.sampled else None,
        top_ids=None if rows.top_ids is None else rows.top_ids[part],
        top_logprobs=None if rows.top_logprobs is None else rows.top_logprobs[part],
        candidate_logprobs=None if rows.candidates is None else rows.candidates[part],
        entropy=None if rows.entropy is None else rows.entropy[part],
        valid=rows.valid[part],
    )


def _share_out(
    batch: list[Unit], places: list[int], entries: list[_Entry], scores: list[SequenceScore], *, packed: bool
) -> list[UnitScores]:
    """Each unit's scores; the first unit of a context pays for it, later ones reuse it."""
    owned: list[dict[int, SequenceScore]] = [{} for _ in batch]
    for entry, score in zip(entries, scores, strict=True):
        owned[entry.unit][entry.index] = score
    parts, paid = [], set()
    for unit, place, sequences in zip(batch, places, owned, strict=True):
        context = len(unit.job.request.contexts[unit.context])
        unshared = unit.tokens + context * (len(unit.sequences) - 1)
        computed = unit.tokens - (context if place in paid else 0) if packed else unshared
        paid.add(place)
        valid = [score.valid for score in sequences.values() if score.valid is not None]
        positions = sum(len(rows) for rows in valid)
        invalid = positions - sum(int(np.count_nonzero(rows)) for rows in valid)
        parts.append(UnitScores(sequences, computed, unshared - computed, positions, invalid))
    return parts
