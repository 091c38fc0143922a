"""Answers between numpy types and protobuf messages: who scored, and what was found at every position.

Decoding views the message's bytes without a copy, so decoded arrays are read-only.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from tutelage.v1 import teacher_pb2 as pb

from tutelage_client import types as t
from tutelage_client.errors import invalid

FLOATS = {pb.ENCODING_UNSPECIFIED: "<f4", pb.ENCODING_FLOAT32: "<f4", pb.ENCODING_FLOAT16: "<f2"}
ENCODINGS: dict[t.EncodingName, pb.Encoding] = {
    "float32": pb.ENCODING_FLOAT32,
    "float16": pb.ENCODING_FLOAT16,
}


def identity_to_proto(identity: t.Identity) -> pb.Identity:
    return pb.Identity(**{name: getattr(identity, name) for name in t.Identity.__slots__})


def identity_from_proto(message: pb.Identity) -> t.Identity:
    return t.Identity(**{name: getattr(message, name) for name in t.Identity.__slots__})


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
    floats = FLOATS[ENCODINGS[encoding]]
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
        encoding=ENCODINGS[encoding],
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
    floats = FLOATS[ENCODINGS[encoding]]
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
    dtype = FLOATS[message.encoding]

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
