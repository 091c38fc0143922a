"""What a request must satisfy before an engine sees it; every refusal names field, got and allowed.

Problems of the whole request raise; a problem of one sequence is returned and fails it alone.
Ids are checked as arrays, all sequences at once when all are well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
from tutelage_client import codec
from tutelage_client.errors import TutelageError, invalid, shown
from tutelage_client.types import (
    PAD_ID,
    Identity,
    Int32Array,
    Limits,
    Pins,
    ScoreRequest,
    Sequence,
    SequenceError,
    Signal,
)

_BYTES_PER_SEQUENCE = 128  # id, counts and field headers of one SequenceScore


def check_counts(sequences: int, contexts: int, limits: Limits) -> None:
    """Raise TutelageError for too many parts; cheap, so that doors ask it before they decode any."""
    if sequences > limits.max_sequences:
        raise invalid(f"sequences: got {sequences}, allowed are 1 to {limits.max_sequences}")
    if contexts > limits.max_sequences:
        raise invalid(f"contexts: got {contexts}, allowed are as many as sequences, {limits.max_sequences}")


def check_request(request: ScoreRequest, identity: Identity, limits: Limits) -> None:
    """Raise TutelageError for what makes the request to this teacher as a whole unanswerable."""
    check_pins(request.pins, identity)
    check_signal(request.signal, identity, limits)
    count = len(request.sequences)
    check_counts(count, len(request.contexts), limits)
    if not count:
        raise invalid(f"sequences: got 0, allowed are 1 to {limits.max_sequences}")
    if len({sequence.id for sequence in request.sequences}) != count:
        raise invalid("sequences.id: got the same id twice, ids must be unique in a request")
    check_sizes(request, limits)


def check_sizes(request: ScoreRequest, limits: Limits) -> None:
    """Raise TutelageError for more tokens than a request may have, or an answer of more bytes."""
    tokens = codec.request_tokens(request)
    if tokens > limits.max_request_tokens:
        raise invalid(f"request tokens: got {tokens}, allowed are {limits.max_request_tokens}")
    reply = _reply_bytes(request, limits)
    if reply > limits.max_message_bytes:
        raise invalid(
            f"request: its answer would have {reply} bytes, allowed are {limits.max_message_bytes}; "
            "send fewer sequences at once"
        )


def check_signal(signal: Signal, identity: Identity, limits: Limits) -> None:
    """Raise TutelageError for a signal that this teacher does not answer."""
    asks_arrays = bool(
        signal.sampled or signal.top_k or signal.candidates or signal.entropy or signal.hidden_layers
    )
    if limits.judge or signal.judgement:
        _check_judgement(signal, limits, asks_others=asks_arrays or signal.continuations != 0)
    if limits.max_continuations or signal.continuations or signal.chunk_tokens:
        _check_continuations(signal, limits, asks_others=asks_arrays)
    if limits.judge or limits.max_continuations:
        return
    if not asks_arrays:
        raise invalid(
            "signal: got nothing to answer, ask for sampled, top_k, candidates, entropy or hidden_layers"
        )
    _check_layers(signal, limits)
    allowed_k = min(limits.max_top_k, identity.vocab_size)
    if not 0 <= signal.top_k <= allowed_k:
        raise invalid(f"signal.top_k: got {signal.top_k}, allowed are 0 to {allowed_k}")
    if signal.candidates and not limits.max_candidates:
        raise invalid("signal.candidates: got true, this teacher does not score candidates")
    if signal.entropy and not limits.entropy:
        raise invalid("signal.entropy: got true, this teacher does not answer entropy")
    if not (math.isfinite(signal.temperature) and signal.temperature > 0):
        raise invalid(f"signal.temperature: got {signal.temperature}, must be a finite number above 0")
    if signal.temperature != 1.0 and not limits.temperature:
        raise invalid(f"signal.temperature: got {signal.temperature}, this teacher answers only 1")


def _check_layers(signal: Signal, limits: Limits) -> None:
    layers = signal.hidden_layers
    if not layers:
        return
    if not limits.hidden_layers:
        raise invalid(f"signal.hidden_layers: got {list(layers)}, this teacher answers no hidden states")
    ascending = all(one < other for one, other in pairwise(layers))
    if not ascending or not 1 <= layers[0] <= layers[-1] <= limits.hidden_layers:
        raise invalid(
            f"signal.hidden_layers: got {shown(list(layers))}, allowed are layers from 1 to "
            f"{limits.hidden_layers} in ascending order"
        )


def _check_judgement(signal: Signal, limits: Limits, *, asks_others: bool) -> None:
    if not limits.judge:
        raise invalid("signal.judgement: got true, this teacher is no judge")
    if not signal.judgement or asks_others:
        raise invalid("signal: this teacher is a judge, ask for judgement and for nothing else")
    if signal.temperature != 1.0:
        raise invalid(f"signal.temperature: got {signal.temperature}, a judge answers only 1")


def _check_continuations(signal: Signal, limits: Limits, *, asks_others: bool) -> None:
    if not signal.continuations and signal.chunk_tokens:
        raise invalid(f"signal.chunk_tokens: got {signal.chunk_tokens} without continuations, must be 0")
    most = limits.max_continuations
    if not most:
        raise invalid(f"signal.continuations: got {signal.continuations}, this teacher writes nothing")
    if not signal.continuations or asks_others:
        raise invalid("signal: this teacher is a writer, ask for continuations and for nothing else")
    if not 1 <= signal.continuations <= most:
        raise invalid(f"signal.continuations: got {signal.continuations}, allowed are 1 to {most}")
    if signal.chunk_tokens < 1:
        raise invalid(f"signal.chunk_tokens: got {signal.chunk_tokens}, must be at least 1")
    if signal.temperature != 1.0:
        raise invalid(
            f"signal.temperature: got {signal.temperature}, must be 1; a writer has its own temperature"
        )


def check_sequences(request: ScoreRequest, identity: Identity, limits: Limits) -> dict[int, SequenceError]:
    """The sequences that cannot be scored, by index, each with its reason; empty when all can."""
    vocab = identity.vocab_size
    contexts = [_context_problem(i, ids, vocab) for i, ids in enumerate(request.contexts)]
    ids_are_fine = _in_vocabulary((s.response_ids for s in request.sequences), vocab)
    problems = {}
    for index, sequence in enumerate(request.sequences):
        problem = _shape_problem(index, sequence, request, contexts, limits)
        if problem is None and not ids_are_fine:
            problem = _ids_problem(f"sequences[{index}].response_ids", sequence.response_ids, 0, vocab)
        if problem is None and request.signal.candidates:
            problem = _candidates_problem(f"sequences[{index}].candidate_ids", sequence, vocab, limits)
        if problem is None and request.signal.continuations:
            problem = _anchors_problem(f"sequences[{index}].anchors", sequence, request.signal.chunk_tokens)
        if problem is not None:
            problems[index] = SequenceError("INVALID_ARGUMENT", problem)
    return problems


def check_pins(pins: Pins, identity: Identity) -> None:
    """Raise FAILED_PRECONDITION when this is not the teacher that the caller insists on."""
    for field in ("tokenizer_fingerprint", "revision", "weights_version"):
        wanted, here = getattr(pins, field), getattr(identity, field)
        if wanted is not None and wanted != here:
            why = "; token ids would mean other text to it" if field == "tokenizer_fingerprint" else ""
            raise TutelageError(
                "FAILED_PRECONDITION", f"pins.{field}: got {shown(wanted)}, this teacher has {here!r}{why}"
            )
    least = pins.min_weights_version
    if least is not None and identity.weights_version < least:
        raise TutelageError(
            "FAILED_PRECONDITION",
            f"pins.min_weights_version: got {least}, this teacher has {identity.weights_version}",
        )


def _reply_bytes(request: ScoreRequest, limits: Limits) -> int:
    signal = request.signal
    width = 2 if signal.encoding == "float16" else 4
    per_position = 1 + width * (signal.sampled + signal.entropy) + (4 + width) * signal.top_k
    per_position += 2 * len(signal.hidden_layers) * limits.hidden_size
    total = 0
    for sequence in request.sequences:
        columns = 0
        if signal.candidates and sequence.candidate_ids is not None and sequence.candidate_ids.ndim == 2:
            columns = sequence.candidate_ids.shape[1]
        total += _BYTES_PER_SEQUENCE + len(sequence.id.encode())
        total += len(sequence.response_ids) * (per_position + width * columns)
        if signal.continuations and sequence.anchors is not None:
            total += 4 * sequence.anchors.size
    return total


def _context_problem(index: int, ids: Int32Array, vocab: int) -> str | None:
    if len(ids) == 0:
        return (
            f"contexts[{index}].ids: got no token, at least 1 is needed to predict the first response token"
        )
    return _ids_problem(f"contexts[{index}].ids", ids, 0, vocab)


def _shape_problem(
    index: int, sequence: Sequence, request: ScoreRequest, contexts: list[str | None], limits: Limits
) -> str | None:
    if not 0 <= sequence.context < len(contexts):
        return f"sequences[{index}].context: got {sequence.context}, allowed are 0 to {len(contexts) - 1}"
    problem = contexts[sequence.context]
    if problem is not None:
        return problem
    if sequence.response_ids.ndim != 1 or len(sequence.response_ids) == 0:
        shape = list(sequence.response_ids.shape)
        return f"sequences[{index}].response_ids: got shape {shape}, must be [R] with R of at least 1"
    tokens = len(request.contexts[sequence.context]) + len(sequence.response_ids)
    if tokens > limits.max_sequence_tokens:
        return (
            f"sequences[{index}]: got {tokens} tokens of context and response, "
            f"allowed are {limits.max_sequence_tokens}"
        )
    return None


def _candidates_problem(name: str, sequence: Sequence, vocab: int, limits: Limits) -> str | None:
    ids = sequence.candidate_ids
    rows = len(sequence.response_ids)
    if ids is None:
        return f"{name}: got none, signal.candidates asks for an array [{rows}, C]"
    if ids.ndim != 2 or ids.shape[0] != rows or not 1 <= ids.shape[1] <= limits.max_candidates:
        allowed = f"[{rows}, C] with C from 1 to {limits.max_candidates}"
        return f"{name}: got shape {list(ids.shape)}, must be {allowed}"
    return _ids_problem(name, ids, PAD_ID, vocab)


def _anchors_problem(name: str, sequence: Sequence, chunk: int) -> str | None:
    anchors, last = sequence.anchors, len(sequence.response_ids) - chunk
    if anchors is None:
        return f"{name}: got none, signal.continuations asks for an array [F]"
    if anchors.ndim != 1:
        return f"{name}: got shape {list(anchors.shape)}, must be [F]"
    if len(anchors) and not 0 <= anchors.min() <= anchors.max() <= last:
        allowed = f"0 to {last}" if last >= 0 else f"none, the response is shorter than {chunk} tokens"
        return f"{name}: got {anchors.min()} to {anchors.max()}, allowed are {allowed}"
    if (np.diff(anchors) < chunk).any():
        return f"{name}: got {shown(anchors.tolist())}, must be ascending and at least {chunk} apart"
    return None


def _in_vocabulary(arrays: Iterable[Int32Array], vocab: int) -> bool:
    """Whether every id of every array is in [0, vocab); one pass, negative ids wrap to huge ones."""
    joined = np.concatenate([array.ravel() for array in arrays])
    return joined.size == 0 or int(joined.view(np.uint32).max()) < vocab


def _ids_problem(name: str, ids: Int32Array, lowest: int, vocab: int) -> str | None:
    low, high = int(ids.min()), int(ids.max())
    if low >= lowest and high < vocab:
        return None
    return f"{name}: got ids from {low} to {high}, allowed are {lowest} to {vocab - 1}"
