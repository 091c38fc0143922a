"""Where every token of a packed batch sits, and which keys it may attend to; numpy and index tensors only.

Packed rows T hold each context once and R−1 rows per response: the last response token predicts
nothing that is asked for. A context with one response forms one causal segment; a context with
several is followed by its responses, each of which attends to the context and to itself.

For attention, segments become padded *blocks* of similar length, so that many short sequences
cost a few batched kernel calls. Padding repeats a segment's own last row: it adds no foreign
value, so one sequence's NaN never reaches another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tutelage_client.errors import invalid

IntArray = npt.NDArray[np.int64]

MAX_BLOCK_KEY_ROWS = 65_536  # bounds the gathered copies of keys and values of one block
MAX_MASK_ELEMENTS = 1 << 24  # bounds an explicit mask, [n, Lq, Lk]
QUERY_STEP = 512  # rows per piece where a mask is explicit
FREE_WASTE = 4096  # padded query-key pairs that cost less than one more kernel call


@dataclass(frozen=True)
class AttentionBlock:
    """Padded pieces that share one attention call.

    query_index [n, Lq] and key_index [n, Lk] are packed rows; mask is bool [n, 1, Lq, Lk], or
    None where query and key rows are the same and plain causality is exact.
    """

    query_index: Tensor
    key_index: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class AttentionBlocks:
    """All blocks of one kind of layer; gather[T] finds each packed row in their concatenated queries."""

    blocks: tuple[AttentionBlock, ...]
    gather: Tensor


@dataclass(frozen=True)
class _Segment:
    """Queries are rows [own, own + length) at positions prefix_length…; keys: prefix rows, then own rows."""

    prefix: int
    prefix_length: int
    own: int
    length: int


@dataclass(frozen=True)
class _Piece:
    """Some consecutive queries of a segment, with the two runs of rows that hold their keys."""

    query: int
    query_length: int
    first: int
    first_length: int
    second: int
    second_length: int
    causal: bool

    @property
    def key_length(self) -> int:
        return self.first_length + self.second_length


@dataclass(frozen=True)
class PackedLayout:
    """A packed batch.

    Attributes:
        input_ids, position_ids: int64 [T].
        score_rows: int64 [ΣR]; the packed row whose output predicts each response token, sequences
            in the order given. The row of a first response token is its context's last row.
        response_ids: int64 [ΣR]; the tokens so predicted.
        offsets: numpy int64 [B + 1]; sequence i owns positions offsets[i]:offsets[i + 1].
        num_unshared: rows that packing without shared contexts would have had.
        max_position: the largest position id.
    """

    input_ids: Tensor
    position_ids: Tensor
    score_rows: Tensor
    response_ids: Tensor
    offsets: IntArray
    num_unshared: int
    max_position: int
    sequence_parts: tuple[tuple[int, int, int, int], ...]  # context row, P, response row, R − 1
    _segments: tuple[_Segment, ...] = field(repr=False)
    _blocks: dict[tuple[int | None, bool], AttentionBlocks] = field(default_factory=dict, repr=False)

    @property
    def num_rows(self) -> int:
        return int(self.input_ids.shape[0])

    def to(self, device: torch.device | str) -> PackedLayout:
        """The same layout with its tensors on `device`."""
        if self.input_ids.device == torch.device(device):
            return self
        return PackedLayout(
            self.input_ids.to(device),
            self.position_ids.to(device),
            self.score_rows.to(device),
            self.response_ids.to(device),
            self.offsets,
            self.num_unshared,
            self.max_position,
            self.sequence_parts,
            self._segments,
        )

    def blocks(self, window: int | None, explicit: bool = False) -> AttentionBlocks:
        """The attention blocks of layers with this sliding window, made on first use.

        Args:
            window: a query at position p sees keys at positions p − window + 1 … p; None: all.
            explicit: the caller materialises scores, so every block gets a mask and bounded queries.
        """
        if window is not None and window > self.max_position:
            window = None
        key = (window, explicit)
        if key not in self._blocks:
            pieces = [piece for segment in self._segments for piece in _cut(segment, window, explicit)]
            self._blocks[key] = _plan(pieces, self, window)
        return self._blocks[key]


def build_layout(
    contexts: Sequence[Iterable[int] | npt.NDArray[np.integer]],
    sequences: Sequence[tuple[int, Iterable[int] | npt.NDArray[np.integer]]],
    *,
    device: torch.device | str = "cpu",
) -> PackedLayout:
    """Lay out `sequences` (context index, response ids); contexts that nobody uses take no rows.

    Raises TutelageError (INVALID_ARGUMENT) for no sequence, an empty context or response, an unknown index.
    """
    if not sequences:
        raise invalid("sequences: got none, there must be at least one")
    context_ids = [_ids(ids, f"contexts[{i}]") for i, ids in enumerate(contexts)]
    responses = [_ids(ids, f"sequences[{i}] response") for i, (_, ids) in enumerate(sequences)]
    members: dict[int, list[int]] = {}
    for i, (context, _) in enumerate(sequences):
        if not 0 <= context < len(context_ids):
            raise invalid(f"sequences[{i}] context: got {context}, must be from 0 to {len(context_ids) - 1}")
        members.setdefault(context, []).append(i)

    runs: list[IntArray] = []  # token ids in packed order
    starts: list[int] = []  # position of each run's first token
    segments: list[_Segment] = []
    parts: list[tuple[int, int, int, int]] = [(0, 0, 0, 0)] * len(responses)
    cursor = 0
    for context, owned in members.items():
        head, size = cursor, len(context_ids[context])
        runs.append(context_ids[context])
        starts.append(0)
        cursor += size
        lone = len(owned) == 1
        if not lone:
            segments.append(_Segment(head, 0, head, size))
        for i in owned:
            length = len(responses[i]) - 1
            runs.append(responses[i][:-1])
            starts.append(size)
            parts[i] = (head, size, cursor, length)
            if lone:
                segments.append(_Segment(head, 0, head, size + length))
            elif length:
                segments.append(_Segment(head, size, cursor, length))
            cursor += length
    return _assemble(runs, starts, responses, parts, segments, device=device)


def _assemble(
    runs: list[IntArray],
    starts: list[int],
    responses: list[IntArray],
    parts: list[tuple[int, int, int, int]],
    segments: list[_Segment],
    *,
    device: torch.device | str,
) -> PackedLayout:
    run_lengths = np.array([len(run) for run in runs], dtype=np.int64)
    positions = _ranges(np.array(starts, dtype=np.int64), run_lengths)
    lengths = np.array([len(ids) for ids in responses], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    table = np.array(parts, dtype=np.int64).reshape(-1, 4)
    rows = _ranges(table[:, 2] - 1, lengths)
    rows[offsets[:-1]] = table[:, 0] + table[:, 1] - 1

    def tensor(array: IntArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return PackedLayout(
        input_ids=tensor(np.concatenate(runs)),
        position_ids=tensor(positions),
        score_rows=tensor(rows),
        response_ids=tensor(np.concatenate(responses)),
        offsets=offsets,
        num_unshared=int((table[:, 1] + table[:, 3]).sum()),
        max_position=int(positions.max()),
        sequence_parts=tuple(parts),
        _segments=tuple(segments),
    )


def _ids(ids: Iterable[int] | npt.NDArray[np.integer], name: str) -> IntArray:
    array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
    if array.ndim != 1 or array.size == 0:
        raise invalid(f"{name}: got shape {list(array.shape)}, must be [N] with N >= 1")
    return array.astype(np.int64)


def _ranges(starts: IntArray, lengths: IntArray) -> IntArray:
    """start, start + 1, … for every (start, length), one after the other."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1], dtype=np.int64)


def _cut(segment: _Segment, window: int | None, explicit: bool) -> Iterable[_Piece]:
    """Pieces of a segment; plain causal segments stay whole, masked ones have bounded queries."""
    prefix, total = segment.prefix_length, segment.prefix_length + segment.length
    if prefix == 0 and not explicit and (window is None or total <= window):
        yield _Piece(segment.own, total, segment.own, total, 0, 0, causal=True)
        return
    for begin in range(prefix, total, QUERY_STEP):
        end = min(begin + QUERY_STEP, total)
        oldest = 0 if window is None else max(0, begin - window + 1)
        from_prefix = min(oldest, prefix)
        from_own = max(oldest - prefix, 0)
        yield _Piece(
            segment.own + begin - prefix,
            end - begin,
            segment.prefix + from_prefix,
            prefix - from_prefix,
            segment.own + from_own,
            end - prefix - from_own,
            causal=False,
        )


def _plan(pieces: list[_Piece], layout: PackedLayout, window: int | None) -> AttentionBlocks:
    """Group pieces of similar size into blocks and index their rows."""
    order = sorted(pieces, key=lambda piece: (piece.causal, -piece.key_length, -piece.query_length))
    groups: list[list[_Piece]] = []
    useful = longest = 0
    for piece in order:
        work = piece.query_length * piece.key_length
        if groups and groups[-1][0].causal == piece.causal:
            count = len(groups[-1]) + 1
            keys = groups[-1][0].key_length
            queries = max(longest, piece.query_length)
            padded = count * queries * keys
            small = piece.causal or padded <= MAX_MASK_ELEMENTS
            waste = padded - useful - work
            if (
                count * keys <= MAX_BLOCK_KEY_ROWS
                and small
                and waste <= max(FREE_WASTE, (useful + work) // 4)
            ):
                groups[-1].append(piece)
                useful, longest = useful + work, queries
                continue
        groups.append([piece])
        useful, longest = work, piece.query_length

    device = layout.input_ids.device
    positions = layout.position_ids.cpu().numpy()
    gather = np.zeros(layout.num_rows, dtype=np.int64)
    blocks: list[AttentionBlock] = []
    base = 0
    for group in groups:
        query_index, key_index, mask, real = _index(group, positions, window)
        slots = base + np.arange(query_index.size, dtype=np.int64).reshape(query_index.shape)
        gather[query_index[real]] = slots[real]
        base += query_index.size
        blocks.append(
            AttentionBlock(
                torch.from_numpy(query_index).to(device),
                torch.from_numpy(key_index).to(device),
                None if mask is None else torch.from_numpy(mask[:, None]).to(device),
            )
        )
    return AttentionBlocks(tuple(blocks), torch.from_numpy(gather).to(device))


def _index(
    group: list[_Piece], positions: IntArray, window: int | None
) -> tuple[IntArray, IntArray, npt.NDArray[np.bool_] | None, npt.NDArray[np.bool_]]:
    """(query rows [n, Lq], key rows [n, Lk], mask [n, Lq, Lk] or None, which queries are real [n, Lq])."""
    columns = np.array(
        [(p.query, p.query_length, p.first, p.first_length, p.second, p.second_length) for p in group],
        dtype=np.int64,
    )
    query, query_length, first, first_length, second, second_length = (
        column[:, None] for column in columns.T
    )
    step = np.arange(int(query_length.max()), dtype=np.int64)[None]
    real = step < query_length
    query_index = query + np.minimum(step, query_length - 1)
    if group[0].causal:
        return query_index, query_index, None, real
    key_length = first_length + second_length
    slot = np.arange(int(key_length.max()), dtype=np.int64)[None]
    held = np.minimum(slot, key_length - 1)
    key_index = np.where(held < first_length, first + held, second + held - first_length)
    query_position, key_position = positions[query_index][:, :, None], positions[key_index][:, None, :]
    mask = (key_position <= query_position) & (slot < key_length)[:, None, :]
    if window is not None:
        mask &= key_position > query_position - window
    return query_index, key_index, mask, real
