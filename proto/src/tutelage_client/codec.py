"""Between numpy types and protobuf messages; with `ids` and `score_codec` the only place that knows the wire.

Decoding views the message's bytes without a copy, so decoded arrays are read-only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from google.protobuf.message import Message
from tutelage.v1 import teacher_pb2 as pb

from tutelage_client import types as t
from tutelage_client.errors import TutelageError, invalid, shown
from tutelage_client.ids import as_ids, pack_ids, unpack_ids
from tutelage_client.score_codec import (
    ENCODINGS,
    FLOATS,
    identity_from_proto,
    identity_to_proto,
    score_from_proto,
    score_to_bytes,
    score_to_proto,
    stream_answer_from_proto,
)

__all__ = [
    "as_ids",
    "build_request",
    "identity_from_proto",
    "identity_to_proto",
    "pack_ids",
    "pins_from_proto",
    "pins_to_proto",
    "request_from_proto",
    "request_to_proto",
    "request_tokens",
    "score_from_proto",
    "score_to_bytes",
    "score_to_proto",
    "signal_from_proto",
    "signal_to_proto",
    "stream_answer_from_proto",
    "teacher_from_proto",
    "teacher_request",
    "teacher_to_proto",
    "unpack_ids",
]

_BYTES_OF_A_TOKEN = 4
_SIGNAL_FIELDS = (
    "sampled",
    "top_k",
    "candidates",
    "entropy",
    "temperature",
    "judgement",
    "continuations",
    "chunk_tokens",
)


def signal_to_proto(signal: t.Signal) -> pb.Signal:
    """Refuses what the wire cannot say, and a temperature of 0, which on the wire means 1."""
    if signal.encoding not in ENCODINGS:
        raise invalid(f"signal.encoding: got {shown(signal.encoding)}, allowed are {', '.join(ENCODINGS)}")
    message = pb.Signal(encoding=ENCODINGS[signal.encoding])
    for field in _SIGNAL_FIELDS:
        _set(message, field, getattr(signal, field), "signal.")
    try:
        message.hidden_layers.extend(signal.hidden_layers)
    except (TypeError, ValueError) as error:
        raise invalid(f"signal.hidden_layers: got {shown(signal.hidden_layers)}, must be integers") from error
    if not (math.isfinite(message.temperature) and message.temperature > 0):
        raise invalid(f"signal.temperature: got {signal.temperature}, must be a finite number above 0")
    return message


def _set(message: Message, field: str, value: object, prefix: str = "") -> None:
    """Set a scalar field; INVALID_ARGUMENT with its name when protobuf cannot hold the value."""
    try:
        setattr(message, field, value)
    except (TypeError, ValueError) as error:  # includes text that is not Unicode
        raise invalid(f"{prefix}{field}: got {shown(value)}, which is no value of this field") from error


def signal_from_proto(message: pb.Signal) -> t.Signal:
    if message.encoding not in FLOATS:
        raise invalid(f"signal.encoding: got {message.encoding}, allowed are 1 (float32) and 2 (float16)")
    return t.Signal(
        sampled=message.sampled,
        top_k=message.top_k,
        candidates=message.candidates,
        entropy=message.entropy,
        temperature=message.temperature or 1.0,
        encoding="float16" if message.encoding == pb.ENCODING_FLOAT16 else "float32",
        judgement=message.judgement,
        hidden_layers=tuple(message.hidden_layers),
        continuations=message.continuations,
        chunk_tokens=message.chunk_tokens,
    )


def pins_to_proto(pins: t.Pins) -> pb.Pins:
    message = pb.Pins()
    for field in t.Pins.__slots__:
        value = getattr(pins, field)
        if value is not None:
            _set(message, field, value, "pins.")
    return message


def teacher_request(teacher: str) -> pb.GetTeacherRequest:
    message = pb.GetTeacherRequest()
    _set(message, "teacher", teacher)
    return message


def pins_from_proto(message: pb.Pins) -> t.Pins:
    return t.Pins(
        tokenizer_fingerprint=message.tokenizer_fingerprint
        if message.HasField("tokenizer_fingerprint")
        else None,
        revision=message.revision if message.HasField("revision") else None,
        weights_version=message.weights_version if message.HasField("weights_version") else None,
        min_weights_version=message.min_weights_version if message.HasField("min_weights_version") else None,
    )


def request_to_proto(request: t.ScoreRequest) -> pb.ScoreRequest:
    """The message of a request; raises INVALID_ARGUMENT, with the field, for what the wire cannot say."""
    message = pb.ScoreRequest(
        pins=pins_to_proto(request.pins),
        contexts=_contexts_to_proto(request),
        sequences=[_sequence_to_proto(i, sequence) for i, sequence in enumerate(request.sequences)],
        signal=signal_to_proto(request.signal),
    )
    _set(message, "request_id", request.request_id)
    _set(message, "teacher", request.teacher)
    return message


def _contexts_to_proto(request: t.ScoreRequest) -> list[pb.Context]:
    texts = request.context_texts or (None,) * len(request.contexts)
    if len(texts) != len(request.contexts):
        raise invalid(f"context_texts: got {len(texts)} texts for {len(request.contexts)} contexts")
    messages = []
    for i, (ids, text) in enumerate(zip(request.contexts, texts, strict=True)):
        message = pb.Context(ids=pack_ids(as_ids(ids, f"contexts[{i}]")))
        if text is not None:
            _set(message, "text", text, f"contexts[{i}].")
        messages.append(message)
    return messages


def _sequence_to_proto(index: int, sequence: t.Sequence) -> pb.Sequence:
    prefix = f"sequences[{index}]."
    message = pb.Sequence(response_ids=pack_ids(as_ids(sequence.response_ids, f"{prefix}response_ids")))
    _set(message, "id", sequence.id, prefix)
    _set(message, "context", sequence.context, prefix)
    candidates = sequence.candidate_ids
    if candidates is not None:
        _check_candidates(candidates, f"{prefix}candidate_ids")
        message.candidate_ids = pack_ids(candidates, f"{prefix}candidate_ids")
        message.num_candidates = candidates.shape[1]
    if sequence.anchors is not None:
        message.anchors = pack_ids(as_ids(sequence.anchors, f"{prefix}anchors"))
    return message


def _check_candidates(candidates: object, name: str) -> None:
    if not isinstance(candidates, np.ndarray):
        raise invalid(f"{name}: got a {type(candidates).__name__}, must be a numpy array [R, C]")
    if candidates.ndim != 2:
        raise invalid(f"{name}: got shape {list(candidates.shape)}, must be [R, C]")


def request_tokens(request: t.ScoreRequest) -> int:
    """What a request costs: every response token, and every context token once.

    Words are read again and again: a judge reads the context before each response; a writer context and
    response before each chunk, and may write `continuations` more of it. Values are not checked yet.
    """
    signal = request.signal
    cost = sum(len(sequence.response_ids) for sequence in request.sequences)
    if not signal.judgement and signal.continuations < 1:
        return cost + sum(map(len, request.contexts))
    shown = _shown_tokens(request)
    for sequence in request.sequences:
        context = shown[sequence.context] if 0 <= sequence.context < len(shown) else 0
        if signal.continuations < 1:
            cost += context
        elif sequence.anchors is not None:
            length = len(sequence.response_ids)
            chunk = max(0, min(signal.chunk_tokens, length))
            before = int(sequence.anchors.clip(0, length).sum(dtype=np.int64))
            cost += before + sequence.anchors.size * (context + signal.continuations * chunk)
    return cost


def _shown_tokens(request: t.ScoreRequest) -> list[int]:
    """Of each context as words: of its text about a token for four bytes, of one without it its ids."""
    texts = request.context_texts or (None,) * len(request.contexts)
    return [
        len(ids) if text is None else -(-len(text.encode()) // _BYTES_OF_A_TOKEN)
        for ids, text in zip(request.contexts, texts, strict=False)
    ]


def request_from_proto(
    message: pb.ScoreRequest, malformed: dict[int, t.SequenceError] | None = None
) -> t.ScoreRequest:
    """Decode without judging: values are checked against a teacher's limits by the server.

    A sequence whose arrays have no whole shape raises, or is noted by its index in `malformed`
    when that is given, and left without a response, so that it can fail alone.
    """
    texts = tuple(c.text if c.HasField("text") else None for c in message.contexts)
    return t.ScoreRequest(
        contexts=tuple(unpack_ids(c.ids, f"contexts[{i}].ids") for i, c in enumerate(message.contexts)),
        sequences=tuple(_sequence_or_note(i, s, malformed) for i, s in enumerate(message.sequences)),
        signal=signal_from_proto(message.signal),
        teacher=message.teacher,
        pins=pins_from_proto(message.pins),
        request_id=message.request_id,
        context_texts=_where_any(texts),
    )


def _where_any(texts: tuple[str | None, ...]) -> tuple[str | None, ...]:
    return texts if any(text is not None for text in texts) else ()


def _sequence_or_note(
    index: int, message: pb.Sequence, malformed: dict[int, t.SequenceError] | None
) -> t.Sequence:
    try:
        return _sequence_from_proto(index, message)
    except TutelageError as error:
        if malformed is None:
            raise
        malformed[index] = t.SequenceError(error.code, error.message)
        return t.Sequence(message.id, message.context, np.empty(0, dtype=np.int32))


def _sequence_from_proto(index: int, message: pb.Sequence) -> t.Sequence:
    name = f"sequences[{index}]"
    candidates = None
    if message.num_candidates or message.candidate_ids:
        if message.num_candidates < 1:
            raise invalid(f"{name}.num_candidates: got {message.num_candidates}, must be at least 1")
        candidates = unpack_ids(message.candidate_ids, f"{name}.candidate_ids", message.num_candidates)
    return t.Sequence(
        id=message.id,
        context=message.context,
        response_ids=unpack_ids(message.response_ids, f"{name}.response_ids"),
        candidate_ids=candidates,
        anchors=unpack_ids(message.anchors, f"{name}.anchors") if message.HasField("anchors") else None,
    )


def teacher_to_proto(teacher: t.Teacher) -> pb.GetTeacherResponse:
    limits = pb.Limits(**{name: getattr(teacher.limits, name) for name in t.Limits.__slots__})
    return pb.GetTeacherResponse(
        identity=identity_to_proto(teacher.identity), limits=limits, ready=teacher.ready
    )


def teacher_from_proto(message: pb.GetTeacherResponse) -> t.Teacher:
    limits = t.Limits(**{name: getattr(message.limits, name) for name in t.Limits.__slots__})
    return t.Teacher(identity=identity_from_proto(message.identity), limits=limits, ready=message.ready)


def build_request(
    contexts: Iterable[t.TokenIds],
    responses: Iterable[t.TokenIds],
    *,
    context_texts: Iterable[str | None] | None = None,
    context_index: Iterable[int] | None = None,
    candidate_ids: Iterable[t.Int32Array] | None = None,
    anchors: Iterable[t.TokenIds] | None = None,
    signal: t.Signal | None = None,
    teacher: str = "",
    pins: t.Pins | None = None,
    request_id: str = "",
) -> t.ScoreRequest:
    """A request from plain lists of ids, and where they are known the words of each context.

    Without `context_index`, one context serves every response, and as many contexts as
    responses pair up one to one.
    """
    context_arrays = tuple(as_ids(ids, f"contexts[{i}]") for i, ids in enumerate(contexts))
    texts = (None,) * len(context_arrays) if context_texts is None else tuple(context_texts)
    if len(texts) != len(context_arrays):
        raise invalid(f"context_texts: got {len(texts)} texts for {len(context_arrays)} contexts")
    response_arrays = [as_ids(ids, f"responses[{i}]") for i, ids in enumerate(responses)]
    count = len(response_arrays)
    if context_index is not None:
        index = list(context_index)
    elif len(context_arrays) == 1:
        index = [0] * count
    else:
        index = list(range(count))
    if len(index) != count or (context_index is None and len(context_arrays) not in (1, count)):
        raise invalid(
            f"contexts: got {len(context_arrays)} contexts and {len(index)} indices for {count} "
            "responses; give one context, one per response, or context_index"
        )
    candidates = list(candidate_ids) if candidate_ids is not None else [None] * count
    if len(candidates) != count:
        raise invalid(f"candidate_ids: got {len(candidates)} arrays for {count} responses")
    chunks: list[t.Int32Array | None] = [None] * count
    if anchors is not None:
        chunks = [as_ids(ids, f"anchors[{i}]") for i, ids in enumerate(anchors)]
    if len(chunks) != count:
        raise invalid(f"anchors: got {len(chunks)} arrays for {count} responses")
    return t.ScoreRequest(
        contexts=context_arrays,
        sequences=tuple(
            t.Sequence(str(i), index[i], ids, candidates[i], chunks[i])
            for i, ids in enumerate(response_arrays)
        ),
        signal=signal or t.Signal(),
        teacher=teacher,
        pins=pins or t.Pins(),
        request_id=request_id,
        context_texts=_where_any(texts),
    )
