"""The pooler that scores: all signals of all rows of a step, one pass over the head.

It runs inside vLLM, in every tensor-parallel rank, after each forward pass. Between the chunks of
a long prompt it keeps scores, never hidden states.
Shapes: T tokens of the step, H hidden, N scored rows of the step, W packed columns (see packing).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from vllm.model_executor.layers.pooler.abstract import Pooler

from services.models.vllm_adapter import SlicedHead, StepRow, TensorParallelShard, read_step
from services.teacher.engines.scoring_head import RowSignal, rows_for, score_logits
from services.teacher.engines.vllm.packing import Columns, Wanted

# The largest buffers that a step can ask for are made while vLLM measures memory.
_PROFILED = RowSignal(top_k=64, candidates=0, entropy=True, temperature=1.0)


class ScoringPooler(Pooler):  # type: ignore[misc]
    """Turns a step's hidden states into one packed array [R, W] for each request that it finishes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._head = SlicedHead(model)

    def get_supported_tasks(self) -> Set[str]:
        return {"token_classify"}

    def forward(self, hidden_states: Tensor, pooling_metadata: Any) -> list[Tensor | None]:
        """[T, H] in; for each request its packed array when it is finished, else None."""
        step = read_step(pooling_metadata)
        if step is None:
            return self._profile(hidden_states, len(pooling_metadata.pooling_params))
        groups = _groups(_parts(step), hidden_states.device)
        self._score(hidden_states, groups)
        for group in groups:
            pieces = torch.split(group.packed, [part.count for part in group.parts])
            for part, packed in zip(group.parts, pieces, strict=True):
                step[part.request].state.append((part.first, packed))
        return [_whole(row) if row.finished else None for row in step]

    def _score(self, hidden: Tensor, groups: Sequence[_Group]) -> None:
        """Fill every group's packed array; chunks of the head run across groups and requests."""
        if not groups:
            return
        rows = torch.from_numpy(np.concatenate([group.hidden_rows for group in groups])).to(hidden.device)
        size = rows_for(self._head.vocab_size)
        for start in range(0, rows.shape[0], size):
            logits = self._head.logits(hidden.index_select(0, rows[start : start + size]))
            for group in groups:
                group.score(logits, start, self._head.shard)
            del logits  # before the next chunk is made

    def _profile(self, hidden: Tensor, requests: int) -> list[Tensor | None]:
        """What a full chunk of rows needs, so that vLLM leaves room for it."""
        count = min(rows_for(self._head.vocab_size), hidden.shape[0])
        zeros = np.zeros(count, dtype=np.int32)
        part = _Part(0, Wanted(0, zeros, None, _PROFILED), first=0, count=count, hidden=0)
        self._score(hidden, _groups([part], hidden.device))
        return [hidden.new_zeros(1) for _ in range(requests)]


@dataclass(frozen=True)
class _Part:
    """Rows of one request that this step computed: response positions first … first + count."""

    request: int
    wanted: Wanted
    first: int
    count: int
    hidden: int  # where they begin among the step's hidden states


def _parts(step: Sequence[StepRow]) -> Iterator[_Part]:
    hidden = 0
    for index, row in enumerate(step):
        wanted = Wanted.from_extra(row.extra)
        first = max(row.begin, wanted.rows_from)
        count = row.begin + row.scheduled - first
        if count > 0:
            yield _Part(index, wanted, first - wanted.rows_from, count, hidden + first - row.begin)
        hidden += row.scheduled


@dataclass(frozen=True)
class _Group:
    """Parts that ask for the same signal; rows start … start + n of the step's scored rows."""

    signal: RowSignal
    parts: list[_Part]
    start: int
    hidden_rows: npt.NDArray[np.int64]  # [n]
    targets: Tensor  # int64 [n]
    candidates: Tensor | None  # int64 [n, C]
    packed: Tensor  # float32 [n, W]

    def score(self, logits: Tensor, start: int, shard: TensorParallelShard | None) -> None:
        """Take those of a chunk's logits, of rows start … of the step, that belong to this group."""
        low = max(self.start, start)
        high = min(self.start + len(self.targets), start + len(logits))
        if low >= high:
            return
        mine = slice(low - self.start, high - self.start)
        candidates = None if self.candidates is None else self.candidates[mine]
        scores = score_logits(
            logits[low - start : high - start], self.targets[mine], candidates, self.signal, shard
        )
        columns, packed = Columns.of(self.signal), self.packed[mine]
        packed[:, columns.SAMPLED] = scores["sampled"]
        packed[:, columns.VALID] = scores["valid"]
        if self.signal.top_k:
            packed[:, columns.top_logprobs] = scores["top_logprobs"]
            packed.view(torch.int32)[:, columns.top_ids] = scores["top_ids"]
        if self.signal.candidates:
            packed[:, columns.candidates] = scores["candidates"]
        if self.signal.entropy:
            packed[:, columns.entropy] = scores["entropy"][:, None]


def _groups(parts: Iterator[_Part] | Sequence[_Part], device: torch.device) -> list[_Group]:
    by_signal: dict[RowSignal, list[_Part]] = {}
    for part in parts:
        by_signal.setdefault(part.wanted.signal, []).append(part)
    groups, start = [], 0
    for signal, members in by_signal.items():
        group = _group(signal, members, start, device)
        start += len(group.targets)
        groups.append(group)
    return groups


def _group(signal: RowSignal, parts: list[_Part], start: int, device: torch.device) -> _Group:
    def rows_of(arrays: list[npt.NDArray[np.int32]]) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays).astype(np.int64)).to(device)

    targets = rows_of([part.wanted.response[part.first : part.first + part.count] for part in parts])
    candidates = None
    if signal.candidates:
        candidates = rows_of(
            [
                part.wanted.candidates[part.first : part.first + part.count]
                for part in parts
                if part.wanted.candidates is not None
            ]
        )
    return _Group(
        signal=signal,
        parts=parts,
        start=start,
        hidden_rows=np.concatenate([np.arange(part.hidden, part.hidden + part.count) for part in parts]),
        targets=targets,
        candidates=candidates,
        packed=torch.empty(len(targets), Columns.of(signal).width, device=device),
    )


def _whole(row: StepRow) -> Tensor:
    """A finished request's packed array [R, W]; rows that no step computed are not valid and not scored.

    A preempted request computes some rows again; the later ones count.
    """
    wanted = Wanted.from_extra(row.extra)
    pieces: list[tuple[int, Tensor]] = list(row.state)
    row.state.clear()
    if len(pieces) == 1 and len(pieces[0][1]) == len(wanted.response):
        return pieces[0][1]
    width = Columns.of(wanted.signal).width
    whole = torch.full(
        (len(wanted.response), width), torch.nan, device=pieces[0][1].device if pieces else None
    )
    for first, packed in pieces:
        whole[first : first + len(packed)] = packed
    return whole
