"""Between numpy types and protobuf messages; the only place that knows the wire layout.

Decoding views the message's bytes without a copy, so decoded arrays are read-only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf.message import Message
from tutelage.v1 import teacher_pb2 as pb

from tutelage_client import types as t
from tutelage_client.errors import TutelageError, invalid, shown

_FLOAT = {pb.ENCODING_UNSPECIFIED: "<f4", pb.ENCODING_FLOAT32: "<f4", pb.ENCODING_FLOAT16: "<f2"}
_ENCODING: dict[t.EncodingName, pb.Encoding] = {
    "float32": pb.ENCODING_FLOAT32,
    "float16": pb.ENCODING_FLOAT16,
}
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


def pack_ids(ids: t.TokenIds, name: str = "ids") -> bytes:
    """Token ids of any integer type and shape as little-endian int32 bytes."""
    return _as_int32(ids, name).astype("<i4", copy=False).tobytes()


def as_ids(ids: t.TokenIds, name: str = "ids") -> t.Int32Array:
    """Token ids as a contiguous int32 array [N]; refuses floats, other shapes and values outside int32."""
    array = _as_int32(ids, name)
    if array.ndim != 1:
        raise invalid(f"{name}: got shape {list(array.shape)}, must be one list of token ids")
    return array


def _as_int32(ids: t.TokenIds, name: str) -> t.Int32Array:
    if isinstance(ids, np.ndarray) and ids.dtype == np.int32:
        return np.ascontiguousarray(ids) if ids.ndim else ids
    try:
        array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
    except (TypeError, ValueError) as error:
        raise invalid(f"{name}: got {shown(ids)}, must be token ids") from error
    if array.size == 0:
        return array.astype(np.int32)
    if array.dtype.kind not in "iu":
        raise invalid(f"{name}: got an array of {array.dtype}, token ids must be integers")
    if array.max() > np.iinfo(np.int32).max or array.min() < np.iinfo(np.int32).min:
        raise invalid(f"{name}: got ids from {array.min()} to {array.max()}, which is outside int32")
    return array.astype(np.int32, order="C")


def unpack_ids(data: bytes, name: str, columns: int | None = None) -> t.Int32Array:
    """Little-endian int32 bytes as [N], or as [N, columns]."""
    width = 4 * (1 if columns is None else columns)
    if width <= 0 or len(data) % width:
        raise invalid(f"{name}: got {len(data)} bytes, must be a multiple of {width}")
    array = np.frombuffer(data, dtype="<i4")
    return array if columns is None else array.reshape(-1, columns)


def signal_to_proto(signal: t.Signal) -> pb.Signal:
    """Refuses what the wire cannot say, and a temperature of 0, which on the wire means 1."""
    if signal.encoding not in _ENCODING:
        raise invalid(f"signal.encoding: got {shown(signal.encoding)}, allowed are {', '.join(_ENCODING)}")
    message = pb.Signal(encoding=_ENCODING[signal.encoding])
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
    if message.encoding not in _FLOAT:
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
    """What a request costs: every response token, every context token once, and what a writer may write."""
    read = sum(map(len, request.contexts)) + sum(len(s.response_ids) for s in request.sequences)
    if request.signal.continuations < 1:
        return read
    written = sum(
        s.anchors.size * max(0, min(request.signal.chunk_tokens, len(s.response_ids)))
        for s in request.sequences
        if s.anchors is not None
    )
    return read + request.signal.continuations * written


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


def identity_to_proto(identity: t.Identity) -> pb.Identity:
    return pb.Identity(**{name: getattr(identity, name) for name in t.Identity.__slots__})


def identity_from_proto(message: pb.Identity) -> t.Identity:
    return t.Identity(**{name: getattr(message, name) for name in t.Identity.__slots__})


def teacher_to_proto(teacher: t.Teacher) -> pb.GetTeacherResponse:
    limits = pb.Limits(**{name: getattr(teacher.limits, name) for name in t.Limits.__slots__})
    return pb.GetTeacherResponse(
        identity=identity_to_proto(teacher.identity), limits=limits, ready=teacher.ready
    )


def teacher_from_proto(message: pb.GetTeacherResponse) -> t.Teacher:
    limits = t.Limits(**{name: getattr(message.limits, name) for name in t.Limits.__slots__})
    return t.Teacher(identity=identity_from_proto(message.identity), limits=limits, ready=message.ready)


def _packed(array: npt.NDArray[Any] | None, dtype: str) -> bytes:
    return b"" if array is None else array.astype(dtype, copy=False).tobytes()


def score_to_proto(score: t.Score, encoding: t.EncodingName = "float32") -> pb.ScoreResponse:
    return pb.ScoreResponse(
        request_id=score.request_id,
        identity=identity_to_proto(score.identity),
        sequences=[_sequence_score_to_proto(s, encoding) for s in score.sequences],
        usage=pb.Usage(**{name: getattr(score.usage, name) for name in t.Usage.__slots__}),
    )


def _sequence_score_to_proto(score: t.SequenceScore, encoding: t.EncodingName) -> pb.SequenceScore:
    if score.error is not None:
        error = pb.SequenceError(code=score.error.code, message=score.error.message)
        return pb.SequenceScore(id=score.id, error=error)
    message = _sequence_score_head(score, encoding)
    floats = _FLOAT[_ENCODING[encoding]]
    message.sampled = _packed(score.sampled, floats)
    message.top_ids = _packed(score.top_ids, "<i4")
    message.top_logprobs = _packed(score.top_logprobs, floats)
    message.candidate_logprobs = _packed(score.candidate_logprobs, floats)
    message.entropy = _packed(score.entropy, floats)
    message.valid = _packed(score.valid, "u1")
    message.hidden = _packed(score.hidden, "<f2")
    return message


def _sequence_score_head(score: t.SequenceScore, encoding: t.EncodingName) -> pb.SequenceScore:
    """Everything of a sequence's answer but its arrays over positions."""
    return pb.SequenceScore(
        id=score.id,
        num_positions=score.num_positions,
        top_k=0 if score.top_ids is None else score.top_ids.shape[1],
        num_candidates=0 if score.candidate_logprobs is None else score.candidate_logprobs.shape[1],
        encoding=_ENCODING[encoding],
        judgement=score.judgement,
        verdict=score.verdict,
        num_layers=0 if score.hidden is None else score.hidden.shape[1],
        hidden_size=0 if score.hidden is None else score.hidden.shape[2],
        agreement=None if score.agreement is None else _packed(score.agreement, "<f4"),
        num_chunks=0 if score.agreement is None else len(score.agreement),
    )


def score_to_bytes(score: t.Score, encoding: t.EncodingName = "float32") -> bytes:
    """What `score_to_proto(score, encoding).SerializeToString()` says, with each array copied once.

    The array fields are written out by hand, since protobuf would copy each of them three times: an
    answer of 2,048 positions and 64 ids then takes a fifth of the time. Field order is free in
    protobuf, so the arrays follow whatever protobuf itself wrote of a message.
    """
    head = pb.ScoreResponse(
        request_id=score.request_id,
        identity=identity_to_proto(score.identity),
        usage=pb.Usage(**{name: getattr(score.usage, name) for name in t.Usage.__slots__}),
    )
    parts: list[bytes | memoryview] = [head.SerializeToString()]
    for sequence in score.sequences:
        body = _sequence_score_parts(sequence, encoding)
        parts.append(_field_head(pb.ScoreResponse.SEQUENCES_FIELD_NUMBER, sum(map(len, body))))
        parts += body
    return b"".join(parts)


def _sequence_score_parts(score: t.SequenceScore, encoding: t.EncodingName) -> list[bytes | memoryview]:
    if score.error is not None:
        return [_sequence_score_to_proto(score, encoding).SerializeToString()]
    parts: list[bytes | memoryview] = [_sequence_score_head(score, encoding).SerializeToString()]
    floats = _FLOAT[_ENCODING[encoding]]
    for number, array, dtype in (
        (pb.SequenceScore.SAMPLED_FIELD_NUMBER, score.sampled, floats),
        (pb.SequenceScore.TOP_IDS_FIELD_NUMBER, score.top_ids, "<i4"),
        (pb.SequenceScore.TOP_LOGPROBS_FIELD_NUMBER, score.top_logprobs, floats),
        (pb.SequenceScore.CANDIDATE_LOGPROBS_FIELD_NUMBER, score.candidate_logprobs, floats),
        (pb.SequenceScore.ENTROPY_FIELD_NUMBER, score.entropy, floats),
        (pb.SequenceScore.VALID_FIELD_NUMBER, score.valid, "u1"),
        (pb.SequenceScore.HIDDEN_FIELD_NUMBER, score.hidden, "<f2"),
    ):
        if array is not None and array.size:
            packed = np.ascontiguousarray(array, dtype=dtype)
            parts += [_field_head(number, packed.nbytes), packed.data.cast("B")]
    return parts


def _field_head(number: int, size: int) -> bytes:
    """Tag and length of a length-delimited field: (number << 3 | 2) and size, as varints."""
    head = bytearray()
    for value in (number << 3 | 2, size):
        while value > 0x7F:
            head.append(value & 0x7F | 0x80)
            value >>= 7  # noqa: PLW2901 - the rest of the varint
        head.append(value)
    return bytes(head)


def score_from_proto(message: pb.ScoreResponse) -> t.Score:
    """Decode an answer; raises TutelageError when an array does not have its stated shape."""
    return t.Score(
        sequences=tuple(_sequence_score_from_proto(s) for s in message.sequences),
        identity=identity_from_proto(message.identity),
        usage=t.Usage(**{name: getattr(message.usage, name) for name in t.Usage.__slots__}),
        request_id=message.request_id,
    )


def stream_answer_from_proto(message: pb.ScoreResponse) -> t.StreamAnswer:
    if message.HasField("error"):
        error = t.SequenceError(message.error.code, message.error.message)
        return t.StreamAnswer(message.request_id, None, error)
    return t.StreamAnswer(message.request_id, score_from_proto(message))


def _sequence_score_from_proto(message: pb.SequenceScore) -> t.SequenceScore:
    if message.HasField("error"):
        return t.SequenceScore(message.id, t.SequenceError(message.error.code, message.error.message))
    rows, top_k, candidates = message.num_positions, message.top_k, message.num_candidates
    dtype = _FLOAT[message.encoding]

    def array(field: str, data: bytes, kind: str, *columns: int) -> npt.NDArray[Any] | None:
        if not data or 0 in columns:
            return None
        shape = (rows, *columns)
        flat = np.frombuffer(data, dtype=kind)
        if flat.size != math.prod(shape):
            raise invalid(f"sequence {message.id!r} {field}: got {flat.size} values for shape {list(shape)}")
        return flat.reshape(shape)

    valid = array("valid", message.valid, "u1")
    return t.SequenceScore(
        id=message.id,
        sampled=array("sampled", message.sampled, dtype),
        top_ids=array("top_ids", message.top_ids, "<i4", top_k),
        top_logprobs=array("top_logprobs", message.top_logprobs, dtype, top_k),
        candidate_logprobs=array("candidate_logprobs", message.candidate_logprobs, dtype, candidates),
        entropy=array("entropy", message.entropy, dtype),
        valid=None if valid is None else valid.view(np.bool_),
        judgement=message.judgement if message.HasField("judgement") else None,
        verdict=message.verdict,
        hidden=array("hidden", message.hidden, "<f2", message.num_layers, message.hidden_size),
        agreement=_agreement(message),
    )


def _agreement(message: pb.SequenceScore) -> t.Float32Array | None:
    if not message.HasField("agreement"):
        return None
    if len(message.agreement) != 4 * message.num_chunks:
        raise invalid(
            f"sequence {message.id!r} agreement: got {len(message.agreement)} bytes for "
            f"{message.num_chunks} chunks"
        )
    return np.frombuffer(message.agreement, dtype="<f4")


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
