"""JSON schemas of the contract's messages, derived from their descriptors, for the OpenAPI page."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from tutelage.v1 import teacher_pb2 as pb

_SCALARS: dict[int, dict[str, Any]] = {
    FieldDescriptor.TYPE_INT32: {"type": "integer", "format": "int32"},
    FieldDescriptor.TYPE_INT64: {"oneOf": [{"type": "integer"}, {"type": "string", "format": "int64"}]},
    FieldDescriptor.TYPE_DOUBLE: {"type": "number"},
    FieldDescriptor.TYPE_BOOL: {"type": "boolean"},
}
_ID_ARRAYS = {"ids", "response_ids", "candidate_ids"}
_MEDIA_TYPE = "application/x-protobuf"


def message_schema(message: Any) -> dict[str, Any]:
    """The protobuf JSON mapping of the descriptor `message`, plus lists of integers for arrays of ids."""
    return {
        "type": "object",
        "title": message.name,
        "additionalProperties": False,
        "properties": {field.name: _field_schema(field) for field in message.fields},
    }


def score_operation() -> dict[str, Any]:
    """The request body and the answer of POST /v1/score."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": message_schema(pb.ScoreRequest.DESCRIPTOR),
                    "example": {
                        "contexts": [{"ids": [1, 2, 3]}],
                        "sequences": [{"id": "0", "context": 0, "response_ids": [4, 5]}],
                        "signal": {"sampled": True, "top_k": 2},
                    },
                },
                _MEDIA_TYPE: binary,
            },
        },
        "responses": {
            "200": {
                "description": "Scores, in the request's order; each sequence has arrays or an error.",
                "content": {
                    "application/json": {"schema": message_schema(pb.ScoreResponse.DESCRIPTOR)},
                    _MEDIA_TYPE: binary,
                },
            }
        },
    }


def error_responses() -> dict[int | str, dict[str, Any]]:
    """What every route may answer instead."""
    schema = {
        "type": "object",
        "properties": {
            "error": {
                "type": "object",
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "code": {"type": "string"},
                    "param": {"type": "string", "nullable": True},
                },
            }
        },
    }
    texts = {
        400: "The request cannot be answered: which field, what was got, what is allowed",
        401: "No accepted bearer token",
        404: "No such teacher",
        412: "A pin does not match this teacher",
        413: "The body is too large",
        429: "Full; see Retry-After",
        499: "The caller hung up before the answer",
        500: "The teacher failed; its log says why",
        503: "Loading or draining; see Retry-After",
        504: "The deadline passed",
    }
    content = {"application/json": {"schema": schema}}
    return {status: {"description": text, "content": content} for status, text in texts.items()}


def _field_schema(field: FieldDescriptor) -> dict[str, Any]:
    if field.is_repeated:
        return {"type": "array", "items": _single_schema(field)}
    return _single_schema(field)


def _single_schema(field: FieldDescriptor) -> dict[str, Any]:
    if field.message_type is not None:
        return message_schema(field.message_type)
    if field.enum_type is not None:
        return {"type": "string", "enum": [value.name for value in field.enum_type.values]}
    if field.type == FieldDescriptor.TYPE_BYTES:
        packed = {"type": "string", "format": "byte", "description": "base64 of little-endian values"}
        if field.name not in _ID_ARRAYS:
            return packed
        integers: dict[str, Any] = {"type": "array", "items": {"type": "integer", "format": "int32"}}
        if field.name == "candidate_ids":
            integers = {"type": "array", "items": integers}
        return {"oneOf": [packed, integers]}
    return _SCALARS.get(field.type, {"type": "string"})
